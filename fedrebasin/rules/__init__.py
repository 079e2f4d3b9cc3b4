"""One small function per ATen op: which axes it ties. ``rule`` adds one to the registry ``RULES``."""

from fedrebasin.rules import (
    fourier,
    layers,
    lookups,
    norms,
    numbers,
    parts,
    pointwise,
    products,
    recurrent,
    reductions,
    shapes,
    spatial,
)
from fedrebasin.rules.registry import RULES, NotCoveredError, Rule, Traced, Value, op_name, rule

__all__ = [
    "RULES",
    "NotCoveredError",
    "Rule",
    "Traced",
    "Value",
    "fourier",
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
