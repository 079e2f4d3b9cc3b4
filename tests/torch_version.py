"""Which torch runs the tests: some of its versions cannot do what a test asks for."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
sets_attributes = pytest.mark.skipif(TORCH < (2, 10), reason="torch 2.9 exports no model that makes attributes")
