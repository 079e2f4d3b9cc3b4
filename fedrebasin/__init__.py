"""Merge models that were trained apart: trace, match, permute, average, repair."""

from fedrebasin.aligner import PermutationAligner
from fedrebasin.chain import chain_spec
from fedrebasin.check import check_spec
from fedrebasin.connectivity import LossPath, barrier_above_chord, loss_along_path, loss_barrier
from fedrebasin.corrections import (
    best_end,
    bias_normalisation,
    closed_form,
    distill,
    input_grams,
    least_squares,
    regmean,
    remove_label_prior,
    repair,
    rescale,
    reset_batchnorm,
    reshift,
)
from fedrebasin.diagnostics import (
    layer_similarity,
    linear_cka,
    procrustes_distance,
    relative_similarity,
    unit_correlation,
)
from fedrebasin.errors import (
    CalibrationError,
    InvalidSpecError,
    RebasinError,
    SpecMismatchError,
    TraceError,
    UnsupportedOpError,
)
from fedrebasin.held_out import split_calibration
from fedrebasin.matching import (
    ManyMatching,
    Matching,
    activation_matching,
    frank_wolfe_matching,
    match_each,
    match_many,
    sinkhorn_matching,
    straight_through_matching,
    weight_matching,
)
from fedrebasin.merge import align, interpolate, merge, merge_modules
from fedrebasin.optimizer import permute_optimizer
from fedrebasin.perms import compose, identity_perms, invert, moved_fraction, random_perms
from fedrebasin.permute import permute
from fedrebasin.selection import Selection, select_candidate
from fedrebasin.spec import PermutationSpec
from fedrebasin.ties import Axis
from fedrebasin.trace import trace
from fedrebasin.trunk import match_trunks, trunk_tensors
from fedrebasin.trunk_merge import merge_trunk_modules, merge_trunks
from fedrebasin.widths import (
    Resized,
    WidthMatching,
    check_widths,
    match_widths,
    matched_averaging,
    merge_units,
    merge_widths,
    resize,
)
from fedrebasin.zipping import zip_trunks

__all__ = [
    "Axis",
    "CalibrationError",
    "InvalidSpecError",
    "LossPath",
    "ManyMatching",
    "Matching",
    "PermutationAligner",
    "PermutationSpec",
    "RebasinError",
    "Resized",
    "Selection",
    "SpecMismatchError",
    "TraceError",
    "UnsupportedOpError",
    "WidthMatching",
    "activation_matching",
    "align",
    "barrier_above_chord",
    "best_end",
    "bias_normalisation",
    "chain_spec",
    "check_spec",
    "check_widths",
    "closed_form",
    "compose",
    "distill",
    "frank_wolfe_matching",
    "identity_perms",
    "input_grams",
    "interpolate",
    "invert",
    "layer_similarity",
    "least_squares",
    "linear_cka",
    "loss_along_path",
    "loss_barrier",
    "match_each",
    "match_many",
    "match_trunks",
    "match_widths",
    "matched_averaging",
    "merge",
    "merge_modules",
    "merge_trunk_modules",
    "merge_trunks",
    "merge_units",
    "merge_widths",
    "moved_fraction",
    "permute",
    "permute_optimizer",
    "procrustes_distance",
    "random_perms",
    "regmean",
    "relative_similarity",
    "remove_label_prior",
    "repair",
    "rescale",
    "reset_batchnorm",
    "reshift",
    "resize",
    "select_candidate",
    "sinkhorn_matching",
    "split_calibration",
    "straight_through_matching",
    "trace",
    "trunk_tensors",
    "unit_correlation",
    "weight_matching",
    "zip_trunks",
]
