"""calibrate_: a sweep in numpy, what becomes of seeds, and what must not change."""

from __future__ import annotations

import contextlib
import copy

import checks
import numpy as np
import pytest
import torch
from torch import nn

import kasmina_ext as kx
from kasmina_ext.lifecycle import ExtendedLifecycle, StateTransition, TransitionRules

S = ExtendedLifecycle
WAY = [S.DORMANT, S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING]
BUFFERS = ("state", "alpha", "telemetry", "grad_telemetry", "history", "history_count", "performance_metrics")


def network(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 14), nn.ReLU(), nn.Linear(14, 9))
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return net.to(device, dtype).requires_grad_(False)


def damaged(healthy: nn.Module, seed: int = 1, share: float = 0.5, **settings) -> nn.Module:
    """A copy with half of all weights gone, its linear layers wrapped."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(healthy)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            keep = torch.rand(module.weight.shape, generator=generator) > share
            module.weight.data *= keep.to(module.weight)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, kx.KasminaLayer(module, **{"chunk_size": 4, **settings}))
    return model


def inputs(
    device: torch.device | str = "cpu", dtype=torch.float64, rows: int = 60, seed: int = 2
) -> list[torch.Tensor]:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return list(x.to(device, dtype).split([rows // 2, rows // 3, rows - rows // 2 - rows // 3]))


def layers(model: nn.Module) -> list[kx.KasminaLayer]:
    return [module for module in model.modules() if isinstance(module, kx.KasminaLayer)]


def numbers(t: torch.Tensor) -> np.ndarray:
    return t.detach().double().cpu().numpy()


def banks(model: nn.Module) -> list[torch.Tensor]:
    return [layer.blueprint_weights.detach().clone() for layer in layers(model)]


def sweep(model: nn.Sequential, healthy: nn.Sequential, x: torch.Tensor, ridge: float):
    """The sequential sweep in numpy: ``(lines, explained in turn, explained after)`` for each linear layer."""
    lines, turn, after, h, t = [], [], [], numbers(x), numbers(x)
    for module, sound in zip(model, healthy, strict=True):
        base = module.base_layer if isinstance(module, kx.KasminaLayer) else module
        h, t = (numbers(each(torch.from_numpy(v).to(x))) for each, v in ((base, h), (sound, t)))
        if base is module:
            continue
        spread = ((t - t.mean(0)) ** 2).sum()
        turn.append(1 - ((t - h) ** 2).sum() / spread)
        found = []
        for f in range(h.shape[1]):
            dx, dt = h[:, f] - h[:, f].mean(), t[:, f] - t[:, f].mean()
            rows = np.append(dx, np.sqrt(ridge * (dt**2).sum()))[:, None]
            (a,), *_ = np.linalg.lstsq(rows, np.append(dt, 0), rcond=None)
            found.append((a, t[:, f].mean() - a * h[:, f].mean()))
        a, b = np.array(found).T
        lines.append((a, b))
        h = a * h + b
        after.append(1 - ((t - h) ** 2).sum() / spread)
    return lines, turn, after


# ---------------------------------------------------------------------------------------------------- the sweep


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.01])
def test_the_sweep_is_numpys(device, ridge):
    healthy = network(device=device)
    model, x = damaged(healthy), inputs(device)
    report = kx.calibrate_(model, healthy, x, ridge=ridge)
    lines, turn, after = sweep(damaged(healthy), healthy, torch.cat(x), ridge)
    for layer, (a, b) in zip(layers(model), lines, strict=True):
        np.testing.assert_allclose(numbers(layer.blueprint_weights), np.stack([a, b]), rtol=1e-8, atol=1e-9)
    assert list(report) == ["0", "2", "4"]
    rows = list(report.values())
    np.testing.assert_allclose([row["in_turn"] for row in rows], turn, rtol=1e-8)
    np.testing.assert_allclose([row["after"] for row in rows], after, rtol=1e-8)
    assert all(row["after"] > row["before"] for row in rows)
    assert [(row["features"], row["seeds"], row["pairs"], row["neutral"], row["nonfinite"]) for row in rows] == [
        (20, 5, 60, 0, 0),
        (14, 4, 60, 0, 0),  # 3.5 seeds, rounded
        (9, 2, 60, 0, 0),
    ]


def test_before_is_of_the_network_as_it_was_given(device):
    healthy, x = network(device=device), inputs(device)
    model = damaged(healthy)
    outputs = {}
    for name, net in (("x", model), ("t", healthy)):
        h, outputs[name] = torch.cat(x), []
        for module in net:
            h = module(h)
            outputs[name].append(numbers(h))
    report = kx.calibrate_(model, healthy, x)
    for i in (0, 2, 4):
        y, t = outputs["x"][i], outputs["t"][i]
        want = 1 - ((t - y) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
        np.testing.assert_allclose(report[str(i)]["before"], want, rtol=1e-9)


def test_an_undone_gain_drift_is_undone(device):
    """What lines can repair is repaired to rounding: the output is the healthy one's."""
    healthy = network(torch.float32, device)
    model = damaged(healthy, share=0)
    for layer in layers(model):
        gain = torch.randn(layer.hidden_dim, generator=torch.Generator().manual_seed(3)).exp().to(device)
        layer.base_layer.weight.data *= gain[:, None]
        layer.base_layer.bias.data += gain
    x = inputs(device, torch.float32)
    report = kx.calibrate_(model, healthy, x, ridge=0)
    assert all(row["after"] > 1 - 1e-9 for row in report.values()) and report["4"]["before"] < 0.9
    torch.testing.assert_close(model(x[0]), healthy(x[0]), rtol=1e-4, atol=1e-4)


