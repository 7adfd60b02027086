"""DistributedDataParallel: nobody's gradient is missing, and each rank's telemetry stays its own."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel, distributed
from two_ranks import Rank, in_two_ranks

import kasmina_ext as kx

ANY = kx.TransitionRules.any()


def network(device: torch.device, **arguments) -> nn.Sequential:
    """Grafted seeds of all strategies, a layer whose seeds all sleep, and one behind a convolution."""
    torch.manual_seed(5)
    model = nn.Sequential(
        kx.KasminaLayer(nn.Conv1d(2, 9, 3), num_seeds=5, num_blueprints=3, alpha_schedule="linear", ramp_epochs=4),
        nn.Flatten(),
        kx.KasminaLayer(nn.Linear(36, 16), num_seeds=4, **arguments),
        nn.Tanh(),
        nn.Linear(16, 3),
    ).to(device, torch.float64)
    model[0].request_state_transitions(range(4), "grafting", [0, 1, 2, 0], [0, 1, 2, 3], rules=ANY)
    model[0].set_alpha(None, [0.2, 0.4, 0.6, 0.8, 1.0])
    return model


def batch(step: int, device: torch.device) -> Tensor:
    """Of both ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 6, generator=generator, dtype=torch.float64).to(device)


def own(rank: Rank, x: Tensor) -> Tensor:
    return x.chunk(2)[rank.index]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def live(model: nn.Sequential, step: int) -> None:
    """Seeds change while the model trains, alike everywhere."""
    model[0].step_lifecycle()
    if step == 1:
        model[2].request_state_transitions([0, 3], "germinated")
    if step == 2:
        model[2].request_state_transitions([0, 3], "grafting", rules=ANY)
        model[0].request_state_transitions(0, "rolled_back")
    if step == 3:
        model[0].recycle()
        model[0].request_state_transitions(1, "fossilized", rules=ANY)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(kx.param_groups(model, 0.02, 0.1))


def compare(one: nn.Module, two: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.stack("distributed: DDP, static_graph on and off, no unused parameters")
@in_two_ranks
def test_gradients_and_training_are_those_of_one_process(rank: Rank) -> None:
    for settings in (
        {"static_graph": False},
        {"static_graph": True},
        {"static_graph": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001},
    ):
        alone, model = network(rank.device), network(rank.device)
        wrapped = DistributedDataParallel(kx.prepare_ddp(model), find_unused_parameters=False, **settings)
        optimizers = optimizer_of(alone), optimizer_of(model)
        for step in range(6):
            x = batch(step, rank.device)
            train(alone, optimizers[0], x)
            train(wrapped, optimizers[1], own(rank, x))
            for (name, expected), found in zip(alone.named_parameters(), model.parameters(), strict=True):
                assert found.grad is not None, name
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)
                assert rank.same(found.grad) and rank.same(found)
            if step < 2:  # all asleep
                assert not model[2].blueprint_weights.grad.any()
            for each in (alone, model):
                live(each, step)
        compare(model, alone)
        assert rank.same(model[0].blueprint_weights) and model[2].blueprint_weights.grad.any()


