"""One small function per ATen op: which axes it ties. ``rule`` adds one to the registry ``RULES``."""

from fedrebasin.rules import layers, pointwise, shapes
from fedrebasin.rules.registry import RULES, NotCoveredError, Rule, Traced, Value, op_name, rule

__all__ = ["RULES", "NotCoveredError", "Rule", "Traced", "Value", "layers", "op_name", "pointwise", "rule", "shapes"]
