"""Flower strategies that align the clients' hidden units before they aggregate."""

from __future__ import annotations

from fedrebasin.corrections.federated import FederatedOptions
from fedrebasin.corrections.privacy import Privacy
from fedrebasin.strategies.answers import answer_queries
from fedrebasin.strategies.fed_rebasin import FedRebasin
from fedrebasin.strategies.rebasin import Rebasin

__all__ = ["FedRebasin", "FederatedOptions", "Privacy", "Rebasin", "answer_queries"]
