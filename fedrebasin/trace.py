"""trace(model, example_inputs): the permutation spec of a model, read off its exported graph.

The graph of ``torch.export`` is walked once. Every tensor is a list of axes (:mod:`fedrebasin.axes`); one rule
per op (:mod:`fedrebasin.rules`) says which axes the op ties. Inputs and outputs are fixed, parameters start
free, and what is free at the end may be permuted without changing the network's function.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fedrebasin.axes import leaf
from fedrebasin.batches import evaluation_mode, split_inputs
from fedrebasin.errors import TraceError, UnsupportedOpError
from fedrebasin.families import drop_dangling_families, fix_repeated_factors
from fedrebasin.freeze import freeze, name_leaves
from fedrebasin.layout import Layout
from fedrebasin.rules import RULES, NotCoveredError, Traced, Value, op_name
from fedrebasin.spec import PermutationSpec


def trace(model: nn.Module, example_inputs: Any, *, strict: bool = False) -> PermutationSpec:
    """Derive which axes of which tensors of ``model`` one permutation ties.

    Parameters
    ----------
    model : nn.Module
        Its weights and its training mode are left as they are.
    example_inputs : Tensor, tuple or dict
        What the model is called with: one input, positional inputs, or keywords.
    strict : bool
        Raise on the first op that no rule covers, instead of fixing the axes that it touches.

    Returns
    -------
    PermutationSpec
        Not yet proved: pass it to :func:`fedrebasin.check_spec`.

    Raises
    ------
    TraceError
        If ``torch.export`` cannot export the model with these inputs.
    UnsupportedOpError
        With ``strict``, if an op has no rule.

    References
    ----------
    Ainsworth, Hayase, Srinivasa (2023), "Git Re-Basin", Section 3, where such specs are written by hand.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> spec = trace(net, (torch.randn(3, 4),))
    >>> spec.tied["0"]
    (Axis(name='0.weight', dim=0), Axis(name='0.bias', dim=0), Axis(name='2.weight', dim=1))
    """
    args, kwargs = split_inputs(example_inputs)
    walk = _Walk(_export(model, args, kwargs), model.state_dict(keep_vars=True), strict)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return walk.spec(parameters, len(args))


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    if not isinstance(model, nn.Module):
        raise TraceError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    with evaluation_mode(model), torch.no_grad():
        try:
            return torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:  # export raises kinds of its own for every way in which it can fail
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TraceError(
                f"model: torch.export cannot export {type(model).__name__} with these example_inputs "
                f"({type(error).__name__}: {first_line}); check that model(*example_inputs) runs and that no branch "
                "depends on the data, or hand over a spec written for this model"
            ) from error


class _Walk:
    """One pass over an exported graph."""

    def __init__(self, program: ExportedProgram, state: dict[str, Tensor], strict: bool) -> None:
        self.strict = strict
        self.traced = Traced()
        self.state = state
        self.values: dict[torch.fx.Node, Any] = {}
        self.parameters: dict[str, Value] = {}
        self.fixed_ops: dict[str, str] = {}
        self.uses: dict[str, str] = {}
        sources = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node, sources[node.name])
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                torch.fx.node.map_arg(node.args, self._fix_output)
            else:
                self.values[node] = self._opaque(node, "constant")

    def _placeholder(self, node: torch.fx.Node, source: Any) -> Any:
        kept = {InputKind.PARAMETER, InputKind.BUFFER}
        if source.kind in kept and source.target in self.state:
            tensor = self.state[source.target]
            alias = next((value for name, value in self.parameters.items() if _shares(self.state[name], tensor)), None)
            value = Value(alias.axes if alias else [leaf(size) for size in tensor.shape], name=source.target)
            self.parameters[source.target] = value
            self.traced.tensors.append(value.axes)
            if alias is not None and node.users:
                self.uses[alias.name] = self.uses.get(alias.name) or "a tied weight"
            return value
        return self._opaque(node, "input" if source.kind is InputKind.USER_INPUT else "constant")

    def _call(self, node: torch.fx.Node) -> Any:
        if node.target is operator.getitem:
            origin, index = cast("tuple[torch.fx.Node, int]", node.args[:2])
            source = self.values[origin]
            return source[index] if isinstance(source, tuple | list) else source
        name, where = op_name(node), _module_path(node)
        args = torch.fx.node.map_aggregate(node.args, self._fetch)
        kwargs = torch.fx.node.map_aggregate(node.kwargs, self._fetch)
        for value in _values((args, kwargs)):
            if value.name:
                self.uses.setdefault(value.name, f"{name} in {where or 'the model'}")
        self.traced.output_shapes = [tuple(tensor.shape) for tensor in _tensors(node.meta.get("val"))]
        rule = RULES.get(name)
        if not self.traced.output_shapes:
            return None  # an assertion
        if rule is None and not any(value.axes for value in _values((args, kwargs))):
            return self._opaque(node, "constant")
        try:
            if rule is None:
                raise NotCoveredError
            result = rule(self.traced, *args, **kwargs)
        except NotCoveredError:
            return self._fix_op(node, name, where, (args, kwargs))
        for value, shape in zip(_values(result), self.traced.output_shapes, strict=False):
            if value.shape != shape:
                raise TraceError(
                    f"rule for {name}: expected an output of shape {shape}; got {value.shape}; please report it"
                )
            self.traced.tensors.append(value.axes)
        if isinstance(result, Value) and result.uniform and _may_be_written(node):
            result.uniform = False
        return result

    def _fix_op(self, node: torch.fx.Node, name: str, where: str, arguments: Any) -> Any:
        if self.strict:
            raise UnsupportedOpError(
                f"{name} in {where or 'the model'}: no rule covers it; trace(..., strict=False) fixes the axes that it "
                "touches, fedrebasin.rules.rule adds a rule"
            )
        if name not in self.fixed_ops:
            self.fixed_ops[name] = where
        for value in _values(arguments):
            self.traced.fix(value, name)
        return self._opaque(node, name)

    def _fetch(self, argument: Any) -> Any:
        if not isinstance(argument, torch.fx.Node):
            return argument
        value = self.values[argument]
        if isinstance(value, Value) and value.uniform:  # a constant ties nothing: new axes for every use
            return Value([leaf(axis.size) for axis in value.axes])
        return value

    def _fix_output(self, node: torch.fx.Node) -> torch.fx.Node:
        for value in _values(self.values[node]):
            self.traced.fix(value, "output")
        return node

    def _opaque(self, node: torch.fx.Node, reason: str) -> Any:
        def fixed(tensor: Any) -> Any:
            return Value([leaf(int(size), reason) for size in tensor.shape]) if isinstance(tensor, Tensor) else tensor

        value = node.meta.get("val")
        return tuple(fixed(tensor) for tensor in value) if isinstance(value, tuple | list) else fixed(value)

    def spec(self, parameters: set[str], inputs: int) -> PermutationSpec:
        """Turn the tied axes into an immutable spec."""
        for name, value in self.parameters.items():
            if name not in parameters and name not in self.traced.statistics:
                self.traced.fix(value, "buffer")
            elif name not in self.uses and not any(
                _shares(self.state[name], self.state[other]) for other in self.uses if other in self.state
            ):
                self.traced.fix(value, "not used in evaluation mode")
        fix_repeated_factors(axis for value in self.parameters.values() for axis in value.axes)
        drop_dangling_families(self.traced.tensors)
        names = name_leaves({name: value.axes for name, value in self.parameters.items()})
        axes: dict[str, tuple[Layout, ...]] = {}
        for name, tensor in self.state.items():
            traced = self.parameters.get(name)
            nodes = traced.axes if traced else [leaf(size, "not in the exported graph") for size in tensor.shape]
            axes[name] = tuple(freeze(node, names) for node in nodes)
        return PermutationSpec(
            axes=axes,
            buffers=tuple(name for name in self.state if name not in parameters),
            uses=self.uses,
            notes=tuple(
                f"no rule for {op} (first in {where or 'the model'}): its axes stay fixed"
                for op, where in self.fixed_ops.items()
            ),
            inputs=inputs,
        )


def _values(argument: Any) -> list[Value]:
    if isinstance(argument, Value):
        return [argument]
    if isinstance(argument, Mapping):
        return _values(list(argument.values()))
    if isinstance(argument, tuple | list):
        return [value for item in argument for value in _values(item)]
    return []


def _tensors(value: Any) -> list[Tensor]:
    return [item for item in (value if isinstance(value, tuple | list) else [value]) if isinstance(item, Tensor)]


def _shares(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.shape == other.shape and one.data_ptr() == other.data_ptr() and one.data_ptr() != 0 and one.numel() > 0
    )


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _may_be_written(node: torch.fx.Node) -> bool:
    """Whether some use of the node's tensor writes into it or keeps a view of it."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None or any(argument.alias_info is not None for argument in schema.arguments):
            return True
    return False
