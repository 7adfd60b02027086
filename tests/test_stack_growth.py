"""A growth controller on each rank: all decide alike, by what all have seen."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from growing import FAST, STATES, Run, graft, same, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from two_ranks import Rank, in_two_ranks

import kasmina_ext as kx


class RankRun(Run):
    """Each rank trains and judges on data of its own, in DDP without its broadcasts if not said otherwise."""

    def __init__(self, rank: Rank, ddp: dict | None = None, **settings) -> None:
        super().__init__(FAST, device=rank.device, **settings)
        own = slice(150 * rank.index, 150 * rank.index + 150)
        self.train = tuple(torch.cat([part[own]] * 2) for part in self.train)
        self.held = self.held[5 * rank.index : 5 * rank.index + 5]
        self.plain = self.model
        self.model = DistributedDataParallel(kx.prepare_ddp(self.plain), **(ddp or {"broadcast_buffers": False}))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")

    def evaluate(self) -> kx.controller.Evaluation:
        return self.control.evaluate(self.held, self.loss)

    def states(self) -> list[int]:
        return torch.cat([layer.lifecycle_states for layer in self.plain.layers]).tolist()

    def shared(self) -> Tensor:
        """What the ranks should have in common."""
        found = []
        for layer in self.plain.layers:
            found += [layer.state, layer.history, layer.alpha, layer.blueprint_weights, *layer.moments(self.optimizer)]
        return torch.cat([tensor.detach().double().flatten() for tensor in found])


def everyones(value: object) -> list:
    found = [None, None]
    dist.all_gather_object(found, value)
    return found


@in_two_ranks
def test_all_ranks_decide_alike(rank: Rank) -> None:
    for ddp in ({"broadcast_buffers": False}, {"static_graph": True}):
        decide_alike(rank, RankRun(rank, ddp))


def decide_alike(rank: Rank, run: RankRun) -> None:
    run.step(25)
    alive = run.alive()
    before = [layer.state.clone() for layer in run.plain.layers]
    losses = run.loss(tuple(torch.cat(part) for part in zip(*run.held, strict=True))).detach()
    found = run.evaluate()
    assert rank.same(run.shared()) and alive > 3
    assert found.loss_before == pytest.approx(torch.tensor(everyones(losses.mean().item())).mean().item(), rel=1e-5)
    assert everyones((found.loss, found.culled, found.advanced)) == [(found.loss, found.culled, found.advanced)] * 2
    assert found.credit.batches == 10 and rank.same(torch.cat(found.credit.mean))
    assert any(not torch.equal(layer.state, state) for layer, state in zip(run.plain.layers, before, strict=True))
    run.step(16)
    run.evaluate()
    run.step(10)
    assert rank.same(run.shared())
    digests = everyones(kx.distributed.lifecycle_digest(run.plain))
    assert digests[0] == digests[1]
    # Only the first writes the log, and it is the history of all.
    assert bool(run.events) == rank.first
    entered = {event["to"] for event in everyones(run.events)[0]}
    assert {"GERMINATED", "GRAFTING", "EVALUATING"} <= entered
    # Telemetry is still each rank's own.
    assert not rank.same(run.plain.first.telemetry) and not rank.same(run.plain.first.grad_telemetry)


@in_two_ranks
def test_decisions_are_by_what_all_have_seen(rank: Rank) -> None:
    seen = []

    def watching(seeds: kx.policy.Observation) -> Tensor:
        seen.append(seeds)
        return kx.default_policy(seeds)

    run = RankRun(rank, policy=watching, budget=3, wave=1.0)
    layers = run.plain.layers
    totals = []
    for _ in range(3):
        run.step()
        totals.append(sum(everyones(torch.cat([layer.grad_telemetry for layer in layers]).cpu())))
    since_the_wave = totals[2] - totals[1]
    by_hand = []
    for tick, (u2, v2, backwards) in enumerate(total.unbind(1) for total in (totals[0], totals[1], since_the_wave)):
        by_hand.append(torch.cat([u2[:4], (u2 + v2)[4:]]) / backwards)  # MULTIPLICATIVE seeds, then AFFINE ones
        torch.testing.assert_close(seen[tick].potential.cpu(), by_hand[tick], rtol=1e-9, atol=0)
    best = by_hand[1].argsort(descending=True)[:3]
    assert sorted((seen[2].lifecycle > 0).nonzero().flatten().tolist()) == sorted(best.tolist())
    merged = torch.cat(list(kx.distributed.sync_telemetry(run.plain).values()))
    run.step()
    assert (seen[-1].activations[:, 0] > merged[:, 0]).all() and rank.same(seen[-1].activations)
    assert rank.same(seen[-1].loss) and seen[-1].loss.isfinite()


@in_two_ranks
def test_the_first_rank_has_the_say(rank: Rank) -> None:
    """Whatever a policy goes by."""

    def odd(seeds: kx.policy.Observation) -> Tensor:
        wanted = torch.full_like(seeds.lifecycle, -1)
        wanted[rank.index] = STATES.GERMINATED
        return wanted

    log = rank.folder / "first" / "growth.jsonl" if rank.first else rank.folder / "not there" / "growth.jsonl"
    if rank.first:
        log.parent.mkdir()
    run = RankRun(rank, policy=odd, log=log)
    run.step()
    assert [state != 0 for state in run.states()] == [True] + 6 * [False]
    run.control.flush()
    assert log.exists() == rank.first  # the others open none


@in_two_ranks
def test_mixed_seeds_start_alike(rank: Rank) -> None:
    """At the mean of what all ranks have seen."""
    torch.manual_seed(0)
    layer = kx.KasminaLayer(nn.Linear(3, 8, device=rank.device, dtype=torch.float64), num_seeds=2, strategy="mixed")
    control = kx.GrowthController(layer, config=FAST, watch=1)
    x = torch.randn(16, 3, device=rank.device, dtype=torch.float64) + 3 * rank.index
    layer(x).square().sum().backward()
    control.step()
    assert layer.lifecycle_states.tolist() == [1, 1]
    outputs = sum(layer.base_layer(each.to(rank.device)).mean(0) for each in everyones(x.cpu())) / 2
    expected = outputs.view(2, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(layer.blueprint_weights[0].double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert rank.same(layer.blueprint_weights)


@in_two_ranks
def test_one_decides_and_tells_the_others(rank: Rank) -> None:
    run = RankRun(rank, process_group=False)
    healed = []
    for _ in range(30):
        run.optimizer.zero_grad()
        loss = run.loss(run.train).mean()
        loss.backward()
        run.optimizer.step()
        if rank.first:
            run.control.step(loss)
        healed += kx.distributed.sync_lifecycle(run.plain, optimizer=run.optimizer)
        assert rank.same(run.shared())
    assert run.alive() > 3 and bool(healed) != rank.first


@pytest.mark.stack("distributed: elastic restart on another number of ranks")
@in_two_ranks
def test_a_controller_goes_on_with_another_number_of_ranks(rank: Rank) -> None:
    """2 -> 1 -> 2."""

    def state_of(run: RankRun) -> tuple[dict, ...]:
        return run.plain.state_dict(), run.optimizer.state_dict(), run.control.state_dict()

    def later(state: tuple[dict, ...], **settings) -> RankRun:
        run = RankRun(rank, **settings)
        for part, values in zip((run.plain, run.optimizer, run.control), state, strict=True):
            part.load_state_dict(values)
        return run

    run = RankRun(rank)
    run.step(13)
    run.evaluate()
    path, one = rank.folder / "run.pt", dist.new_group([0])
    if rank.first:
        torch.save(state_of(run), path)
        saved = torch.load(path, weights_only=True)
        alone = later(saved, ddp={"process_group": one}, process_group=one)
        assert alone.states() == run.states() and alone.control.ticks == 13
        alone.step(9)
        alone.evaluate()
        torch.save(state_of(alone), path)
    dist.barrier()
    run = later(torch.load(path, weights_only=True, map_location=rank.device))
    run.step(20)
    run.evaluate()
    assert run.control.ticks == 42 and rank.same(run.shared()) and rank.same(run.control._lives)
    entered = {(event["to"], event["tick"] > 22) for event in everyones(run.events)[0]}
    assert ("FINE_TUNING", True) in entered or ("CULLED", True) in entered


@in_two_ranks
def test_losses_that_are_not_finite_count_by_rank(rank: Rank) -> None:
    """As for one process with the batches of both. In DDP's broadcasts the ranks would wait for each other, unless all
    make the same passes.
    """
    run = RankRun(rank, {"static_graph": False}, scale=0.0, stability=0.0)
    run.step(12)
    for layer in run.plain.layers:
        graft(layer, STATES.EVALUATING)
    with torch.no_grad():
        run.plain.first.blueprint_weights[:, :4] = 1e30
    held = [x.clone() for x, _ in run.held]
    held[1][slice(3) if rank.first else slice(None)] = torch.nan  # a few samples of one rank, a batch of the other
    held[3] *= 1.0 if rank.first else 1e10  # too much for the seed above, not for the network
    run.held = [(x, y) for x, (_, y) in zip(held, run.held, strict=True)]

    twin = copy.deepcopy(run.plain)
    alone = kx.GrowthController(twin, config=run.control.config, process_group=False)
    alone.load_state_dict(run.control.state_dict())
    everything = [(x.to(rank.device), y.to(rank.device)) for part in everyones(run.held) for x, y in part]
    expected = alone.evaluate(everything, twin.loss)

    def measured(found: kx.controller.Evaluation) -> list:
        credits = torch.cat(found.credit.mean).tolist()
        return [
            found.loss,
            found.loss_without,
            found.left_out,
            found.culled,
            found.advanced,
            found.credit.batches,
            *credits,
        ]

    found = run.evaluate()
    assert measured(found) == pytest.approx(measured(expected), rel=1e-4)
    assert found.left_out == 13 and found.credit.batches == 9 and not math.isfinite(found.loss_before)
    assert run.states() == torch.cat([layer.lifecycle_states for layer in twin.layers]).tolist()
    assert run.states()[0] == STATES.CULLED and rank.same(run.shared())


@in_two_ranks
def test_bad_calls_fail_on_all_ranks(rank: Rank) -> None:
    run = RankRun(rank)
    run.step(8)
    before = snapshot(run.plain)
    with pytest.raises(ValueError, match=r"the ranks must have equally many batches, they have \[5, 4\]"):
        run.control.evaluate(run.held[rank.index :], run.loss)
    assert same(before, snapshot(run.plain)) == []
    late = kx.GrowthController(run.plain, config=FAST)
    late.steps = rank.index
    with pytest.raises(RuntimeError, match="do not have the same layers and steps; rank .* at step"):
        late.step()
