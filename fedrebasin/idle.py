"""What a graph computes and nothing uses: it goes before the walk, so that it ties and fixes nothing."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from fedrebasin.nodes import WRAPPERS
from fedrebasin.rules import op_name

#: Ops that take shape, type or device of one argument, by its position, and none of its values.
_NO_VALUES_OF = {
    **dict.fromkeys(("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like"), 0),
    **dict.fromkeys(("zeros_like", "new_empty", "new_full", "new_ones", "new_zeros"), 0),
    **dict.fromkeys(("sym_numel", "sym_size", "sym_stride", "_assert_tensor_metadata"), 0),
    **dict.fromkeys(("expand_as", "type_as"), 1),
}


def drop_idle(program: ExportedProgram) -> None:
    """Erase nodes that lead to no output and to no effect, those before ``ones_like`` and its like among them.

    The way to and from a tensor of the state dict that nothing else reads stays: it may be what a model keeps beside
    its outputs (a loss that it leaves in an attribute), and shows what that tensor goes with.

    >>> class Ones(torch.nn.Linear):
    ...     def forward(self, x):
    ...         h = super().forward(x)
    ...         return h * torch.ones_like(h[:, :1])
    >>> program = torch.export.export(Ones(2, 4), (torch.zeros(3, 2),), strict=False)
    >>> drop_idle(program)
    >>> [op_name(node) for node in program.graph.nodes if node.op == "call_function"]
    ['linear', 'ones_like', 'mul']
    """
    kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
    state = (InputKind.PARAMETER, InputKind.BUFFER)
    _drop(program.graph, {node for node in _places(program.graph) if kinds[node.name] in state})


def _places(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _drop(graph: Graph, held: set[Node]) -> None:
    """Erase what is idle; ``held`` are the placeholders of tensors of the state dict."""
    for node in graph.nodes:  # around autocast, export leaves out some of those that use a node
        for given in node.all_input_nodes:
            given.users.setdefault(node)
    for node in graph.nodes:
        place = _NO_VALUES_OF.get(op_name(node)) if node.op == "call_function" else None
        if place is not None:  # the walk reads the shape off the result
            node.args = tuple(None if at == place else argument for at, argument in enumerate(node.args))
        for inner, given in _inside(node):
            _drop(inner, {own for own, outer in zip(_places(inner), given, strict=True) if outer in held})
    idle = _leading_nowhere(graph)
    beside = {node for node in held if node.users and idle.issuperset(node.users)}
    for node in graph.nodes:  # what comes of them
        if node in idle and not beside.isdisjoint(node.all_input_nodes):
            beside.add(node)
    for node in reversed(graph.nodes):  # what they meet
        if node in idle and not beside.isdisjoint(node.users):
            beside.add(node)
    for node in reversed(list(graph.nodes)):
        if node in idle - beside:
            graph.erase_node(node)


def _leading_nowhere(graph: Graph) -> set[Node]:
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if found.issuperset(node.users) and node.op in ("call_function", "get_attr") and not _acts(node):
            found.add(node)
    return found


def _acts(node: Node) -> bool:
    """Whether an op may do more than return tensors: write, check, or what is not known of it."""
    schema = getattr(node.target, "_schema", None)
    if node.op == "get_attr" or node.target is operator.getitem:
        return False
    if schema is None:
        inner = [one for graph, _ in _inside(node) for one in graph.nodes if one.op == "call_function"]
        return op_name(node) not in WRAPPERS or any(map(_acts, inner))
    writes = schema.is_mutable or any(argument.name == "running_mean" for argument in schema.arguments)  # unsaid
    return bool(writes or not schema.returns)


def _inside(node: Node) -> Iterator[tuple[Graph, tuple[object, ...]]]:
    """The graph that a wrapper runs, and what it is given."""
    if node.op == "call_function" and op_name(node) in WRAPPERS:
        for at, argument in enumerate(node.args):
            if isinstance(argument, Node) and argument.op == "get_attr":
                module = getattr(node.graph.owning_module, str(argument.target))
                if isinstance(module, torch.fx.GraphModule):
                    yield module.graph, node.args[at + 1 :]
