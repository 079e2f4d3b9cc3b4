"""Flower strategies that align clients' hidden units before they aggregate, and the mod that does it on a client."""

from __future__ import annotations

from fedrebasin.corrections.federated import FederatedOptions
from fedrebasin.corrections.privacy import Privacy
from fedrebasin.strategies.answers import answer_queries
from fedrebasin.strategies.beside import perms_from_record
from fedrebasin.strategies.fed_rebasin import FedRebasin
from fedrebasin.strategies.mods import rebasin_mod
from fedrebasin.strategies.rebasin import Rebasin

__all__ = [
    "FedRebasin",
    "FederatedOptions",
    "Privacy",
    "Rebasin",
    "answer_queries",
    "perms_from_record",
    "rebasin_mod",
]
