"""The demo end to end in its smallest size, its interruption, and the rules that its growth follows."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from threads import one_thread

from kasmina_ext import ExtendedLifecycle as State
from kasmina_ext import GrowthConfig

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CPU = torch.device("cpu")


def ignore(steps: int) -> None:
    """A progress bar that nobody looks at."""


@pytest.fixture(scope="module")
def demo():
    """The demo's modules; one thread, as the demo itself runs on, whatever the machine has."""
    sys.path.insert(0, str(SCRIPTS))
    names = ("demo", "demo_task", "demo_grow", "demo_journal", "demo_report")
    try:
        modules = {name.removeprefix("demo_"): importlib.import_module(name) for name in names}
        with one_thread():
            yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory) -> Path:
    """The folder of a quick run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("demo") / "whole"
    assert demo.demo.main(["--quick", "--seeds", "2", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


def measured(folder: Path) -> dict:
    """All results but the times."""
    parts = json.loads((folder / "run.json").read_text())["parts"]
    return {name: {key: value for key, value in part.items() if key != "seconds"} for name, part in parts.items()}


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_results_table_and_picture(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "demo.png",
        "network-0.pt",
        "network-1.pt",
        "run.json",
        "table.md",
    ]
    assert (finished / "demo.png").read_bytes().startswith(b"\x89PNG")
    table = (finished / "table.md").read_text()
    for row in ("healthy", "damaged: 90% of weights pruned", "last layer", "8 seeds"):
        assert f"| {row}" in table
    assert len(measured(finished)) == 2 * 10


def test_interrupted_and_resumed_it_ends_with_the_same_numbers(demo, finished, tmp_path):
    arguments = ["--quick", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "demo.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
    )
    try:
        journal = tmp_path / "run.json"
        deadline = time.monotonic() + 120
        while not journal.exists() or len(json.loads(journal.read_text())["parts"]) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130 and "--resume" in output and "Traceback" not in output
    stopped = measured(tmp_path)
    assert 3 <= len(stopped) < len(measured(finished))

    assert demo.demo.main([*arguments, "--resume"]) == 0
    assert measured(tmp_path) == measured(finished)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_goes_on_only_with_what_it_was_begun_with(demo, tmp_path, capsys):
    begun = demo.journal.Journal(tmp_path, {"damage": "prune", "commit": "abc-dirty"}, resume=False)
    begun.record("0/base", {"accuracy": 1 / 3})
    again = demo.journal.Journal(tmp_path, {"damage": "prune", "commit": "abc"}, resume=True)
    assert again.parts == {"0/base": {"accuracy": 1 / 3}}
    with pytest.raises(demo.journal.JournalError, match="begun with damage = 'prune', this is 'drift'"):
        demo.journal.Journal(tmp_path, {"damage": "drift", "commit": "abc"}, resume=True)
    for content in ("", "[]", '{"format": 1}', '{"format": 1, "config": {}, "parts": {}'):
        (tmp_path / "run.json").write_text(content)
        arguments = ["--quick", "--device", "cpu", "--resume", "--out", str(tmp_path)]
        assert demo.demo.main(arguments) == 2
        assert "is not a saved run" in capsys.readouterr().out


def test_the_table_goes_between_the_markers_of_the_readme(demo, finished, tmp_path):
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{demo.report.BEGIN}\nold\n{demo.report.END}\nafter\n")
    config = json.loads((finished / "run.json").read_text())["config"]
    journal = demo.journal.Journal(finished, config, resume=True)
    demo.report.report(journal, demo.demo.Console(quiet=True), readme=tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (finished / "table.md").read_text() in text
    assert (tmp_path / "docs" / "demo.png").read_bytes() == (finished / "demo.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--damage", "fire"], "invalid choice"),
        (["--device", "abacus"], "--device"),
        (["--quick", "--readme"], "not with --quick"),
    ],
)
def test_bad_arguments(demo, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.demo.main(arguments)
    assert message in capsys.readouterr().err


# ---- data and damage -------------------------------------------------------------------------------------------------


def test_train_held_out_and_test_share_no_image(demo):
    data, other = demo.task.load(0, CPU), demo.task.load(1, CPU)
    assert [len(part[0]) for part in (data.train, data.held, data.test)] == [1000, 300, 497]
    images = {tuple(image.tolist()) for part in (data.train, data.held, data.test) for image in part[0]}
    assert len(images) == 1797
    assert torch.equal(data.test[0], other.test[0]) and not torch.equal(data.train[0], other.train[0])


@pytest.mark.parametrize("kind", ["prune", "quantize", "drift"])
def test_damage_is_what_it_says(demo, kind):
    before, after = demo.task.classifier(0, CPU), demo.task.classifier(0, CPU)
    demo.task.damage(after, kind, 0)
    assert torch.equal(before[-1].weight, after[-1].weight)
    for was, now in zip(demo.task.hidden(before), demo.task.hidden(after), strict=True):
        if kind == "prune":
            assert (now.weight == 0).double().mean().item() == pytest.approx(0.9, abs=1e-3)
            assert torch.equal(now.weight, torch.where(now.weight == 0, 0.0, was.weight))
        elif kind == "quantize":
            assert len(now.weight.unique()) <= 4
        else:
            gain = now.weight[:, :1] / was.weight[:, :1]
            torch.testing.assert_close(now.weight, was.weight * gain)
            torch.testing.assert_close(now.bias, was.bias * gain[:, 0])


def test_a_part_of_the_last_layer_moves_alone(demo):
    data, network = demo.task.load(0, CPU), demo.task.classifier(0, CPU)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trained = demo.task.subset_of_last_layer(network, 64, 0)
    demo.task.train(network, trained, data, steps=5, lr=0.1, seed=0, on_step=ignore)
    chosen = {id(parameter): mask.bool() for parameter, mask in trained.items()}
    assert sum(int(mask.sum()) for mask in chosen.values()) == 64
    for name, parameter in network.named_parameters():
        moved = parameter != before[name]
        mask = chosen.get(id(parameter), torch.zeros_like(moved))
        assert not (moved & ~mask).any() and moved.any() == mask.any()


# ---- growth ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(demo):
    network = demo.task.train_base(demo.task.load(0, CPU), 0, 60, ignore)
    demo.task.damage(network, "prune", 0)
    return network


def test_with_all_seeds_culled_the_damaged_network_is_left_bit_for_bit(demo, damaged):
    data = demo.task.load(0, CPU)
    how = demo.grow.Growth(16, tick_steps=1, ticks=64, z=float("inf"))
    grown = demo.grow.grow(damaged, data, how, seed=0, on_step=ignore)
    assert grown.kept == 0 and sum(f"{State.CULLED:x}" in life for life in lives_of(grown)) == 16
    assert any((layer.blueprint_weights != 1).any() for layer in demo.task.hidden(grown.network))
    with torch.no_grad():
        assert torch.equal(grown.network(data.test[0]), damaged(data.test[0]))


def lives_of(grown) -> list[str]:
    """One string per seed, one digit per tick."""
    return ["".join(life) for life in zip(*grown.lifecycles, strict=True)]


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_growth_keeps_to_its_budget_and_to_legal_lives(demo, damaged, by):
    data, steps = demo.task.load(0, CPU), []
    how = demo.grow.Growth(12, by, tick_steps=1, ticks=64)
    grown = demo.grow.grow(damaged, data, how, seed=0, on_step=steps.append)
    assert sum(steps) == how.steps and len(grown.lifecycles) == how.steps + 1
    alive = [sum(State.GERMINATED <= int(state, 16) <= State.FOSSILIZED for state in tick) for tick in grown.lifecycles]
    assert max(alive) == 12 and grown.kept == alive[-1] == grown.parameters / 8
    rules = GrowthConfig().life()
    for life in lives_of(grown):
        for now, after in itertools.pairwise(int(state, 16) for state in life):
            assert now == after or rules.least_epochs(now, after) is not None
    frozen = {id(p) for layer in demo.task.hidden(grown.network) for p in layer.base_layer.parameters()}
    assert all(not p.requires_grad for p in grown.network.parameters() if id(p) in frozen)


def test_random_seeds_are_others_and_the_same_again(demo, damaged):
    data = demo.task.load(0, CPU)

    def lives(by, seed):
        return demo.grow.grow(
            damaged, data, demo.grow.Growth(6, by, tick_steps=1, ticks=24), seed=seed, on_step=ignore
        ).lifecycles

    assert lives("random", 1) == lives("random", 1)
    assert len({lives(by, seed)[9] for by, seed in (("random", 1), ("random", 2), ("gradient", 1))}) == 3
