"""A copy of a model on random weights, and what permutations change in its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedrebasin.batches import copied, split_inputs, tensors
from fedrebasin.by_mode import NothingDropped
from fedrebasin.errors import InvalidSpecError, first_line
from fedrebasin.modules import deep_copy, mode_of, unwrapped, without_cache
from fedrebasin.perms import Perms, identity_perms, random_perms
from fedrebasin.permute import permute, permute_tensor
from fedrebasin.redraw import Calibration, Keep, redraw, redraw_inputs, telling_tables
from fedrebasin.seeds import generator_of
from fedrebasin.spec import PermutationSpec

_KEEP: tuple[Keep, ...] = ("none", "whole", "all")
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_NARROW = (torch.float16, torch.bfloat16)
#: Drawn orders of so few units are often equal.
_FEW = 4


class Proof:
    """A copy of the model with random weights and inputs on which its units are alive, and its outputs.

    In float64; in float32 where the forward pass has tensors of that type in its code. Where a branch depends on the
    data, the example inputs are taken as well as random ones: they may go different ways.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> proof = Proof(net, trace(net, (torch.zeros(3, 4),)), (torch.zeros(3, 4),), seed=0)
    >>> proof.change({"0": torch.arange(8).roll(1)}) < proof.tolerance
    True
    >>> proof.change_to({**proof.state, "0.bias": proof.state["0.bias"].flip(0)}) < proof.tolerance
    False
    """

    def __init__(self, model: nn.Module, spec: PermutationSpec, example_inputs: Any, seed: int) -> None:
        self.spec = spec
        self.generator = generator_of(seed)
        args, kwargs = split_inputs(example_inputs)
        model = unwrapped(model)
        if any(tensor.is_meta for tensor in model.state_dict().values()):
            raise InvalidSpecError(
                "model: expected weights on a device with memory; got the meta device, where nothing can be computed; "
                "build the model on the CPU for the proof"
            )
        # a forward with float32 tensors or masks in its code does not run in float64, one that looks up floating inputs
        # as numbers of categories only on whole numbers, one that asserts a range only on numbers in it, one that takes
        # roots of a table only on the table's own numbers
        keeps = _KEEP if _vary((args, kwargs)) else _KEEP[:1]
        own = frozenset(telling_tables(model, spec))
        drawn = (frozenset[str](), own) if own else (own,)
        for tables, keep, dtype in product(drawn, keeps, (torch.float64, torch.float32)):
            cause: Exception | None = None
            try:
                after = self._draw(model, (args, kwargs), dtype, keep, tables)
            except Exception as error:  # noqa: BLE001 - whatever the model raises
                cause = error
            if not cause and self.outputs and _finite(self.outputs):
                break
        else:
            if cause:
                remedy = (
                    "check that model(*example_inputs) runs, and let them vary: on equal numbers alone nothing is seen"
                )
                if narrow := [str(one.dtype) for one in model.parameters() if one.dtype in _NARROW]:
                    remedy = (
                        f"proofs are made in float64 and float32: where forward casts to {narrow[0]}, let it cast to "
                        "the weights' own type, x.to(self.weight.dtype)"
                    )
                raise InvalidSpecError(
                    "model: expected to run on random weights and on inputs like example_inputs; got "
                    f"{first_line(cause)}, so the spec cannot be proved; {remedy}"
                ) from cause
            raise InvalidSpecError(
                "model: expected finite floating outputs on random weights; got "
                f"{'a NaN or an infinity' if self.outputs else 'none'}, so the spec cannot be proved; let forward "
                "return what comes before (logits, say)"
            )
        self.written = {
            name: one
            for name, one in after.items()
            if name in spec.buffers and one.is_floating_point() and bool(one.isfinite().all())
            if not torch.equal(one, self.state[name])
        }

    def _draw(
        self, model: nn.Module, inputs: Any, dtype: torch.dtype, keep: Keep, tables: frozenset[str]
    ) -> dict[str, Tensor]:
        """Draw weights and inputs, set ``outputs``, and return the state after a forward pass in training mode."""
        self.model = deep_copy(model, "cpu").cpu()
        self.model = self.model.double() if dtype is torch.float64 else self.model.float()
        for parameter in self.model.parameters():
            if parameter.is_complex():  # which these leave as they are
                parameter.data = parameter.data.to(torch.promote_types(dtype, torch.complex64))
        self.state = redraw(self.model.state_dict(), self.spec.parameters, self.generator, tables)
        self.inputs = [redraw_inputs(inputs, dtype, self.generator, keep)]
        self.tolerance = _TOLERANCE[dtype]
        with Calibration({name: tensor for name, tensor in self.state.items() if name not in tables}):
            self._run(self.state, write=True)
        self.outputs, after = self._run(self.state)
        if self.branched and keep != "all":
            self.inputs.append(redraw_inputs(inputs, dtype, self.generator, "all"))
            outputs, written = self._run(self.state)
            if _finite(outputs):
                self.outputs, after = outputs, written
            else:
                self.inputs.pop()
        return after

    def run(self, state: dict[str, Tensor]) -> list[Tensor]:
        """The outputs in evaluation mode; where training uses more tensors, in training, too; dropout drops nothing."""
        return self._run(state)[0]

    @torch.no_grad()
    def _run(self, state: dict[str, Tensor], *, write: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the state after training, in copies or with ``write`` in ``state`` itself."""
        own: dict[str, Tensor] = {}
        outputs: list[Tensor] = []
        with NothingDropped() as mode, torch.random.fork_rng(devices=[]):  # type: ignore[no-untyped-call]  # torch has no types for modes
            for inputs in self.inputs:  # functional_call writes into the dict that it is given
                outputs += self._call(dict(state), inputs, training=False)
            if self.spec.training:
                own = {name: tensor if write else tensor.clone() for name, tensor in state.items()}
                for inputs in self.inputs:
                    outputs += self._call(own, inputs, training=True)
        self.branched = mode.branched
        return outputs, own

    def _call(self, state: dict[str, Tensor], inputs: tuple[Any, Any], *, training: bool) -> list[Tensor]:
        torch.manual_seed(0)  # a model that draws numbers draws the same ones each time
        with mode_of(self.model, training=training), without_cache(self.model):
            return tensors(functional_call(self.model, state, *copied(inputs), tie_weights=False))

    def change(self, perms: Perms) -> float:
        """The largest relative change of any output, or buffer that training writes, under these permutations."""
        try:
            moved = permute(self.spec, perms, self.state)
            written = {name: permute_tensor(self.spec.axes[name], perms, one) for name, one in self.written.items()}
        except (RuntimeError, LookupError) as error:
            raise InvalidSpecError(
                "spec: the layouts of some axes contradict each other, so that nothing can be permuted; keep the units "
                "that groups share by spec.fix, or write the spec by hand"
            ) from error
        return self._change(moved, written, self.outputs)

    def change_to(self, state: dict[str, Tensor], before: list[Tensor] | None = None) -> float:
        """The largest relative change of any output on the weights ``state``; infinite where it is not a number.

        Outputs are compared with those ``before``, by default the proof's own.
        """
        return self._change(state, {}, self.outputs if before is None else before)

    def _change(self, state: dict[str, Tensor], written: dict[str, Tensor], before: list[Tensor]) -> float:
        outputs, after = self._run(state)
        if [output.shape for output in outputs] != [output.shape for output in before]:
            return math.inf  # forward went another way
        pairs = [*zip(outputs, before, strict=True), *((after[name], one) for name, one in written.items())]
        changes = [
            float((new - old).abs().max() / old.abs().max().clamp_min(torch.finfo(old.dtype).tiny))
            for new, old in pairs
            if old.numel()
        ]
        return max((math.inf if math.isnan(change) else change for change in changes), default=0.0)

    def widen_tolerance(self) -> float:
        """Allow for float32 steps in a float64 run (norms that cast), and for deep networks that magnify rounding."""
        with _NarrowSteps() as steps:  # type: ignore[no-untyped-call]  # as above
            self.run(self.state)
        widest = _TOLERANCE[torch.float32]
        self.tolerance = widest if steps.found else max(self.tolerance, min(10 * self.rounding(), widest))
        return self.tolerance

    def rounding(self) -> float:
        """The largest relative change of any output if every weight is nudged by a few units of its last place."""
        nudged = {name: self._nudged(tensor) for name, tensor in self.state.items() if tensor.is_floating_point()}
        return self._change({**self.state, **nudged}, self.written, self.outputs)

    def _nudged(self, tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=self.generator, dtype=tensor.dtype, device="cpu")
        return tensor * (1 + 4 * torch.finfo(tensor.dtype).eps * noise)