def test_nothing_is_damaged(device):
    """Then nothing changes but by the ridge, and with ridge 0 by rounding."""
    healthy, x = network(device=device), inputs(device)
    model = damaged(healthy, share=0)
    report = kx.calibrate_(model, healthy, x, ridge=0)
    for layer in layers(model):
        torch.testing.assert_close(layer.blueprint_weights[0], torch.ones_like(layer.blueprint_weights[0]))
        assert layer.blueprint_weights[1].abs().max() < 1e-12
    assert all(abs(row["before"] - 1) < 1e-12 and abs(row["after"] - 1) < 1e-12 for row in report.values())


def test_a_second_time_changes_nothing_more(device):
    """The seeds are fitted to the base layers: what they were before does not show, nor does which batch was which."""
    healthy, x = network(device=device), inputs(device)
    model = damaged(healthy)
    kx.calibrate_(model, healthy, x)
    first = banks(model)
    kx.calibrate_(model, healthy, x)
    assert all(checks.same_bits(*pair) for pair in zip(first, banks(model), strict=True))
    kx.calibrate_(model, healthy, [torch.cat(x[::-1])])
    for before, now in zip(first, banks(model), strict=True):
        torch.testing.assert_close(now, before, rtol=1e-9, atol=1e-9)


def test_without_kernels(device):
    """Switched off for a layer or for all: the reference finds the same fits."""
    healthy, x, found = network(device=device), inputs(device), []
    for layer_wide, everywhere in ((True, True), (False, True), (True, False)):
        model = damaged(healthy, enable_kernels=layer_wide)
        with kx.flags.override(triton_kernels=everywhere and kx.flags.triton_kernels):
            kx.calibrate_(model, healthy, x)
        found.append(torch.cat([bank.flatten() for bank in banks(model)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- seeds


def test_seeds_go_the_legal_way(device):
    healthy = network(device=device)
    model = damaged(healthy, alpha_schedule="cosine", ramp_epochs=9)
    model[0].set_alpha(None, 0.25)
    kx.calibrate_(model, healthy, inputs(device))
    for layer in layers(model):
        assert layer.lifecycle_states.eq(S.EVALUATING).all() and layer.alpha.eq(1).all()
        assert layer.state_tensor[:, kx.StateVar.EPOCHS_IN_STATE].eq(0).all()
        for seed in range(layer.num_seeds):
            steps = layer.extended_state.get_transition_history(seed)[::-1]
            assert steps == list(zip(WAY[:-1], WAY[1:], strict=True))
        layer.step_lifecycle()
        assert layer.alpha.eq(1).all(), "no ramp begins anew"


@pytest.mark.parametrize("state", S, ids=lambda state: state.name)
def test_every_state_but_a_fossil_ends_and_starts_anew(state):
    healthy, x = network(), inputs()
    model = damaged(healthy, num_blueprints=4)
    layer = model[0]
    layer.set_blueprint([0, 1], [1, 3 if state is S.FOSSILIZED else 2], ["affine", "multiplicative"])
    layer.request_state_transitions([0, 1], state, rules=TransitionRules.any())
    with torch.no_grad():
        layer.blueprint_weights.normal_()
    layer.set_alpha([0, 1], 0.5)
    before, alpha = layer.blueprint_weights.detach().clone(), layer.alpha.clone()
    kx.calibrate_(model, healthy, x)
    after = layer.blueprint_weights.detach()
    first, second = slice(0, 4), slice(4, 8)
    assert torch.equal(after[:, first][[0, 3]], before[:, first][[0, 3]]), "rows that are not its own"
    assert torch.equal(after[3, second], before[3, second])
    history = [new for _, new in layer.extended_state.get_transition_history(0)[::-1]]
    if state is S.FOSSILIZED:
        assert torch.equal(after[:, :8], before[:, :8]) and torch.equal(layer.alpha[:2], alpha[:2])
        assert layer.lifecycle_states[:2].eq(state).all() and len(history) == 1
    else:
        (a, b), *_ = sweep(damaged(healthy), healthy, torch.cat(x), 1e-4)[0]
        np.testing.assert_allclose(numbers(after[1:3, first]), np.stack([a, b])[:, first], rtol=1e-7, atol=1e-8)
        assert layer.lifecycle_states[:2].eq(S.EVALUATING).all() and layer.alpha[:2].eq(1).all()
        assert history[-5:] == WAY[1:]
        walked = history if state is not S.DORMANT else [state, *history]
        for source, target in zip(walked, walked[1:], strict=False):
            legal = target in StateTransition.VALID_TRANSITIONS[source]
            assert legal or (source.is_terminal and target is S.DORMANT)
    assert layer.lifecycle_states[2:].eq(S.EVALUATING).all()


def test_the_other_strategies(device):
    """One layer, a third of the seeds of each kind: the best scale through the origin, the best shift, the best line."""
    healthy, x = network(device=device), inputs(device)
    model = damaged(healthy, num_seeds=3)
    layer = model[0]
    layer.set_strategy([0, 1, 2], ["multiplicative", "additive", "affine"])
    y, t = (numbers(module(torch.cat(x))) for module in (layer.base_layer, healthy[0]))
    kx.calibrate_(model, healthy, x, ridge=0)
    bank = numbers(layer.blueprint_weights)
    lo, mid, hi = (slice(*layer.seed_offsets[i : i + 2].tolist()) for i in range(3))
    np.testing.assert_allclose(bank[0, lo], (y * t).sum(0)[lo] / (y * y).sum(0)[lo], rtol=1e-9)
    np.testing.assert_allclose(bank[0, mid], (t - y).mean(0)[mid], rtol=1e-9, atol=1e-12)
    line = np.array([np.polyfit(y[:, f], t[:, f], 1) for f in range(hi.start, hi.stop)]).T
    np.testing.assert_allclose(bank[:, hi], line, rtol=1e-7, atol=1e-9)
    assert (bank[1, : hi.start] == 0).all(), "rows that they do not use"


@pytest.mark.parametrize("strategy", ["multiplicative", "additive"])
def test_banks_of_one_row(strategy):
    healthy = network()
    model = damaged(healthy, strategy=strategy, num_blueprints=1)
    report = kx.calibrate_(model, healthy, inputs())
    # The best that the strategy can do never loses at its own layer; what the layers together gain is the task's.
    assert report["0"]["after"] > report["0"]["before"]


def test_the_drop_in(device):
    """Random rows, uniform chunks and a remainder that nobody owns."""
    healthy = network(torch.float32, device)
    model = copy.deepcopy(healthy)
    model[2].weight.data *= 0.3
    model[2] = kx.TritonChunkedKasminaLayer(model[2], chunks_per_layer=4)
    kept = model[2].blueprint_weights.detach().clone()
    x = inputs(device, torch.float32)
    kx.calibrate_(model, healthy, x)
    layer = model[2]
    assert layer.seed_offsets[-1] == 12 and layer.lifecycle_states.eq(S.EVALUATING).all()
    assert torch.equal(layer.blueprint_weights[:, 12:], kept[:, 12:])
    assert torch.equal(layer.blueprint_weights[1:], kept[1:])
    h = healthy[1](healthy[0](x[0]))
    assert torch.equal(model[2](h)[:, 12:], model[2].base_layer(h)[:, 12:])


def test_strategies_without_a_fit_are_named():
    healthy = network()
    model = damaged(healthy)
    model[2].set_strategy(2, "mixed")
    before = state(model)
    with pytest.raises(ValueError, match=r"'2' has seeds of strategy MIXED, .* set_strategy"):
        kx.calibrate_(model, healthy, inputs())
    assert same(before, state(model))
    model = damaged(healthy, strategy="additive", num_blueprints=1)
    model[4].state_tensor[:, kx.StateVar.GRAFTING_STRATEGY] = 3
    with pytest.raises(ValueError, match=r"'4' .* AFFINE, which takes 2 rows of the bank, and num_blueprints is 1"):
        kx.calibrate_(model, healthy, inputs())
    model[4].state_tensor[:, kx.StateVar.GRAFTING_STRATEGY] = 77
    with pytest.raises(ValueError, match="strategy 77"):
        kx.calibrate_(model, healthy, inputs())
    # A fossil is not fitted: whatever its strategy.
    model[4].request_state_transitions(None, "FOSSILIZED", rules=TransitionRules.any())
    kx.calibrate_(model, healthy, inputs())


def test_features_and_seeds_with_nothing_to_fit():
    """A seed without a usable feature sleeps on; one with some is neutral in the others."""
    healthy, x = network(), inputs()
    model = damaged(healthy)
    model[0].base_layer.bias.data[:6] = torch.nan
    with torch.no_grad():
        model[2].base_layer.weight[:, :6] = 0
    model[1].register_forward_hook(lambda module, args, out: out.nan_to_num())
    report = kx.calibrate_(model, healthy, x)
    bank = model[0].blueprint_weights.detach()
    assert model[0].lifecycle_states.tolist() == [S.DORMANT, *[S.EVALUATING] * 4]
    assert bank[0, :6].eq(1).all() and bank[1, :6].eq(0).all() and bank[0, 6:].ne(1).all()
    assert report["0"]["neutral"] == 2 and report["0"]["nonfinite"] == 6 * 60 and report["0"]["seeds"] == 4
    assert model[0].extended_state.get_transition_history(0) == []
    assert "neutral" in str(report) and "nonfinite" in str(report)
    few = damaged(healthy)
    report = kx.calibrate_(few, healthy, [x[0][:7]])
    assert all(row["seeds"] == 0 for row in report.values()) and few[0].lifecycle_states.eq(0).all()
    assert kx.calibrate_(few, healthy, [x[0][:7]], least_pairs=7)["0"]["seeds"] == 5


def test_a_dead_feature_gets_its_mean_back():
    healthy, x = network(), inputs()
    model = damaged(healthy, share=0)
    model[0].base_layer.weight.data[3] = 0
    kx.calibrate_(model, healthy, x, ridge=0)
    a, b = numbers(model[0].blueprint_weights)[:, 3]
    want = healthy[0](torch.cat(x))[:, 3].mean().item() - model[0].base_layer.bias[3].item()
    assert a == 1
    np.testing.assert_allclose(b, want, rtol=1e-9)


def test_the_controller_judges_them():
    """EVALUATING: the next evaluation keeps what helps, culls the rest, and ticks leave alpha alone."""
    healthy, x = network(torch.float32), inputs(dtype=torch.float32, rows=300)
    model = damaged(healthy, share=0.3)
    kx.calibrate_(model, healthy, x)
    optimizer = torch.optim.AdamW(kx.param_groups(model, lr=1e-3))
    grow = kx.GrowthController(model, optimizer, budget=1.0, tick_every=1, points=0)
    held = inputs(dtype=torch.float32, rows=200, seed=9)

    def loss_fn(batch):
        return (model(batch) - healthy(batch)).square().mean(1)

    for batch in x * 4:
        optimizer.zero_grad()
        loss = loss_fn(batch).mean()
        loss.backward()
        optimizer.step()
        grow.step(loss)
    assert all(layer.alpha.eq(1).all() for layer in layers(model))
    result = grow.evaluate(held, loss_fn)
    assert result.advanced + result.culled > 0 and result.loss < result.loss_without


def test_the_optimizer_forgets():
    healthy, x = network(torch.float32), inputs(dtype=torch.float32)
    model = damaged(healthy)
    model[0].request_state_transitions([0, 1], "FOSSILIZED", rules=TransitionRules.any())
    optimizer = torch.optim.Adam([layer.blueprint_weights for layer in layers(model)])
    for layer in layers(model):
        layer.blueprint_weights.grad = torch.ones_like(layer.blueprint_weights)
    optimizer.step()
    kx.calibrate_(model, healthy, x, optimizer=optimizer)
    moments = optimizer.state[model[0].blueprint_weights]["exp_avg"]
    assert moments[:, :8].ne(0).all() and moments[:, 8:].eq(0).all()


# ---------------------------------------------------------------------------------------------------- no trace


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: t.clone() for name, t in model.state_dict().items()}
    found |= {f"{name} training": torch.tensor(module.training) for name, module in model.named_modules()}
    found |= {f"{i} telemetry": torch.tensor(layer.telemetry_enabled) for i, layer in enumerate(layers(model))}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return {
        **found,
        "hooks": torch.tensor(hooks),
        "grads": torch.tensor(any(p.requires_grad for p in model.parameters())),
    }


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    def raw(tensor):
        return tensor.cpu().numpy().tobytes()

    names = [name for name in before if not (but and name.endswith(but))]
    return before.keys() == after.keys() and all(raw(before[name]) == raw(after[name]) for name in names)


def restless(device="cpu") -> nn.Sequential:
    """With dropout and batch norm in training mode, some modules in eval mode."""
    torch.manual_seed(0)
    parts = [nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 14), nn.ReLU(), nn.Dropout(0.3)]
    net = nn.Sequential(*parts, nn.Linear(14, 9)).double().to(device)
    net[5].eval()
    return net


def test_all_else_keeps_its_bits(device):
    """Weights, running statistics, modes, telemetry, random numbers, gradients, hooks: of both networks."""
    healthy = restless(device)
    model = damaged(healthy)
    model[3].telemetry_enabled = False
    model(inputs(device)[0]).sum().backward()
    before, sound, grads = state(model), state(healthy), [p.grad.clone() for p in model[1].parameters()]
    cpu, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    kx.calibrate_(model, healthy, inputs(device))
    assert torch.equal(torch.get_rng_state(), cpu) and (np.random.get_state()[1] == numpy_state).all()
    assert same(sound, state(healthy))
    changed = ("blueprint_weights", ".state", ".alpha", ".history", ".history_count")
    assert same(before, state(model), but=changed)
    assert all(torch.equal(p.grad, g) for p, g in zip(model[1].parameters(), grads, strict=True))
    assert not any(torch.equal(before[f"{i}.blueprint_weights"], model[i].blueprint_weights) for i in (0, 3, 6))


def test_it_runs_in_eval_mode(device):
    """The fits are those of networks without dropout, whatever mode they are in."""
    found = []
    for training in (True, False):
        healthy = restless(device).train(training)
        model = damaged(healthy).train(training)
        with torch.inference_mode() if training else torch.enable_grad():
            kx.calibrate_(model, healthy, inputs(device))
        found.append(banks(model))
    assert all(checks.same_bits(*pair) for pair in zip(*found, strict=True))


class Fails(nn.Module):
    """Raises at its n-th call."""

    def __init__(self, calls: int, error: type[BaseException]):
        super().__init__()
        self.left, self.error = calls, error

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise self.error("on purpose")
        return x


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 2, 5, 7, 8])
def test_a_failure_leaves_everything_as_it_was(device, calls, error):
    """In the middle of a batch: of the survey (1-3), of the sweep (4-6, when a layer is calibrated), while measuring."""
    healthy = nn.Sequential(*network(device=device)[:3], nn.Identity(), *network(device=device)[3:])
    model = damaged(healthy, num_blueprints=2).train()
    model[3] = Fails(calls, error)
    model[0].request_state_transitions([0, 2], "FINE_TUNING", blueprints=0, rules=TransitionRules.any())
    before, sound = state(model), state(healthy)
    with pytest.raises(error, match="on purpose"):
        kx.calibrate_(model, healthy, inputs(device))
    assert same(before, state(model)) and same(sound, state(healthy))
    assert torch.is_grad_enabled()
    model[3].left = -1
    kx.calibrate_(model, healthy, inputs(device))


