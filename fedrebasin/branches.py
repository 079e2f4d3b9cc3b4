"""The ways through a model whose branches depend on the data, a graph for each.

``torch.export`` stops where Python asks a tensor without data for its truth: a check for NaNs, an input that is scaled
if it has not been, an early exit, an expert that is skipped. Here each place in the code that asks is told false, then
true, until every way has been exported or has ended in an error of the model's own (the check's). Where something else
of the data matters (a number out of a tensor), the one way that the example inputs take is followed.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedrebasin.errors import RebasinError
from fedrebasin.sizes import settle_sizes

#: What export raises where Python asks for data.
ASKED = (GuardOnDataDependentSymNode, DataDependentOutputException)
_TRUTHS = (Tensor.__bool__, Tensor.equal, torch.equal, Tensor.allclose, torch.allclose)
_TAKES = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__)
_MOST_WAYS, _MOST_QUESTIONS = 16, 256

_Place = tuple[CodeType, int]


@dataclass
class Ways:
    """The graphs of a model, with all sizes known.

    Attributes
    ----------
    programs : list of ExportedProgram
    mixed : bool
        A place was asked more than once on a way, and got the same answer each time; both lead on.
    cut : bool
        Inputs may take branches that are in no graph.
    """

    programs: list[ExportedProgram] = field(default_factory=list)
    mixed: bool = False
    cut: bool = False


def export_ways(model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ways:
    """Follow every way, or that of the inputs.

    >>> class Scaled(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x / 255 if x.max() > 1 else x)
    >>> ways = export_ways(Scaled(2, 2), (torch.rand(3, 2),), {})
    >>> len(ways.programs), ways.cut
    (2, False)
    """
    try:
        ways = _by_truths(model, args, kwargs)
    except ASKED:
        return _own_way(model, args, kwargs)
    if ways.cut:
        with suppress(Exception):  # it is one way more
            ways.programs += _own_way(model, args, kwargs).programs
    return ways


def _by_truths(model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ways:
    """Every way that truth values part, those with few answers true before others."""
    ways, failures = Ways(), []
    leads: defaultdict[_Place, set[bool]] = defaultdict(set)
    often: set[_Place] = set()
    waiting: list[dict[_Place, bool]] = [{}]
    for _ in range(_MOST_WAYS):
        if not waiting:
            break
        told = waiting.pop(0)
        with _Answers(told) as answers:
            try:
                program = torch.export.export(model, args, kwargs, strict=False)
                _forget_questions(program)
                settle_sizes(program, args, kwargs)
                ways.programs.append(program)
                for place in answers.asked:
                    leads[place].add(told.get(place, False))
            except ASKED:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the model raises on that way
                failures.append(error)
        often.update(place for place, count in answers.asked.items() if count > 1)
        news = list(answers.asked)[len(told) :]
        waiting += [{**told, **dict.fromkeys(news[:count], False), place: True} for count, place in enumerate(news)]
    beyond = [error for error in failures if not _of_the_model(error)]
    if not ways.programs:
        raise (beyond or failures)[0]
    ways.cut = bool(waiting or beyond)
    ways.mixed = any(len(leads[place]) > 1 for place in often)
    return ways


def _of_the_model(error: Exception) -> bool:
    """Whether its forward raised an error, and export did not."""
    functions = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return "forward" in functions and not type(error).__module__.startswith(("torch", __name__))


def _own_way(model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ways:
    """The way that the inputs take, which cannot be told on the meta device."""
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs, model.state_dict()))):
        raise ValueError("the way through forward depends on numbers, and the meta device has none")
    with _Numbers() as numbers:
        program = torch.export.draft_export(model, args, kwargs, strict=False)
    settle_sizes(program, args, kwargs)
    return Ways([program], cut=numbers.taken)


class _Answers(TorchFunctionMode):
    """Says of tensors without data whether they are true: for each place as told, false where nothing is told."""

    def __init__(self, told: dict[_Place, bool]) -> None:
        super().__init__()
        self.asked: Counter[_Place] = Counter()
        self._told = told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item and args[0].dtype is torch.bool:
            return self._answer()
        try:
            return func(*args, **(kwargs or {}))
        except ASKED:
            if func not in _TRUTHS:
                raise
            return self._answer()

    def _answer(self) -> bool:
        place = _place()
        self.asked[place] += 1
        if self.asked.total() > _MOST_QUESTIONS:
            raise _EndlessError(f"a way through forward asks for data more than {_MOST_QUESTIONS} times")
        return self._told.get(place, False)


class _EndlessError(RebasinError):
    """A loop that ends by values may not end at all."""


def _place() -> _Place:
    """Where in the model's code a question is asked."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_machinery(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


def _is_machinery(module: str) -> bool:
    return module == __name__ or (module.split(".")[0] == "torch" and not module.startswith("torch.nn."))


class _Numbers(TorchFunctionMode):
    """Sees whether a truth value or a number with a fraction is taken out of a tensor; whole ones are sizes."""

    taken = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TAKES and (args[0].dtype is torch.bool or args[0].is_floating_point()):
            self.taken = True
        return func(*args, **(kwargs or {}))


def _forget_questions(program: ExportedProgram) -> None:
    """Remove what is left in the graph of questions that were answered: numbers on which nothing depends."""
    deciding = deciding_nodes(program)
    for node in reversed(list(program.graph.nodes)):
        if node in deciding and not node.users and not isinstance(node.meta.get("val"), Tensor):
            program.graph.erase_node(node)


def deciding_nodes(program: ExportedProgram) -> set[Node]:
    """Nodes that lead to nothing: to no more than assertions, or to questions that were answered."""
    found: set[Node] = set()
    for node in reversed(program.graph.nodes):
        ends = node.op == "call_function" and not _writes(node)  # where nothing uses it
        if found.issuperset(node.users) if node.users else ends:
            found.add(node)
    return found


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
