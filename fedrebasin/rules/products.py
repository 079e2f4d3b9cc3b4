"""Rules for products that sum over an axis: matrix products, einsum, attention.

A contracted axis is gone from the result, so the two axes that meet in it share one permutation.
Outer axes (batch, heads) are tied before inner ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import Node, leaf
from fedrebasin.rules.pointwise import pointwise
from fedrebasin.rules.registry import NotCoveredError, Traced, Value, rule


@rule("matmul", "linalg_matmul", "mm", "_sparse_mm", "bmm", "mv", "dot", "vdot")
def matmul(traced: Traced, a: Value, b: Value, *_: Any, **__: Any) -> Value:
    """(*batch, m, k) by (*batch, k, n); either may be a vector."""
    batch = _meet(traced, a.axes[:-2], b.axes[:-2])
    _own_orders(a.axes[:-2], a.axes[-2:-1])
    _own_orders(b.axes[:-2], b.axes[-1:])
    _own_orders(_in_both(a.axes[:-2], b.axes[:-2]), a.axes[-1:])
    traced.tie(a.axes[-1], b.axes[max(-2, -len(b.axes))])
    result = [*batch, *a.axes[-2:-1], *(b.axes[-1:] if len(b.axes) > 1 else [])]
    traced.within([*result, a.axes[-1]])
    return Value(result)


def _in_both(one: Sequence[Node], other: Sequence[Node]) -> list[Node]:
    return [a for a, b in zip(one[::-1], other[::-1], strict=False) if a.size == b.size][::-1]


def _own_orders(batch: Sequence[Node], nodes: Sequence[Node]) -> None:
    """Free axes may have an order of their own for each index of a free batch axis (experts, heads)."""
    outers = [axis.root for axis in batch if axis.root.free_leaf]
    for axis in nodes:
        if outers and axis.root.free_leaf and axis.root not in outers:
            axes.unify(axis, axes.family(outers[-1], [leaf(axis.size) for _ in range(outers[-1].size)]))


@rule("inner", "linalg_vecdot")
def inner(traced: Traced, a: Value, b: Value, *_: Any, **keywords: Any) -> Value:
    """(*p, k) by (*q, k) is (*p, *q); ``vecdot`` broadcasts p with q instead."""
    if keywords.get("dim", -1) != -1:
        raise NotCoveredError
    if not a.axes or not b.axes:
        return pointwise(traced, a, b)
    result = [*a.axes[:-1], *b.axes[:-1]]
    if len(result) != len(traced.output_shapes[0]):
        result = _meet(traced, a.axes[:-1], b.axes[:-1])
    traced.tie(a.axes[-1], b.axes[-1])
    traced.within([*result, a.axes[-1]])
    return Value(result)


@rule("cdist")
def distances(traced: Traced, a: Value, b: Value, *_: Any, **__: Any) -> Value:
    """(*batch, p, k) and (*batch, q, k) have distances (*batch, p, q)."""
    batch = _meet(traced, a.axes[:-2], b.axes[:-2])
    traced.tie(a.axes[-1], b.axes[-1])
    traced.within([*batch, a.axes[-2], b.axes[-2], a.axes[-1]])
    return Value([*batch, a.axes[-2], b.axes[-2]])


@rule("outer", "ger")
def outer(traced: Traced, a: Value, b: Value) -> Value:
    """(m,) by (n,) is (m, n)."""
    del traced
    return Value([a.axes[0], b.axes[0]])


@rule("addmm", "addmv", "baddbmm")
def add_product(traced: Traced, x: Value, a: Value, b: Value, **_: Any) -> Value:
    """``x`` broadcasts against the product of ``a`` and ``b``."""
    return pointwise(traced, matmul(traced, a, b), x)


@rule("addbmm")
def add_batch_product(traced: Traced, x: Value, a: Value, b: Value, **_: Any) -> Value:
    """The batch of products is summed."""
    return pointwise(traced, Value(matmul(traced, a, b).axes[1:]), x)


@rule("addr")
def add_outer(traced: Traced, x: Value, a: Value, b: Value, **_: Any) -> Value:
    """``x`` broadcasts against an outer product."""
    return pointwise(traced, outer(traced, a, b), x)


@rule("tensordot")
def tensordot(traced: Traced, a: Value, b: Value, a_dims: Sequence[int], b_dims: Sequence[int]) -> Value:
    """Axes are contracted pair by pair."""
    pairs = sorted((i % len(a.axes), j % len(b.axes)) for i, j in zip(a_dims, b_dims, strict=True))
    for i, j in pairs:
        _meet(traced, [a.axes[i]], [b.axes[j]])
    gone = {j for _, j in pairs}
    b_axes = [axis for j, axis in enumerate(b.axes) if j not in gone]
    traced.within([*a.axes, *b_axes])
    gone = {i for i, _ in pairs}
    return Value([axis for i, axis in enumerate(a.axes) if i not in gone] + b_axes)


@rule("einsum")
def einsum(traced: Traced, equation: str, operands: Sequence[Value], *_: Any, **__: Any) -> Value:
    """Axes with the same letter are tied, those of the output first; a letter twice in one operand is a diagonal."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = [_labels(term, len(value.axes)) for term, value in zip(inputs.split(","), operands, strict=True)]
    labels = [label for term in terms for label in term]
    if arrow:
        hidden = max(sum(isinstance(label, int) for label in term) for term in terms)
        result = _labels(output, len(output.replace("...", "")) + hidden)
    else:
        once = sorted(label for label in labels if isinstance(label, str) and labels.count(label) == 1)
        result = [*sorted({label for label in labels if isinstance(label, int)}), *once]
    tied: dict[str | int, Node] = {}
    shared = [label for label in result if sum(label in term for term in terms) > 1]
    for label in dict.fromkeys([*shared, *result, *labels]):
        meeting = [
            [axis]
            for term, value in zip(terms, operands, strict=True)
            for named, axis in zip(term, value.axes, strict=True)
            if named == label
        ]
        if label not in shared:
            beside = [term for term in terms if label in term]
            batch = [tied[other] for other in shared if all(other in term for term in beside)]
            _own_orders(batch, [axis for axes_ in meeting for axis in axes_])
        tied[label] = _meet(traced, *meeting)[0]
    traced.within(tied.values())
    return Value([tied[label] for label in result])


