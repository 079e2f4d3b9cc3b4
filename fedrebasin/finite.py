"""NaNs and infinities in a state dict, where they are a fault."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def first_not_finite(state: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> str | None:
    """The first tensor with a NaN or an infinity that is not as in ``known``: a mask of attention may hold some.

    >>> mask = torch.tensor([0.0, -torch.inf])
    >>> first_not_finite({"mask": mask}, {"mask": mask}), first_not_finite({"mask": mask}, {})
    (None, 'mask')
    """
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            before = known.get(name)
            if before is None or not torch.equal(before.to(tensor), tensor):
                return name
    return None
