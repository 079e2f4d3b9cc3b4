"""The strategies by the names that the command line knows them by."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin.corrections import methods as correction_methods
from fedrebasin.corrections.federated import FEDERATED, FederatedOptions
from fedrebasin.errors import UsageError
from fedrebasin.matching.methods import JOINT_REFERENCES, METHODS, check_joint

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

#: name on the command line -> (class in flwr.serverapp.strategy, how tables call it)
FLOWER = {
    "fedavg": "FedAvg",
    "fedavgm": "FedAvgM",
    "fedprox": "FedProx",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
    "fedmedian": "FedMedian",
}
#: joins every comparison of clients that start apart: what the same work is worth from a common start
COMMON_START = "fedavg@common"
REFERENCES = ("auto", "global", "largest", *JOINT_REFERENCES)
MATCHINGS = tuple(METHODS)
#: name of a federated correction with other options than its usual ones -> (correction, options)
VARIANTS = {
    "federated-repair-at-once": ("federated-repair", FederatedOptions(sequential=False)),
    "federated-least-squares-prior": ("federated-least-squares", FederatedOptions(label_prior=True)),
}
CORRECTIONS = ("none", *correction_methods.CORRECTIONS, *FEDERATED, *VARIANTS)
SELECTS = ("none", "calibration", "clients")
_NAME = re.compile(
    r"(fedrebasin|rebasin:(?P<inner>[a-z]+))(\+(?P<correction>[a-z-]+)(@(?P<rounds>[1-9]\d*(\+[1-9]\d*)*))?)?"
)


def parse_strategies(text: str) -> list[str]:
    """Read the names of strategies: FedAvg's kin, ``fedrebasin`` and ``rebasin:NAME``.

    The last two also with ``+CORRECTION``, or ``+CORRECTION@ROUNDS`` if it is to follow those rounds alone.

    Raises
    ------
    UsageError
        If a name is unknown or given twice.

    Examples
    --------
    >>> parse_strategies("fedavg,fedrebasin,rebasin:fedadam,fedrebasin+repair,fedrebasin+repair@1+5")
    ['fedavg', 'fedrebasin', 'rebasin:fedadam', 'fedrebasin+repair', 'fedrebasin+repair@1+5']
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name in FLOWER:
            continue
        match = _NAME.fullmatch(name)
        inner, correction = (match["inner"], match["correction"]) if match else (None, None)
        known = correction is None or correction in CORRECTIONS[1 if match and match["rounds"] else 0 :]
        if match is None or (inner and inner not in FLOWER) or not known:
            raise UsageError(
                f"--strategies: expected {', '.join(FLOWER)}, fedrebasin or rebasin:NAME, these two also with "
                f"+CORRECTION or +CORRECTION@ROUNDS (as @1+5), one of {', '.join(CORRECTIONS[1:])}; got {name!r}"
            )
    if len(set(names)) < len(names):
        raise UsageError(f"--strategies: expected each name once; got {text!r}")
    return names


def check_words(
    reference: str, matching: str, correction: str, select: str = "none", strategies: Sequence[str] = ()
) -> None:
    """Refuse a word that the strategies do not know, and corrections that the selection cannot take, before the start.

    >>> check_words("auto", "weight", "repair,least-squares", "calibration")
    """
    corrections = correction.split(",")
    if select == "none" and len(corrections) > 1:
        raise UsageError(f"--correction: several need --select calibration or clients; got {correction!r}")
    for option, word, known in (
        ("reference", reference, REFERENCES),
        ("matching", matching, MATCHINGS),
        *(("correction", one, CORRECTIONS) for one in corrections),
        ("select", select, SELECTS),
    ):
        if word not in known:
            raise UsageError(f"--{option}: expected one of {', '.join(known)}; got {word!r}")
    check_joint(matching, reference)
    if select == "none":
        return
    for name in (*corrections, *(one for strategy in strategies for one in corrections_of(strategy, correction))):
        if name in VARIANTS:
            raise UsageError(f"--select {select}: takes federated corrections with their usual options; got {name!r}")
        if select == "calibration" and name in FEDERATED:
            raise UsageError(
                f"--select calibration measures on the server's data, and {name!r} asks the clients; "
                "give --select clients"
            )


def corrections_of(name: str, correction: str) -> list[str]:
    """What a re-basin strategy corrects by: its own ``+CORRECTION``, or the comparison's, without ``none``.

    >>> corrections_of("fedrebasin+repair", "regmean"), corrections_of("fedrebasin", "repair,regmean")
    (['repair'], ['repair', 'regmean'])
    """
    chosen = name.partition("@")[0].partition("+")[2] or correction
    return [one for one in chosen.split(",") if one != "none"]


