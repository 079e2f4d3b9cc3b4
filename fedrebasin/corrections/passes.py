"""Passes that stop at one layer, and within a memory limit go on from the layers before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fedrebasin.batches import Batches, copied
from fedrebasin.corrections.calls import arguments_of, attention_inside, key_of, leaves, names_of_tensors
from fedrebasin.corrections.layers import Norm, Step
from fedrebasin.corrections.sites import Site
from fedrebasin.errors import CalibrationError, RebasinError

Batch = tuple[tuple[Any, ...], dict[str, Any]]


class Memory:
    """How many bytes may still be kept."""

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise RebasinError(f"memory: expected a number of bytes from 0; got {limit}")
        self.free = limit

    def take(self, tensor: Tensor) -> bool:
        """Take a tensor's bytes if they are there."""
        size = tensor.numel() * tensor.element_size()
        fits = size <= self.free
        self.free -= size if fits else 0
        return fits

    def give(self, tensor: Tensor) -> None:
        """Give a tensor's bytes back."""
        self.free += tensor.numel() * tensor.element_size()


def hold(batches: Batches, memory: Memory) -> Sequence[Batch] | None:
    """Calibration batches as a list if they fit: only then is a batch the same in every pass, whoever shuffles."""
    held: list[Batch] = []
    for args, kwargs, _ in batches:
        for tensor in leaves((args, kwargs)):
            if not memory.take(tensor):
                return None
        held.append((args, kwargs))
    return held


class Runner:
    """One network that is run again and again, each time up to a later step.

    Outputs of layers are kept while a later step reads them; a layer that is kept is not computed again, and one
    whose output reaches the step only through kept ones gives a tensor of its shape without entries (on torch's meta
    device), as does all that reads it; zeros where the model cannot run on those. So one pass costs one layer and what
    stands between it and those before it, where memory allows, and a whole pass up to that step where not.
    """

    def __init__(self, model: nn.Module, steps: Sequence[Step | Site], memory: Memory, *, keep: bool) -> None:
        self.model, self._steps, self._memory, self._keep = model, steps, memory, keep
        place = {step.key: index for index, step in enumerate(steps)}
        self._place = {tensor: place[name] for tensor, name in names_of_tensors(model).items() if name in place}
        self._device = torch.device("cpu")
        self.last_input = torch.zeros((), device="cpu")
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._like: dict[tuple[int, int], Tensor] = {}
        self._hollow = True

    def input(self, index: int, number: int, batch: Batch) -> Tensor:
        """Input of a step on a batch; ``number`` is the batch's place."""
        return self._run(index, number, batch, output=False)

    def output(self, index: int, number: int, batch: Batch, *, final: bool = True) -> Tensor:
        """Output of a layer on a batch; not kept for later steps if the layer's weights are not ``final``."""
        return self._run(index, number, batch, output=True, final=final)

    def _run(self, index: int, number: int, batch: Batch, *, output: bool, final: bool = True) -> Tensor:
        mode = _Pass(self, index, number, output=output, final=final)
        args, kwargs = copied(batch)
        try:
            with torch.no_grad(), suppress(Stop), mode:
                self.model(*args, **kwargs)
        except Exception:  # the user's model may raise anything where it looks at values that a stand-in has not
            if not self._hollow:
                raise
            self._hollow = False
            return self._run(index, number, batch, output=output, final=final)
        if mode.seen is None:
            raise not_reached(self._steps[index].key)
        self.last_input = mode.seen_input
        done = index + 1 if output and final else index
        alive = self._reached(range(done, len(self._steps)), number)
        for key in [key for key in self._kept if key[1] == number and key[0] not in alive]:
            self._memory.give(self._kept.pop(key))
        return mode.seen

    def _read_from(self, index: int, layer: int) -> bool:
        return any(layer in step.after for step in self._steps[index:])

    def needed(self, index: int, number: int) -> set[int]:
        """Layers that must give their real output so that the step's input is right."""
        return self._reached([index], number)

    def _reached(self, indices: Iterable[int], number: int) -> set[int]:
        """Layers that the inputs of the steps read, back to those that are kept."""
        found: set[int] = set()
        stack = [layer for index in indices for layer in self._steps[index].after]
        while stack:
            layer = stack.pop()
            if layer not in found:
                found.add(layer)
                if (layer, number) not in self._kept:
                    stack += self._steps[layer].after
        return found

    def place_of(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> int | None:
        """Which step a call is."""
        given = arguments_of(func, args, kwargs)
        return None if given is None else self._place.get(id(key_of(func, given)))

    def result(self, index: int, number: int, needed: set[int], call: Any) -> Any:
        """A step's output on the way to a later one: a stand-in, kept, or computed."""
        like = self._like.get((index, number))  # a ``Norm`` has none: it runs
        if index not in needed and like is not None:
            if self._hollow:
                return _stand_in(like)
            return torch.zeros(like.shape, dtype=like.dtype, device=self._device)
        kept = self._kept.get((index, number))
        if kept is not None:
            return kept.clone()  # what follows may write into it
        output = call()
        if output.is_meta:
            return output
        self.keep(index, number, output)
        return output.clone() if (index, number) in self._kept else output

    def keep(self, index: int, number: int, output: Any, *, final: bool = True) -> None:
        """Note an output's shape, and keep the output if it is final, a later step reads it and memory is left."""
        if isinstance(self._steps[index], Norm):
            return
        self._like[index, number] = _stand_in(output)
        self._device = output.device
        if final and self._keep and self._read_from(index + 1, index) and self._memory.take(output):
            self._kept[index, number] = output


def not_reached(name: str) -> CalibrationError:
    """What is raised where a network takes another way on some batches than on the first.

    >>> not_reached("b.weight")
    CalibrationError("calibration: the network does not reach 'b.weight' on every batch; give batches on which it does")
    """
    return CalibrationError(
        f"calibration: the network does not reach {name!r} on every batch; give batches on which it does"
    )


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of its shape without entries."""
    return torch.empty_like(tensor, device="meta")


class Stop(Exception):  # noqa: N818  # it ends a forward pass, no error
    """The forward pass has run as far as it is needed."""


class _Pass(TorchFunctionMode):
    """One forward pass up to a step."""

    def __init__(self, runner: Runner, index: int, number: int, *, output: bool, final: bool) -> None:
        super().__init__()
        self._runner, self._index, self._number, self._output, self._final = runner, index, number, output, final
        self._needed = runner.needed(index, number)
        self.seen: Tensor | None = None
        self.seen_input = torch.zeros((), device="cpu")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or what stands in for it; stop at the step."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_inside(*args, **kwargs)
        place = self._runner.place_of(func, args, kwargs)
        if any(x.is_meta for x in leaves((args, kwargs))):  # a stand-in: nothing has to be computed
            args, kwargs = tree_map_only(Tensor, _stand_in, (args, kwargs))
        if place == self._index:
            given = arguments_of(func, args, kwargs) or {}
            if given["input"].is_meta:
                raise RuntimeError(f"the input of step {place} is a stand-in")
            self.seen = self.seen_input = given["input"]
            if self._output:
                self.seen = func(*args, **kwargs)
                self._runner.keep(place, self._number, self.seen, final=self._final)
            raise Stop
        if place is None:
            return func(*args, **kwargs)
        return self._runner.result(place, self._number, self._needed, lambda: func(*args, **kwargs))