@pytest.mark.stack("distributed: DDP, static_graph on and off, no unused parameters")
@pytest.mark.stack("distributed: DDP, gradients accumulated with no_sync")
@in_two_ranks
def test_accumulated_gradients(rank: Rank) -> None:
    alone, model = network(rank.device), network(rank.device)
    wrapped = DistributedDataParallel(kx.prepare_ddp(model))
    first, second = batch(0, rank.device), batch(1, rank.device)
    (alone(first).square().mean() + alone(second).square().mean()).backward()
    with wrapped.no_sync():
        wrapped(own(rank, first)).square().mean().backward()
    wrapped(own(rank, second)).square().mean().backward()
    for a, b in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.stack(
    "distributed: DDP, two forwards before a backward",
    note="torch 2.11 needs broadcast_buffers=False: autograd takes its DDP's broadcast of buffers for a change",
)
@in_two_ranks
def test_two_forwards_before_a_backward(rank: Rank) -> None:
    """A contrastive loss, say. DDP writes state and alpha before each forward, the same bits if the ranks agree."""
    alone, first, second = network(rank.device), batch(0, rank.device), batch(1, rank.device)
    (alone(first).square().mean() + alone(second).square().mean()).backward()

    def gradients(broadcast: bool) -> list[Tensor]:
        model = network(rank.device)
        wrapped = DistributedDataParallel(kx.prepare_ddp(model), broadcast_buffers=broadcast)
        assert not kx.distributed.sync_lifecycle(model)
        (wrapped(own(rank, first)).square().mean() + wrapped(own(rank, second)).square().mean()).backward()
        return [parameter.grad for parameter in model.parameters()]

    def is_right(found: list[Tensor]) -> None:
        for expected, gradient in zip(alone.parameters(), found, strict=True):
            torch.testing.assert_close(gradient, expected.grad, rtol=1e-9, atol=1e-12)

    is_right(gradients(broadcast=False))
    ordinary = DistributedDataParallel(nn.BatchNorm1d(2).to(rank.device, torch.float64)).eval()
    before = ordinary.module.running_mean._version
    ordinary(first)
    if ordinary.module.running_mean._version > before:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(broadcast=True)
    else:
        is_right(gradients(broadcast=True))


@pytest.mark.stack("distributed: DDP, telemetry of each rank kept (prepare_ddp)")
@in_two_ranks
def test_each_rank_keeps_its_telemetry(rank: Rank) -> None:
    model, careless = network(rank.device), network(rank.device)
    model.register_buffer("mine", torch.full((1,), float(rank.index), device=rank.device))
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    wrapped = DistributedDataParallel(kx.prepare_ddp(model), broadcast_buffers=True)
    forgetful = DistributedDataParallel(careless, broadcast_buffers=True)
    features = []
    for step in range(3):
        x = own(rank, batch(step, rank.device))
        features.append(model[0].base_layer(x).detach())
        for each in (wrapped, forgetful):
            each(x).square().mean().backward()
    values = torch.cat(features).movedim(1, -1).flatten(0, 1)
    offsets = model[0].seed_offsets.tolist()
    for seed, (count, mean, m2, calls, nonfinite) in enumerate(model[0].telemetry.tolist()):
        chunk = values[:, offsets[seed] : offsets[seed + 1]]
        assert (count, calls, nonfinite) == (chunk.numel(), 3, 0)
        assert mean == pytest.approx(chunk.mean().item()) and m2 == pytest.approx(
            chunk.var(correction=0).item() * count
        )
    assert model[0].grad_telemetry[:, 2].tolist() == [3] * 5
    for name in ("telemetry", "grad_telemetry"):
        assert not rank.same(model[0]._buffers[name])
    assert model.mine.item() == rank.index
    # Without it, all but the last forward of every rank is forgotten for what rank 0 saw.
    count = [None, None]
    dist.all_gather_object(count, (careless[0].telemetry - model[0].telemetry).abs().max().item() < 1e-9)
    assert count == [True, False]
    # State and alpha are broadcast as they always were.
    if not rank.first:
        model[0].set_alpha(0, 0.0)
    wrapped(x)
    assert model[0].alpha[0] != 0 and rank.same(model[0].alpha)
    # And a model that is compiled before it is wrapped.
    ignored = DistributedDataParallel(torch.compile(kx.prepare_ddp(network(rank.device)))).parameters_to_ignore
    assert "_orig_mod.0.telemetry" in ignored


