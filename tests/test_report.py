"""seed_report: against numbers taken from the layer one by one."""

from __future__ import annotations

import io
import json
import math
import pickle

import pytest
import torch
from torch import nn

from kasmina_ext import KasminaLayer, TransitionRules, potential
from kasmina_ext.report import MAX_TABLE_ROWS

ANY = TransitionRules.any()
NAMES = ["DORMANT", "GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING",
         "FINE_TUNING", "FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK"]  # fmt: skip


@pytest.fixture
def layer(device):
    layer = KasminaLayer(nn.Linear(4, 22, device=device), num_seeds=5, num_blueprints=3)
    layer.request_state_transitions([1, 2, 4], ["grafting", "grafting", "fossilized"], [0, 1, 2], [3, 1, 0], rules=ANY)
    layer.set_alpha([1, 2], [0.25, 0.75])
    layer.extended_state.increment_epochs([1, 1, 4])
    return layer


def test_a_row_for_each_seed(layer, device):
    x = torch.randn(9, 4, device=device)
    x[0] = torch.inf
    layer(x).nan_to_num(0, 0, 0).sum().backward()
    report, seen = layer.seed_report(), layer.base_layer(x).detach().double()
    assert list(report) == [0, 1, 2, 3, 4]
    grow = potential(layer).tolist()
    states = ["DORMANT", "GRAFTING", "GRAFTING", "DORMANT", "FOSSILIZED"]
    strategies = ["AFFINE", "AFFINE", "ADDITIVE", "AFFINE", "MULTIPLICATIVE"]
    for seed, (start, end) in enumerate([(0, 5), (5, 10), (10, 14), (14, 18), (18, 22)]):
        row, chunk = report[seed], seen[:, start:end]
        finite = chunk[chunk.isfinite()]
        assert (row["state"], row["strategy"]) == (states[seed], strategies[seed])
        assert row["blueprint"] == [-1, 0, 1, -1, 2][seed] and row["epochs"] == [0, 2, 0, 0, 1][seed]
        assert row["alpha"] == [1, 0.25, 0.75, 1, 1][seed] and row["features"] == end - start
        assert row["count"] == finite.numel() and row["nonfinite"] == chunk.numel() - finite.numel()
        assert row["mean"] == pytest.approx(finite.mean().item(), abs=1e-6)
        assert row["std"] == pytest.approx(finite.std(correction=0).item(), rel=1e-6)
        assert row["potential"] == pytest.approx(grow[seed], nan_ok=True)


def test_a_row_for_each_state(layer, device):
    x = torch.randn(7, 4, device=device)
    layer(x).sum().backward()
    report, seen = layer.seed_report("state"), layer.base_layer(x).detach().double()
    assert list(report) == NAMES
    assert [report[name]["seeds"] for name in NAMES] == [2, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]
    grafting = report["GRAFTING"]
    assert grafting["blueprint"] == {0: 1, 1: 1} and grafting["strategy"] == {"ADDITIVE": 1, "AFFINE": 1}
    assert (grafting["alpha"], grafting["epochs"], grafting["features"], grafting["count"]) == (0.5, 1.0, 9, 63)
    assert grafting["mean"] == pytest.approx(seen[:, 5:14].mean().item(), abs=1e-6)
    assert grafting["std"] == pytest.approx(seen[:, 5:14].std(correction=0).item(), rel=1e-6)
    assert grafting["potential"] == pytest.approx(potential(layer)[1:3].mean().item())
    nobody = report["CULLED"]
    assert nobody["seeds"] == nobody["count"] == 0 and nobody["strategy"] == {}
    assert all(math.isnan(nobody[name]) for name in ("alpha", "epochs", "mean", "std", "potential"))


def test_what_was_not_measured_is_nan(layer):
    for row in layer.seed_report().values():
        assert row["count"] == 0 and all(math.isnan(row[name]) for name in ("mean", "std", "potential"))
    assert math.isnan(layer.seed_report("state")["DORMANT"]["mean"])


def test_for_programs(layer):
    layer.lifecycle_states[0], layer.grafting_strategies[0] = 99, -4
    report = layer.seed_report()
    assert isinstance(report, dict) and (report[0]["state"], report[0]["strategy"]) == ("99", "-4")
    assert json.loads(json.dumps(report))["1"]["state"] == "GRAFTING"
    assert layer.seed_report("state")["99"]["seeds"] == 1
    again = pickle.loads(pickle.dumps(report))
    assert str(again) == str(report) and again.per == "seed"
    assert layer.seed_report(per="seed").keys() == report.keys()
    for per in ("seeds", None, 1):
        with pytest.raises(ValueError, match="per must be 'seed' or 'state'"):
            layer.seed_report(per)


def test_for_people(layer):
    text = str(layer.seed_report())
    assert text == repr(layer.seed_report())
    title, header, rule, *rows = text.splitlines()
    assert title == "5 seeds of Linear, 22 features" and set(rule) == {"-", " "}
    columns = [
        "seed",
        "state",
        "blueprint",
        "strategy",
        "alpha",
        "epochs",
        "features",
        "count",
        "mean",
        "std",
        "potential",
    ]
    assert header.split() == columns
    assert rows[1].split() == ["1", "GRAFTING", "0", "AFFINE", "0.25", "2", "5", "0", "-", "-", "-"]
    states = str(layer.seed_report("state")).splitlines()
    assert [line.split()[0] for line in states[3:]] == ["DORMANT", "GRAFTING", "FOSSILIZED"]


def test_the_unusual_has_a_column_when_there_is_any(layer, device):
    layer(torch.full((1, 4), torch.nan, device=device))
    assert "nonfinite" in str(layer.seed_report()).splitlines()[1]


def test_a_long_table_shows_the_seeds_at_work(device):
    layer = KasminaLayer(nn.Linear(2, 200, device=device), num_seeds=200)
    layer.request_state_transitions([150, 199], "germinated")
    lines = str(layer.seed_report()).splitlines()
    assert len(lines) == MAX_TABLE_ROWS + 4 and lines[-1] == "... and 140 more"
    shown = [int(line.split()[0]) for line in lines[3:-1]]
    assert shown == [*range(58), 150, 199]


def test_show_prints_plain_text_to_a_file_and_rich_on_a_terminal(layer):
    pytest.importorskip("rich")
    plain = io.StringIO()
    layer.seed_report().show(plain)
    assert plain.getvalue() == str(layer.seed_report()) + "\n"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    layer.seed_report("state").show(terminal)
    assert "\x1b[" in terminal.getvalue() and "FOSSILIZED" in terminal.getvalue()
    from rich.console import Console

    narrow = Console(file=io.StringIO(), width=80)
    narrow.print(layer.seed_report())
    assert all(name in narrow.file.getvalue() for name in ("FOSSILIZED", "MULTIPLICATIVE", "potential"))
