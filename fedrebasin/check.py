"""check_spec: prove on random weights that a spec's permutations keep the network's function."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from torch import nn

from fedrebasin.errors import InvalidSpecError, RebasinError
from fedrebasin.perms import Perms, identity_perms
from fedrebasin.proof import Proof, cycles, trials
from fedrebasin.redraw import stir
from fedrebasin.resizable import seen_unread
from fedrebasin.spec import PermutationSpec
from fedrebasin.trace import trace

_UNSEEN = (
    "no output on random weights depends on what is permuted, so the proof has seen nothing; give example_inputs that "
    "reach it (an empty batch or a mask of zeros hides all)"
)


def check_spec(model: nn.Module, spec: PermutationSpec, example_inputs: Any, *, seed: int = 0) -> PermutationSpec:
    """Prove that no permutation of ``spec`` changes the function of ``model``.

    Every parameter, running statistic and floating input is drawn anew (:mod:`fedrebasin.redraw`; on default weights a
    check sees almost nothing), all permutations are drawn at random, and the outputs in float64 are compared. Those of
    few units, which may be equal by chance, are also drawn so that of any two one moves alone.

    Parameters
    ----------
    model : nn.Module
        Only its architecture is used; its weights and mode are left as they are.
    spec : PermutationSpec
    example_inputs : Tensor, tuple or dict
        As for :func:`fedrebasin.trace`.
    seed : int
        Seed of all draws.

    Returns
    -------
    PermutationSpec
        The spec, with the mark of the passed check, with what it has found for ``whole``, and with a note where no
        output depends on what is permuted.

    Raises
    ------
    InvalidSpecError
        If an output changes; the message names the permutation, the tensor and the op.
    SpecMismatchError
        If the spec is of another architecture.

    Examples
    --------
    >>> import torch
    >>> from fedrebasin import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> check_spec(net, trace(net, (torch.randn(3, 4),)), (torch.randn(3, 4),)).checked
    True
    """
    spec.check_state(model.state_dict(), "model")
    proof = Proof(model, spec, example_inputs, seed)
    drawn = [(proof.change(perms), perms) for perms in trials(spec, proof.generator)]
    change, perms = max(drawn, key=lambda one: one[0])
    if change > proof.tolerance and change > proof.widen_tolerance():
        unstable = proof.change(identity_perms(spec))
        if unstable > proof.tolerance:
            raise InvalidSpecError(
                f"model: expected equal outputs of two runs on equal weights and inputs; they differ by {unstable:.1g} "
                "of their size, so no spec can be proved; let evaluation mode draw no numbers and keep no state"
            )
        raise InvalidSpecError(_culprit(model, spec, example_inputs, proof, perms))
    notes = [*(note for note in spec.notes if note != _UNSEEN), *([] if _sees(proof) else [_UNSEEN])]
    return replace(spec, checked=True, whole=seen_unread(proof), notes=tuple(notes))


def proved_trace(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> PermutationSpec:
    """The checked spec of a fresh trace; a ``UserWarning`` gives each of its notes.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> proved_trace(net, (torch.randn(3, 4),)).checked
    True
    """
    spec = check_spec(model, trace(model, example_inputs), example_inputs, seed=seed)
    for note in spec.notes:
        warnings.warn(f"model: {note}", stacklevel=3)
    return spec


def _sees(proof: Proof) -> bool:
    """Whether an output depends on any weight that is permuted: else it is equal for any spec."""
    moved = {axis.name for axes in proof.spec.tied.values() for axis in axes}
    return not moved or proof.change_to({**proof.state, **{name: stir(proof.state[name]) for name in moved}}) > 0


def _culprit(model: nn.Module, spec: PermutationSpec, example_inputs: Any, proof: Proof, perms: Perms) -> str:
    still = identity_perms(spec)

    def change(suspects: list[str]) -> float:
        return proof.change({**still, **{perm: perms[perm] for perm in suspects}})

    suspects = list(spec.perm_shapes)
    while len(suspects) > 1:  # halve them, as long as a half changes an output by itself
        middle = len(suspects) // 2
        guilty = [half for half in (suspects[:middle], suspects[middle:]) if change(half) > proof.tolerance]
        if not guilty:
            break
        suspects = guilty[0]
    return _explain(model, spec, example_inputs, suspects, change(suspects))


def output_change(model: nn.Module, spec: PermutationSpec, example_inputs: Any, *, seed: int = 0) -> float:
    """The largest relative change of any output when every permutation of ``spec`` moves every unit.

    Parameters and raised errors as for :func:`check_spec`, but for the verdict: rounding alone gives about 1e-14.
    """
    spec.check_state(model.state_dict(), "model")
    proof = Proof(model, spec, example_inputs, seed)
    return proof.change(cycles(spec, proof.generator))


def _explain(model: nn.Module, spec: PermutationSpec, example_inputs: Any, suspects: list[str], change: float) -> str:
    """Name the culprit by the difference to what a fresh trace ties."""
    perm, alone = suspects[0], "alone" if len(suspects) == 1 else f"and {len(suspects) - 1} more together"
    said = f"spec: permuting {perm!r} {alone} changes an output by {change:.1g} of its size"
    tied = set(spec.tied[perm])
    try:
        right = trace(model, example_inputs)
    except RebasinError:
        return f"{said}; it ties {_list(tied)}; mend the spec or trace the model again"
    if right.axes == spec.axes:
        return (
            f"{said}, though it is as traced: forward goes another way than when it was traced (to other experts, by "
            "another branch), or magnifies rounding; trace it with example_inputs that go every way, or keep the units "
            f"by spec.fix({perm!r})"
        )
    truth = max((set(axes) for axes in right.tied.values()), key=lambda axes: len(axes & tied), default=set())
    truth = truth if truth & tied else set()
    for wrong, verb in ((truth - tied, "leaves out"), (tied - truth, "wrongly ties")):
        for axis in sorted(wrong):
            op = right.uses.get(axis.name, "an op")
            return f"{said}: it {verb} {axis.name!r} dim {axis.dim}, used by {op}; trace the model again"
    order = next((axis for axis in sorted(tied) if spec.axes[axis.name] != right.axes[axis.name]), min(tied))
    op = right.uses.get(order.name, "an op")
    what = f"the layout of {order.name!r} dim {order.dim}, used by {op}, is not the traced one"
    return f"{said}: {what}; trace the model again"


def _list(axes: set[Any]) -> str:
    shown = [f"{axis.name}:{axis.dim}" for axis in sorted(axes)]
    return ", ".join(shown[:4]) + (" and others" if len(shown) > 4 else "")
