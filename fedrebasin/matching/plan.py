"""What weight matching reads off a spec once: which products make up the similarity of each permutation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrebasin.layout import Fixed, Free, Layout, leaves
from fedrebasin.matching.slabs import slabs
from fedrebasin.permute import outer_dims_of
from fedrebasin.spec import PermutationSpec

#: What never changes is multiplied together, side by side, in parts of at most this many entries, which are copied.
_PART = 1 << 20


@dataclass(frozen=True)
class Block:
    """What one assignment decides: a permutation, or row ``row`` of a family."""

    perm: str
    size: int
    row: int | None = None


@dataclass(frozen=True, eq=False)
class Term:
    """A slab of one tensor as a matrix with one row for each unit of a block; ``places`` is None for a whole axis."""

    name: str
    dim: int
    places: Tensor | None
    copies: int
    within: tuple[tuple[int, Tensor], ...]

    @property
    def whole(self) -> bool:
        """Whether the slab is the tensor, its axis ``dim`` the block's units."""
        return self.places is None and not self.within

    def rows(self, tensor: Tensor) -> Tensor:
        """The slab of ``tensor``, shape ``(units, columns)``."""
        for dim, index in self.within:
            tensor = tensor.index_select(dim, index.to(tensor.device))
        if self.places is not None:
            tensor = tensor.index_select(self.dim, self.places.to(tensor.device))
        return tensor.movedim(self.dim, 0).reshape(tensor.shape[self.dim] // self.copies, -1)


@dataclass(frozen=True)
class Plan:
    """The blocks of a spec, and for each its tensors and products.

    Attributes
    ----------
    names : list of str
        The tied parameters.
    blocks : list of Block
    relative : set of Block
        Blocks that are matched step by step from the current order: rows of families, permutations that a family is
        over, and those that move two axes of one tensor (``quadratic``).
    terms, tensors : dict of Block to list
        The slabs that a block moves, and the tensors that they lie in.
    alone : dict of Block to set of str
        Tensors that no other permutation moves: biases, norms, the first and the last layer.
    simple : set of str
        Tensors in which each permutation has axes to itself, and no order depends on another axis's index.
    moved_dims : dict of str to list of int
        The axes of a tensor that some permutation moves.
    whole : dict of Layout to str
        Layouts that are one permutation's units and nothing else.
    axes_of : dict of str to list of (str, int)
        The axes that a permutation moves.
    perms_of : dict of str to set of str
        The permutations that move a tensor.
    neighbours : dict of Block to list of Block
        The blocks whose similarity changes when a block moves.
    clusters : dict of str to list of Block
        Each plain permutation alone, each outer one with the families over it, and the rows of each family over a
        fixed leaf.
    """

    names: list[str]
    blocks: list[Block]
    relative: set[Block]
    quadratic: set[Block]
    terms: dict[Block, list[Term]]
    tensors: dict[Block, list[str]]
    alone: dict[Block, set[str]]
    simple: set[str]
    moved_dims: dict[str, list[int]]
    whole: dict[Layout, str]
    axes_of: dict[str, list[tuple[str, int]]]
    perms_of: dict[str, set[str]]
    neighbours: dict[Block, list[Block]]
    clusters: dict[str, list[Block]]


def plan_of(spec: PermutationSpec) -> Plan:
    """The plan of a spec; made once."""
    if "matching" not in spec.derived:
        spec.derived["matching"] = _make(spec)
    plan = spec.derived["matching"]
    assert isinstance(plan, Plan)
    return plan


def _make(spec: PermutationSpec) -> Plan:
    buffers = set(spec.buffers)
    axes_of = {perm: [(axis.name, axis.dim) for axis in axes] for perm, axes in spec.tied.items()}
    tied = {name for axes in axes_of.values() for name, _ in axes} - buffers
    names = [name for name in spec.axes if name in tied]
    blocks = [
        Block(perm, shape[-1], row)
        for perm, shape in spec.perm_shapes.items()
        for row in (range(shape[0]) if len(shape) == 2 else [None])
    ]
    outer = set(spec.over.values())
    by_dim = {name: _perms_by_dim(spec.axes[name]) for name in names}
    perms_of = {name: set[str]().union(*found.values()) for name, found in by_dim.items()}
    terms = {block: _terms(spec, block, [name for name, _ in axes_of[block.perm] if name in tied]) for block in blocks}
    tensors = {block: list(dict.fromkeys(term.name for term in found)) for block, found in terms.items()}
    quadratic = {
        block for block in blocks if len({(term.name, term.dim) for term in terms[block]}) != len(tensors[block])
    }
    clusters: dict[str, list[Block]] = {}
    for block in sorted(blocks, key=lambda block: block.row is not None):
        over = spec.over.get(block.perm)
        clusters.setdefault(over if over in spec.perm_shapes else block.perm, []).append(block)
    using: dict[str, list[Block]] = {}
    for block in blocks:
        for name in tensors[block]:
            using.setdefault(name, []).append(block)
    return Plan(
        names=names,
        blocks=blocks,
        relative={block for block in blocks if block.row is not None or block.perm in outer} | quadratic,
        quadratic=quadratic,
        terms=terms,
        tensors=tensors,
        alone={
            block: {name for name in tensors[block] if perms_of[name] == {block.perm} and len(by_dim[name]) == 1}
            for block in blocks
        },
        simple={name for name in names if _is_simple(spec.axes[name], by_dim[name])},
        moved_dims={name: list(found) for name, found in by_dim.items()},
        whole={
            layout: layout.perm
            for layouts in spec.axes.values()
            for layout in layouts
            if isinstance(layout, Free) and not layout.over
        },
        axes_of=axes_of,
        perms_of=perms_of,
        neighbours={
            block: list(
                dict.fromkeys(o for name in tensors[block] for o in using[name] if o != block or block in quadratic)
            )
            for block in blocks
        },
        clusters=clusters,
    )


def _perms_by_dim(layouts: tuple[Layout, ...]) -> Mapping[int, set[str]]:
    found = {dim: {end.perm for end in leaves(layout) if isinstance(end, Free)} for dim, layout in enumerate(layouts)}
    return {dim: perms for dim, perms in found.items() if perms}


def _is_simple(layouts: tuple[Layout, ...], perms: Mapping[int, set[str]]) -> bool:
    apart = sum(map(len, perms.values())) == len(set().union(*perms.values()))
    lonely = all(len(found) == 1 or _is_sum_of_wholes(layouts[dim]) for dim, found in perms.items())
    return apart and lonely and not any(outer_dims_of(layouts, dim) for dim in perms)


def _is_sum_of_wholes(layout: Layout) -> bool:
    parts = getattr(layout, "parts", ())
    return bool(parts) and all(isinstance(part, Free | Fixed) and not getattr(part, "over", "") for part in parts)


def _terms(spec: PermutationSpec, block: Block, names: list[str]) -> list[Term]:
    found = []
    for name in dict.fromkeys(names):
        for slab in slabs(spec.axes[name], block.perm, block.row):
            places = slab.places.flatten()
            whole = torch.equal(places, torch.arange(spec.shapes[name][slab.dim], device="cpu"))
            found.append(Term(name, slab.dim, None if whole else places, slab.places.shape[1], slab.within))
    return found


def in_parts(terms: Sequence[Term], entries: Callable[[str], int]) -> list[list[Term]]:
    """Terms in groups, each of one term or of few entries."""
    found: list[list[Term]] = []
    held = 0
    for term in terms:
        held += entries(term.name)
        if not found or held > _PART:
            found.append([])
            held = entries(term.name)
        found[-1].append(term)
    return found
