"""How permutations are found: one file a method."""

from fedrebasin.matching.activation import activation_matching
from fedrebasin.matching.each import match_each
from fedrebasin.matching.frank_wolfe import frank_wolfe_matching
from fedrebasin.matching.many import match_many
from fedrebasin.matching.result import ManyMatching, Matching
from fedrebasin.matching.sinkhorn import sinkhorn_matching
from fedrebasin.matching.straight_through import straight_through_matching
from fedrebasin.matching.weight import weight_matching

__all__ = [
    "ManyMatching",
    "Matching",
    "activation_matching",
    "frank_wolfe_matching",
    "match_each",
    "match_many",
    "sinkhorn_matching",
    "straight_through_matching",
    "weight_matching",
]
