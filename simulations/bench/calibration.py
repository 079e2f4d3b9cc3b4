"""Every correction by clients, calibration images and their source, aligned and not.

``python -m fedrebasin.simulations.bench.calibration digits --output FOLDER``, for example. Two clients hold the 20/80
halves of ``fedrebasin reproduce disjoint`` and share its trained ends; more hold Dirichlet parts (alpha 0.5), which a
seed draws anew. Calibration images are training images without their labels (``own``), another data set's
(``--other cifar100``), and noise with the training images' mean and standard deviation. ``--copies 4`` adds four
augmented copies of the most own images (``augmented``). With ``--priors`` aligned clients are merged a second time,
after each one's label prior has been removed from its model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from torch import Tensor, nn

from fedrebasin import match_many, merge, permute, remove_label_prior
from fedrebasin.corrections import methods
from fedrebasin.simulations.bench.clients import Clients, Options, Row, calibrations, measure_all, options_of, parser_of
from fedrebasin.simulations.data import CATALOGUE
from fedrebasin.simulations.disjoint_bench import CORRECTIONS, Bench
from fedrebasin.simulations.measures import measure


def corrected(clients: Clients, options: Options) -> Iterator[Row]:
    """A row for every merge, correction and calibration set."""
    bench, shares = clients.bench, clients.coefficients
    if len(clients.states) == 2:
        a, b = clients.states
        aligned = [a, permute(bench.spec, bench.match(a, b, 0).perms, b)]
    else:
        perms = match_many(bench.spec, clients.states, coefficients=shares).perms
        aligned = [permute(bench.spec, one, state) for one, state in zip(perms, clients.states, strict=True)]
    sets = list(calibrations(clients, options))
    merges = {"plain": clients.states, "aligned": aligned}
    if options.priors:
        merges["aligned, priors removed"] = [
            remove_label_prior(state, labels.bincount(minlength=bench.data.classes), bias=_last_bias(bench.net))
            for state, labels in zip(aligned, clients.labels, strict=True)
        ]
    for alignment, ends in merges.items():
        merged = merge(ends, coefficients=shares)
        yield {"alignment": alignment, "correction": "", "source": "", "images": 0, **_score(bench, merged)}
        for source, batches in sets:
            setting = methods.CorrectionSetting(bench.net, batches, shares)
            for name in bench.corrections:
                if not name or name in options.skip:
                    continue
                started = time.perf_counter()
                state = methods.correct(CORRECTIONS[name], setting, merged, ends)
                seconds = round(time.perf_counter() - started, 2)
                row = {"alignment": alignment, "correction": name, "source": source, "images": sum(map(len, batches))}
                yield row | _score(bench, state) | {"seconds": seconds}


def _last_bias(net: nn.Module) -> str:
    """The networks of the simulations end in a linear layer; kept ends do not keep its place among their keys."""
    return [name for name in net.state_dict() if name.endswith(".bias")][-1]


def _score(bench: Bench, state: Mapping[str, Tensor]) -> dict[str, float]:
    return measure(bench.logits(dict(state), ["test"])["test"], bench.labels["test"])


def main() -> None:
    """Measure every correction."""
    parser = parser_of(__doc__)
    parser.add_argument("--images", default="100,1000,5000", help="numbers of own calibration images")
    parser.add_argument("--other", default="", help="data set of the same shape")
    parser.add_argument("--other-data", help="its folder")
    parser.add_argument("--other-images", type=int, default=1000, help="images of each other source")
    parser.add_argument("--skip", default="", help="corrections with commas between")
    parser.add_argument("--priors", action="store_true", help="also merge models without their label priors")
    parser.add_argument("--copies", type=int, default=0, help="augmented copies of each own image, as a set of its own")
    given = parser.parse_args()
    if given.copies and not CATALOGUE[given.dataset][4]:
        parser.error(f"--copies: {given.dataset} is not augmented; choose cifar10 or cifar100")
    options = options_of(
        given,
        [int(word) for word in given.images.split(",")],
        sources=[*([given.other] if given.other else []), "noise"],
        other_path=given.other_data,
        other_images=given.other_images,
        skip=given.skip.split(","),
        priors=given.priors,
        copies=given.copies,
    )
    left_out = ("path", "other_path", "ends")  # where files lay decides no number
    config = {key: value for key, value in asdict(options).items() if key not in left_out}
    measure_all(
        *("calibration", options, lambda clients, seed: corrected(clients, options), given.output),
        config=config,
        module="calibration",
    )


if __name__ == "__main__":
    main()
