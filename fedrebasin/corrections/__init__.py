"""What follows the average: one file a method."""

from fedrebasin.corrections.repair import repair
from fedrebasin.corrections.reset import reset_batchnorm

__all__ = ["repair", "reset_batchnorm"]
