"""What the README shows is true: its code runs, and what it points to exists."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_its_code_runs_and_grafting_changes_no_bit(capsys, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    network, graft, growth, ship, calibration, by_hand, checkpoints = blocks
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(network, names)
    x = torch.rand(5, 64)
    plain = names["model"](x)
    exec(graft, names)
    assert torch.equal(names["model"](x), plain)
    assert not any(p.requires_grad for n, p in names["model"].named_parameters() if "blueprint" not in n)
    exec(growth, names)
    assert "before culling" in capsys.readouterr().out
    assert (tmp_path / "growth.jsonl").read_text().count("GERMINATED") >= 3
    assert "<canvas" in (tmp_path / "seeds.html").read_text()
    grown = names["model"](x)
    assert not torch.equal(grown, plain)
    exec(ship, names)
    assert torch.equal(names["model"](x), grown)
    assert torch.allclose(names["plain"](x), grown, rtol=1e-4, atol=1e-4)
    assert not any(type(module).__module__.startswith("kasmina_ext") for module in names["plain"].modules())
    assert 0 < (tmp_path / "anna.safetensors").stat().st_size < 8192
    exec(calibration, names)
    right = {name: (names[name](names["x"]).argmax(1) == names["y"]).float().mean() for name in ("healthy", "damaged")}
    assert right["healthy"] == 1 and right["damaged"] > 0.8 and "explained variance" in capsys.readouterr().out
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
