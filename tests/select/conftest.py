"""Fixtures that several files of this folder share."""

from __future__ import annotations

import pytest
from tiny import causal_lm

from tokensel import apply_to


@pytest.fixture(scope="module")
def model():
    found = causal_lm(attention="sdpa")
    apply_to(found)
    return found
