"""How alike the units of two networks of different width are, given the matching of all others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError
from fedrebasin.layout import Free, Layout, Product, Sum, has_leaf, leaves
from fedrebasin.matching.numbers import refuse_complex
from fedrebasin.resizable import read_axis
from fedrebasin.spec import PermutationSpec
from fedrebasin.widths.maps import Maps, common_units, layouts_of, map_axis, unflatten


class WidthProblem:
    """A reference, a model, and the maps by which the model is made to fit so far; neither is changed.

    Only parameters count. All is computed in float64.
    """

    def __init__(
        self,
        reference_spec: PermutationSpec,
        model_spec: PermutationSpec,
        reference: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
    ) -> None:
        self.specs = reference_spec, model_spec
        self.names = common_units(reference_spec, model_spec)
        for spec, state, label in ((reference_spec, reference, "reference"), (model_spec, model, "model")):
            spec.check_state(state, label)
            refuse_complex(spec.parameters, state, label, "where widths change", "merge models of one width")
            bad = next((name for name in spec.parameters if not bool(state[name].isfinite().all())), None)
            if bad is not None:
                raise SpecMismatchError(f"{label}: expected finite weights; {bad!r} holds a NaN or an infinity")
        tied = {perm: list(dict.fromkeys(reference_spec.tied[perm])) for perm in self.names}
        held = {name for name in reference_spec.parameters if reference[name].is_floating_point()}
        self.axes = {perm: [axis for axis in axes if axis.name in held] for perm, axes in tied.items()}
        self.tensors = {perm: list(dict.fromkeys(axis.name for axis in axes)) for perm, axes in self.axes.items()}
        used = {name for names in self.tensors.values() for name in names}
        self.reference = {name: reference[name].detach().double().cpu() for name in used}
        self.model = {name: model[name].detach().double().cpu() for name in used}
        self.layouts = {name: layouts_of(reference_spec, model_spec, name) for name in used}
        self.read = {name: read_axis(reference_spec, name) for name in used}
        self.writes: dict[str, Tensor] = {}
        self.reads: dict[str, Tensor] = {}

    def sizes(self, perm: str) -> tuple[int, int]:
        """Units of the reference and of the model."""
        return self.specs[0].perm_shapes[perm][0], self.specs[1].perm_shapes[self.names[perm]][0]

    def is_quadratic(self, perm: str) -> bool:
        """Whether some tensor has the permutation on two axes."""
        return len(self.axes[perm]) > len(self.tensors[perm])

    def similarity(self, perm: str) -> tuple[Tensor, Tensor]:
        """``[i, j]`` of the reference's units with the model's, by what writes them and by what reads them."""
        found = torch.zeros(2, *self.sizes(perm), dtype=torch.float64, device="cpu")
        for reads in (False, True):
            for one, other in self.rows(perm, reads=reads):
                found[int(reads)].addmm_(one, other.T)
        return found[0], found[1]

    def forward(self, *, reads: bool = True) -> Iterator[str]:
        """The permutations, each time the one that is most :meth:`settled` by what the caller has set meanwhile."""
        waiting = dict.fromkeys(self.names)
        while waiting:
            perm = max(waiting, key=lambda one: self.settled(one, reads=reads))
            yield perm
            del waiting[perm]

    def settled(self, perm: str, *, reads: bool = True) -> float:
        """The share of the reference's entries tied to the permutation that can be compared by now.

        Without ``reads``, of those that write its units.
        """
        kinds = (False, True) if reads else (False,)
        seen = sum(one.numel() for kind in kinds for one, _ in self.rows(perm, reads=kind))
        counted = [axis for axis in self.axes[perm] if reads or axis.dim != self.read[axis.name]]
        return seen / max(1, sum(self.reference[axis.name].numel() for axis in counted))

    def rows(self, perm: str, *, reads: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """What writes, or reads, the units of both networks: pairs of ``(units, entries)``, those that are settled."""
        for name, dim in self.axes[perm]:
            if reads != (dim == self.read[name]):
                continue
            tensor, layouts = self.model[name], self.layouts[name]
            others = [(other, pair) for other, pair in enumerate(layouts) if other != dim]
            if all(self._is_settled(one) for _, (one, _) in others):
                for other, (one, two) in others:
                    tensor = map_axis(tensor, other, one, two, self._maps(name, other))
                yield from self._units(perm, self.reference[name], tensor, dim, layouts[dim], self._maps(name, dim))

    def objective(self, names: Collection[str] | None = None) -> float:
        """The sum over tied parameters, or over ``names``, of <reference, model made to fit>."""
        total = 0.0
        for name in self.reference if names is None else names:
            tensor = self.model[name]
            for dim, (one, other) in enumerate(self.layouts[name]):
                tensor = map_axis(tensor, dim, one, other, self._maps(name, dim))
            total += float((self.reference[name] * tensor).sum())
        return total

    def _maps(self, name: str, dim: int) -> Maps:
        return self.reads if dim == self.read[name] else self.writes

    def _is_settled(self, layout: Layout) -> bool:
        perms = {leaf.perm for leaf in leaves(layout) if isinstance(leaf, Free)}
        return all(perm in self.writes for perm in perms if perm in self.names)

    def _units(
        self, perm: str, reference: Tensor, model: Tensor, dim: int, layouts: tuple[Layout, Layout], maps: Maps
    ) -> Iterator[tuple[Tensor, Tensor]]:
        match layouts:
            case Free(perm=found), Free() if found == perm:
                mine, theirs = (side.movedim(dim, 0).reshape(side.shape[dim], -1) for side in (reference, model))
                yield mine, theirs
            case Sum(parts=ones), Sum(parts=others):
                first = reference.split_with_sizes([part.size for part in ones], dim)
                second = model.split_with_sizes([part.size for part in others], dim)
                for one, two, *pair in zip(first, second, ones, others, strict=True):
                    yield from self._units(perm, one, two, dim, (pair[0], pair[1]), maps)
            case Product(factors=ones), Product(factors=others):
                reference = unflatten(reference, dim, [factor.size for factor in ones])
                model = unflatten(model, dim, [factor.size for factor in others])
                for place, own in enumerate(ones):
                    rest = [other for other in range(len(ones)) if other != place]
                    if has_leaf(own, perm) and all(self._is_settled(ones[other]) for other in rest):
                        mapped = model
                        for other in rest:
                            mapped = map_axis(mapped, dim + other, ones[other], others[other], maps)
                        yield from self._units(perm, reference, mapped, dim + place, (own, others[place]), maps)
