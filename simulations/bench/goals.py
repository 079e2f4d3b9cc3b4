"""What might bring least squares nearer to the ensemble: other goals, passes, calibration images and shares by layer.

``python -m fedrebasin.simulations.bench.goals digits --output FOLDER``, for example; clients and images as in
``calibration.py``, aligned. *Confidence* gives the last layer the ends' logits, each weighed by the largest of its
probabilities; *shares by layer* tries, layer after layer, 0.3, 0.5 and 0.7 for the first of two clients, and keeps what
agrees best with the ensemble on a quarter of the images that nothing is solved on. *One client* is no merge: a client's
own network, of which the last layer alone is solved for what all clients say (``fedrebasin.best_end``), then distilled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedrebasin import best_end, distill, least_squares, match_many, merge, permute, select_candidate, split_calibration
from fedrebasin.corrections.layers import Norm
from fedrebasin.corrections.least_squares import held_out_rows, solve_steps, steps_of
from fedrebasin.corrections.methods import GENTLE_LR
from fedrebasin.corrections.normal_equations import NormalEquations
from fedrebasin.corrections.passes import Memory, Runner
from fedrebasin.corrections.solution import solve_layer
from fedrebasin.corrections.working import begin, extract, working_copy
from fedrebasin.simulations.bench.clients import Clients, Options, Row, State, measure_all, options_of, parser_of
from fedrebasin.simulations.disjoint_bench import Bench
from fedrebasin.simulations.measures import measure

SHARES = (0.3, 0.5, 0.7)


def tried(clients: Clients, options: Options) -> Iterator[Row]:
    """A row for the aligned average and for every attempt."""
    bench, shares = clients.bench, clients.coefficients
    perms = match_many(bench.spec, clients.states, coefficients=shares).perms
    ends = [permute(bench.spec, one, state) for one, state in zip(perms, clients.states, strict=True)]
    merged, count = merge(ends, coefficients=shares), options.images[0]
    own, balanced, half = (_batches(bench, rows[:count]) for rows in _choices(bench))
    solved = least_squares(bench.net, merged, ends, own, coefficients=shares)
    alone = best_end(bench.net, merged, ends, own, goals="probabilities", coefficients=shares)
    given: dict[str, Any] = {"coefficients": shares}
    attempts: dict[str, Callable[[], State]] = {
        "none": lambda: merged,
        "least squares": lambda: solved,
        "a second pass": lambda: least_squares(bench.net, solved, ends, own, **given),
        "goals: mean probabilities": lambda: least_squares(
            bench.net, merged, ends, own, goals="probabilities", **given
        ),
        "goals: by confidence": lambda: solve_last(bench, solved, ends, own, by_confidence(shares)),
        "images: equally many of each class": lambda: least_squares(bench.net, merged, ends, balanced, **given),
        "images: half of the classes": lambda: least_squares(bench.net, merged, ends, half, **given),
        "distillation": lambda: distill(bench.net, solved, ends, own, lr=GENTLE_LR, **given),
        "one client, last layer solved": lambda: best_end(bench.net, merged, ends, own, **given),
        "one client, last layer solved for mean probabilities": lambda: alone,
        "one client, the same and distillation": lambda: distill(bench.net, alone, ends, own, lr=GENTLE_LR, **given),
    }
    if len(ends) == 2:
        attempts["shares by layer"] = lambda: by_layer(bench, merged, ends, own)
    for name, attempt in attempts.items():
        scores = measure(bench.logits(attempt(), ["test"])["test"], bench.labels["test"])
        yield {"attempt": name, "images": count, **scores}


def _choices(bench: Bench) -> Iterator[Tensor]:
    """Rows of the calibration images: as they were drawn, class after class in turn, and the lower classes alone."""
    labels = bench.labels["calibration"]
    yield torch.arange(len(labels))
    turn = torch.zeros_like(labels)
    for label in range(bench.data.classes):
        turn[labels == label] = torch.arange(int((labels == label).sum()))
    yield (turn * bench.data.classes + labels).argsort()
    yield torch.nonzero(labels < bench.data.classes // 2).flatten()


def _batches(bench: Bench, rows: Tensor) -> list[Tensor]:
    images = bench.images["calibration"][rows]
    return [bench.data.normalise(chunk) for chunk in torch.split(images, bench.batch)]


@torch.no_grad()
def solve_last(
    bench: Bench,
    start: State,
    ends: Sequence[State],
    batches: Sequence[Tensor],
    goal: Callable[[list[Tensor]], Tensor],
) -> State:
    """Solve the last layer of ``start`` for what ``goal`` makes of the ends' logits."""
    model, data, _ = begin(bench.net, start, ends, batches, None, None)
    steps = steps_of(model, data, "goals")
    last = steps[-1]
    assert not isinstance(last, Norm)
    ours = Runner(model, steps, Memory(0), keep=False)
    theirs = [Runner(working_copy(bench.net, end, None), steps, Memory(0), keep=False) for end in ends]
    fit, check = NormalEquations(), NormalEquations()
    for number, (args, kwargs, _) in enumerate(data):
        place = (len(steps) - 1, number, (args, kwargs))
        lacking = goal([one.output(*place) for one in theirs]) - ours.output(*place)
        held = held_out_rows(0, lacking)
        for sums, mask in ((fit, ~held), (check, held)):
            sums.add(ours.last_input[mask].T, lacking[mask].T)
    solve_layer(model, last, fit, check)
    return extract(model, start)


