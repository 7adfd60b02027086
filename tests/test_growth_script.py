"""The growth experiments end to end in their smallest size, and the statistics that they report."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def growth():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield SimpleNamespace(
            **{name: importlib.import_module(name) for name in ("growth", "growth_experiments", "growth_report")}
        )
    finally:
        sys.path.remove(str(SCRIPTS))


def test_a_quick_run_measures_everything_and_goes_on_from_what_it_has(growth, tmp_path, capsys):
    arguments = ["--quick", "--seeds", "1", "--jobs", "2", "--work", str(tmp_path / "work")]
    assert growth.growth.main([*arguments, "--out", str(tmp_path / "one.json")]) == 0
    record = json.loads((tmp_path / "one.json").read_text())
    kinds = {"prune", "quantize", "drift", "fade"}
    for experiment in ("where to grow", "who helped", "what to cull", "repair"):
        assert set(record["summary"][experiment]) == kinds | {"all"} and set(record["parts"][experiment]) == kinds
        assert all(len(parts) == 1 for parts in record["parts"][experiment].values())
    compared = record["summary"]["what to cull"]["all"]
    for other in ("random", "one cut by credit", "greedy leave-one-out"):
        paired = compared[f"less {other}"]
        assert paired["n"] == 4 and paired["low"] <= paired["mean"] <= paired["high"]
        assert paired["mean"] == pytest.approx(compared["controller"] - compared[other], abs=1e-9)
    for parts in record["parts"]["who helped"].values():
        assert all(part["Shapley sum over gain"] == pytest.approx(1, abs=1e-4) for part in parts), "it telescopes"
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("picked by potential", "What to cull", "Who helped", "Grown by"))
    lines = growth.growth_report.markdown(record["summary"], record["config"]).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1

    again = growth.growth.main([*arguments, "--resume", "--out", str(tmp_path / "two.json")])
    assert again == 0 and json.loads((tmp_path / "two.json").read_text())["parts"] == record["parts"]


def test_intervals(growth):
    found = growth.growth_report.interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(4.30265273 / 3**0.5)
    assert 2 - found["low"] == pytest.approx(4.30265273 / 3**0.5)
    assert growth.growth_report.interval([5.0]) == {"mean": 5.0, "n": 1}


def test_shapley_values_of_a_loss_that_is_known(growth, monkeypatch):
    """Two seeds that matter only together share what they bring; one alone brings its own; the rest bring nothing."""
    experiments = growth.growth_experiments
    present = {}

    class Alphas(experiments.alphas):
        def __init__(self, layers):
            pass

        def __enter__(self):
            return lambda values: present.update(now=values)

        def __exit__(self, *exception):
            pass

    def losses(network, part):
        now = present["now"]
        return torch.tensor([10.0 - 4 * float(now[0] and now[1]) - 2 * float(now[2])])

    monkeypatch.setattr(experiments, "alphas", Alphas)
    monkeypatch.setattr(experiments.task, "hidden", lambda network: [])
    monkeypatch.setattr(experiments.task, "losses", losses)
    values = experiments.shapley(None, None, 400, [0])
    assert values[2] == 2 and not values[3:].any() and values[0] + values[1] == 4
    assert values[0] == pytest.approx(2, abs=0.4)


@pytest.mark.parametrize("arguments", [["--quick"], ["--quick", "--readme", "--out", "x"], ["--seeds", "0"]])
def test_bad_arguments(growth, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        growth.growth.main(arguments)
    assert "argument" in capsys.readouterr().err