def rounds_of(name: str) -> list[int] | None:
    """The rounds that a strategy's own correction follows, ``None`` where that is all.

    >>> rounds_of("fedrebasin+repair@1+5"), rounds_of("fedrebasin+repair")
    ([1, 5], None)
    """
    match = _NAME.fullmatch(name)
    return sorted({int(one) for one in match["rounds"].split("+")}) if match and match["rounds"] else None


def label_of(name: str) -> str:
    """How tables and plots call a strategy.

    >>> label_of("fedprox"), label_of("fedrebasin+repair@1+5"), label_of("rebasin:fedadam")
    ('FedProx', 'FedRebasin + repair in rounds 1 and 5', 'Rebasin(FedAdam)')
    """
    if name == COMMON_START:
        return "FedAvg, common start"
    plain, _, correction = name.partition("@")[0].partition("+")
    if plain in FLOWER:
        label = FLOWER[plain]
    elif plain == "fedrebasin":
        label = "FedRebasin"
    else:
        label = f"Rebasin({FLOWER[plain.removeprefix('rebasin:')]})"
    rounds = rounds_of(name)
    if rounds is not None:
        *others, last = map(str, rounds)
        correction += f" in rounds {', '.join(others)} and {last}" if others else f" in round {last}"
    return f"{label} + {correction}" if correction else label


def make_strategy(
    name: str,
    *,
    nodes: int,
    model: Callable[[], nn.Module],
    example_inputs: tuple[Tensor, ...],
    calibration: Sequence[Any],
    reference: str,
    matching: str,
    correction: str,
    select: str = "none",
    server_lr: float,
    proximal_mu: float,
    seed: int,
    device: str,
) -> Strategy:
    """Build a strategy that trains on every node each round and leaves evaluation to the server.

    Parameters
    ----------
    calibration : sequence of Tensor or (Tensor, Tensor)
        Batches of inputs, with labels for a matching that needs them; only strategies that use data get them.
    correction : str
        For re-basin strategies whose name has no ``+CORRECTION``; with ``select`` several, with commas between.
    select : {"none", "calibration", "clients"}
        Whether re-basin strategies keep the best of a round's models, and who measures them.
    server_lr : float
        FedAdam's, FedYogi's and FedAdagrad's eta.
    """
    plain = name.removesuffix("@common").partition("+")[0]
    if plain in FLOWER:
        return _flower(plain, nodes, server_lr, proximal_mu)
    from fedrebasin.strategies import FedRebasin, Rebasin

    options: dict[str, Any] = {
        "model": model,
        "example_inputs": example_inputs,
        "reference": reference,
        "matching": matching,
        "seed": seed,
        "device": device,
        "correction_rounds": rounds_of(name),
    }
    corrections = corrections_of(name, correction)
    on_server = any(one not in FEDERATED and one not in VARIANTS for one in corrections)
    if select != "none":
        options |= {"select": select, "correction": corrections}
    elif corrections and corrections[0] in VARIANTS:
        options["correction"], options["federated"] = VARIANTS[corrections[0]]
    elif corrections or METHODS[matching].inputs:
        options["correction"] = corrections[0] if corrections else None
    if select == "calibration" or METHODS[matching].inputs or on_server:
        options["calibration"] = calibration
    if METHODS[matching].targets:
        options["loss"] = F.cross_entropy
    if plain == "fedrebasin":
        return FedRebasin(**options, **_sampling(nodes))
    return Rebasin(_flower(plain.removeprefix("rebasin:"), nodes, server_lr, proximal_mu), **options)


def _sampling(nodes: int) -> dict[str, Any]:
    # with Flower's default minimum of two, round 1 could sample only two of many nodes
    return {"fraction_evaluate": 0.0, "min_train_nodes": nodes, "min_available_nodes": nodes}


def _flower(name: str, nodes: int, server_lr: float, proximal_mu: float) -> Strategy:
    from flwr.serverapp import strategy as flower

    options = _sampling(nodes)
    if name == "fedprox":
        options["proximal_mu"] = proximal_mu
    if name in ("fedadam", "fedyogi", "fedadagrad"):
        options["eta"] = server_lr
    if name == "fedavgm":
        options["server_momentum"] = 0.9
    strategy: Strategy = getattr(flower, FLOWER[name])(**options)
    return strategy
