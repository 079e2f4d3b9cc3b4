"""How permutations are found: one file a method."""

from fedrebasin.matching.many import match_many
from fedrebasin.matching.result import ManyMatching, Matching
from fedrebasin.matching.weight import weight_matching

__all__ = ["ManyMatching", "Matching", "match_many", "weight_matching"]
