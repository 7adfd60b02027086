"""What the callbacks share, where no framework is needed: several ranks, and loaders that are walked through in part."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from growing import FAST, Run
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from two_ranks import Rank, in_two_ranks

import kasmina_ext as kx
from kasmina_ext.integrations.loop import GrowthLoop, first_of
from kasmina_ext.sinks import JsonlSink, read_jsonl


@in_two_ranks
def test_the_first_rank_logs_and_all_decide_alike(rank: Rank) -> None:
    run = Run(device=rank.device)
    run.control = None
    path = rank.folder / f"seeds{rank.index}.jsonl"
    model = DistributedDataParallel(kx.prepare_ddp(run.model), broadcast_buffers=False)
    loop = GrowthLoop(config=FAST, sinks=[JsonlSink(path)], log_every=4)
    loop._begin(run.model, [run.optimizer], None)
    own = slice(150 * rank.index, 150 * rank.index + 150)
    for _ in range(12):
        run.optimizer.zero_grad()
        loss = F.cross_entropy(model(run.train[0][own]), run.train[1][own])
        loss.backward()
        run.optimizer.step()
        loop._stepped(loss, rank.first)
    held = run.held[5 * rank.index : 5 * rank.index + 5]
    found = loop._judge(
        run.model, held, lambda net, batch: net.loss(batch), place=lambda batch: batch, first_rank=rank.first
    )
    loop._end(rank.first)
    everyones = [None, None]
    dist.all_gather_object(everyones, (found, kx.distributed.lifecycle_digest(run.model)))
    assert everyones[0] == everyones[1] and found["seeds_alive"] > 0
    assert loop.evaluation.credit.batches == 10
    steps = {record["step"] for record in read_jsonl(path)}
    assert steps == ({4, 8, 12} if rank.first else set())


def test_nothing_is_judged_before_the_first_tick():
    run = Run()
    loop = GrowthLoop(run.control)
    loop._begin(run.model, [run.optimizer], None)
    assert loop._judge(run.model, run.held, lambda net, batch: 1 / 0, place=lambda batch: batch, first_rank=True) == {}
    assert loop.controller is run.control and loop.evaluation is None


def test_a_state_that_does_not_fit_is_refused():
    run = Run()
    saved = run.control.state_dict() | {"layers": {"other": 3}}
    loop = GrowthLoop(run.control)
    with pytest.raises(ValueError, match="the state is of layers"):
        loop._begin(run.model, [run.optimizer], saved)
    assert run.control.state_dict()["layers"] == {"first": 4, "second": 3}


@pytest.mark.parametrize(("size", "count", "taken"), [(5, 3, 3), (5, 5, 5), (5, 9, 5), (0, 2, 0)])
def test_a_loader_notices_that_no_more_is_wanted(size, count, taken):
    class Loader:
        """As accelerate's."""

        gradient_state, ended, given = None, 0, 0

        def __iter__(self):
            for number in range(size):
                self.given += 1
                yield torch.tensor(number)

        def end(self):
            self.ended += 1

    loader = Loader()
    assert [int(batch) for batch in first_of(loader, count)] == list(range(taken))
    assert loader.given == taken and loader.ended == 1