def _labels(term: str, ndim: int) -> list[str | int]:
    """The letters of a term; the axes of its ellipsis are numbered -1, -2, ... from the right."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after) if dots else 0
    return [*before, *range(-hidden, 0), *after]


@rule("_grouped_mm", "transformers.grouped_mm_fallback")
def grouped_product(
    traced: Traced, a: Value, b: Value, ends: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """(rows, k) by (group, k, n), each group of rows by a matrix of its own: all share the orders of k and n."""
    if len(a.axes) != 2 or len(b.axes) != 3 or ends is None or bias is not None:
        raise NotCoveredError
    for axis in (b.axes[0], *ends.axes):
        axes.fix(axis, "groups of rows")
    traced.tie(a.axes[1], b.axes[1])
    traced.within([a.axes[0], a.axes[1], b.axes[2]])
    return Value([a.axes[0], b.axes[2]])


@rule("bilinear")
def bilinear(traced: Traced, a: Value, b: Value, weight: Value, bias: Value | None = None) -> Value:
    """``weight`` is (out, in of a, in of b)."""
    batch = _meet(traced, a.axes[:-1], b.axes[:-1])
    traced.tie(weight.axes[1], a.axes[-1])
    traced.tie(weight.axes[2], b.axes[-1])
    if bias is not None:
        traced.tie(weight.axes[0], bias.axes[0])
    traced.within([*batch, *weight.axes])
    return Value([*batch, weight.axes[0]])


@rule("scaled_dot_product_attention")
def attention(
    traced: Traced,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """(*batch, heads, length, size); with ``enable_gqa`` several heads of the query share one of key and value."""
    del dropout_p, scale
    if enable_gqa:
        heads = _meet(traced, [key.axes[-3]], [value.axes[-3]])[0]
        if key.axes[-3].size != value.axes[-3].size:
            raise NotCoveredError
        groups = traced.split(query.axes[-3], [heads.size, query.axes[-3].size // heads.size])
        batch = _meet(traced, query.axes[:-3], key.axes[:-3], value.axes[:-3])
        traced.tie(heads, groups[0])
        batch.append(query.axes[-3])
    else:
        batch = _meet(traced, query.axes[:-2], key.axes[:-2], value.axes[:-2])
    length, keys = query.axes[-2], traced.tie(key.axes[-2], value.axes[-2])
    if attn_mask is not None:
        _meet(traced, [*batch, length, keys], attn_mask.axes)
    if is_causal:
        axes.fix(length, "causal order")
        axes.fix(keys, "causal order")
    _own_orders(key.axes[:-2], [key.axes[-1], value.axes[-1]])
    traced.tie(query.axes[-1], key.axes[-1])
    for last in (query.axes[-1:], value.axes[-1:], []):
        traced.within([*batch, length, keys, *last])
    traced.within([*batch, length])
    return Value([*batch, length, value.axes[-1]])


@rule("diagonal", "linalg_diagonal")
def diagonal(traced: Traced, x: Value, offset: int = 0, first: int = 0, second: int = 1) -> Value:
    """Two axes of one size move together; off the main diagonal positions count."""
    rest = [axis for dim, axis in enumerate(x.axes) if dim not in (first % len(x.axes), second % len(x.axes))]
    return Value([*rest, _diagonal(traced, x.axes[first], x.axes[second], offset, traced.output_shapes[0][-1])])


@rule("trace")
def diagonal_sum(traced: Traced, x: Value) -> Value:
    """The sum of the diagonal."""
    _diagonal(traced, x.axes[0], x.axes[1], 0, 1)
    return Value([])


def _diagonal(traced: Traced, one: Node, other: Node, offset: int, size: int) -> Node:
    if offset == 0 and one.size == other.size:
        return traced.tie(one, other)
    axes.fix(one, "diagonal")
    axes.fix(other, "diagonal")
    return leaf(size, "diagonal")


def _meet(traced: Traced, *lists: Sequence[Node]) -> list[Node]:
    """Tie lists of axes that broadcast against each other."""
    return pointwise(traced, *(Value(list(nodes)) for nodes in lists)).axes
