"""Networks of one kind with different widths: matched, made to fit each other, and averaged."""

from fedrebasin.widths.check import check_widths
from fedrebasin.widths.growth import Grown, matched_averaging
from fedrebasin.widths.maps import WidthMatching, resize
from fedrebasin.widths.matching import match_widths
from fedrebasin.widths.merge import merge_widths

__all__ = ["Grown", "WidthMatching", "check_widths", "match_widths", "matched_averaging", "merge_widths", "resize"]
