"""What follows the average: one file a method, and all of them by name in ``methods``."""

from fedrebasin.corrections.best_end import best_end
from fedrebasin.corrections.bias_normalisation import bias_normalisation
from fedrebasin.corrections.closed_form import closed_form
from fedrebasin.corrections.distill import distill
from fedrebasin.corrections.label_prior import remove_label_prior
from fedrebasin.corrections.least_squares import least_squares
from fedrebasin.corrections.regmean import input_grams, regmean
from fedrebasin.corrections.repair import repair
from fedrebasin.corrections.rescale import rescale
from fedrebasin.corrections.reset import reset_batchnorm
from fedrebasin.corrections.reshift import reshift

__all__ = [
    "best_end",
    "bias_normalisation",
    "closed_form",
    "distill",
    "input_grams",
    "least_squares",
    "regmean",
    "remove_label_prior",
    "repair",
    "rescale",
    "reset_batchnorm",
    "reshift",
]
