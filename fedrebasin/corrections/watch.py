"""Watches one pass through a network: every call of a layer or norm, and what has gone into it.

What stands between calls is not looked into: for every call it is noted which calls' outputs reach its input without
passing through another one, and that is all that a second pass needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fedrebasin.corrections.calls import (
    CONVOLUTIONS,
    NORMS,
    TRANSPOSED,
    address_of,
    arguments_of,
    attention_inside,
    key_of,
    leaves,
    names_of_tensors,
)


@dataclass(frozen=True)
class Call:
    """A layer's or norm's call with a tensor of the state dict.

    Attributes
    ----------
    func : callable
        A key of ``AFFINE``; the module's ``forward`` where a norm computes by hand.
    given : dict of str to object
        Arguments by name; where a norm computes by hand also ``again``, which gives its output with other weights.
    content : tuple of int
        Of the output, see :func:`content_of`.
    after : frozenset of int
        Places of the calls whose outputs reach the input.
    module : str or None
        The name of the norm that computes by hand.
    """

    func: Any
    given: dict[str, Any]
    output: Tensor
    content: tuple[int, int]
    after: frozenset[int]
    module: str | None = None

    @property
    def norm(self) -> bool:
        """Whether it is a norm's."""
        return self.module is not None or self.func in NORMS


def watch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, computed: bool = False) -> Watch:
    """Run the model once; with ``computed`` a layer's call is one whose weight is computed, too (``weight_norm``).

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> seen = watch(net, (torch.zeros(4, 2),), {})
    >>> [seen.names[id(call.given["weight"])] for call in seen.calls], seen.calls[1].after
    (['0.weight', '2.weight'], frozenset({0}))
    """
    found = Watch(model, (args, kwargs), computed=computed)
    with torch.no_grad(), found.hooks(), found:
        found.outputs = list(leaves(model(*args, **kwargs)))
    return found


class Watch(TorchFunctionMode):
    """What :func:`watch` returns.

    Attributes
    ----------
    names : dict of int to str
        Keys of the state dict by the ``id`` of their tensors.
    calls : list of Call
        In order.
    uses, tied : Counter of int
        How many calls read a tensor, and how many keys of the state dict it has, by ``id``.
    normed : set of tuple
        Content and number of entries of what norms have read.
    read : set of tuple
        Content of what others than norms have read: a residual stream, for example.
    outputs : list of Tensor
        Of the model.
    """

    def __init__(self, model: nn.Module, inputs: Any, *, computed: bool = False) -> None:
        super().__init__()
        self._model, self.names, self._computed = model, names_of_tensors(model), computed
        self.calls: list[Call] = []
        self.normed: set[tuple[int, int, int]] = set()
        self.read: set[tuple[int, int]] = set()
        self._inside = 0
        self.outputs: list[Tensor] = []
        self.uses: Counter[int] = Counter()
        self.tied = Counter(id(tensor) for tensor in model.state_dict(keep_vars=True).values())
        self._sources: dict[int, frozenset[int]] = {}
        self._alive: list[Any] = []  # so that neither ids nor addresses are given out twice
        for tensor in (*leaves(inputs), *model.parameters(), *model.buffers()):
            self._sources[address_of(tensor)] = frozenset()

    def hooks(self) -> ExitStack:
        """Watch, inside a ``with``, the modules that look like a norm and may compute by hand."""
        stack = ExitStack()
        for name, module in self._model.named_modules():
            own = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
            if set(own) == {"weight", "bias"} and all(tensor.ndim == 1 for tensor in own.values()):
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._hook(name), with_kwargs=True).remove)
        return stack

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside += 1

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside -= 1
            known = any(call.module is None and call.given.get("weight") is module.weight for call in self.calls)
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and not known:
                given: dict[str, Any] = {"input": args[0], "weight": module.weight, "bias": module.bias}
                given["again"] = lambda changed: functional_call(module, changed, args, kwargs)
                self.normed.add((*content_of(args[0]), args[0].numel()))
                sources = self._sources_of([args[0]])
                self.calls.append(Call(type(module).forward, given, output, content_of(output), sources, name))
                self._sources[address_of(output)] = frozenset({len(self.calls) - 1})

        return note

    def _sources_of(self, read: Collection[Tensor]) -> frozenset[int]:
        everything = frozenset(range(len(self.calls)))  # what an unseen op made may hold anything so far
        empty: frozenset[int] = frozenset()
        return empty.union(*(self._sources.get(address_of(x), everything) for x in read))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note what went into its result."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return attention_inside(*args, **kwargs)
        read, given = list(leaves((args, kwargs))), arguments_of(func, args, kwargs)
        contents = [content_of(x) for x in read]
        ours = given is not None and (
            id(key_of(func, given)) in self.names or (self._computed and func in (F.linear, *CONVOLUTIONS, *TRANSPOSED))
        )
        sources = self._sources_of(read)
        norm = given is not None and ours and func in NORMS
        if given is not None and norm:
            self.normed.add((*content_of(given["input"]), given["input"].numel()))
        result = func(*args, **kwargs)
        written = list(leaves(result))
        if getattr(func, "__name__", "") == "__setitem__":
            written = read[:1]
        if not written:
            return result  # a shape or a number: no use of the tensor's values that a pass could see
        if not norm and not self._inside:
            views = {address_of(y) for y in written}
            self.read.update(content for content in contents if content[0] not in views)
        same = {id(y) for y in written}  # a cast that changes nothing gives its input back, and is no use
        self.uses.update(
            {
                id(x): 1
                for x, content in zip(read, contents, strict=True)
                if id(x) not in same or content_of(x) != content
            }
        )
        self._alive += [*read, *written]
        if given is not None and ours and isinstance(result, Tensor):
            self.calls.append(Call(func, given, result, content_of(result), sources))
            sources = frozenset({len(self.calls) - 1})
        for tensor in written:  # by storage: what is written in place, or through a view, has been read as well
            self._sources[address_of(tensor)] = sources
        return result

    def used_once(self, tensor: Tensor) -> bool:
        """Whether one call reads the tensor, under one key."""
        return self.uses[id(tensor)] <= 1 and self.tied[id(tensor)] <= 1

    def only_normed(self, call: Call) -> bool:
        """Whether a call's output goes straight into norms, all of it, and nowhere else."""
        return (*call.content, call.output.numel()) in self.normed and call.content not in self.read

    def through(self, place: int, where: Mapping[int, int]) -> frozenset[int]:
        """``where`` of the calls whose outputs reach a call's input; one that is not in ``where`` is looked through."""
        found: set[int] = set()
        stack, done = list(self.calls[place].after), set[int]()
        while stack:
            source = stack.pop()
            if source in done:
                continue
            done.add(source)
            if source in where:
                found.add(where[source])
            else:
                stack += self.calls[source].after
        return frozenset(found)

    def unread(self, known: Collection[str]) -> dict[str, str]:
        """Matrices that are none of the ``known`` keys, each with the reason why nothing is done about them."""
        ids = {id(tensor) for name, tensor in self._model.state_dict(keep_vars=True).items() if name in known}
        return {
            name: "no linear or convolution layer reads it directly"
            for name, tensor in self._model.state_dict(keep_vars=True).items()
            if id(tensor) not in ids and tensor.is_floating_point() and tensor.ndim > 1
        }


def content_of(tensor: Tensor) -> tuple[int, int]:
    """A tensor's storage, and how often it had been written to: the same for all views of it until the next time."""
    return address_of(tensor), 0 if tensor.is_inference() else tensor._version
