"""One small function per ATen op: which axes it ties. ``rule`` adds one to the registry ``RULES``."""

from fedrebasin.rules import (
    layers,
    parts,
    pointwise,
    shapes,
)

# isort: split
# after layers and shapes, while those still hold older rules for some of these ops
from fedrebasin.rules import (
    lookups,
    norms,
    numbers,
    products,
    recurrent,
    reductions,
    spatial,
)
from fedrebasin.rules.registry import RULES, NotCoveredError, Rule, Traced, Value, op_name, rule

__all__ = [
    "RULES",
    "NotCoveredError",
    "Rule",
    "Traced",
    "Value",
    "layers",
    "lookups",
    "norms",
    "numbers",
    "op_name",
    "parts",
    "pointwise",
    "products",
    "recurrent",
    "reductions",
    "rule",
    "shapes",
    "spatial",
]
