"""trace(model, example_inputs): the permutation spec of a model, read off its exported graph.

The graph of ``torch.export`` is walked once (:mod:`fedrebasin.walk`). Every tensor is a list of axes
(:mod:`fedrebasin.axes`); one rule per op (:mod:`fedrebasin.rules`) says which axes the op ties. Inputs and
outputs are fixed, parameters start free, and what is free at the end may be permuted without changing the
network's function. Parameters that only training uses (auxiliary heads) are tied by a second graph.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fedrebasin.axes import leaf
from fedrebasin.axes.families import settle
from fedrebasin.axes.freeze import freeze_all
from fedrebasin.batches import mode_of, split_inputs, unwrapped
from fedrebasin.errors import TraceError, first_line
from fedrebasin.spec import PermutationSpec
from fedrebasin.walk import Walk, identity


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
    return spec_of(export_model(model, example_inputs), strict=strict)


@dataclass(frozen=True)
class Exported:
    """A model's graphs and what they leave out; made by :func:`export_model`, read by :func:`spec_of`.

    ``training`` is there only if some parameter is not used in evaluation mode; if it was needed and could not be
    made, ``failure`` says why. ``mutated`` names the buffers that a forward pass in training mode writes.
    """

    program: ExportedProgram
    training: ExportedProgram | None
    failure: str
    state: dict[str, Tensor]
    parameters: frozenset[str]
    mutated: frozenset[str]
    inputs: int


def export_model(model: nn.Module, example_inputs: Any) -> Exported:
    """Export ``model`` with ``torch.export``; parameters and raised errors as for :func:`trace`."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    args, kwargs = split_inputs(example_inputs)
    model = unwrapped(model)
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            kind = "sparse" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TraceError(
                f"model: expected dense tensors in its state dict; {name!r} is {kind}; keep it out (persistent=False)"
            )
    try:
        program = _export(model, args, kwargs, training=False)
    except Exception as error:  # export raises kinds of its own for every way in which it can fail
        raise TraceError(
            f"model: torch.export cannot export {type(model).__name__} with these example_inputs "
            f"({first_line(error)}); check that model(*example_inputs) runs and that no branch "
            "depends on the data, or hand over a spec written for this model"
        ) from error
    training, failure = None, ""
    if _unused(program, state):
        try:
            training = _export(model, args, kwargs, training=True)
        except Exception as error:  # noqa: BLE001 - kinds of its own here, too
            failure = first_line(error)
    return Exported(
        program=program,
        training=training,
        failure=failure,
        state=state,
        parameters=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        mutated=_mutated_buffers(model, args, kwargs),
        inputs=len(args),
    )


def spec_of(exported: Exported, *, strict: bool = False) -> PermutationSpec:
    """Walk the graphs and turn the tied axes into a spec; parameters and raised errors as for :func:`trace`."""
    with _collection_paused():
        return _spec_of(exported, strict=strict)


def _spec_of(exported: Exported, *, strict: bool) -> PermutationSpec:
    walk = Walk(exported.state, strict=strict)
    walk.program(exported.program)
    if exported.training is not None:
        walk.program(exported.training)
    state = exported.state
    used = {identity(state[name]) for name in walk.uses}
    for name, value in walk.parameters.items():
        if name not in exported.parameters and name not in walk.traced.statistics | exported.mutated:
            walk.traced.fix(value, "table that training does not change")
        elif identity(state[name]) not in used:
            walk.traced.fix(value, f"not used in evaluation mode{exported.failure and '; training mode fails'}")
    settle(walk.traced.tensors)
    found = {
        name: walk.parameters[name].axes
        if name in walk.parameters
        else [leaf(size, "not in the exported graph") for size in tensor.shape]
        for name, tensor in state.items()
    }
    notes = [
        f"no rule for {op} (first in {where or 'the model'}): its axes stay fixed"
        for op, where in walk.fixed_ops.items()
    ]
    if exported.failure:
        notes.append(
            f"some parameters are not used in evaluation mode, and the model cannot be exported in training mode "
            f"({exported.failure}): they stay fixed, and further training sees them beside permuted units"
        )
    return PermutationSpec(
        axes=freeze_all(found),
        buffers=tuple(name for name in state if name not in exported.parameters),
        uses=walk.uses,
        notes=tuple(notes),
        inputs=exported.inputs,
        training=exported.training is not None,
    )


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Without garbage collection: one pass over all that torch and an export hold takes longer than the whole walk."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back attributes, and what is in them, that a forward pass sets: tensors without data may be left in them."""
    before = [
        (
            attributes,
            dict(attributes),
            [(held, held.copy()) for held in attributes.values() if isinstance(held, dict | list)],
        )
        for attributes in map(vars, model.modules())
    ]
    try:
        yield
    finally:
        for attributes, kept, containers in before:
            attributes.clear()
            attributes.update(kept)
            for held, content in containers:
                held.clear()
                held.update(content) if isinstance(held, dict) else held.extend(content)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> ExportedProgram:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs tracebacks of failures that are reported here in one line
    try:
        with _attributes_kept(model), mode_of(model, training=training), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about attributes that it sets and puts back (nn.LSTM, old weight norm)
            return torch.export.export(model, args, kwargs, strict=False)
    finally:
        logging.disable(before)


def _unused(program: ExportedProgram, state: dict[str, Tensor]) -> bool:
    """Whether some parameter has no user in the graph, and is not another name of one that has."""
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and targets[node.name] in state]
    used = {identity(state[str(targets[node.name])]) for node in nodes if node.users}
    return any(isinstance(tensor, nn.Parameter) and identity(tensor) not in used for tensor in state.values())


def _mutated_buffers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """The buffers that a forward pass in training mode writes, seen on a copy without memory."""
    if not any(buffer.is_floating_point() and buffer.ndim for buffer in model.buffers()):
        return frozenset()
    try:
        shadow = copy.deepcopy(model, _without_memory(model)).to("meta")
        before = {name: (buffer, buffer._version) for name, buffer in shadow.named_buffers()}
        inputs, keywords = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        with torch.no_grad():
            shadow.train()(*inputs, **keywords)
    except Exception:  # noqa: BLE001 - what does not run without memory keeps its buffers fixed, but for running statistics
        return frozenset()
    after = dict(shadow.named_buffers())
    return frozenset(
        name for name, (buffer, version) in before.items() if after[name] is not buffer or buffer._version != version
    )


def _without_memory(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy that puts meta tensors in the place of parameters and buffers."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else tensor.detach().to("meta")
        for tensor in (*model.parameters(), *model.buffers(), *held)
    }
