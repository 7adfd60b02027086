"""torch.compile(fullgraph=True): a training step in one graph does what eager does; compiled on each device."""

from __future__ import annotations

import checks
import pytest
import torch
from cases import Case, build
from torch.utils.checkpoint import checkpoint

STEPS = 3


class Model(torch.nn.Module):
    """3-D activations, an operator with buffers between two linear layers; float64, so that only bugs are visible."""

    def __init__(self, device, backend="ops"):
        super().__init__()
        self.operator = checks.BACKENDS[backend].chunked_forward
        case = Case((4, 6, 24), 5, dtype=torch.float64, states="grafted", telemetry="fresh", weights="near_one")
        inputs = build(case, device)
        torch.manual_seed(0)
        self.first = torch.nn.Linear(24, 24, dtype=torch.float64, device=device)
        self.second = torch.nn.Linear(24, 3, dtype=torch.float64, device=device)
        self.weights = torch.nn.Parameter(inputs.weights)
        self.alpha = torch.nn.Parameter(inputs.alpha)
        for name in ("offsets", "state", "telemetry", "grad_telemetry"):
            self.register_buffer(name, getattr(inputs, name))
        self.x = inputs.x

    def grown(self, x):
        args = (self.offsets, self.state, self.alpha, self.weights, self.telemetry, self.grad_telemetry)
        return self.operator(x, *args)

    def forward(self, x, checkpointed=False):
        h = self.first(x)
        if checkpointed:
            h = checkpoint(lambda t: self.grown(t).tanh(), h, use_reentrant=False)
        else:
            h = self.grown(h).tanh()
        return self.second(h)


def train(model, step) -> dict[str, torch.Tensor]:
    """A few SGD steps; returns everything that they touched."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, outputs = [], []
    for n in range(STEPS):
        optimizer.zero_grad()
        y, loss = step(model.x + n)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        outputs.append(y.detach())
    seen = {"losses": torch.stack(losses), "outputs": torch.stack(outputs)}
    seen |= {name: p.grad for name, p in model.named_parameters()}
    return seen | {f"trained {name}": t.detach() for name, t in model.state_dict().items()}


@pytest.mark.stack("torch.compile: fullgraph training step")
@pytest.mark.parametrize(
    ("backend", "checkpointed"),
    [
        pytest.param("ops", False, id="ops"),
        pytest.param(
            "ops",
            True,
            marks=pytest.mark.stack("activation checkpointing: under torch.compile"),
            id="ops-checkpointed",
        ),
        pytest.param("reference", False, id="reference"),
    ],
)
def test_training_step_in_one_graph(device, backend, checkpointed):
    torch._dynamo.reset()
    eager, compiled = Model(device, backend), Model(device, backend)

    def step_of(model):
        def step(x):
            y = model(x, checkpointed)
            return y, y.square().mean()

        return step

    expected = train(eager, step_of(eager))
    got = train(compiled, torch.compile(step_of(compiled), fullgraph=True))
    for name, want in expected.items():
        # float64 throughout; a compiler may reorder sums of some hundred terms
        torch.testing.assert_close(got[name], want, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
    assert compiled.telemetry[:, 3].eq(STEPS).all(), "each step counts once"
    assert compiled.grad_telemetry[:, 2].eq(STEPS).all()


@pytest.mark.stack("torch.compile: fullgraph forward")
def test_state_changes_need_no_new_graph(device):
    """State and alpha are tensors: one graph serves all 11 lifecycle states."""
    torch._dynamo.reset()
    model = Model(device)
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model.grown, backend=graphs, fullgraph=True)
    for lifecycle in range(11):
        model.state[0] = lifecycle
        with torch.no_grad():
            model.alpha.fill_(lifecycle / 10)
        assert checks.same_bits(compiled(model.x), model.grown(model.x))
    assert graphs.frame_count == 1


def test_fake_tensors_are_checked_too(device):
    """What is wrong is found while tracing, with the same words."""
    torch._dynamo.reset()
    model = Model(device)
    with pytest.raises(Exception, match="chunked_forward: blueprint_weights must have shape"):
        torch.compile(model.grown, fullgraph=True, backend="eager")(model.x.repeat(1, 1, 2))


def test_dynamic_shapes(device):
    """Batches of different sizes share a graph after the first two."""
    torch._dynamo.reset()
    model = Model(device)
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model.grown, backend=graphs, fullgraph=True)
    for rows in (2, 3, 5, 7, 11):
        x = torch.randn(rows, 6, 24, dtype=torch.float64, device=device)
        assert checks.same_bits(compiled(x), model.grown(x))
    assert graphs.frame_count <= 2
