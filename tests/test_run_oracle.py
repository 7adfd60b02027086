"""scripts/run_oracle.py: what it writes, and that it fails when the operators do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import checks
import pytest
import run_oracle


def run(monkeypatch, out, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["run_oracle.py", "--skip-big", "--out", str(out), *arguments])
    return run_oracle.main()


def test_writes_one_entry_for_each_backend_and_device(monkeypatch, tmp_path):
    out = tmp_path / "results/oracle.json"
    assert run(monkeypatch, out, "--backend", "reference", "--cases", "12", "--seed", "5") == 0
    first = json.loads(out.read_text())
    entry = first["reference/cpu"]
    assert (entry["cases"], entry["failures"], entry["seed"]) == (12, 0, 5)
    assert len(entry["source_sha256"]) == 64 and entry["torch"] and entry["device"]
    (tmp_path / "other.json").write_text(json.dumps({"ops/cuda": {"cases": 1}}))
    assert run(monkeypatch, tmp_path / "other.json", "--backend", "reference", "--cases", "2") == 0
    assert json.loads((tmp_path / "other.json").read_text()).keys() == {"ops/cuda", "reference/cpu"}


def test_counts_failures(monkeypatch, tmp_path, capsys):
    """A backend whose output is one part in a million off, and one that raises."""

    def off(x, *args):
        return checks.reference.chunked_forward(x, *args) * (1 + 2**-20)

    def raises(x, *args):
        raise RuntimeError("on purpose")

    for forward in (off, raises):
        broken = SimpleNamespace(**{**vars(checks.reference), "chunked_forward": forward})
        monkeypatch.setitem(checks.BACKENDS, "reference", broken)
        out = tmp_path / f"{forward.__name__}.json"
        assert run(monkeypatch, out, "--backend", "reference", "--cases", "20") == 1
        entry = json.loads(out.read_text())["reference/cpu"]
        assert entry["failures"] == len(entry["failed_cases"]) >= 5  # the half types round it away
        index = str(entry["failed_cases"][0])
        assert run(monkeypatch, out, "--backend", "reference", "--only", index) == 1
    assert "on purpose" in capsys.readouterr().out


def test_a_device_without_a_kernel_is_an_error(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path / "x.json", "--device", "meta")
    assert "no compiled kernel for meta" in capsys.readouterr().err