def _vary(inputs: Any) -> bool:
    """False if there are but floating tensors, each of equal numbers."""
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.numel()]
    return any(not tensor.is_floating_point() or bool((tensor != tensor.flatten()[0]).any()) for tensor in given)


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(output.isfinite().all()) for output in outputs)


class _NarrowSteps(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as above
    """Sees whether any op returns floating numbers narrower than float64."""

    supports_higher_order_operators = True
    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found = self.found or any(tensor.dtype != torch.float64 for tensor in tensors(result))
        return result


def cycles(spec: PermutationSpec, generator: torch.Generator) -> Perms:
    """Random permutations that move every unit: a uniform draw of two units is the identity half of the time.

    >>> from fedrebasin.layout import Free
    >>> cycles(PermutationSpec({"w": (Free("a", 2),)}), torch.Generator())
    {'a': tensor([1, 0])}
    """
    orders = random_perms(spec, generator)
    return {perm: torch.empty_like(order).scatter_(-1, order, order.roll(1, -1)) for perm, order in orders.items()}


def trials(spec: PermutationSpec, generator: torch.Generator) -> Iterator[Perms]:
    """All permutations at once; then those of few units in sets of which one tells any two apart.

    Two of two units always move alike, and would hide that one of them alone is wrong.

    >>> from fedrebasin.layout import Free
    >>> spec = PermutationSpec({"w": (Free("a", 2), Free("b", 2))})
    >>> [[order.tolist() for order in perms.values()] for perms in trials(spec, torch.Generator())]
    [[[1, 0], [1, 0]], [[1, 0], [0, 1]]]
    """
    perms, still = cycles(spec, generator), identity_perms(spec)
    yield perms
    shapes = {perm: shape for perm, shape in spec.perm_shapes.items() if shape[-1] <= _FEW}
    few = [(perm, row) for perm, shape in shapes.items() for row in range(math.prod(shape[:-1]))]
    for bit in range(max(0, len(few) - 1).bit_length()):
        drawn = {perm: order.clone() for perm, order in perms.items()}
        for place, (perm, row) in enumerate(few):
            if place >> bit & 1:
                size = shapes[perm][-1]
                drawn[perm].view(-1, size)[row] = still[perm].view(-1, size)[row]
        yield drawn
