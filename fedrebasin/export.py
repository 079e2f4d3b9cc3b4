"""A model's graphs by ``torch.export``: in evaluation mode, in training mode where that uses more, all sizes known.

Where an inner size depends on the data (edges of a graph network, the number of graphs in a batch), the graph is run
once on the example inputs, and holds what came out. Where a branch does, there are several graphs (``branches.py``).
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fedrebasin.batches import split_inputs
from fedrebasin.branches import ASKED, Ways, deciding_nodes, export_ways
from fedrebasin.by_mode import differs_in_training
from fedrebasin.copies import followers
from fedrebasin.errors import TraceError, first_line
from fedrebasin.idle import drop_idle
from fedrebasin.memory import identity
from fedrebasin.modules import mode_of, unwrapped, without_cache
from fedrebasin.packed import packed_as_padded
from fedrebasin.sizes import settle_sizes
from fedrebasin.written import written_buffers

_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time: export changes what all threads share (warnings, loggers, stderr, torch's functions)."""
    with _LOCK:
        yield


@dataclass(frozen=True)
class Exported:
    """A model's graphs and what they leave out; made by :func:`export_model`, read by :func:`spec_of`.

    Those of training mode are among the ``programs`` (``training``) only if some parameter, or a buffer that training
    writes, is not used in evaluation mode, or if the model's code gives something else there (``by_mode.py``); if they
    were needed and could not be made, ``failure`` says why. ``written``
    names the buffers that a forward pass in training mode writes: all of them or, where no graph shows what some go
    with, none. ``unused`` names parameters that are in no graph, but for modules that look like copies, which
    ``followers`` maps to their originals. ``more_ways``: other inputs may take a way that is in no graph. ``differs``:
    all are used in evaluation, but training gives something else.
    """

    programs: tuple[ExportedProgram, ...]
    training: bool
    failure: str
    state: dict[str, Tensor]
    parameters: frozenset[str]
    written: frozenset[str]
    unused: tuple[str, ...]
    followers: dict[str, str]
    more_ways: bool
    inputs: int
    differs: bool = False


@alone()
def export_model(model: nn.Module, example_inputs: Any) -> Exported:
    """Export ``model`` with ``torch.export``; parameters and raised errors as for :func:`trace`."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    args, kwargs = split_inputs(example_inputs)
    model = unwrapped(model)
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        fault = _fault(value)
        if fault:
            raise TraceError(f"model: expected dense tensors in its state dict; {name!r} is {fault}")
    _refuse_other_names(model, state)
    try:
        ways = _export(model, args, kwargs, training=False)
    except Exception as error:  # export raises kinds of its own for every way in which it can fail
        check = "check that model(*example_inputs) runs"
        if isinstance(error, NameError) and sys.version_info >= (3, 14):  # torch.export looks annotations up
            check += ", put 'from __future__ import annotations' first in its file"
        if "'NoneType'" in str(error):  # transformers make no mask of ones while a model is exported
            check += ", give it what it makes itself where nothing is given (an attention_mask of ones)"
        raise TraceError(
            f"model: torch.export cannot export {type(model).__name__} with these example_inputs "
            f"({first_line(error)}); {check}, or hand over a spec written for this model"
        ) from error
    training, failure = Ways(), ""
    parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    written = written_buffers(model, args, kwargs)
    unused = _unused(ways.programs, state).intersection(parameters | written)
    differs = not unused and differs_in_training(model, args, kwargs)
    if unused or differs:
        try:
            training = _export(model, args, kwargs, training=True)
            unused &= _unused(training.programs, state)
        except Exception as error:  # noqa: BLE001 - kinds of its own here, too
            failure = first_line(error)
            written = frozenset() if unused & written else written
    found = followers(model, unused)
    copies = tuple(f"{name}." for name in found)
    outside = [name for name in state if name in parameters and not name.startswith(copies)]
    programs = [*ways.programs, *training.programs]
    if ways.cut or training.cut:
        _refuse_left_out(model, _unused(programs, state, deciding=True).intersection(outside))
    return Exported(
        programs=tuple(programs),
        training=bool(training.programs),
        failure=failure,
        state=state,
        parameters=parameters,
        written=written,
        unused=tuple(name for name in outside if name in unused),
        followers=found,
        more_ways=ways.cut or training.cut or ways.mixed or training.mixed,
        inputs=len(args),
        differs=differs,
    )


def _refuse_left_out(model: nn.Module, names: set[str]) -> None:
    if names:
        raise TraceError(
            f"example_inputs: the way through {type(model).__name__}.forward depends on the data, and those that were "
            f"followed leave out {min(names)!r}{' and others' if len(names) > 1 else ''}, which other inputs may use; "
            "choose inputs that use every parameter, or hand over a spec written for this model"
        )


def _refuse_other_names(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Graphs have the names of parameters and buffers: under other names a state dict is in none of them."""
    parameters = dict(nn.Module.named_parameters(model, remove_duplicate=False))  # a wrapper may have its own
    known = {*parameters, *(name for name, _ in nn.Module.named_buffers(model, remove_duplicate=False))}
    strange, missing = [name for name in state if name not in known], [name for name in parameters if name not in state]
    if strange and missing:
        raise TraceError(
            f"model: expected a state dict with the names of the model's parameters; it has {strange[0]!r}, and not "
            f"{missing[0]!r}; pass the model without what renames them (torch's checkpoint_wrapper, a hook, a "
            "state_dict of its own): a module that has the state dict's names"
        )


def _fault(value: object) -> str:
    """Why an entry of a state dict cannot be permuted, and what to do, or ``""``."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}; leave it out of state_dict()"
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        return "not initialised; run the model once before"
    return "" if value.layout is torch.strided else "sparse; register it with persistent=False"


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
                if not _same(held, content):  # one that cannot be changed (a config of diffusers) has not been
                    held.clear()
                    held.update(content) if isinstance(held, dict) else held.extend(content)


def _same(first: Any, second: Any) -> bool:
    """Whether two dicts or two lists hold the same objects in the same order."""
    items = [[*held.keys(), *held.values()] if isinstance(held, dict) else held for held in (first, second)]
    return len(items[0]) == len(items[1]) and all(one is other for one, other in zip(*items, strict=True))


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> Ways:
    """The graphs of a mode."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs tracebacks of failures that are reported here in one line
    try:
        with (
            _attributes_kept(model),
            without_cache(model),
            packed_as_padded(),
            mode_of(model, training=training),
            torch.no_grad(),
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),  # graphs that torch prints when it fails
        ):
            warnings.simplefilter("ignore")  # about attributes that it sets and puts back (nn.LSTM, old weight norm)
            try:
                ways = Ways([torch.export.export(model, args, kwargs, strict=False)])
            except ASKED:
                ways = export_ways(model, args, kwargs)
            else:
                settle_sizes(ways.programs[0], args, kwargs)
            for program in ways.programs:
                drop_idle(program)
            return ways
    finally:
        logging.disable(before)


def _unused(programs: list[ExportedProgram], state: dict[str, Tensor], *, deciding: bool = False) -> set[str]:
    """Tensors that no graph uses, with ``deciding`` but to choose a way, and that are no other name of one in use."""
    used = set()
    for program in programs:
        targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
        idle = deciding_nodes(program) if deciding else set()
        for node in program.graph.nodes:
            if node.op == "placeholder" and targets[node.name] in state and not idle.issuperset(node.users):
                used.add(identity(state[str(targets[node.name])]))
    return {name for name, tensor in state.items() if identity(tensor) not in used}
