"""One pass over an exported graph: every tensor gets axes, and one rule per op ties them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from fedrebasin.axes import is_fixed, leaf, leaves
from fedrebasin.axes.families import settle_op
from fedrebasin.axes.reach import Read
from fedrebasin.coefficients import wide_type
from fedrebasin.decompose import decompose
from fedrebasin.errors import UnsupportedOpError
from fedrebasin.memory import identity
from fedrebasin.nodes import WRAPPERS, masks_of, module_path, outs_of, shapes_of, used_outputs
from fedrebasin.rules import RULES, NotCoveredError, Traced, Value, op_name
from fedrebasin.rules.pointwise import pointwise
from fedrebasin.uniform import may_be_written, stays_uniform

#: Why a tensor that a graph makes of nothing is fixed.
_CONSTANT = "constant"


class Walk:
    """The axes of a model's tensors, tied by every graph that is walked.

    Attributes
    ----------
    parameters : dict of str to Value
        The tensors of the state dict that a graph has, with their axes.
    uses : dict of str to str
        The op and module that use each of them first.
    fixed_ops : dict of str to str
        Ops that no rule covers, and the module where each occurs first.
    reads : list of Read
        The axes that go in and out of every op that uses all of its tensors.
    """

    def __init__(self, state: Mapping[str, Tensor], *, strict: bool = False) -> None:
        self.state = state
        self.strict = strict
        self.traced = Traced()
        self.parameters: dict[str, Value] = {}
        self.first: dict[object, Value] = {}
        self.uses: dict[str, str] = {}
        self.fixed_ops: dict[str, str] = {}
        self.reads: list[Read] = []

    def program(self, program: ExportedProgram) -> None:
        """Walk the graph of an exported model and fix its inputs and outputs."""
        sources = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        values = {
            node: self._placeholder(node, sources[node.name])
            for node in program.graph.nodes
            if node.op == "placeholder"
        }
        outputs = self._graph(program.graph, values)
        for value, spec in zip(outputs, program.graph_signature.output_specs, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                for item in values_in(value):
                    self.traced.fix(item, "output")

    def _graph(self, graph: torch.fx.Graph, values: dict[torch.fx.Node, Any], op: str = "", where: str = "") -> Any:
        """Values of the graph's outputs; ``op`` and ``where`` name what a subgraph was decomposed from."""
        for node in graph.nodes:
            if node.op == "call_function":
                values[node] = self._call(node, values, op, where)
            elif node.op == "output":
                return torch.fx.node.map_aggregate(node.args[0], lambda item: _fetch(item, values))
            elif node.op == "get_attr":
                constant = getattr(graph.owning_module, str(node.target))
                values[node] = constant if isinstance(constant, torch.fx.GraphModule) else opaque(node, _CONSTANT)
        return None

    def _placeholder(self, node: torch.fx.Node, source: Any) -> Any:
        if source.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or source.target not in self.state:
            return opaque(node, "input" if source.kind is InputKind.USER_INPUT else _CONSTANT)
        name = source.target
        if name not in self.parameters:
            tensor = self.state[name]
            reason = "table of integers" if wide_type(tensor) is None else ""
            own = Value([leaf(size, reason) for size in tensor.shape], name=name)
            alias = self.first.setdefault(identity(tensor), own)
            self.parameters[name] = Value(alias.axes, name=name)
            self.traced.tensors.append(alias.axes)
            if alias.name != name and node.users:
                self.uses[alias.name] = self.uses.get(alias.name) or "a tied weight"
        return self.parameters[name]

    def _call(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any], op: str, where: str) -> Any:
        if node.target is operator.getitem:
            return _item(node, values)
        name, where = op_name(node), where or module_path(node)
        args: Any = torch.fx.node.map_aggregate(node.args, lambda item: _fetch(item, values))
        kwargs: Any = torch.fx.node.map_aggregate(node.kwargs, lambda item: _fetch(item, values))
        for value in values_in((args, kwargs)):
            if value.name:
                self.uses.setdefault(value.name, f"{op or name} in {where or 'the model'}")
        if name in WRAPPERS:
            index = next(i for i, item in enumerate(args) if isinstance(item, torch.fx.GraphModule))
            return self._graph(args[index].graph, _bound(args[index].graph, args[index + 1 :]), op, where)
        shapes = shapes_of(node, f"{op or name} in {where or 'the model'}")
        if not shapes:  # a number, or an assertion
            return node.meta.get("val") if isinstance(node.meta.get("val"), int | float) else None
        known = len(self.traced.tensors)
        rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in getattr(node.target, "tags", ()) else None)
        try:
            result = self._by_rule(rule, node, shapes, args, kwargs)
        except NotCoveredError:
            return self._without_rule(node, args, kwargs, op or name, where)
        given, made = values_in((args, kwargs)), values_in(result)
        if not self.traced.in_part:
            written = [] if self.traced.sums else [value.axes for value in made]
            self.reads.append(([value.axes for value in given], written))
        settle_op([*(value.axes for value in given), *self.traced.tensors[known:]], self.traced.unlike)
        self.traced.unlike.clear()
        stays = stays_uniform(node, rule, values)
        for value in made:
            value.uniform = (value.uniform or stays) and not may_be_written(node)
        return result

    def _by_rule(
        self,
        rule: Callable[..., Any] | None,
        node: torch.fx.Node,
        shapes: list[tuple[int, ...]],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """What a rule makes of an op, in the op's shapes; a ``NotCoveredError`` where it does not know the case."""
        if rule is None:
            raise NotCoveredError
        self.traced.output_shapes, self.traced.masks = shapes, masks_of(node)
        self.traced.in_part = self.traced.sums = False
        outs = outs_of(node)
        result = rule(self.traced, *args, **{key: value for key, value in kwargs.items() if key not in outs})
        for value, out in zip(values_in(result), [kwargs[key] for key in outs if key in kwargs], strict=False):
            if value.shape != out.shape:
                raise NotCoveredError
            for axis, written in zip(value.axes, out.axes, strict=True):
                self.traced.tie(axis, written)
        used = used_outputs(node)
        for index, (value, shape) in enumerate(zip(values_in(result), shapes, strict=False)):
            if value.shape != shape and index in used:  # a release of torch that gets the op's shape wrong
                raise NotCoveredError
            self.traced.tensors.append(value.axes)
        return result

    def _without_rule(self, node: torch.fx.Node, args: Any, kwargs: Any, op: str, where: str) -> Any:
        """Walk what the op decomposes into; fix what it touches where that fails, too."""
        touched = [axis for value in values_in((args, kwargs)) for axis in value.axes]
        if all(is_fixed(axis) for axis in touched):
            return opaque(node, op if touched else _CONSTANT)
        graph = decompose(node) if op == op_name(node) else None  # one level: what is left in there has no rule
        if graph is not None:
            free = [axis for axis in touched if not is_fixed(axis)]
            result = self._graph(graph, _bound(graph, values_in((args, kwargs))), op, where)
            if any(end.reason == _CONSTANT for axis in free for end in leaves(axis)):  # it counts with ``arange``, say
                self._note(op, where)
            return result
        self._note(op, where)
        for value in values_in((args, kwargs)):
            self.traced.fix(value, op)
        return opaque(node, op)

    def _note(self, op: str, where: str) -> None:
        """Note that an op fixes what it touches."""
        if self.strict:
            raise UnsupportedOpError(
                f"{op} in {where or 'the model'}: no rule covers it; trace(..., strict=False) fixes the axes that it "
                "touches, fedrebasin.rules.rule adds a rule"
            )
        self.fixed_ops.setdefault(op, where)


def values_in(argument: Any) -> list[Value]:
    """All tensors of an argument, however nested, in order."""
    if isinstance(argument, Value):
        return [argument]
    if isinstance(argument, tuple | list):
        return [value for item in argument for value in values_in(item)]
    if isinstance(argument, Mapping):
        return values_in(list(argument.values()))
    return []


def opaque(node: torch.fx.Node, reason: str) -> Any:
    """What a node returns, with every axis fixed."""

    def fixed(tensor: Any) -> Any:
        return Value([leaf(int(size), reason) for size in tensor.shape]) if isinstance(tensor, Tensor) else tensor

    value = node.meta.get("val")
    return tuple(fixed(tensor) for tensor in value) if isinstance(value, tuple | list) else fixed(value)


def _item(node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Any:
    """One of the tensors that an op returns."""
    if not node.users:
        return None
    origin, index = cast("tuple[torch.fx.Node, int]", node.args[:2])
    source = values[origin]
    return source[index] if isinstance(source, tuple | list) else source


def _bound(graph: torch.fx.Graph, arguments: Sequence[Any]) -> dict[torch.fx.Node, Any]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return dict(zip(placeholders, arguments, strict=True))


def _fetch(argument: Any, values: dict[torch.fx.Node, Any]) -> Any:
    value = values[argument] if isinstance(argument, torch.fx.Node) else argument
    if isinstance(value, Value) and value.uniform:  # a constant ties nothing: new axes for every use
        return Value([leaf(axis.size) for axis in value.axes])
    return value