def by_confidence(shares: Sequence[float]) -> Callable[[list[Tensor]], Tensor]:
    """The mean of logits, each weighed by the largest of its probabilities besides its share."""

    def goal(logits: list[Tensor]) -> Tensor:
        together = torch.stack(logits)
        weights = together.softmax(-1).amax(-1, keepdim=True) * torch.tensor(shares).view(-1, 1, 1)
        return (together * weights / weights.sum(0)).sum(0)

    return goal


def by_layer(bench: Bench, merged: State, ends: Sequence[State], batches: Sequence[Tensor]) -> State:
    """Choose the first end's share of each layer's goals by agreement with the ensemble on a part of the images."""
    fit, held_out = split_calibration(bench.net, batches)
    model, data, _ = begin(bench.net, merged, ends, batches, None, None)
    chosen = [0.5] * len(steps_of(model, data, "goals"))
    for index in range(len(chosen)):
        candidates: dict[str, Callable[[], State]] = {
            str(share): _solver(bench, merged, ends, fit, [*chosen[:index], share, *chosen[index + 1 :]])
            for share in SHARES
        }
        chosen[index] = float(select_candidate(bench.net, candidates, held_out, ends=ends).name)
    return solve(bench, merged, ends, batches, chosen)


def _solver(
    bench: Bench, merged: State, ends: Sequence[State], batches: Sequence[Tensor], shares: Sequence[float]
) -> Callable[[], State]:
    return lambda: solve(bench, merged, ends, batches, shares)


@torch.no_grad()
def solve(
    bench: Bench, merged: State, ends: Sequence[State], batches: Sequence[Tensor], shares: Sequence[float]
) -> State:
    """``least_squares`` with a share of the first of two ends for each step."""
    model, data, _ = begin(bench.net, merged, ends, batches, None, None)
    steps, others = steps_of(model, data, "goals"), [working_copy(bench.net, end, None) for end in ends]
    solve_steps(model, others, steps, [[share, 1 - share] for share in shares], data, Memory(2**30))
    return extract(model, merged)


def main() -> None:
    """Measure every attempt."""
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    given = parser.parse_args()
    options = options_of(given, [given.images, 5 * given.images])  # so many to choose those of a class from
    chosen = ("dataset", "model", "width", "epochs", "nodes", "split", "seeds")
    measure_all(
        *("goals", options, lambda clients, seed: tried(clients, options), given.output),
        config={key: getattr(options, key) for key in chosen} | {"images": given.images},
        module="goals",
    )


if __name__ == "__main__":
    main()
