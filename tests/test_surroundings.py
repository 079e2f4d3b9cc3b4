"""What surrounds a call changes nothing: the default device, modes without gradients, and tensors of such modes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks_attention import Patches
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import fedrebasin as core
from fedrebasin.matching.many import MANY_METHODS, ON_DATA
from fedrebasin.matching.methods import METHODS, MatchingSetting, find_matching

ROOT = Path(core.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "normal", "ones", "rand", "randint"),
    *("randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def convolutional(width: int = 6) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(144, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)),
    )


torch.manual_seed(0)
X = torch.randn(2, 1, 8, 8)
DATA = [(torch.randn(60, 1, 8, 8), torch.arange(60) % 3) for _ in range(2)]
INPUTS = [x for x, _ in DATA]
NETS = [convolutional() for _ in range(3)]
ENDS = [net.state_dict() for net in NETS]
SPEC = core.trace(NETS[0], (X,))
NARROW = convolutional(5)
NARROW_SPEC = core.trace(NARROW, (X,))
SPECS, WIDTHS = [SPEC, NARROW_SPEC], [ENDS[0], NARROW.state_dict()]
VITS = [Patches() for _ in range(2)]
IMAGE = torch.randn(2, 3, 8, 8)
VIT_SPEC = core.trace(VITS[0], (IMAGE,))


def setting(name: str) -> MatchingSetting:
    loss = F.cross_entropy if METHODS[name].targets else None
    return MatchingSetting(SPEC, NETS[2], DATA if loss else INPUTS, loss)


def arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: state[name].numpy() for name in ("4.weight", "4.bias", "6.weight", "6.bias", "8.weight", "8.bias")}


CALLS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: find_matching(name, setting(name), *ENDS[:2]) for name in METHODS},
    **{name: lambda name=name: core.match_many(SPEC, ENDS, method=name) for name in MANY_METHODS},
    "sinkhorn on data": lambda: core.sinkhorn_matching(
        SPEC, *ENDS[:2], net=NETS[2], batches=DATA, loss=F.cross_entropy, steps=4
    ),
    "many on data": lambda: core.match_many(
        SPEC, ENDS, method=ON_DATA, net=NETS[2], batches=DATA, loss=F.cross_entropy
    ),
    "restarts": lambda: core.weight_matching(SPEC, *ENDS[:2], restarts=3),
    "attention": lambda: core.weight_matching(VIT_SPEC, *(vit.state_dict() for vit in VITS)),
    "attention, many": lambda: core.match_many(VIT_SPEC, [vit.state_dict() for vit in VITS]),
    "attention, activation": lambda: core.activation_matching(
        VIT_SPEC, VITS[0], *(vit.state_dict() for vit in VITS), [IMAGE]
    ),
    "attention, Frank-Wolfe": lambda: core.frank_wolfe_matching(VIT_SPEC, *(vit.state_dict() for vit in VITS)),
    "each": lambda: core.match_each(SPEC, ENDS[0], ENDS[1:]),
    "trace": lambda: core.trace(NETS[0], (X,)),
    "check_spec": lambda: core.check_spec(NETS[0], SPEC, (X,)),
    "check_widths": lambda: core.check_widths(NETS[0], NARROW, (X,)),
    "random_perms": lambda: core.random_perms(VIT_SPEC, 0),
    "permute": lambda: core.permute(VIT_SPEC, core.random_perms(VIT_SPEC, 0), VITS[0].state_dict()),
    "compose": lambda: core.compose(VIT_SPEC, *[core.random_perms(VIT_SPEC, seed) for seed in range(2)]),
    "invert": lambda: core.invert(VIT_SPEC, core.random_perms(VIT_SPEC, 0)),
    "align": lambda: core.align(SPEC, *ENDS[:2]),
    "merge": lambda: core.merge(ENDS),
    "interpolate": lambda: core.interpolate(*ENDS[:2], 0.3),
    "merge_modules": lambda: core.merge_modules(NETS, (X,), calibration=INPUTS),
    "aligner": lambda: core.PermutationAligner().weight_match(arrays(ENDS[0]), arrays(ENDS[1])),
    "loss_along_path": lambda: core.loss_along_path(NETS[0], *ENDS[:2], DATA, loss=F.cross_entropy),
    "layer_similarity": lambda: core.layer_similarity(SPEC, NETS[0], *ENDS[:2], INPUTS),
    "relative_similarity": lambda: core.relative_similarity(
        torch.eye(30, device="cpu")[:4], torch.eye(30, device="cpu")[2:8]
    ),
    "match_widths": lambda: core.match_widths(*SPECS, *WIDTHS),
    "merge_widths": lambda: core.merge_widths(SPECS, WIDTHS),
    "matched_averaging": lambda: core.matched_averaging(SPECS, WIDTHS),
    "merge_units": lambda: core.merge_units(SPEC, ENDS[0], 4),
    "merge_trunks": lambda: core.merge_trunks([SPEC, SPEC], ENDS[:2], until="6"),
    "zip_trunks": lambda: core.zip_trunks([SPEC, SPEC], NETS[0], ENDS[:2], INPUTS, until="6"),
}


@contextmanager
def inference_tensors() -> Iterator[None]:
    """All that the calls are given was made in inference mode."""
    given: list[list[Any]] = [ENDS, DATA, INPUTS, WIDTHS]
    kept = [list(one) for one in given]
    with torch.inference_mode():
        for one in given:
            one[:] = tree_map_only(Tensor, torch.clone, one)
    try:
        yield
    finally:
        for one, before in zip(given, kept, strict=True):
            one[:] = before


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "default-device": lambda: torch.device("meta"),
    "inference-mode": torch.inference_mode,
    "inference-tensors": inference_tensors,
    "no-grad": torch.no_grad,
}


def same(found: Any, expected: Any) -> bool:
    """Exactly, but for the seconds that a call took."""
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, np.ndarray):
        return np.array_equal(found, expected)
    if isinstance(expected, nn.Module):
        return same(found.state_dict(), expected.state_dict())
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(same(*pair) for pair in zip(found, expected, strict=True))
    if is_dataclass(expected):
        names = [field.name for field in fields(expected) if field.name != "seconds"]
        return all(same(getattr(found, name), getattr(expected, name)) for name in names)
    return bool(found == expected)


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", CALLS)
def test_what_surrounds_a_call_changes_nothing(name: str, surrounding: str) -> None:
    expected = CALLS[name]()
    with SURROUNDINGS[surrounding]():
        assert same(CALLS[name](), expected)


def test_every_tensor_that_is_made_names_its_device() -> None:
    """Else it lies on the default device, where a user's ``torch.set_default_device("cuda")`` puts it."""
    without = []
    for path in sorted((*ROOT.rglob("*.py"), *(ROOT / "strategies").glob("*.py"))):
        if (ROOT / "simulations") in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            named = any(keyword.arg in ("device", None) for keyword in node.keywords)
            if of_torch and node.func.attr in FACTORIES and not named:
                without.append(f"{path.name}:{node.lineno}")
    assert not without
