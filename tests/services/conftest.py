# SPDX-License-Identifier: MPL-2.0
"""Fixtures of the tests that run the programs among Debian's."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from datacenter import DataCenter  # noqa: E402  (it needs the path)


@pytest.fixture()
def center(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DataCenter]:
    """An empty data center."""
    tmp_path.chmod(0o755)
    made = DataCenter(tmp_path)
    failed = request.session.testsfailed
    yield made
    made.stop(request.session.testsfailed > failed)
