# SPDX-License-Identifier: MPL-2.0
"""Everything at once for a short while; by hand: `python3 tests/soak.py 3600`."""
from __future__ import annotations

import json
import sys

from support import ROOT, Program


def test_under_all_faults_nothing_foreign_is_shown_and_nothing_leaks() -> None:
    soak = Program(sys.executable, ROOT / "tests" / "soak.py", "25")
    try:
        assert soak.wait(240) == 0, soak.output[-6000:] + soak.log[-3000:]
        summary = json.loads(soak.output.partition("\n")[2])
        assert summary["requests"] > 500 and summary["counts"]["changes of owner"] > 5
        assert {"file 200", "file 404", "triton 200", "triton 404"} <= set(summary["counts"])
    finally:
        soak.kill()
