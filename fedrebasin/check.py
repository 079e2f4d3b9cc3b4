"""check_spec: prove on random weights that a spec's permutations keep the network's function."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from fedrebasin.batches import evaluation_mode, split_inputs, tensors
from fedrebasin.errors import InvalidSpecError, RebasinError
from fedrebasin.perms import Perms, identity_perms, random_perms
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec
from fedrebasin.trace import trace

#: Weights and inputs are drawn so often; in one draw some units are dead, and what happens to them is not seen.
DRAWS = 3
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def check_spec(model: nn.Module, spec: PermutationSpec, example_inputs: Any, *, seed: int = 0) -> PermutationSpec:
    """Prove that no permutation of ``spec`` changes the function of ``model``.

    Every parameter, running statistic and floating input is drawn anew (on default weights a check sees
    almost nothing), all permutations are drawn at random, and the outputs in float64 are compared.

    Parameters
    ----------
    model : nn.Module
        Only its architecture is used; its weights and mode are left as they are.
    spec : PermutationSpec
    example_inputs : Tensor, tuple or dict
        As for :func:`fedrebasin.trace`.
    seed : int
        Seed of all draws.

    Returns
    -------
    PermutationSpec
        The spec, with the mark of the passed check.

    Raises
    ------
    InvalidSpecError
        If an output changes; the message names the permutation, the tensor and the op.
    SpecMismatchError
        If the spec is of another architecture.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> check_spec(net, trace(net, (torch.randn(3, 4),)), (torch.randn(3, 4),)).checked
    True
    """
    spec.check_state(model.state_dict(), "model")
    for draw in range(DRAWS):
        proof = _Proof(model, spec, example_inputs, seed + draw)
        perms = _cycles(spec, proof.generator)
        change = proof.change(perms)
        if change > proof.tolerance and change > proof.widen_tolerance():
            raise InvalidSpecError(_culprit(model, spec, example_inputs, proof, perms))
    return replace(spec, checked=True)


def _culprit(model: nn.Module, spec: PermutationSpec, example_inputs: Any, proof: _Proof, perms: Perms) -> str:
    suspects = list(spec.perm_shapes)
    while len(suspects) > 1:  # halve them, and keep a half that changes an output by itself
        half = suspects[: len(suspects) // 2]
        guilty = proof.change({**identity_perms(spec), **{perm: perms[perm] for perm in half}}) > proof.tolerance
        suspects = half if guilty else suspects[len(half) :]
    change = proof.change({**identity_perms(spec), suspects[0]: perms[suspects[0]]})
    return _explain(model, spec, example_inputs, suspects[0], change)


def output_change(model: nn.Module, spec: PermutationSpec, example_inputs: Any, *, seed: int = 0) -> float:
    """The largest relative change of any output when every permutation of ``spec`` moves every unit.

    Parameters and raised errors as for :func:`check_spec`, but for the verdict: rounding alone gives about 1e-14.
    """
    spec.check_state(model.state_dict(), "model")
    changes = []
    for draw in range(DRAWS):
        proof = _Proof(model, spec, example_inputs, seed + draw)
        changes.append(proof.change(_cycles(spec, proof.generator)))
    return max(changes)


class _Proof:
    """A copy of the model with random weights and inputs, and its outputs."""

    def __init__(self, model: nn.Module, spec: PermutationSpec, example_inputs: Any, seed: int) -> None:
        self.spec = spec
        self.generator = torch.Generator().manual_seed(seed)
        args, kwargs = split_inputs(example_inputs)
        for dtype in (torch.float64, torch.float32):
            self.model = _copy(model).cpu()
            self.model = self.model.double() if dtype is torch.float64 else self.model.float()
            self.state = _redraw(self.model.state_dict(), set(spec.parameters), self.generator)
            self.args, self.kwargs = _redraw_inputs((args, kwargs), dtype, self.generator)
            self.tolerance = _TOLERANCE[dtype]
            try:
                self.outputs = self.run(self.state)
                break
            except RuntimeError:  # a forward with hard-coded float32 tensors does not run in float64
                if dtype is torch.float32:
                    raise
        if not self.outputs or not all(bool(output.isfinite().all()) for output in self.outputs):
            raise InvalidSpecError(
                "model: expected finite floating outputs on random weights; got "
                f"{'none' if not self.outputs else 'a NaN or an infinity'}, so the spec cannot be proved"
            )

    @torch.no_grad()
    def run(self, state: dict[str, Tensor]) -> list[Tensor]:
        """The outputs in evaluation mode; where training uses more tensors, in training mode without dropout, too."""
        with evaluation_mode(self.model):
            outputs = tensors(functional_call(self.model, state, self.args, self.kwargs, tie_weights=False))
            if self.spec.training:
                for module in self.model.modules():
                    module.training = not isinstance(module, _DropoutNd)
                copies = {name: tensor.clone() for name, tensor in state.items()}  # running statistics are written
                outputs += tensors(functional_call(self.model, copies, self.args, self.kwargs, tie_weights=False))
        return outputs

    def change(self, perms: Perms) -> float:
        """The largest relative change of any output under these permutations."""
        return self._change(permute(self.spec, perms, self.state))

    def widen_tolerance(self) -> float:
        """Allow for float32 steps in a float64 run (norms that cast), and for deep networks that magnify rounding."""
        with _NarrowSteps() as steps:  # type: ignore[no-untyped-call]
            self.run(self.state)
        nudged = {name: self._nudged(tensor) for name, tensor in self.state.items() if tensor.is_floating_point()}
        rounding = 10 * self._change({**self.state, **nudged})
        widest = _TOLERANCE[torch.float32]
        self.tolerance = widest if steps.found else max(self.tolerance, min(rounding, widest))
        return self.tolerance

    def _nudged(self, tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype)
        return tensor * (1 + 4 * torch.finfo(tensor.dtype).eps * noise)

    def _change(self, state: dict[str, Tensor]) -> float:
        changes = [
            float((new - old).abs().max() / old.abs().max().clamp_min(torch.finfo(old.dtype).tiny))
            for new, old in zip(self.run(state), self.outputs, strict=True)
            if old.numel()
        ]
        return max(changes, default=0.0)


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also where a module holds a computed tensor, which deepcopy refuses."""
    held = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf})


