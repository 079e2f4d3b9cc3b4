"""Every part of the library on a device beside the CPU; prints a line for each case: its name, and what went wrong.

python tests/accelerator_run.py
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_accelerator
import torch
import torch.nn.functional as F
from federated_clients import play
from flwr.common.logger import FLOWER_LOGGER
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fedrebasin as fr
from fedrebasin.corrections.federated import FEDERATED, Case, correct_federated
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting, correct
from fedrebasin.corrections.queries import FederatedOptions
from fedrebasin.matching.methods import JOINT_REFERENCES
from fedrebasin.stored import StoredState

State = dict[str, Tensor]
DEVICE = fake_accelerator.NAME


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    convolutions = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, 4)).eval()


NET, EXAMPLE = net(0), (torch.randn(4, 3, 6, 6),)
SPEC = fr.trace(NET, EXAMPLE)
STATES: list[State] = [{name: t.clone() for name, t in net(seed).state_dict().items()} for seed in (1, 2)]
DATA = [torch.randn(60, 3, 6, 6) for _ in range(2)]
LABELLED = [(x, torch.randint(4, (60,))) for x in DATA]
MERGED = fr.merge(STATES)


def there(state: State) -> State:
    return {name: tensor.to(DEVICE) for name, tensor in state.items()}


def corrected(name: str, merged: State, ends: list[State], device: str | None) -> State:
    return correct(name, CorrectionSetting(NET, DATA, None, EXAMPLE, 0, device), merged, ends)


def asked(name: str, merged: State, ends: list[State], device: str | None, *, sequential: bool) -> Any:
    case = Case(NET, merged, ends, [0.5, 0.5], EXAMPLE[0], FederatedOptions(sequential=sequential), device)
    return correct_federated(name, case, [[DATA[0]], [DATA[1]]])


def matchings(device: str | None, a: State, b: State) -> Iterator[tuple[str, Callable[[], Any]]]:
    how: dict[str, Any] = {"device": device}
    labelled = {**how, "loss": F.cross_entropy}
    tried = {**labelled, "batches": LABELLED}
    yield "weight", lambda: fr.weight_matching(SPEC, a, b, restarts=1, **how).perms
    yield "frank-wolfe", lambda: fr.frank_wolfe_matching(SPEC, a, b, iterations=3, **how).perms
    yield "sinkhorn", lambda: fr.sinkhorn_matching(SPEC, a, b, steps=3, **how).perms
    yield (
        "sinkhorn, loss",
        lambda: fr.sinkhorn_matching(SPEC, a, b, steps=3, net=NET, **tried).perms,
    )
    yield (
        "straight-through",
        lambda: fr.straight_through_matching(SPEC, NET, a, b, epochs=1, **tried).perms,
    )
    yield "match_each", lambda: fr.match_each(SPEC, a, [b, a], **how)[0].perms
    yield "loss_along_path", lambda: fr.loss_along_path(NET, a, b, LABELLED, lams=3, **labelled).losses
    yield "select", lambda: fr.select_candidate(NET, {"a": a, "b": b}, LABELLED, alone={"A": a}, **labelled).state
    yield "select, agreement", lambda: fr.select_candidate(NET, {"a": a, "b": b}, DATA, ends=[a, b], **how).state
    for method in ("star", *JOINT_REFERENCES):
        yield method, lambda method=method: fr.match_many(SPEC, [a, b, a], method=method, **how).perms
    yield (
        "merge_trunks",
        lambda: fr.merge_trunks([SPEC, SPEC], [a, b], until="6", correction="repair", net=NET, calibration=DATA, **how),
    )


def everywhere(a: State, b: State) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What takes no device, and works where its tensors are."""
    yield "merge", lambda: fr.merge([a, b])
    yield "interpolate", lambda: fr.interpolate(a, b, 0.3)
    yield "permute", lambda: fr.permute(SPEC, fr.random_perms(SPEC, 1), b)
    yield "merge_widths", lambda: fr.merge_widths([SPEC, SPEC], [a, b])
    yield "matched_averaging", lambda: fr.matched_averaging([SPEC, SPEC], [a, b]).state
    yield "merge_units", lambda: fr.merge_units(SPEC, b, 4).state


