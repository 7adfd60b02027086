"""The repair benchmark end to end in its smallest size, what it compares, and what it says of it."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from threads import one_thread
from torch import nn

from kasmina_ext import ExtendedLifecycle, KasminaLayer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TRAINED = {"grow", "calibrate + grow", "last layer", "LoRA of equal size", "full fine-tuning"}


@pytest.fixture(scope="module")
def repair():
    """The benchmark's modules; one thread, as its own processes have, and two rungs of the ladder."""
    sys.path.insert(0, str(ROOT / "scripts"))
    names = ("repair", "repair_methods", "repair_digits", "repair_gpt", "repair_report", "char_gpt", "damage")
    try:
        modules = {name.removeprefix("repair_"): importlib.import_module(name) for name in names}
        with pytest.MonkeyPatch.context() as patch, one_thread():
            patch.setattr(modules["methods"], "LADDER", (3e-3, 1e-2))
            yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def run(repair, part: str, work: Path, out: Path, *more: str) -> dict:
    arguments = [part, "--quick", "--device", "cpu", "--jobs", "1", "--work", str(work), "--out", str(out)]
    assert repair.repair.main([*arguments, *more]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(repair, tmp_path_factory) -> Path:
    """The file of a quick run of both parts, with one damage of each kind."""
    folder = tmp_path_factory.mktemp("repair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair.digits, "DAMAGES", ("90 % pruned",))
        patch.setattr(repair.digits, "NEW_TASKS", ())
        patch.setattr(repair.gpt, "DAMAGES", ("80 % pruned",))
        run(repair, "digits", folder / "digits", folder / "repair.json", "--seeds", "2")
        patch.setattr(repair.methods, "LADDER", (1e-2,))
        run(repair, "gpt", folder / "gpt", folder / "repair.json", "--seeds", "1")
    return folder


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_raw_values_and_what_they_depend_on(results):
    record = json.loads((results / "repair.json").read_text())
    assert set(record) == {"digits", "gpt"}
    for part, methods in (("digits", TRAINED), ("gpt", TRAINED | {"IA3", "LoRA r=8"})):
        section = record[part]
        assert {"sizes", "device", "torch", "commit"} <= section["config"].keys() and "python" in section["machine"]
        (by_method,) = section["found"].values()
        assert methods | {"frozen", "calibrate"} <= by_method.keys()
        for method in methods:
            for one in by_method[method]:
                assert one["parameters"] > 0 and one["seconds_per_step"] > 0 and str(one["rate"]) in one["tried"]
                assert one["score"] == min(one["tried"].values()), "the rate that is best on held-out data"
        assert "score" in by_method["frozen"][0] and by_method["frozen"][0]["parameters"] == 0
    assert [one["seed"] for one in record["digits"]["found"]["90 % pruned"]["grow"]] == [0, 1]
    corpus = record["gpt"]["base"]["corpus"]
    assert corpus["bytes"] > 0 and sum(corpus[f"{name}_characters"] for name in ("train", "val", "test")) > 0


def test_it_goes_on_from_what_it_has(repair, results, monkeypatch, capsys):
    """Nothing is measured again, and the other part's section stays."""
    before = json.loads((results / "repair.json").read_text())
    monkeypatch.setattr(repair.gpt, "DAMAGES", ("80 % pruned",))
    monkeypatch.setattr(repair.repair, "repaired", None)
    after = run(repair, "gpt", results / "gpt", results / "repair.json", "--seeds", "1", "--resume")
    assert after["gpt"]["found"] == before["gpt"]["found"] and after["digits"] == before["digits"]
    (results / "gpt/network.pt").rename(results / "gone.pt")
    arguments = ["gpt", "--quick", "--device", "cpu", "--resume", "--work", str(results / "gpt")]
    assert repair.repair.main([*arguments, "--out", str(results / "repair.json")]) == 2
    assert "start anew" in capsys.readouterr().out
    (results / "gone.pt").rename(results / "gpt/network.pt")


def test_a_deadline_ends_it_with_what_there_is(repair, results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(repair.gpt, "DAMAGES", ("80 % pruned",))
    journal = json.loads((results / "gpt/run.json").read_text())
    journal["parts"] = {name: journal["parts"][name] for name in ("base", "80 % pruned/frozen/0")}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/run.json").write_text(json.dumps(journal))
    (tmp_path / "work/network.pt").write_bytes((results / "gpt/network.pt").read_bytes())
    record = run(repair, "gpt", tmp_path / "work", tmp_path / "repair.json", "--resume", "--deadline", "0")
    assert list(record["gpt"]["found"]["80 % pruned"]) == ["frozen"]
    assert "the deadline of 0 s is near" in capsys.readouterr().out


def test_the_table_goes_into_the_readme_and_says_where_others_win(repair, results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- repair:begin -->\nold\n<!-- repair:end -->\nbelow\n")
    for _ in range(2):  # it can be done again
        assert repair.repair.main(["render", "--out", str(results / "repair.json"), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith("above\n<!-- repair:begin -->\n") and text.endswith("<!-- repair:end -->\nbelow\n")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables if "accuracy" not in line}) <= 2, "each table has its width"
    assert any(line.startswith("| 90 % pruned | ") for line in tables) and "old" not in text
    record = json.loads((results / "repair.json").read_text())
    costs = record["digits"]["summary"]["costs"]
    assert f"| {costs['grow']['parameters']:,.0f} |" in next(line for line in tables if "parameters trained" in line)
    assert "Against *calibrate + grow*: " in text and "Full fine-tuning is" in text


def test_what_is_said_of_others(repair):
    """A clear gain, a clear loss, and what may be chance; losses are better where they are less."""
    ours = [{"seed": seed, "accuracy": 90.0 + seed} for seed in range(5)]
    better, worse, unclear = (
        [one | {"accuracy": one["accuracy"] + by[one["seed"]]} for one in ours]
        for by in ([2, 2.1, 2, 2.2, 2], [-1, -1.1, -1, -1, -1], [1, -1, 1, -1, 0])
    )
    found = {
        "a": {"calibrate + grow": ours, "frozen": worse, "last layer": better, "full fine-tuning": better},
        "b": {"calibrate + grow": ours, "frozen": unclear, "last layer": worse, "full fine-tuning": better},
    }
    section = {"summary": repair.report.summary("digits", found)}
    by = section["summary"]["against calibrate + grow"]["last layer"]
    assert by["a"]["mean"] == pytest.approx(2.06) and by["b"]["mean"] == pytest.approx(-1.02)
    assert repair.report.verdicts("digits", section) == [
        "frozen is no different on b; worse on a",
        "last layer is better on a; worse on b",
        "full fine-tuning is better everywhere",
    ]
    as_bits = {d: {m: [{"seed": one["seed"], "bits": one["accuracy"]} for one in ones] for m, ones in by.items()}
               for d, by in found.items()}  # fmt: skip
    section = {"summary": repair.report.summary("gpt", as_bits)}
    assert "full fine-tuning is worse everywhere" in repair.report.verdicts("gpt", section)


def test_means_say_of_how_many_seeds_they_are(repair):
    """Mean, standard deviation and n; what cannot differ counts for all seeds, and one seed has no spread."""
    ours = [{"seed": seed, "bits": bits, "loss_error": 0.01} for seed, bits in enumerate((1.0, 2.0, 6.0))]
    one = {"seed": 0, "bits": 9.0, "loss_error": 0.01}
    found = {
        "a": {"frozen": [one], "calibrate + grow": ours, "IA3": ours[:2]},
        "b": {"frozen": [one], "calibrate + grow": ours[:1], "IA3": ours[:1]},
    }
    section = {"summary": repair.report.summary("gpt", found), "found": found}
    header, rows = repair.report.table("gpt", section)
    assert header == ["damage", "n", "frozen", "calibrate + grow", "IA3"]
    assert rows[0] == ["a", "2–3", "9.000", "3.000 ± 2.646", "1.500 ± 0.707"]
    assert rows[1] == ["b", "1", "9.000", "1.000", "1.000"]
    against = section["summary"]["against calibrate + grow"]["frozen"]
    assert against["a"]["n"] == 3 and against["a"]["mean"] == pytest.approx(-6) and against["b"]["n"] == 1


class Time:
    """Stands still but for what is said to have taken time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("deadline", [100, 250, 330, 400, 480, 600, 10_000])
def test_rows_are_whole_at_any_deadline(repair, tmp_path, monkeypatch, deadline):
    """All damages with one random seed, then the next: a row is not begun that might not be ended. (Of the first nothing is known.)"""
    clock, costs = Time(), dict.fromkeys(repair.gpt.METHODS_TRIED, 4.0) | {"frozen": 0.2, "grow": 6.0}

    def repaired(problem, method, seed, *, start, rate):
        """Where a rate is sought it takes three attempts, or more or less."""
        assert (rate is None) == (seed == 0)
        attempts = 1 if rate else 2 + (len(method) + problem) % 3
        clock.now += costs[method] * attempts + 0.5
        return {
            "bits": 1.0,
            "parameters": 1,
            "loss_error": 0.0,
            "rate": 0.1,
            "tried": {str(k): 0 for k in range(attempts)},
        }

    damages = iter(range(1000))
    monkeypatch.setattr(repair.repair, "time", clock)
    monkeypatch.setattr(repair.repair, "repaired", repaired)
    monkeypatch.setattr(repair.gpt, "damaged", lambda *_: next(damages))
    monkeypatch.setattr(repair.repair, "base_network", lambda *_: None)
    monkeypatch.setattr(repair.repair, "show", lambda *_: None)
    monkeypatch.setattr(repair.repair, "summary", lambda *_: {})
    monkeypatch.setattr(repair.char_gpt, "read_stdlib", lambda *_: repair.char_gpt.Corpus(None, None, None, dict.fromkeys(
        ("files", "python", "bytes"), 0)))  # fmt: skip
    record = run(repair, "gpt", tmp_path / "work", tmp_path / "out.json", "--seeds", "3", "--deadline", str(deadline))
    found = record["gpt"]["found"]
    done = [(seed, damage) for seed in range(3) for damage in repair.gpt.DAMAGES
            if any(one["seed"] == seed for ones in found.get(damage, {}).values() for one in ones)]  # fmt: skip
    rows = [(seed, damage) for seed in range(3) for damage in repair.gpt.DAMAGES]
    assert done == rows[: len(done)], "in this order"
    for seed, damage in done:
        methods = {name for name, ones in found[damage].items() if any(one["seed"] == seed for one in ones)}
        assert methods == set(repair.repair.methods_for(seed))
    assert clock.now <= max(deadline, 150) and (len(done) == len(rows)) == (deadline == 10_000)


@pytest.mark.parametrize(
    "arguments", [["digits", "--quick"], ["digits", "--seeds", "0"], ["gpt", "--device", "moon"], []]
)
def test_bad_arguments(repair, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        repair.repair.main(arguments)
    assert "argument" in capsys.readouterr().err


# ---- what is compared ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(repair):
    return repair.digits.damaged("90 % pruned", 0, repair.digits.QUICK)


def test_frozen_is_the_damaged_network_to_the_bit(repair, problem):
    healthy = repair.digits.healthy(0, repair.digits.QUICK.base_steps)
    expected = copy.deepcopy(healthy)
    repair.digits.task.damage(expected, "prune", 0)
    prepared = repair.methods.frozen(problem, 0)
    assert all(map(torch.equal, prepared.network.parameters(), expected.parameters()))
    found = repair.methods.repaired(problem, "frozen", 0)
    data = repair.digits.task.load(0, CPU)
    assert found["accuracy"] == repair.digits.task.accuracy(expected, data.test)
    assert found["loss"] == repair.digits.task.losses(expected, data.test).mean().item()


def test_repairs_leave_the_damaged_network_as_it_was(repair, problem):
    before = [parameter.clone() for parameter in problem.network.parameters()]
    for method in repair.digits.METHODS_TRIED:
        repair.methods.repaired(problem, method, 0, rate=1e-2)
    assert all(map(torch.equal, problem.network.parameters(), before))
    assert not any(isinstance(module, KasminaLayer) for module in problem.network.modules())


@pytest.mark.parametrize("method", ["grow", "LoRA of equal size", "full fine-tuning"])
def test_a_second_rate_starts_where_the_first_did(repair, problem, method):
    """Attempts share a network and an optimizer; neither must remember."""
    prepared = repair.methods.METHODS[method](problem, 0)
    batches = list(problem.batches(0))
    trainer = repair.methods.Trainer(prepared.network, prepared.trained, problem.losses, batches[0])
    found = []
    for rate in (1e-2, 3e-3, 1e-2):
        trainer.restart()
        result = repair.methods.trained(problem, prepared, trainer, batches, rate, 0)
        found.append({name: value for name, value in result.items() if "seconds" not in name})
    assert found[0] == found[2] != found[1]


def test_pruned_weights_stay_pruned(repair, problem):
    prepared = repair.methods.everything(problem, 0)
    batches = list(problem.batches(0))
    trainer = repair.methods.Trainer(prepared.network, prepared.trained, problem.losses, batches[0])
    repair.methods.trained(problem, prepared, trainer, batches, 1e-2, 0)
    weights = 0
    for name, parameter in prepared.network.named_parameters():
        damaged = problem.network.get_parameter(name)
        if name.removesuffix(".weight") in problem.names and parameter.dim() == 2:
            assert not parameter[damaged == 0].any() and not torch.equal(parameter, damaged)
            weights += int((damaged != 0).sum())
    others = sum(p.numel() for name, p in prepared.network.named_parameters() if name.endswith("bias") or "8." in name)
    assert prepared.parameters == weights + others


def test_equal_size_and_how_it_is_counted(repair, problem):
    """Counted in what is there, not by the formulas: 48 seeds of 8 features, a weight and a shift each."""
    prepared = repair.methods.grown(problem, 0)
    assert prepared.parameters == repair.methods.parameters_of_seeds(prepared.network) == 48 * 8 * 2
    assert repair.methods.kept_of(prepared.network) == {"kept_seeds": 0, "kept_parameters": 0}
    prepared.network[0].request_state_transitions([0, 5], ExtendedLifecycle.GERMINATED)
    assert repair.methods.kept_of(prepared.network) == {"kept_seeds": 2, "kept_parameters": 2 * 8 * 2}
    adapter = repair.methods.adapted(problem, 0)
    assert adapter.facts["rank"] == 1 and adapter.parameters == (64 + 96) + 3 * (96 + 96)
    by_rank = [abs(repair.methods.adapted(problem, 0, rank).parameters - 768) for rank in (1, 2)]
    assert by_rank[0] == min(by_rank), "the nearest"
    assert repair.methods.last_layer(problem, 0).parameters == 96 * 10 + 10


def test_calibration_takes_images_without_labels(repair):
    """Its digits could be any: with the labels gone, the same network comes out. Images change under the network, too."""
    for damage in ("90 % pruned", "pixel gain drift", "rotation"):
        problem = repair.digits.damaged(damage, 0, repair.digits.QUICK)
        found = repair.methods.calibrated(problem, 0)
        data = repair.digits.task.load(0, CPU)
        reference = repair.digits.healthy(0, repair.digits.QUICK.base_steps)
        images = next(iter(problem.batches(0)))[0]
        assert found.network(images).isfinite().all() and found.facts["parameters"] == 768
        clean, seen = data.train[0][:20], problem_images(repair, problem, data)
        before, after = (
            (network(seen) - reference(clean)).square().mean() for network in (problem.network, found.network)
        )
        assert after < before, damage


def problem_images(repair, problem, data):
    """The first twenty training images as the problem shows them: found among its batches, by their labels' order."""
    drawn = torch.randint(
        len(data.train[0]), (problem.steps, repair.digits.task.BATCH), generator=torch.Generator().manual_seed(0)
    )
    images = torch.cat([batch[0] for batch in problem.batches(0)])
    first = [int((drawn.flatten() == row).nonzero()[0]) for row in range(20)]
    return images[first]


def test_a_climb_ends_between_worse_neighbours(repair, monkeypatch):
    monkeypatch.setattr(repair.methods, "LADDER", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    for best in range(1, 7):
        tried = []

        def attempt(rate: float, best=best, tried=tried) -> dict:
            tried.append(rate)
            return {"score": [(rate - best) ** 2], "rate": rate}

        found = repair.methods.climbed(attempt, 3.0)
        assert found["rate"] == best and len(tried) == len(set(tried))
        assert {best - 1, best + 1} & {1, 2, 3, 4, 5, 6} <= {float(rate) for rate in found["tried"]}
    monkeypatch.setattr(repair.methods, "LADDER", (3.0,))
    assert repair.methods.climbed(lambda rate: {"score": [1.0], "rate": rate}, 3.0)["tried"] == {"3.0": [1.0]}
    monkeypatch.setattr(repair.methods, "LADDER", (2.0, 3.0, 4.0))
    scores = {2.0: math.nan, 3.0: 1.0, 4.0: math.inf}
    assert repair.methods.climbed(lambda rate: {"score": [scores[rate]], "rate": rate}, 3.0)["rate"] == 3.0


# ---- the example -----------------------------------------------------------------------------------------------------


def test_the_example_repairs_without_labels(capsys):
    """With fewer steps of training than it takes by itself."""
    path = ROOT / "examples/repair_without_labels.py"
    spec = importlib.util.spec_from_file_location("repair_without_labels", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(["--steps", "200"])
    assert found["healthy"] > 85 and found["repaired"] > found["pruned"] + 10
    assert found["folded"] == pytest.approx(found["repaired"], abs=0.3), "folding is a rounding"
    printed = capsys.readouterr().out
    assert "explained variance: 48 seeds of 4 layers" in printed and f"repaired  {found['repaired']:5.1f} %" in printed


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_weights_become_the_nearest_level(repair):
    weight = torch.randn(7, 40, dtype=torch.float64)
    for bits in (2, 3):
        for per_row in (False, True):
            found = weight.clone()
            repair.damage.quantize_(found, bits, per_row=per_row)
            for row, levels_of in zip(found, weight if per_row else [weight] * 7, strict=True):
                levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64) * levels_of.abs().max()
                assert (row[:, None] - levels).abs().amin(1).max() < 1e-12
            errors = (found - weight).abs()
            reach = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()
            assert (errors <= reach / (2**bits - 1) + 1e-12).all()
    zeros = torch.zeros(3, 4)
    repair.damage.quantize_(zeros, 2, per_row=True)
    assert zeros.isfinite().all() and zeros.abs().max() < 1e-30


def test_the_smallest_weights_go(repair):
    weight = torch.randn(30, 20)
    pruned = weight.clone()
    repair.damage.prune_(pruned, 0.7)
    assert int((pruned == 0).sum()) == 420 and weight[pruned == 0].abs().max() <= weight[pruned != 0].abs().min()
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_units_drift(repair):
    layer, x, gains = nn.Linear(5, 3), torch.randn(4, 5), torch.tensor([0.5, 1.0, 3.0])
    before = layer(x)
    repair.damage.scale_outputs_(layer, gains)
    torch.testing.assert_close(layer(x), before * gains)


# ---- the GPT ---------------------------------------------------------------------------------------------------------


def test_no_file_is_in_two_sets_and_windows_stay_inside(repair):
    corpus = repair.char_gpt.read_stdlib(CPU, 1_500_000)
    again = repair.char_gpt.read_stdlib(CPU, 2_000_000)
    files = [files_in(part) for part in (again.train, again.val, again.test)]
    assert not (files[0] & files[1] or files[0] & files[2] or files[1] & files[2])
    assert files_in(corpus.train) <= files[0], "a file's set does not depend on the others"
    assert int(corpus.train.max()) < repair.char_gpt.SYMBOLS
    text = torch.arange(100, dtype=torch.uint8)
    (even,) = repair.char_gpt.even_windows(text, 4, 8, 20)
    assert even[0].tolist() == [list(range(start, start + 21)) for start in (0, 26, 52, 79)]
    for (windows,) in repair.char_gpt.random_windows(text, 3, 50, 20, seed=0):
        assert windows.shape == (50, 21) and (windows.diff() == 1).all()


def files_in(part: torch.Tensor) -> set[bytes]:
    return set(part.numpy().tobytes().split(b"\0")) - {b""}


def test_a_gpt_sees_only_what_was_before(repair):
    shape = repair.gpt.TINY.shape
    network = repair.char_gpt.GPT(shape)
    symbols = torch.randint(128, (2, shape.context))
    changed = symbols.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 128
    first, second = network(symbols), network(changed)
    assert torch.equal(first[:, :20], second[:, :20]) and not torch.equal(first[:, 20:], second[:, 20:])
    losses = repair.char_gpt.losses(network, (torch.cat((symbols, symbols[:, :1]), 1),))
    logits = network(symbols).transpose(1, 2)
    expected = nn.functional.cross_entropy(logits, torch.cat((symbols[:, 1:], symbols[:, :1]), 1), reduction="none")
    torch.testing.assert_close(losses, expected.mean(1), rtol=2e-2, atol=0)  # bfloat16


@pytest.mark.parametrize("method", ["calibrate + grow", "last layer", "LoRA r=8", "IA3", "full fine-tuning"])
def test_steps_are_those_of_plain_adamw(repair, method, device):
    """On a GPU they are replayed from a graph that was captured before; masks hold there, too."""
    torch.manual_seed(1)
    sizes = repair.gpt.TINY
    text = torch.randint(128, (4000,), dtype=torch.uint8, device=device)
    corpus = repair.char_gpt.Corpus(text, text, text, {})
    network = repair.char_gpt.GPT(sizes.shape).to(device).requires_grad_(False)
    problem = repair.gpt.damaged(network, corpus, "70 % pruned", sizes)
    batches = list(problem.batches(0))[:6]
    prepared = repair.methods.METHODS[method](problem, 0)
    trainer = repair.methods.Trainer(prepared.network, prepared.trained, problem.losses, batches[0])
    trainer.restart()
    found = [trainer.step(batch, 0.02 / (1 + done)).item() for done, batch in enumerate(batches)]

    twin = repair.methods.METHODS[method](problem, 0)
    optimizer = torch.optim.AdamW(list(twin.trained), lr=0.0, betas=repair.methods.BETAS, weight_decay=0.0)
    expected = []
    for done, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + done)
        optimizer.zero_grad()
        loss = problem.losses(twin.network, batch).mean()
        loss.backward()
        for parameter, mask in twin.trained.items():
            if mask is not None:
                parameter.grad[mask == 0] = 0
        optimizer.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, rel=5e-3) and expected[0] != expected[-1]
