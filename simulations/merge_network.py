"""What the files of ``fedrebasin merge`` are the weights of: a traced and proved module, or a saved spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedrebasin.errors import RebasinError, SpecMismatchError, UsageError
from fedrebasin.prefixes import common_prefix, wrappers_of
from fedrebasin.simulations.inspection import proved, traced_model
from fedrebasin.simulations.inspection_command import quiet
from fedrebasin.simulations.inspection_factory import build, importable_here, load_factory, parse_kwargs
from fedrebasin.simulations.inspection_inputs import Input, parse_inputs
from fedrebasin.simulations.merge_memory import check_proof
from fedrebasin.spec import PermutationSpec
from fedrebasin.stored import StoredState


@dataclass(frozen=True)
class Network:
    """The spec of what the files hold, ``spec``, and that of all of the module's tensors, ``full``.

    With a model there are ``net``, where it has weights, its ``example`` and ``inputs``; ``shared`` says which tensor
    of the file stands for one that the file leaves out, because the model uses the same tensor under two names.
    """

    spec: PermutationSpec
    full: PermutationSpec
    net: nn.Module | None = None
    example: Any = None
    inputs: tuple[Input, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict that the module loads."""
        return {**state, **{name: state[kept] for name, kept in self.shared.items()}}


def from_spec(path: Path, *, check: bool) -> Network:
    """Load a saved spec; one without the mark of a passed proof is refused unless ``check`` is off.

    Raises
    ------
    RebasinError
        If the file is no spec, or not proved.
    """
    spec = PermutationSpec.load(path)
    if check and not spec.checked:
        raise UsageError(
            f"--spec: {path} is not proved (fedrebasin inspect MODULE:NET --input SHAPE --save {path} --force "
            "proves it); give the --model as well known, or --no-check"
        )
    return Network(spec, spec)


def from_model(
    model: str,
    inputs: Sequence[str],
    states: Sequence[StoredState],
    *,
    kwargs: str = "",
    vocab: int | None = None,
    check: bool = True,
    held: bool = True,
    limit: int | None = None,
    seed: int = 0,
) -> Network:
    """Build, trace and prove ``module:Class``; with neither ``check`` nor ``held`` it is built without weights.

    Raises
    ------
    RebasinError
        If it cannot be built, traced or proved, or the proof does not fit into ``limit`` bytes.
    """
    parsed, arguments = parse_inputs(inputs), parse_kwargs(kwargs)
    if check:
        check_proof(limit, states)
    with importable_here(), quiet():
        factory = load_factory(model)

        def traced(device: str) -> Any:
            return traced_model(
                *(lambda: build(factory, arguments), parsed), device=device, name=model, vocab=vocab, seed=seed
            )

        if check or held or isinstance(factory, nn.Module):
            found, net, example = traced("cpu")
        else:
            try:
                found, net, example = traced("meta")
            except RebasinError:
                if limit is not None:
                    raise
                found, net, example = traced("cpu")
        if check:
            found = proved(found, net, example, seed=seed)
    shared = _shared(net, states[0])
    spec = found.spec.only([name for name in found.spec.axes if name not in shared], fix=False)
    on_meta = any(tensor.is_meta for tensor in net.state_dict().values())
    return Network(spec, found.spec, None if on_meta else net.eval(), example, parsed, shared)


def check_fit(spec: PermutationSpec, states: Sequence[StoredState]) -> None:
    """Raise :class:`SpecMismatchError` unless every file holds the tensors of the spec."""
    for state in states:
        try:
            spec.check_state(state.described, str(state.path))
        except SpecMismatchError as error:
            prefix, missing = common_prefix(state, spec.axes), common_prefix(spec.axes, state)
            if prefix:
                raise SpecMismatchError(
                    f"{state.path}: its tensors' names have the prefix {prefix!r}{wrappers_of(prefix)}, those of the "
                    f"model do not; take it off: safetensors.torch.save_file({{name.removeprefix({prefix!r}): tensor "
                    "for name, tensor in safetensors.torch.load_file(path).items()}, 'model.safetensors')"
                ) from error
            if missing:
                raise SpecMismatchError(
                    f"{state.path}: its tensors' names lack the prefix {missing!r}{wrappers_of(missing)} of the "
                    "model's; give the --model or --spec without its wrapper"
                ) from error
            raise SpecMismatchError(f"{error}, and the --model or --spec of these files") from error


def _shared(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    names: dict[int, list[str]] = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    found = {}
    for group in names.values():
        kept = [name for name in group if name in state]
        if kept:
            found.update({name: kept[0] for name in group if name not in state})
    return found


def sizes(example: Any) -> tuple[int, ...]:
    """The shape of one example of the first input, without the batch.

    >>> import torch
    >>> sizes((torch.zeros(2, 3, 8, 8),))
    (3, 8, 8)
    """
    first = next(iter(example.values())) if isinstance(example, Mapping) else example[0]
    return tuple(first.shape[1:])
