"""The examples end well in their smallest size, and what they print is true of themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import needs
from run_examples import ROOT, run_example

from kasmina_ext.sinks import read_jsonl


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in\n{text}"
    return float(found[1].replace(",", ""))


def test_drop_in(tmp_path):
    printed = run_example("drop_in", "--steps", "120", cwd=tmp_path)
    assert "same bits: True" in printed
    damaged, repaired = number(r"damaged: +([\d.]+) %", printed), number(r"repaired: +([\d.]+) %", printed)
    assert number(r"gained: +([+-][\d.]+) points", printed) == pytest.approx(repaired - damaged, abs=0.11)
    assert repaired > damaged + 2 and 1 <= number(r"by (\d+) seeds", printed) <= 18


def test_trainer(tmp_path):
    needs("transformers", "accelerate")
    printed = run_example("trainer", "--learn", "40", "--grow", "20", "--folder", "out", cwd=tmp_path)
    assert "resumed at step 10, same bits: True" in printed
    losses = [number(rf"{kind} ([\d.]+)", printed) for kind in ("healthy", "damaged", "repaired")]
    assert losses[2] < losses[1], "of the damaged one"
    assert number(r"recorded: (\d+) lines", printed) == len(list(read_jsonl(tmp_path / "out" / "seeds.jsonl"))) > 20


def test_lightning_digits(tmp_path):
    needs("lightning", "tensorboard")
    printed = run_example("lightning_digits", "--epochs", "6", "--folder", "out", cwd=tmp_path)
    healthy, drifted, repaired = (number(rf"{kind} ([\d.]+) %", printed) for kind in ("healthy", "drifted", "repaired"))
    assert drifted < healthy and repaired > drifted + 2
    assert "the controller at step 90 of 90" in printed
    assert (tmp_path / "out" / "last.ckpt").exists() and list((tmp_path / "out" / "runs").iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_each_says_what_it_shows_and_is_tested(path: Path):
    text = path.read_text()
    assert re.match(r'"""\w[^\n]{20,}\n\n', text)
    tests = [file.read_text() for file in (ROOT / "tests").glob("test_*.py")]
    assert any(path.stem in text for text in tests)