class _NarrowSteps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether any op returns floating numbers narrower than float64."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found = self.found or any(tensor.dtype != torch.float64 for tensor in tensors(result))
        return result


def _cycles(spec: PermutationSpec, generator: torch.Generator) -> Perms:
    """Random permutations that move every unit: a uniform draw of two units is the identity half of the time."""
    orders = random_perms(spec, generator)
    return {perm: torch.empty_like(order).scatter_(-1, order, order.roll(1, -1)) for perm, order in orders.items()}


def _redraw(state: Mapping[str, Tensor], parameters: set[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Random values of a size that keeps signals alive: vectors are positive, so that few units are dead."""
    drawn: dict[str, Tensor] = {}
    for name, tensor in state.items():
        alias = next(
            (other for other in drawn if state[other].data_ptr() == tensor.data_ptr() and tensor.numel()), None
        )
        if alias is not None and state[alias].shape == tensor.shape:
            drawn[name] = drawn[alias]
        elif not tensor.is_floating_point():
            drawn[name] = tensor
        elif name not in parameters or tensor.ndim <= 1:
            drawn[name] = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5
        else:
            fan_in = max(1, tensor[0].numel())
            drawn[name] = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * (2 / fan_in) ** 0.5
    return drawn


def _redraw_inputs(value: Any, dtype: torch.dtype, generator: torch.Generator) -> Any:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value.cpu()
        return torch.randn(value.shape, generator=generator, dtype=dtype)
    if isinstance(value, Mapping):
        return {key: _redraw_inputs(item, dtype, generator) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_redraw_inputs(item, dtype, generator) for item in value)
    return value


def _explain(model: nn.Module, spec: PermutationSpec, example_inputs: Any, perm: str, change: float) -> str:
    """Name the culprit by the difference to what a fresh trace ties."""
    said = f"spec: permuting {perm!r} alone changes an output by {change:.1g} of its size"
    tied = set(spec.tied[perm])
    try:
        right = trace(model, example_inputs)
    except RebasinError:
        return f"{said}; it ties {_list(tied)}; mend the spec or trace the model again"
    truth = max((set(axes) for axes in right.tied.values()), key=lambda axes: len(axes & tied), default=set())
    truth = truth if truth & tied else set()
    for wrong, verb in ((truth - tied, "leaves out"), (tied - truth, "wrongly ties")):
        for axis in sorted(wrong):
            op = right.uses.get(axis.name, "an op")
            return f"{said}: it {verb} {axis.name!r} dim {axis.dim}, used by {op}; trace the model again"
    order = next((axis for axis in sorted(tied) if spec.axes[axis.name] != right.axes[axis.name]), min(tied))
    op = right.uses.get(order.name, "an op")
    what = f"the layout of {order.name!r} dim {order.dim}, used by {op}, is not the traced one"
    return f"{said}: {what}; trace the model again"


def _list(axes: set[Any]) -> str:
    shown = [f"{axis.name}:{axis.dim}" for axis in sorted(axes)]
    return ", ".join(shown[:4]) + (" and others" if len(shown) > 4 else "")
