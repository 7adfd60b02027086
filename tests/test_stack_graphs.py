"""CUDA graphs captured by hand: what is changed between replays takes effect, since it is all in tensors."""

from __future__ import annotations

import pytest
import stack_model
import torch
from stack_model import live, twins

from kasmina_ext.lifecycle import begins_or_ends

DEVICE = torch.device("cuda")
ROWS, WARMUPS, REPLAYS = 8, 3, 12
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Trainer:
    """A training step on one fixed batch, eager or replayed."""

    def __init__(self, net: stack_model.Net) -> None:
        self.net = net
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.01, device=DEVICE), capturable=True)
        self.x = torch.zeros(ROWS, stack_model.INPUTS, dtype=torch.float64, device=DEVICE)
        self.loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        loss = (self.net(self.x) - 0.5).square().mean()
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def forget(self) -> None:
        """What an optimizer's hook does at the next eager step, and no replay: it runs no Python."""
        layer = self.net.grown
        layer.reset_optimizer_state(self.optimizer, begins_or_ends(layer.lifecycle_states))

    def capture(self, function) -> None:
        """As torch's documentation says: once the warm-ups have run on a side stream."""
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            function()

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self.step()


def warm_up(trainer: Trainer, function) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            trainer.optimizer.zero_grad(set_to_none=True)
            function()
    torch.cuda.current_stream().wait_stream(stream)


def assert_same(net: stack_model.Net, twin: stack_model.Net) -> None:
    for (name, got), expected in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        stack_model.compare(name, got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.stack(
    "CUDA graphs: torch.cuda.graph, state, alpha and weights changed between replays",
    device="cuda",
    note="a replayed optimizer step resets no moments: call reset_optimizer_state where blueprints begin or end",
)
def test_a_captured_training_step():
    """Forward, backward and optimizer in one graph; all states pass through it."""
    net, twin = twins(DEVICE)
    captured, eager = Trainer(net), Trainer(twin)
    for trainer in (captured, eager):
        warm_up(trainer, trainer.step)
    captured.capture(captured.step)
    seen = set()
    for step in range(REPLAYS):
        x = torch.randn(ROWS, stack_model.INPUTS, dtype=torch.float64, device=DEVICE)
        for trainer in (captured, eager):
            trainer.x.copy_(x)
            trainer.run()
            layer = trainer.net.grown
            stack_model.turn(layer, step)
            trainer.forget()
            with torch.no_grad():
                layer.blueprint_weights.mul_(0.99)
                layer.set_alpha(step, 0.1 * (step % 10))
        seen |= set(zip(layer.lifecycle_states.tolist(), layer.grafting_strategies.tolist(), strict=True))
        stack_model.compare(f"loss {step}", captured.loss, eager.loss, rtol=1e-9, atol=1e-11)
    assert_same(net, twin)
    assert len(seen) == stack_model.STATES * stack_model.STRATEGIES
    stack_model.assert_counted_once(net.grown, WARMUPS + REPLAYS, WARMUPS + REPLAYS)


@pytest.mark.stack("CUDA graphs: torch.cuda.graph, state, alpha and weights changed between replays", device="cuda")
def test_a_captured_lifecycle():
    """Requests, moments, recycling and step_lifecycle captured behind the training step: nothing asks the host."""
    net, twin = twins(DEVICE)
    captured, eager = Trainer(net), Trainer(twin)
    targets = torch.zeros(stack_model.SEEDS, dtype=torch.int64, device=DEVICE)

    def day(trainer: Trainer) -> None:
        trainer.step()
        trainer.net.grown.request_state_transitions(None, targets, rules=stack_model.ANY)
        trainer.forget()
        trainer.net.grown.step_lifecycle()
        trainer.net.grown.recycle()

    for trainer in (captured, eager):
        warm_up(trainer, lambda trainer=trainer: day(trainer))
    captured.capture(lambda: day(captured))
    for step in range(REPLAYS):
        targets.copy_((torch.arange(stack_model.SEEDS) + step) % stack_model.STATES)
        captured.run()
        eager.optimizer.zero_grad(set_to_none=True)
        day(eager)
    assert_same(net, twin)
    stack_model.assert_counted_once(net.grown, WARMUPS + REPLAYS, WARMUPS + REPLAYS)


@pytest.mark.stack(
    "CUDA graphs: make_graphed_callables, state, alpha and weights changed between replays",
    device="cuda",
    note="its warm-up is counted: reset_telemetry() afterwards; a change between a replay and its backward is not noticed",
)
def test_graphed_callables():
    net, twin = twins(DEVICE)
    sample = torch.randn(ROWS, stack_model.INPUTS, dtype=torch.float64, device=DEVICE)
    graphed = torch.cuda.make_graphed_callables(net, (sample,))
    net.grown.reset_telemetry()
    life = live(net, graphed, [ROWS] * REPLAYS)
    expected = live(twin, twin, [ROWS] * REPLAYS)
    stack_model.assert_same_life(life, expected)
    assert len(expected.seen) == stack_model.STATES * stack_model.STRATEGIES
    stack_model.assert_counted_once(net.grown, REPLAYS, REPLAYS)
    loss = graphed(sample).sum()
    net.grown.step_lifecycle()
    loss.backward()  # the note's: a replay looks at no version
