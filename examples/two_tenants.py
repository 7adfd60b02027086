"""Two tenants served from one frozen network, each with a few kilobytes of seeds.

A digit classifier is trained once, and frozen. Anna's scanner has pixels whose gains have drifted; Bert's is washed out.
For each of them seeds grow inside of the same network, and are saved as a seed file. A server then loads the network and
both files: one call switches from one tenant to the other, in the tensors that the network runs on anyway.

    python examples/two_tenants.py        # half a minute on two cores
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import kasmina_ext as kx

Data = tuple[Tensor, Tensor]
GAINS = (0.9 * torch.randn(64, generator=torch.Generator().manual_seed(1))).exp()
SCANNERS = {"anna": lambda pixels: pixels * GAINS, "bert": lambda pixels: 0.35 * pixels + 0.4}


def digits() -> list[Data]:
    """Images and labels to train on, to judge seeds by, and to test with."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[part], y[part]) for part in order.split([900, 400, 497])]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int, after_step=lambda loss: None
) -> None:
    for step in range(steps):
        rows = torch.randint(len(data[0]), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0][rows]), data[1][rows])
        loss.backward()
        optimizer.step()
        after_step(loss)


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return 100 * (model(data[0]).argmax(1) == data[1]).float().mean().item()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def grow(model: nn.Module, training: Data, held_out: Data, steps: int) -> None:
    """Where the gradient asks for it; what held-out images would not miss goes."""
    optimizer = torch.optim.AdamW(kx.param_groups(model, lr=0.02))
    controller = kx.GrowthController(model, optimizer, budget=0.5, tick_every=max(1, steps // 60), watch=2)
    train(model, optimizer, training, steps, controller.step)
    batches = list(zip(*(part.split(40) for part in held_out), strict=True))
    controller.evaluate(batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of growth, for each tenant")
    parser.add_argument("--out", type=Path, help="where the seed files go (default: a folder that is removed)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    training, held_out, test = digits()

    # ---- one network, trained on clean images ----
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), training, 600)
    print(f"the network: {accuracy(model, test):.1f} % of clean test images")
    weights = copy.deepcopy(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)

        # ---- seeds for each tenant, grown in the same network ----
        kx.graft_(model, "*", chunk_size=4, table=False)
        workshop = kx.SeedSets(model)
        files = {}
        for tenant, scan in SCANNERS.items():
            workshop.off()
            workshop.add(tenant)  # to begin with, a copy of seeds that sleep
            workshop.switch(tenant)
            seen = [(scan(images), labels) for images, labels in (training, held_out)]
            grow(model, *seen, arguments.steps)
            files[tenant] = workshop.save(tenant, out / f"{tenant}.safetensors", metadata={"scanner": tenant})

        # ---- the server: the network's weights, and the two files ----
        server = network()
        server.load_state_dict(weights)
        kx.graft_(server, "*", chunk_size=4, table=False)
        sets = kx.load_seed_sets(server, files)
        print(sets)
        print(f"\n{'scans of':<10}{'own seeds':>12}{'other':>12}{'no seeds':>12}{'seed file':>14}")
        for tenant, other in (("anna", "bert"), ("bert", "anna")):
            scans = SCANNERS[tenant](test[0]), test[1]
            found = []
            for name in (tenant, other):
                with sets.use(name):
                    found.append(accuracy(server, scans))
            sets.off()
            found.append(accuracy(server, scans))
            cells = "".join(f"{value:>10.1f} %" for value in found)
            print(f"{tenant:<10}{cells}{files[tenant].stat().st_size:>8,} bytes")

        size = sum(tensor.nbytes for tensor in weights.values())
        server_weights = {name.replace("base_layer.", ""): t for name, t in server.state_dict().items()}
        same = all(torch.equal(server_weights[name], tensor) for name, tensor in weights.items())
        print(f"\nthe network itself: {size:,} bytes, not a bit of it changed: {same}")
        print(f"a switch takes {switch_time(sets) / forward_time(server, test[0][:64]):.2f} x a forward of 64 images")


def switch_time(sets: kx.SeedSets) -> float:
    return median_time(lambda: (sets.switch("anna", keep=False), sets.switch("bert", keep=False))) / 2


def forward_time(model: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return median_time(lambda: model(images))


def median_time(call) -> float:
    times = []
    for _ in range(50):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
