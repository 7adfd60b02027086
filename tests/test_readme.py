"""What the README shows is true: its code runs, and what it points to exists."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_its_code_runs_and_wrapping_changes_no_bit(capsys, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    before, after, growth, by_hand, checkpoints = blocks
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(before, names)
    x = torch.rand(5, 64)
    plain = names["model"](x)
    exec(after, names)
    assert torch.equal(names["model"](x), plain)
    exec(growth, names)
    assert "before culling" in capsys.readouterr().out
    assert (tmp_path / "growth.jsonl").read_text().count("GERMINATED") >= 3
    exec(by_hand, names)
    printed = capsys.readouterr().out
    assert "SEED_OUT_OF_RANGE" in printed and "true gain" in printed
    bits = {name: value.clone() for name, value in names["model"].state_dict().items()}
    exec(checkpoints, names)
    assert capsys.readouterr().out.startswith("layer_latest_") and len(list((tmp_path / "saved").iterdir())) == 2
    assert all(torch.equal(value, bits[name]) for name, value in names["model"].state_dict().items())


def test_the_files_that_it_names_exist():
    names = re.findall(r"`((?:csrc|scripts|tests|kasmina_ext|docs|benchmarks)/[\w./]+)`", README)
    names += re.findall(r"\]\((docs/[^)]+)\)", README)
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_make_targets_that_it_names_exist():
    targets = {word for line in re.findall(r"`?make ((?:[\w-]+ ?)+)", README) for word in line.split()}
    makefile = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^([\w-]+):.*##", makefile, re.MULTILINE))
    assert {"demo", "test"} <= targets & known
