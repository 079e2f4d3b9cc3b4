"""Which networks' units can be added or merged: those that nothing looks at but the weights that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrebasin.errors import RebasinError
from fedrebasin.layout import axis_mask
from fedrebasin.proof import Proof
from fedrebasin.redraw import stir
from fedrebasin.spec import PermutationSpec

#: ops whose weight is read along this axis; of every other op a tensor with one axis is written
_READS = {
    "linear": 1,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), 1),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 0),
}
#: Layers that look at all units at once: their output changes with every unit that is added, a dead one too.
_WHOLE = ("layer_norm", "group_norm", "rms_norm")


def read_axis(spec: PermutationSpec, name: str) -> int | None:
    """The axis along which a tensor is read; None where it has none, or nobody knows: ask :func:`is_known`."""
    return _READS.get(spec.uses.get(name, "").partition(" ")[0]) if len(spec.axes[name]) > 1 else None


def is_known(spec: PermutationSpec, name: str) -> bool:
    """Whether it is known along which axes a tensor is written and read."""
    return len(spec.axes[name]) <= 1 or read_axis(spec, name) is not None


def check_can_resize(spec: PermutationSpec) -> None:
    """Raise :class:`RebasinError` where units cannot be added or merged without a change of function."""
    if spec.over:
        raise RebasinError(
            f"specs: expected no units inside heads or groups, whose number cannot change; got "
            f"{next(iter(spec.over))!r}; keep the widths, with match_many or merge_widths"
        )
    for perm in spec.perm_shapes:
        reason = _refusal(spec, perm)
        if not reason and perm in spec.whole:
            reason = (
                f"check_spec has found that units of {perm!r} which nobody reads change an output (a softmax, a norm "
                "without weights, a weight used in two ways), so that their number cannot change; keep the widths, "
                "with match_many"
            )
        if reason:
            raise RebasinError(f"specs: {reason}")


def _refusal(spec: PermutationSpec, perm: str) -> str:
    """Why the number of units cannot change, by what is known of the ops that use their tensors, or ``""``."""
    for name in dict.fromkeys(axis.name for axis in spec.tied[perm]):
        use = spec.uses.get(name, "no op")
        if use.startswith(_WHOLE):
            return (
                f"{name!r} is used by {use}, which looks at all units at once, so that their number cannot change; "
                "keep the widths, with match_many"
            )
        if name in spec.parameters and not is_known(spec, name):
            return (
                f"expected ops whose weights are known to be read along one axis; {name!r} is used by {use}; "
                "keep the widths, with match_many or merge_widths"
            )
    return ""


def seen_unread(proof: Proof) -> tuple[str, ...]:
    """The permutations of which a unit that nobody reads changes an output all the same.

    One unit of each is read by zeros alone, and what writes it is stirred. Units inside heads or groups, and those
    of ops that are refused by their names, are left out.

    Examples
    --------
    >>> from torch import nn
    >>> from fedrebasin import trace
    >>> for middle in (nn.ReLU(), nn.Softmax(-1)):
    ...     net = nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 2))
    ...     seen_unread(Proof(net, trace(net, (torch.zeros(3, 4),)), (torch.zeros(3, 4),), seed=0))
    ()
    ('0',)
    """
    spec = proof.spec
    perms = [perm for perm in spec.perm_shapes if perm not in spec.over and not _refusal(spec, perm)]
    if not perms:
        return ()
    before = _unread(spec, perms, proof.state, stirred=False)
    outputs = proof.run(before)

    def changes(some: list[str]) -> bool:
        return proof.change_to(_unread(spec, some, before, stirred=True), outputs) > proof.tolerance

    return tuple(perm for perm in perms if changes([perm])) if changes(perms) else ()


def _unread(spec: PermutationSpec, perms: list[str], state: dict[str, Tensor], *, stirred: bool) -> dict[str, Tensor]:
    """A state in which one unit of each permutation is read by zeros, and what writes it as it is or stirred."""
    others = {perm: torch.arange(spec.perm_shapes[perm][0], device="cpu") > 0 for perm in perms}
    result = {}
    for name, tensor in state.items():
        read, new = read_axis(spec, name), tensor
        for zero in (False, True) if stirred else (True,):  # what is read is zero, whoever writes it
            for dim, layout in enumerate(spec.axes[name]):
                units = (~axis_mask(layout, others)).nonzero().flatten()
                if (dim == read) is zero and len(units) and (tensor.is_floating_point() or tensor.is_complex()):
                    part = new.index_select(dim, units)
                    new = new.index_copy(dim, units, torch.zeros_like(part) if zero else stir(part))
        result[name] = new
    return result
