"""Small networks with seeds, for the tests of credit, culling and the controller."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kasmina_ext import ExtendedLifecycle, GrowthConfig, GrowthController, KasminaLayer
from kasmina_ext.state_layout import StateVar

STATES = ExtendedLifecycle


def shifts(features: int, seeds: int, values: Tensor | None = None) -> KasminaLayer:
    """``x -> x`` with ADDITIVE seeds; all in FINE_TUNING with the shifts ``values [features]`` if these are given."""
    base = nn.Linear(features, features, bias=False, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(torch.eye(features))
    base.requires_grad_(False)
    layer = KasminaLayer(base, num_seeds=seeds, num_blueprints=1, strategy="additive")
    if values is not None:
        graft(layer)
        with torch.no_grad():
            layer.blueprint_weights[0] = values
    return layer


def graft(layer: KasminaLayer, state: ExtendedLifecycle = STATES.FINE_TUNING, epochs: int = 100) -> None:
    """All seeds of the layer in ``state``, with blueprint 0."""
    layer.extended_state.update_state(None, {"lifecycle": state, "blueprint": 0, "epochs": epochs})


class Classifier(nn.Module):
    """Three linear layers, two of them with seeds; dropout and batch norm between, which measuring must not disturb."""

    def __init__(self, *, seeds: tuple[int, int] = (4, 3), noisy: bool = False, schedule: str | None = None):
        super().__init__()
        first, second = (nn.Linear(6, 16), nn.Linear(16, 12))
        self.first = KasminaLayer(
            first, num_seeds=seeds[0], num_blueprints=1, strategy="multiplicative", alpha_schedule=schedule
        )
        self.norm = nn.BatchNorm1d(16) if noisy else nn.Identity()
        self.drop = nn.Dropout(0.5) if noisy else nn.Identity()
        self.second = KasminaLayer(second, num_seeds=seeds[1], strategy="affine", alpha_schedule=schedule)
        self.last = nn.Linear(12, 3)
        for module in (first, second, self.last):
            module.requires_grad_(False)

    @property
    def layers(self) -> list[KasminaLayer]:
        return [self.first, self.second]

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.norm(self.first(x))))
        return self.last(F.relu(self.second(x)))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One for each sample."""
        return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

    def grown(self, size: float = 0.3) -> Classifier:
        """All seeds in FINE_TUNING, with blueprints about neutral."""
        for layer in self.layers:
            graft(layer)
            with torch.no_grad():
                layer.blueprint_weights += size * torch.randn_like(layer.blueprint_weights)
        return self


def batches(count: int = 5, rows: int = 20) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(rows, 6), torch.randint(3, (rows,))) for _ in range(count)]


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that measuring might disturb, for ``==`` by :func:`same`."""
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        **{f"{name}.training": module.training for name, module in model.named_modules()},
        **{f"{name}.grad": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        **{f"{name}.version": buffer._version for name, buffer in model.named_buffers()},
        **{
            f"{name}.telemetry_enabled": module.telemetry_enabled
            for name, module in model.named_modules()
            if isinstance(module, KasminaLayer)
        },
        "random": torch.get_rng_state(),
    }


def same(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names of what differs."""
    assert before.keys() == after.keys()
    return [
        name
        for name, value in before.items()
        if not (torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name])
    ]


def loss_by_hand(model: Classifier, data: list[tuple[Tensor, Tensor]], without: list[tuple[int, int]] = ()) -> Tensor:
    """Losses of all samples with the seeds ``(layer, seed)`` CULLED, by writing the states."""
    states = [layer.state.clone() for layer in model.layers]
    telemetry = [(layer.telemetry.clone(), layer.telemetry_enabled) for layer in model.layers]
    for layer, seed in without:
        model.layers[layer].state[StateVar.LIFECYCLE_STATE, seed] = int(STATES.CULLED)
    with torch.no_grad():
        losses = torch.cat([model.loss(batch) for batch in data]).double()
    for layer, state, (seen, _) in zip(model.layers, states, telemetry, strict=True):
        layer.state.copy_(state)
        layer.telemetry.copy_(seen)
    return losses


# ---- a training run with a controller --------------------------------------------------------------------------------

FAST = GrowthConfig(budget=1.0, tick_every=1, scale=0.02, watch=2, wave=1.0, rest=3, points=1)
ALIVE = range(STATES.GERMINATED, STATES.FOSSILIZED + 1)


class Run:
    """A classifier whose weights were shaken, its optimizer and controller, and data to train and to judge on."""

    def __init__(
        self, config: GrowthConfig = FAST, *, log=None, policy=None, schedule="linear", device="cpu", **settings
    ):
        torch.manual_seed(7)
        self.model = Classifier(schedule=schedule).to(device)
        teacher = copy.deepcopy(self.model)
        with torch.no_grad():
            for layer in self.model.layers:
                layer.base_layer.weight *= torch.randn(layer.hidden_dim, 1, device=device).exp()
        x = torch.randn(400, 6, device=device)
        y = teacher(x).argmax(1)
        self.train, self.held = (x[:300], y[:300]), list(zip(x[300:].split(10), y[300:].split(10), strict=True))
        self.banks = [layer.blueprint_weights for layer in self.model.layers]
        self.optimizer = torch.optim.AdamW(self.banks, lr=0.05, weight_decay=0.0)
        self.events: list[dict] = []
        self.control = GrowthController(
            self.model, self.optimizer, config, policy=policy, log=log or self.events.append, **settings
        )
        self.done = 0

    def step(self, count: int = 1, each=lambda: None) -> None:
        for _ in range(count):
            rows = torch.randint(300, (32,), generator=torch.Generator().manual_seed(self.done)).to(
                self.train[0].device
            )
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.train[0][rows]), self.train[1][rows])
            loss.backward()
            self.optimizer.step()
            self.control.step(loss)
            self.done += 1
            each()

    def evaluate(self):
        return self.control.evaluate(self.held, self.model.loss)

    def states(self) -> list[int]:
        return torch.cat([layer.lifecycle_states for layer in self.model.layers]).tolist()

    def alive(self) -> int:
        return sum(state in ALIVE for state in self.states())

    def bits(self) -> list[torch.Tensor]:
        tensors = list(self.model.state_dict().values())
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value.clone() for value in tensors + moments]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
