"""How alike two networks represent the same data, layer by layer."""

from fedrebasin.diagnostics.layers import layer_similarity
from fedrebasin.diagnostics.measures import linear_cka, procrustes_distance, relative_similarity, unit_correlation

__all__ = ["layer_similarity", "linear_cka", "procrustes_distance", "relative_similarity", "unit_correlation"]