def test_what_is_ignored():
    layer = kx.KasminaLayer(nn.Linear(3, 4))
    assert kx.prepare_ddp(layer) is layer
    assert layer._ddp_params_and_buffers_to_ignore[::2] == ["telemetry", "grad_telemetry"]
    model = nn.Sequential(layer, nn.ModuleList([layer, kx.KasminaLayer(nn.Linear(3, 4))]))
    model._ddp_params_and_buffers_to_ignore = {"0.alpha"}
    kx.prepare_ddp(kx.prepare_ddp(model))
    names = [f"{at}.{name}" for at in ("0", "1.0", "1.1") for name in ("telemetry", "grad_telemetry")]
    found = model._ddp_params_and_buffers_to_ignore
    assert sorted(found) == sorted(["0.alpha", *names, *(f"_orig_mod.{name}" for name in names)])
    compiled = torch.compile(nn.Sequential(layer))
    kx.prepare_ddp(compiled)
    assert "_orig_mod.0.telemetry" in compiled._ddp_params_and_buffers_to_ignore
    # DDP's own mixed precision passes over all of our buffers.
    precision = distributed._MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    distributed._cast_buffers(precision, model)
    assert {name: buffer.dtype for name, buffer in layer._buffers.items()} == layer.BUFFER_DTYPES


@in_two_ranks
def test_models_that_cannot_be_prepared(rank: Rank) -> None:
    with pytest.raises(ValueError, match="no KasminaLayer"):
        kx.prepare_ddp(nn.Linear(2, 2))
    wrapped = DistributedDataParallel(network(rank.device))
    with pytest.raises(ValueError, match=r"DDP\(prepare_ddp\(model\)\)"):
        kx.prepare_ddp(wrapped)


# ---- another number of ranks -----------------------------------------------------------------------------------------


def saved(model: nn.Module, optimizer: torch.optim.Optimizer, merged: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "telemetry": merged}, file)
    return file.getvalue()


def restarted(data: bytes, device: torch.device, keeps_telemetry: bool):
    """In a new process, say: model and optimizer; one rank goes on with the telemetry of all."""
    loaded = torch.load(io.BytesIO(data), weights_only=True, map_location=device)
    model = network(device)
    model.load_state_dict(loaded["model"])
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(loaded["optimizer"])
    for name, telemetry in loaded["telemetry"].items():
        layer = model.get_submodule(name)
        layer.telemetry.copy_(telemetry) if keeps_telemetry else layer.reset_telemetry()
    return model, optimizer


@pytest.mark.stack("distributed: elastic restart on another number of ranks")
@in_two_ranks
def test_ddp_goes_on_with_another_number_of_ranks(rank: Rank) -> None:
    """2 -> 1 -> 2, against one process that was never stopped: all that it learnt and all that it saw."""
    alone = network(rank.device)
    optimizer = optimizer_of(alone)
    for step in range(9):
        train(alone, optimizer, batch(step, rank.device))
        live(alone, step)

    model = network(rank.device)
    optimizer = optimizer_of(model)
    wrapped = DistributedDataParallel(kx.prepare_ddp(model))
    for step in range(3):
        train(wrapped, optimizer, own(rank, batch(step, rank.device)))
        live(model, step)
    merged = kx.distributed.sync_telemetry(model)
    path = rank.folder / "two.pt"
    if rank.first:
        path.write_bytes(saved(model, optimizer, merged))

    path = rank.folder / "one.pt"
    if rank.first:  # the only one there is now
        model, optimizer = restarted((rank.folder / "two.pt").read_bytes(), rank.device, True)
        for step in range(3, 6):
            train(model, optimizer, batch(step, rank.device))
            live(model, step)
        path.write_bytes(saved(model, optimizer, {name: model.get_submodule(name).telemetry for name in merged}))
    dist.barrier()

    model, optimizer = restarted(path.read_bytes(), rank.device, rank.first)
    wrapped = DistributedDataParallel(kx.prepare_ddp(copy.deepcopy(model)))
    optimizer_state = optimizer.state_dict()
    model = wrapped.module
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(optimizer_state)
    for step in range(6, 9):
        train(wrapped, optimizer, own(rank, batch(step, rank.device)))
        live(model, step)
    compare(model, alone)
    assert kx.distributed.lifecycle_digest(model) == kx.distributed.lifecycle_digest(alone)
    for name, telemetry in kx.distributed.sync_telemetry(model).items():
        whole = alone.get_submodule(name).telemetry
        assert torch.equal(telemetry[:, 0], whole[:, 0]) and rank.same(telemetry)
        torch.testing.assert_close(telemetry[:, 1:3], whole[:, 1:3], rtol=1e-9, atol=1e-11)
