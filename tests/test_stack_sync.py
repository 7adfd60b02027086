"""Ranks that agree: telemetry merged exactly, digests of lifecycles, a rank that diverged noticed and healed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from growing import Classifier
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import Rank, in_two_ranks

import kasmina_ext as kx

ANY = kx.TransitionRules.any()


def seeds(device, rows: int = 2, num_seeds: int = 4, **arguments) -> kx.KasminaLayer:
    base = nn.Linear(5, 18, device=device, dtype=torch.float64)
    return kx.KasminaLayer(base, num_seeds=num_seeds, num_blueprints=rows, **arguments)


def rows_of(rank: int, rows: int) -> torch.Tensor:
    """A mean a thousand times the deviation, another one on each rank, and something that is not finite."""
    x = 1000.0 * (1 + rank) + torch.randn(rows, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    x[1, 2] = (float("inf"), float("nan"))[rank]
    return x


# ---- telemetry -------------------------------------------------------------------------------------------------------


@pytest.mark.stack("distributed: sync_telemetry merges ranks exactly")
@in_two_ranks
def test_telemetry_of_all_ranks(rank: Rank) -> None:
    """Against float64 statistics of all that both ranks saw, put together."""
    layer = seeds(rank.device)
    seen = []
    for r in range(2):  # what the other rank sees is known here, too
        layer.reset_telemetry()
        batches = [rows_of(r, 7 + 4 * r), *[rows_of(r, 3)] * r]  # rank 1 has more rows and one more batch
        seen += [layer.base_layer(batch.to(rank.device)) for batch in batches]
        for batch in batches:
            layer(batch.to(rank.device)).sum().backward()
        if r == rank.index:
            own = layer.telemetry.clone(), layer.grad_telemetry.clone()
            break
    for r in range(rank.index + 1, 2):
        seen += [layer.base_layer(rows.to(rank.device)) for rows in (rows_of(r, 11), rows_of(r, 3))]
    merged, gradients = layer.sync_telemetry(), layer.sync_grad_telemetry()
    assert torch.equal(layer.telemetry, own[0]) and torch.equal(layer.grad_telemetry, own[1])
    assert merged.dtype == torch.float64 and rank.same(merged) and rank.same(gradients)
    features = torch.cat(seen).detach().cpu()
    offsets = layer.seed_offsets.tolist()
    for seed in range(4):
        values = features[:, offsets[seed] : offsets[seed + 1]].flatten()
        finite = values[values.isfinite()]
        count, mean, m2, calls, nonfinite = merged[seed].tolist()
        assert (count, calls, nonfinite) == (len(finite), 3, len(values) - len(finite))
        assert mean == pytest.approx(finite.mean().item(), rel=1e-12)
        assert m2 == pytest.approx((finite - finite.mean()).square().sum().item(), rel=1e-6)
    both = [torch.empty_like(gradients) for _ in range(2)]
    dist.all_gather(both, layer.grad_telemetry)
    assert torch.equal(gradients, both[0] + both[1]) and rank.same(layer.sync_telemetry())


@in_two_ranks
def test_telemetry_of_a_model_and_of_a_group(rank: Rank) -> None:
    model = nn.Sequential(seeds(rank.device), nn.ReLU(), kx.KasminaLayer(nn.Linear(18, 6).double(), num_seeds=2)).to(
        rank.device
    )
    if not rank.first:  # rank 0 sees nothing
        model(rows_of(0, 5)[:1].to(rank.device)).sum().backward()
    merged = kx.distributed.sync_telemetry(model)
    assert list(merged) == ["0", "2"]
    for name, layer in (("0", model[0]), ("2", model[2])):
        assert (
            torch.equal(merged[name], layer.sync_telemetry()) and merged[name][:, 3].tolist() == [1] * layer.num_seeds
        )
        assert torch.equal(kx.distributed.sync_grad_telemetry(model)[name], layer.sync_grad_telemetry())
        assert rank.same(merged[name])
    with kx.distributed.merged_telemetry(model):
        assert torch.equal(model[2].telemetry, merged["2"]) and rank.same(kx.potential(model[0]))
        assert not kx.potential(model[0]).isnan().any()
    assert bool(kx.potential(model[0]).isnan().all()) == rank.first
    for member in range(2):
        group = dist.new_group([member])
        if rank.index == member:
            assert torch.equal(model[0].sync_telemetry(group), model[0].telemetry)
        else:
            with pytest.raises(ValueError, match="not in the group"):
                model[0].sync_telemetry(group)
    unlike = seeds(rank.device, num_seeds=4 + rank.index)
    with pytest.raises(
        RuntimeError, match=f"do not have the same layers; rank {rank.index} has : {4 + rank.index} seeds"
    ):
        kx.distributed.sync_telemetry(unlike)


def test_one_process_is_one_rank(device):
    layer = seeds(device)
    layer(torch.randn(6, 5, device=device, dtype=torch.float64)).sum().backward()
    merged = layer.sync_telemetry()
    assert torch.equal(merged, layer.telemetry) and merged.data_ptr() != layer.telemetry.data_ptr()
    assert torch.equal(layer.sync_grad_telemetry(), layer.grad_telemetry)
    assert layer.sync_lifecycle() is False and kx.distributed.sync_lifecycle(nn.Sequential(layer)) == []
    with kx.distributed.merged_telemetry(layer):
        assert torch.equal(layer.telemetry, merged)
    with pytest.raises(ValueError, match="rank 1 is not in the group"):
        layer.sync_lifecycle(src=1)


# ---- digests ---------------------------------------------------------------------------------------------------------


def lived(device, dtype=torch.float64) -> kx.KasminaLayer:
    torch.manual_seed(0)
    layer = kx.KasminaLayer(nn.Linear(5, 18, dtype=dtype), num_seeds=4, alpha_schedule="linear").to(device)
    layer.request_state_transitions([0, 2], "germinated")
    layer.request_state_transitions(2, "training")
    layer.set_alpha(1, 0.25)
    return layer


def test_digest(device):
    layer, twin = lived(device), lived("cpu", torch.bfloat16)
    digest = layer.lifecycle_digest()
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert digest == twin.lifecycle_digest() == copy.deepcopy(layer).lifecycle_digest()
    model = nn.ModuleDict({"a": layer, "b": twin})
    assert kx.distributed.lifecycle_digest(model) != kx.distributed.lifecycle_digest({"a": layer, "c": twin})
    # It has nothing to do with what was seen.
    layer(torch.randn(2, 5, device=device, dtype=torch.float64)).sum().backward()
    layer.extended_state.update_performance(0, {"loss": 1.0})
    assert layer.lifecycle_digest() == digest
    for name in ("state", "history", "history_count", "alpha"):
        bits = layer._buffers[name].view(torch.int32).view(-1)
        for place in (0, bits.numel() - 1):
            bits[place] ^= 1  # the least that could differ
            assert layer.lifecycle_digest() != digest
            bits[place] ^= 1
    assert layer.lifecycle_digest() == digest


def test_digest_of_today_is_that_of_tomorrow():
    """It may be kept in a log: the same bits of another day, device or version have the same digest."""
    assert lived("cpu").lifecycle_digest() == "6bfeb3392ea6ba84"


# ---- a rank that diverged --------------------------------------------------------------------------------------------


def trained(rank: Rank, **arguments) -> tuple[Classifier, DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Classifier(schedule="linear").double().to(rank.device)
    for layer in model.layers:
        layer.request_state_transitions([0, 1], "germinated")
        layer.request_state_transitions(0, "grafting", rules=ANY)
        layer.set_alpha(0, 0.5)
    optimizer = torch.optim.AdamW(kx.param_groups(model, 0.05))
    wrapped = DistributedDataParallel(kx.prepare_ddp(model), broadcast_buffers=False, **arguments)
    return model, wrapped, optimizer


def step(rank: Rank, wrapped: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    """Each rank has other data."""
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(8, 6, dtype=torch.float64, device=rank.device) + rank.index
        wrapped(x).square().mean().backward()
        optimizer.step()


def everything(model: Classifier, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """What the ranks should have in common, as one tensor."""
    found = []
    for layer in model.layers:
        found += [layer.state, layer.history, layer.history_count, layer.alpha, layer.performance_metrics]
        found += [layer.blueprint_weights, *layer.moments(optimizer)]
    return torch.cat([tensor.detach().double().flatten() for tensor in found])


@pytest.mark.stack("distributed: lifecycle_digest and sync_lifecycle heal a rank that diverged")
@in_two_ranks
def test_a_rank_that_diverged_is_noticed_and_healed(rank: Rank) -> None:
    model, wrapped, optimizer = trained(rank)
    step(rank, wrapped, optimizer, 3)
    assert rank.same(everything(model, optimizer))
    assert kx.distributed.sync_lifecycle(wrapped, optimizer=optimizer) == []
    # Rank 1 makes a seed start afresh on its own: its weights and, with the next step, its moments are lost.
    if not rank.first:
        model.first.request_state_transitions(0, "rolled_back")
        model.first.recycle(0)
        model.first.request_state_transitions([1, 0], ["grafting", "germinated"], rules=ANY)
        model.first.extended_state.update_performance(1, {"loss": 0.5})
    step(rank, wrapped, optimizer, 2)
    digests = [None, None]
    dist.all_gather_object(digests, (model.first.lifecycle_digest(), model.second.lifecycle_digest()))
    assert digests[0][0] != digests[1][0] and digests[0][1] == digests[1][1]
    assert not rank.same(everything(model, optimizer)) and not rank.same(model.first.blueprint_weights)
    before = everything(model, optimizer)
    telemetry = model.first.telemetry.clone()
    healed = kx.distributed.sync_lifecycle(wrapped, optimizer=optimizer)
    assert healed == ([] if rank.first else ["module.first"])
    assert rank.same(everything(model, optimizer)) and torch.equal(model.first.telemetry, telemetry)
    if rank.first:
        assert torch.equal(everything(model, optimizer), before)
    step(rank, wrapped, optimizer, 3)
    assert rank.same(everything(model, optimizer))


@pytest.mark.stack("distributed: lifecycle_digest and sync_lifecycle heal a rank that diverged")
@in_two_ranks
def test_a_rank_that_missed_something_is_healed_for_good(rank: Rank) -> None:
    """The next step finds a germination that is news to this rank alone: it must not reset moments for it again."""
    model, wrapped, optimizer = trained(rank)
    step(rank, wrapped, optimizer)
    if rank.first:
        model.second.request_state_transitions(2, "germinated")
        model.second.request_state_transitions(2, "fine_tuning", rules=ANY)
    step(rank, wrapped, optimizer, 3)
    assert kx.distributed.sync_lifecycle(model, optimizer=optimizer) == ([] if rank.first else ["second"])
    used = model.second.blueprint_mask(model.second.lifecycle_states == 6)
    assert model.second.moments(optimizer)[0][used].any()
    step(rank, wrapped, optimizer, 2)
    assert rank.same(everything(model, optimizer))


@in_two_ranks
def test_any_rank_may_be_the_one_to_follow(rank: Rank) -> None:
    model, wrapped, optimizer = trained(rank)
    if rank.first:
        model.second.set_alpha(2, 0.125)
        with torch.no_grad():
            model.first.blueprint_weights[0, 3] = 7.0  # no digest of lifecycles says so
    assert rank.same(torch.tensor(int(model.first.lifecycle_digest()[:8], 16)))
    assert model.first.sync_lifecycle(src=1) == model.second.sync_lifecycle(src=1) == rank.first
    assert model.second.alpha[2] == 1 and model.first.blueprint_weights[0, 3] == 1
    assert rank.same(everything(model, optimizer))
    with pytest.raises(ValueError, match="rank 2 is not in the group"):
        model.first.sync_lifecycle(src=2)


@in_two_ranks
def test_layers_that_are_not_alike_are_refused(rank: Rank) -> None:
    layer = seeds(rank.device, rows=2 + rank.index)
    before = layer.state.clone()
    if not rank.first:
        layer.set_alpha(0, 0.5)
    with pytest.raises(RuntimeError, match="do not have the same layers and optimizers; rank"):
        layer.sync_lifecycle()
    assert torch.equal(layer.state, before)
    # An optimizer that has not stepped yet has no moments to be healed.
    model, wrapped, optimizer = trained(rank)
    fresh = torch.optim.AdamW(kx.param_groups(model, 0.05))
    step(rank, wrapped, optimizer)
    with pytest.raises(RuntimeError, match="do not have the same"):
        kx.distributed.sync_lifecycle(model, optimizer=(optimizer, fresh)[rank.index])


@in_two_ranks
def test_ddp_heals_what_it_broadcasts_and_nothing_else(rank: Rank) -> None:
    """Why one rank must not decide alone, even under broadcast_buffers=True."""
    model = seeds(rank.device, strategy="additive")
    with torch.no_grad():
        model.blueprint_weights.fill_(5.0)
    wrapped = DistributedDataParallel(kx.prepare_ddp(model))
    if rank.first:
        model.request_state_transitions(0, "germinated")
    wrapped(rows_of(0, 3).to(rank.device))
    assert rank.same(model.state) and not rank.same(model.blueprint_weights)
    assert model.sync_lifecycle() is not rank.first
    assert rank.same(model.blueprint_weights)
