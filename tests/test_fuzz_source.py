# SPDX-License-Identifier: MPL-2.0
"""Each property of tests/fuzz.py with a few thousand inputs; by hand it may be a million."""
from __future__ import annotations

import pytest

import fuzz

COUNTS = {"inventory_file": 1500, "settings_file": 500}


@pytest.mark.parametrize("name", sorted(fuzz.PROPERTIES))
def test_property_holds(name: str) -> None:
    fuzz.run(name, COUNTS.get(name, 2000), 1)
