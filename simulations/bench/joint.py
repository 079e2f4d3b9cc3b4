"""Every joint method on trained clients: ``python -m fedrebasin.simulations.bench.joint digits --output FOLDER``.

The clients are those of ``clients.py``, whose ends ``calibration.py`` shares: two hold the 20/80 halves, more hold
Dirichlet parts (alpha 0.5), which a seed draws anew. Each method of ``match_many`` aligns them; the average is measured
as it is and after a correction on training images without labels. *Gain* is that of the weighted objective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from fedrebasin import match_many, merge, permute
from fedrebasin.corrections import methods
from fedrebasin.matching.many import MANY_METHODS
from fedrebasin.simulations.bench.clients import (
    Clients,
    Options,
    Row,
    calibrations,
    measure_all,
    options_of,
    parser_of,
)
from fedrebasin.simulations.measures import measure

CORRECTION = "least-squares-probabilities"


def merged(clients: Clients, options: Options, seed: int) -> Iterator[Row]:
    """A row for the plain average and for every method, without and with the correction."""
    bench, shares = clients.bench, clients.coefficients
    _, batches = next(calibrations(clients, options))
    setting = methods.Setting(bench.net, batches, shares)
    for method in ("", *MANY_METHODS):
        ends, seconds, gain = clients.states, 0.0, 0.0
        if method:
            started = time.process_time()
            found = match_many(bench.spec, clients.states, coefficients=shares, method=method, seed=seed)
            seconds, gain = time.process_time() - started, found.objective - found.objective_before
            ends = [permute(bench.spec, perms, state) for perms, state in zip(found.perms, clients.states, strict=True)]
        average = merge(ends, coefficients=shares)
        for correction in ("", CORRECTION):
            state = methods.correct(correction, setting, average, ends) if correction else average
            scores = measure(bench.logits(dict(state), ["test"])["test"], bench.labels["test"])
            yield {"method": method, "correction": correction, "gain": gain, "cpu-seconds": round(seconds, 2), **scores}


def main() -> None:
    """Measure every method."""
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    given = parser.parse_args()
    options = options_of(given, [given.images])
    chosen = ("dataset", "width", "epochs", "nodes", "seeds", "images")
    measure_all(
        *("joint", options, lambda clients, seed: merged(clients, options, seed), given.output),
        config={key: getattr(options, key) for key in chosen},
        module="joint",
    )


if __name__ == "__main__":
    main()
