"""The example with two tenants, with less growth than it shows: each is served best by its own seeds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "two_tenants.py"


def test_two_tenants(one_thread, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "120", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    for tenant in ("anna", "bert"):
        line = next(line for line in printed.splitlines() if line.startswith(f"{tenant} "))
        own, other, none = (float(cell) for cell in line.replace("bytes", "").split()[1:6:2])
        assert own > 85 and own > other + 20 and own > none + 20, line
        size = (tmp_path / f"{tenant}.safetensors").stat().st_size
        assert f"{size:,} bytes" in line and size < 6000
    assert "not a bit of it changed: True" in printed
