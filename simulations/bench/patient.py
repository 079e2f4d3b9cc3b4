"""What distillation gains where the images are augmented anew in every epoch, and from where it starts.

``python -m fedrebasin.simulations.bench.patient cifar10 --nodes 2 --output FOLDER``, for example; clients as in
``calibration.py``. *Held* is ``correction="least-squares+distill"``; *anew* reads images that are shifted and mirrored
as in training, differently in each of ``--passes`` epochs, and is ``correction="patient-distill"`` where it starts at
least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fedrebasin import best_end, distill, least_squares, match_many, merge, permute
from fedrebasin.corrections.methods import GENTLE_LR, PATIENT_EPOCHS
from fedrebasin.simulations.augment import BatchMaker
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
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.measures import measure

BATCH = 100


class Anew:
    """Batches of images that are drawn, shifted and mirrored anew each time that they are read."""

    def __init__(self, data: Dataset, images: Tensor, seed: int) -> None:
        self._maker = BatchMaker(data, images, seed=seed)

    def __iter__(self) -> Iterator[Tensor]:
        size = min(BATCH, len(self._maker.images))
        yield from (self._maker.batch(rows) for rows in self._maker.rows(size))


def tried(clients: Clients, options: Options, passes: int, seed: int) -> Iterator[Row]:
    """A row for every start and way of distilling."""
    bench, shares = clients.bench, clients.coefficients
    perms = match_many(bench.spec, clients.states, coefficients=shares).perms
    ends = [permute(bench.spec, one, state) for one, state in zip(perms, clients.states, strict=True)]
    images = bench.images["calibration"][: options.images[0]]
    _, held = next(calibrations(clients, options))
    given: dict[str, Any] = {"coefficients": shares}
    solved = least_squares(bench.net, merge(ends, **given), ends, held, **given)
    attempts: dict[str, Callable[[], State]] = {
        "aligned, least squares": lambda: solved,
        "the same, distilled on held images": lambda: distill(bench.net, solved, ends, held, lr=GENTLE_LR, **given),
        "the same, distilled on images augmented anew": lambda: patient(solved),
        "not aligned, least squares, distilled on images augmented anew": lambda: patient(
            least_squares(bench.net, merge(clients.states, **given), clients.states, held, **given)
        ),
        "one client, last layer solved, distilled on images augmented anew": lambda: patient(
            best_end(bench.net, merge(ends, **given), ends, held, **given)
        ),
    }

    def patient(start: State) -> State:  # what the ends say does not depend on the order of their units
        anew = Anew(bench.data, images, seed)
        return distill(bench.net, start, ends, anew, epochs=passes, reread=True, seed=seed, **given)

    for name, attempt in attempts.items():
        scores = measure(bench.logits(attempt(), ["test"])["test"], bench.labels["test"])
        yield {"attempt": name, "images": len(images), **scores}


def main() -> None:
    """Measure every attempt."""
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=5000, help="calibration images")
    parser.add_argument("--passes", type=int, default=PATIENT_EPOCHS, help="epochs of images that are augmented anew")
    given = parser.parse_args()
    options = options_of(given, [given.images])
    chosen = ("dataset", "model", "width", "epochs", "nodes", "split", "seeds")
    measure_all(
        *("patient", options, lambda clients, seed: tried(clients, options, given.passes, seed), given.output),
        config={key: getattr(options, key) for key in chosen} | {"images": given.images, "passes": given.passes},
        module="patient",
    )


if __name__ == "__main__":
    main()