def cases() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """A name, what it gives on the CPU, and what on the device."""
    a, b = STATES
    far, ends = (there(a), there(b)), [there(a), there(b)]
    for name in CORRECTIONS:
        if name in ("patient-distill", "bias-normalisation"):
            continue  # distillation again, for longer; and one for networks without norms
        expected = lambda name=name: corrected(name, MERGED, STATES, None)  # noqa: E731
        yield f"{name}, device=", expected, lambda name=name: corrected(name, MERGED, STATES, DEVICE)
        yield f"{name}, all there", expected, lambda name=name: corrected(name, there(MERGED), ends, None)
        yield f"{name}, ends here", expected, lambda name=name: corrected(name, there(MERGED), STATES, None)
    for name in FEDERATED:
        for sequential in (True, False):
            expected = lambda n=name, s=sequential: asked(n, MERGED, STATES, None, sequential=s)  # noqa: E731
            yield (
                f"{name}, {sequential}",
                expected,
                lambda n=name, s=sequential: asked(n, MERGED, STATES, DEVICE, sequential=s),
            )
    here = list(matchings(None, a, b))
    for (name, expected), (_, one), (_, other) in zip(
        here, matchings(DEVICE, a, b), matchings(None, *far), strict=True
    ):
        yield f"{name}, device=", expected, one
        yield f"{name}, all there", expected, other
    for (name, expected), (_, found) in zip(everywhere(a, b), everywhere(*far), strict=True):
        yield name, expected, found
    perms = fr.random_perms(SPEC, 1)
    away = there(perms)
    yield "moved_fraction", lambda: fr.moved_fraction(perms), lambda: fr.moved_fraction(away)
    yield "compose", lambda: fr.compose(SPEC, perms, perms), lambda: fr.compose(SPEC, perms, away)
    yield "invert", lambda: fr.invert(SPEC, perms), lambda: fr.invert(SPEC, away)
    yield (
        "init=",
        lambda: fr.weight_matching(SPEC, a, b, init=perms).perms,
        lambda: fr.weight_matching(SPEC, a, b, init=away).perms,
    )
    moved = net(0).to(DEVICE)
    yield "check_spec", lambda: True, lambda: fr.check_spec(moved, SPEC, (EXAMPLE[0].to(DEVICE),)).checked
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"]
        for state, file in zip(STATES, files, strict=True):
            save_file(state, file)
        stored = [StoredState(file) for file in files]
        yield (
            "stored",
            lambda: fr.weight_matching(SPEC, a, b).perms,
            lambda: fr.weight_matching(SPEC, *stored, device=DEVICE).perms,
        )
    for name in FEDERATED:
        yield f"strategy, {name}", lambda n=name: rounds(n, None), lambda n=name: rounds(n, DEVICE)


def rounds(correction: str, device: str | None) -> Any:
    """One round of a strategy whose clients answer queries."""
    state, metrics, _ = play(correction, device=device)
    return [*state.values(), metrics["rebasin-query-left-out"]]


def main() -> None:
    library = fake_accelerator.register()
    warnings.simplefilter("ignore")
    FLOWER_LOGGER.setLevel(logging.ERROR)
    try:
        torch.ones(2).to(DEVICE) + torch.ones(2)
        print("mixed devices: the device took them")
    except RuntimeError:
        print("mixed devices: ")
    for name, expected, found in cases():
        try:
            torch.manual_seed(0)
            right = tree_leaves(expected())
            torch.manual_seed(0)
            got = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(found())]
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
            print(f"{name}: ")
        except Exception as error:  # noqa: BLE001 - each case is told
            print(f"{name}: {type(error).__name__} {' '.join(str(error).split())[:300]}")
    del library


if __name__ == "__main__":
    main()