def test_a_failing_reference_or_batch_leaves_everything_as_it_was():
    healthy = network()
    model, before = damaged(healthy), None
    before = state(model)

    def broken():
        yield inputs()[0]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        kx.calibrate_(model, healthy, broken())
    healthy[3] = Fails(2, ValueError)
    with pytest.raises(ValueError, match="on purpose"):
        kx.calibrate_(model, healthy, inputs())
    assert same(before, state(model))


def number_of_hooks(*networks: nn.Module) -> int:
    return sum(len(module._forward_hooks) for network in networks for module in network.modules())


def test_hooks_of_others_are_called_and_kept():
    healthy = network()
    model, calls = damaged(healthy), []
    before = number_of_hooks(model, healthy)
    handles = [model[0].base_layer.register_forward_hook(lambda m, a, out: calls.append("base") or 2 * out)]
    handles.append(healthy[0].register_forward_hook(lambda m, a, out: calls.append("healthy")))
    kx.calibrate_(model, healthy, inputs(), ridge=0)
    assert calls.count("base") == 3 * (2 + 2) and calls.count("healthy") == 3
    handles[0].remove()
    with contextlib.suppress(KeyError):
        handles[1].remove()
    (a, b), *_ = sweep(damaged(healthy), healthy, torch.cat(inputs()), 0.0)[0]
    np.testing.assert_allclose(numbers(model[0].blueprint_weights)[0], a / 2, rtol=1e-8)
    assert number_of_hooks(model, healthy) == before
