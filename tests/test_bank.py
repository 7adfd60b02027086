"""The bank: reconstruction losses of seeds in TRAINING, and which of its elements belong to a seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from kasmina_ext import ExtendedStateTensor, KasminaLayer, TransitionRules, TritonChunkedKasminaLayer

ANY = TransitionRules.any()
STRATEGIES = ["multiplicative", "additive", "mixed", "affine"]


def training_layer(device, base=None, **arguments):
    """Seeds 0 to 3 in TRAINING, one of each strategy, with random blueprints; seed 4 in GRAFTING, 5 dormant."""
    base = nn.Linear(3, 21, device=device) if base is None else base.to(device)
    layer = KasminaLayer(base, num_seeds=6, num_blueprints=3, **arguments)
    nn.init.normal_(layer.blueprint_weights)
    layer.request_state_transitions(range(4), "training", [0, 1, 2, 1], STRATEGIES, rules=ANY)
    layer.request_state_transitions(4, "grafting", 0, rules=ANY)
    return layer


def expected_losses(layer, x, target):
    """Seed by seed, in float64; x and target have their features last."""
    x, target, bank = x.double(), target.double(), layer.blueprint_weights.detach().double()
    losses = []
    for seed, (start, end) in enumerate(
        zip(layer.seed_offsets.tolist(), layer.seed_offsets.tolist()[1:], strict=False)
    ):
        chunk, p = x[..., start:end], int(layer.blueprint_ids[seed])
        w = bank[p, start:end]
        blended = {
            0: lambda chunk=chunk, w=w: w * chunk,
            1: lambda chunk=chunk, w=w: chunk + w,
            2: lambda chunk=chunk, w=w: (chunk + w) / 2,
            3: lambda chunk=chunk, w=w, p=p, s=start, e=end: w * chunk + bank[p + 1, s:e],
        }[int(layer.grafting_strategies[seed])]
        trains = int(layer.lifecycle_states[seed]) == 2
        losses.append((blended() - target[..., start:end]).square().mean().item() if trains else 0.0)
    return losses


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_reconstruction_loss_of_each_seed(device, kernels, given):
    layer = training_layer(device, enable_kernels=kernels)
    x = layer.base_layer(torch.randn(4, 5, 3, device=device))
    target = torch.randn_like(x) if given else None
    losses = layer.reconstruction_loss(x, target)
    assert losses.shape == (6,) and losses.dtype == torch.float32 and losses.device == layer.device
    assert losses.tolist() == pytest.approx(expected_losses(layer, x, x if target is None else target), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 21, 4, 3), (21, 4, 3)])
def test_reconstruction_loss_of_a_convolution(device, shape):
    layer = training_layer(device, nn.Conv2d(2, 21, 1))
    x = torch.randn(shape, device=device)
    last = x.movedim(-3, -1)
    assert layer.reconstruction_loss(x).tolist() == pytest.approx(expected_losses(layer, last, last), rel=1e-5)


def test_only_the_blueprint_learns(device):
    layer = training_layer(device)
    x = layer.base_layer(torch.randn(8, 3, device=device))
    layer.reconstruction_loss(x, 2 * x).sum().backward()
    assert layer.base_layer.weight.grad is None
    reached = layer.blueprint_weights.grad != 0
    assert torch.equal(reached, layer.blueprint_mask(layer.lifecycle_states == 2))


@pytest.mark.parametrize("strategy", ["multiplicative", "additive", "affine"])
def test_training_on_it_pulls_any_blueprint_to_the_neutral_one(device, strategy):
    layer = KasminaLayer(nn.Linear(3, 8, device=device), num_seeds=2, strategy=strategy)
    nn.init.normal_(layer.blueprint_weights)
    for name in ("germinated", "training"):
        layer.request_state_transitions(None, name, keep_blueprints=True)
    optimizer = torch.optim.Adam([layer.blueprint_weights], lr=0.05)
    for _ in range(400):
        x = layer.base_layer(torch.randn(32, 3, device=device))
        optimizer.zero_grad()
        layer.reconstruction_loss(x).sum().backward()
        optimizer.step()
    neutral = {"multiplicative": [1.0], "additive": [0.0], "affine": [1.0, 0.0]}[strategy]
    for row, value in enumerate(neutral):
        assert (layer.blueprint_weights[row] - value).abs().max() < 0.02


def test_bad_targets(device):
    layer = training_layer(device)
    x = torch.randn(4, 21, device=device)
    with pytest.raises(ValueError, match=r"target must have the shape of x, \[4, 21\], got \[3, 21\]"):
        layer.reconstruction_loss(x, x[:3])
    with pytest.raises(RuntimeError, match="target"):
        layer.reconstruction_loss(x, x.double())
    with pytest.raises(RuntimeError, match="reconstruction_loss"):
        layer.reconstruction_loss(x[:, :3])


def test_mask_of_elements(device):
    layer = TritonChunkedKasminaLayer(nn.Linear(2, 7, device=device), 3, num_blueprints=4)
    layer.set_blueprint(None, [2, 1, 3], ["affine", "additive", "mixed"])
    mask = layer.blueprint_mask(torch.tensor([True, False, True], device=device))
    expected = torch.zeros(4, 7, dtype=torch.bool)
    expected[2:4, 0:2] = True  # AFFINE takes two rows
    expected[3, 4:6] = True  # feature 6 is unowned
    assert torch.equal(mask.cpu(), expected)
    layer.blueprint_ids = torch.tensor([-1, 4, 99])  # no such rows
    assert not layer.blueprint_mask(torch.ones(3, dtype=torch.bool, device=device)).any()


# ---- a bank that cannot be written -----------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_parametrized_bank_is_refused_before_anything_is_written():
    layer = KasminaLayer(nn.Linear(3, 8), num_seeds=4)
    layer(torch.randn(2, 3)).sum().backward()
    parametrize.register_parametrization(layer, "blueprint_weights", Doubled())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for call in (
        lambda: layer.request_state_transition(0, "germinated"),
        lambda: layer.request_state_transitions(None, "germinated"),
        lambda: layer.request_state_transitions([0, 1], torch.tensor([1, 8])),
        layer.reset_parameters,
    ):
        with pytest.raises(RuntimeError, match="blueprint_weights is parametrized.*keep_blueprints=True"):
            call()
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert layer.request_state_transition(0, "germinated", {"keep_blueprint": True})
    assert not layer.request_state_transitions([1], torch.tensor([1]), keep_blueprints=True).any()
    assert not layer.request_state_transitions([0, 1], "training").any()
    assert layer.lifecycle_states.tolist() == [2, 2, 0, 0]


# ---- writing states directly ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [None, "linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("write", ["set_state", "update_state", "many"])
def test_alpha_follows_states_that_are_written_directly(device, schedule, write):
    layer = KasminaLayer(nn.Linear(3, 8, device=device), num_seeds=4, alpha_schedule=schedule)
    nn.init.normal_(layer.blueprint_weights)
    bank, x = layer.blueprint_weights.detach().clone(), torch.randn(5, 3, device=device)
    layer.set_blueprint(None, 0)
    layer.set_alpha(None, [0.25, 0.5, 0.75, 1.0])

    def put(target):
        {
            "set_state": lambda: [layer.extended_state.set_state(seed, target) for seed in (1, 3)],
            "update_state": lambda: [layer.extended_state.update_state(s, {"lifecycle": target}) for s in (1, 3)],
            "many": lambda: layer.extended_state.set_state([1, 3, 1], target),
        }[write]()

    put("germinated")
    assert torch.equal(layer.blueprint_weights, bank)  # as they are: neutral is for requests
    before = layer(x)
    put("grafting")
    assert layer.alpha.tolist() == ([0.25, 0.0, 0.75, 0.0] if schedule else [0.25, 0.5, 0.75, 1.0])
    assert torch.equal(layer(x), before) == (schedule is not None)
    layer.set_alpha([1, 3], 0.5)
    put("grafting")  # stays: no transition
    assert layer.alpha.tolist() == [0.25, 0.5, 0.75, 0.5]
    put("stabilization")
    assert layer.alpha.tolist() == ([0.25, 1.0, 0.75, 1.0] if schedule else [0.25, 0.5, 0.75, 0.5])


def test_a_state_on_its_own_has_no_alpha():
    state = ExtendedStateTensor(3)
    state.set_state(None, "grafting")
    assert state.get_state().tolist() == [3, 3, 3] and "alpha" not in state._buffers
