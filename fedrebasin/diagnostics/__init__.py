"""How alike two networks represent the same data, layer by layer."""

from fedrebasin.diagnostics.at_hand import linear_cka, procrustes_distance, relative_similarity, unit_correlation
from fedrebasin.diagnostics.layers import layer_similarity

__all__ = ["layer_similarity", "linear_cka", "procrustes_distance", "relative_similarity", "unit_correlation"]
