"""Networks of one kind with different widths: matched, made to fit each other, averaged, grown and narrowed."""

from fedrebasin.widths.check import check_widths
from fedrebasin.widths.growth import matched_averaging
from fedrebasin.widths.maps import WidthMatching, resize
from fedrebasin.widths.matching import match_widths
from fedrebasin.widths.merge import merge_widths
from fedrebasin.widths.resized import Resized
from fedrebasin.widths.within import merge_units

__all__ = [
    "Resized",
    "WidthMatching",
    "check_widths",
    "match_widths",
    "matched_averaging",
    "merge_units",
    "merge_widths",
    "resize",
]
