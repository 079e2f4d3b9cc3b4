"""A proof that no single permutation improves a model near its reference, in time linear in the parameters.

Index letters: i, j units of one permutation; a_i the reference's weights at unit i, b_i the model's.

If every unit moved by at most half of the distance to the nearest other unit of the reference,
``|a_i - b_i| <= min_j |a_i - a_j| / 2``, then ``|a_i - b_j| >= |a_i - a_j| - |a_j - b_j| >= |a_j - b_j|``
for all i and j, so that no assignment has a smaller ``sum_i |a_i - b_p(i)|^2`` than the identity, or a larger
``sum_i <a_i, b_p(i)>``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedrebasin.matching.plan import Block, Term, plan_of
from fedrebasin.spec import PermutationSpec

#: Squared distances come from a product, with this much rounding for each of the two squared norms (float32).
_ROUNDING = 1e-5


class IdentityCertificate:
    """What a reference alone says, made once and used for every model that is compared with it.

    Permutations with families over them, and those on two axes of one tensor, are not assignments of single units:
    with one of them nothing is certified.
    """

    def __init__(
        self, spec: PermutationSpec, reference: Mapping[str, Tensor], *, device: torch.device | str | None = None
    ) -> None:
        self._plan, self._device = plan_of(spec), device
        self._reference = {name: _wide(reference[name], device) for name in self._plan.names}
        self.possible = not self._plan.relative
        self._margins = {block: self._margin(block) for block in self._plan.blocks} if self.possible else {}

    def _margin(self, block: Block) -> Tensor:
        """A fourth of each unit's squared distance to the nearest other unit, less rounding."""
        gram = sum(_rows(term, self._reference) @ _rows(term, self._reference).T for term in self._plan.terms[block])
        assert isinstance(gram, Tensor)
        norms = gram.diagonal()
        sums = norms.unsqueeze(0) + norms.unsqueeze(1)
        distances = sums - 2 * gram - _ROUNDING * sums
        distances.fill_diagonal_(float("inf"))
        return distances.amin(1) / 4

    def holds(self, model: Mapping[str, Tensor]) -> bool:
        """True if the identity is certainly the best order of every permutation's units, the others as they are."""
        if not self.possible:
            return False
        change = {
            name: _wide(model[name], self._device).to(tensor) - tensor for name, tensor in self._reference.items()
        }
        for block, margin in self._margins.items():
            moved = sum(_rows(term, change).square().sum(1) for term in self._plan.terms[block])
            if not bool((moved <= margin).all()):  # a NaN is not
                return False
        return True


def _rows(term: Term, tensors: Mapping[str, Tensor]) -> Tensor:
    return term.rows(tensors[term.name])


def _wide(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    tensor = tensor.detach() if device is None else tensor.detach().to(device)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
