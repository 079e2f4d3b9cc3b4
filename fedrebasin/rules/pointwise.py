"""Rules for elementwise ops, constants and ops that keep their first argument's axes."""

from __future__ import annotations

from typing import Any

from fedrebasin.axes import leaf
from fedrebasin.rules.registry import Traced, Value, rule

POINTWISE = """
abs add addcdiv addcmul atan bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min copysign cos
div elu eq erf exp exp2 expm1 floor floor_divide fmod ge gelu gt hardshrink hardsigmoid hardswish hardtanh isinf
isnan le leaky_relu lerp log log10 log1p log2 log_sigmoid logical_and logical_not logical_or logical_xor lt
masked_fill maximum minimum mish mul multiply ne neg nan_to_num pow reciprocal relu relu6 remainder round rsqrt
rsub selu sigmoid sign silu sin softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink
threshold true_divide trunc where xlogy
""".split()

ONE_INPUT = """
alias clone contiguous detach dropout feature_dropout alpha_dropout lift_fresh lift_fresh_copy to type_as
_to_copy positive
""".split()


@rule(*POINTWISE)
def pointwise(traced: Traced, *arguments: Any, **keywords: Any) -> Value:
    """Elementwise with broadcasting: axes that meet are tied."""
    values = [argument for argument in (*arguments, *keywords.values()) if isinstance(argument, Value)]
    ndim = max(len(value.axes) for value in values)
    result = []
    for back in range(ndim, 0, -1):
        meeting = [value.axes[-back] for value in values if len(value.axes) >= back and value.axes[-back].size != 1]
        result.append(traced.tie(*meeting) if meeting else leaf(1))
    return Value(result)


@rule(*ONE_INPUT)
def one_input(traced: Traced, x: Value, *_: Any, **__: Any) -> Value:
    """Elementwise in the first argument; the others only choose type, layout or rate."""
    del traced
    return Value(list(x.axes))


@rule(
    "zeros",
    "ones",
    "full",
    "zeros_like",
    "ones_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "scalar_tensor",
)
def uniform(traced: Traced, *_: Any, **__: Any) -> Value:
    """All entries equal: any permutation keeps it, so it ties nothing."""
    return Value([leaf(size) for size in traced.output_shapes[0]], uniform=True)
