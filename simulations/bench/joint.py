"""Every joint method on trained clients: ``python -m fedrebasin.simulations.bench.joint digits --output FOLDER``.

The clients are those of ``clients.py``, whose ends ``calibration.py`` shares: two hold the 20/80 halves, more hold
Dirichlet parts (alpha 0.5), which a seed draws anew, or whatever ``--split`` says. Each method of ``match_many`` aligns
them; the average is measured as it is and after a correction on training images without labels. *Gain* is that of the
weighted objective. *Growth* is matched averaging at several thresholds, *width* the mean number of units in its
layers; where it has more than twice as many as a client, it is not corrected.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from fedrebasin import match_many, matched_averaging, merge, permute, resize
from fedrebasin.corrections import methods
from fedrebasin.matching.many import MANY_METHODS
from fedrebasin.simulations.bench.clients import (
    Clients,
    Options,
    Row,
    State,
    calibrations,
    measure_all,
    options_of,
    parser_of,
)
from fedrebasin.simulations.disjoint_bench import Bench
from fedrebasin.simulations.measures import measure

CORRECTION = "least-squares-probabilities"
THRESHOLDS = (0.5, 0.75, 0.9)


def merged(clients: Clients, options: Options, seed: int) -> Iterator[Row]:
    """A row for the plain average, every method and every growth, without and with the correction."""
    bench, shares = clients.bench, clients.coefficients
    _, batches = next(calibrations(clients, options))
    for method in ("", *MANY_METHODS):
        ends, seconds, gain = clients.states, 0.0, 0.0
        if method:
            started = time.process_time()
            found = match_many(bench.spec, clients.states, coefficients=shares, method=method, seed=seed)
            seconds, gain = time.process_time() - started, found.objective - found.objective_before
            ends = [permute(bench.spec, perms, state) for perms, state in zip(found.perms, clients.states, strict=True)]
        average = merge(ends, coefficients=shares)
        about = {"method": method, "gain": gain, "cpu-seconds": round(seconds, 2)}
        yield from _rows(about, bench, average, ends, shares, batches)
    for threshold in THRESHOLDS:
        yield from grown(clients, batches, threshold)


def grown(clients: Clients, batches: Sequence[Tensor], threshold: float) -> Iterator[Row]:
    """The rows of the model that matched averaging grows."""
    bench, shares = clients.bench, clients.coefficients
    started = time.process_time()
    found = matched_averaging(
        [bench.spec] * len(clients.states), clients.states, coefficients=shares, threshold=threshold
    )
    seconds = time.process_time() - started
    before = sum(shape[0] for shape in bench.spec.perm_shapes.values())
    units = sum(found.units.values())
    wide = copy.copy(bench)
    wide.net = _fitted(bench.net, found.state)
    few = units <= 2 * before
    ends = [resize(one, state) for one, state in zip(found.matchings, clients.states, strict=True)] if few else []
    about = {"method": f"growth, threshold {threshold:g}", "cpu-seconds": round(seconds, 2)}
    yield from _rows({**about, "width": units / len(found.units)}, wide, found.state, ends, shares, batches)


def _rows(
    about: Row, bench: Bench, average: State, ends: Sequence[State], shares: Sequence[float], batches: Sequence[Tensor]
) -> Iterator[Row]:
    """The average's scores, and those after the correction, if there are ends to correct by."""
    setting = methods.CorrectionSetting(bench.net, batches, shares)
    for correction in ("", CORRECTION) if ends else ("",):
        state = methods.correct(correction, setting, average, ends) if correction else average
        scores = measure(bench.logits(dict(state), ["test"])["test"], bench.labels["test"])
        yield {**about, "correction": correction, **scores}


def _fitted(net: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy whose tensors have the shapes of ``state``; its layers read their widths off them."""
    result = copy.deepcopy(net)
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        owner = result.get_submodule(module)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor)
        else:
            owner._buffers[leaf] = tensor
    return result


def main() -> None:
    """Measure every method."""
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    given = parser.parse_args()
    options = options_of(given, [given.images])
    chosen = ("dataset", "model", "width", "epochs", "nodes", "split", "seeds", "images")
    measure_all(
        *("joint", options, lambda clients, seed: merged(clients, options, seed), given.output),
        config={key: getattr(options, key) for key in chosen},
        module="joint",
    )


if __name__ == "__main__":
    main()
