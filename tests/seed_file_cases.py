"""Shared by the tests of seed files: layers of every kind and state, a second reader and a second writer of the files."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import kasmina_ext as kx
from kasmina_ext.grafting import GraftingStrategy

SAVED = ("state", "alpha", "blueprint_weights")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def network(seed: int = 0, device: torch.device | str = "cpu") -> nn.Sequential:
    """Two layers of seeds, 5 of 8 features and 4 of 7 with two features that nobody owns; nothing has grown."""
    torch.manual_seed(seed)
    return nn.Sequential(
        kx.KasminaLayer(nn.Linear(8, 40), chunk_size=8),
        nn.ReLU(),
        kx.KasminaLayer(
            nn.Linear(40, 30), chunk_size=7, chunking="uniform", strategy="multiplicative", num_blueprints=3
        ),
    ).to(device)


def grow_(model: nn.Module, seed: int) -> nn.Module:
    """Two seeds of each layer grafted, one of them half way, with blueprints drawn from ``seed``; the rest asleep."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model):
        ids = torch.randperm(layer.num_seeds, generator=generator)[:2]
        layer.extended_state.update_state(ids, {"lifecycle": ["grafting", "fossilized"], "blueprint": 0})
        layer.set_alpha(ids, [0.25, 1.0])
        drawn = torch.randn(layer.blueprint_weights.shape, generator=generator).to(layer.blueprint_weights)
        chosen = torch.zeros(layer.num_seeds, dtype=torch.bool)
        chosen[ids] = True
        mask = layer.blueprint_mask(chosen.to(layer.device))
        with torch.no_grad():
            layer.blueprint_weights.copy_(torch.where(mask, drawn, layer.blueprint_weights))
    return model


def layers_of(model: nn.Module) -> list[kx.KasminaLayer]:
    return [module for module in model.modules() if isinstance(module, kx.KasminaLayer)]


def bits(tensor: Tensor) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def owned_bits(layer: kx.KasminaLayer) -> dict[str, bytes]:
    """Of what a seed file brings back; of the bank, the features that a seed owns."""
    end = int(layer.seed_offsets[-1])
    return {
        "state": bits(layer.state),
        "alpha": bits(layer.alpha),
        "blueprint_weights": bits(layer.blueprint_weights[:, :end]),
    }


def everything(model: nn.Module) -> dict[str, bytes]:
    """The bits of all tensors of a model."""
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


# ---- two sets of seeds for the network -----------------------------------------------------------

NAMES = {"anna": 1, "bert": 2}


def saved(folder: Path) -> dict[str, Path]:
    return {
        name: kx.save_seeds(grow_(network(), number), folder / f"{name}.safetensors") for name, number in NAMES.items()
    }


def inputs(device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(9)).to(device)


def expected(device: torch.device | str = "cpu") -> dict[str | None, Tensor]:
    """The outputs of a model of one's own for each, by name; None: of the network without seeds."""
    grown = {name: grow_(network(), number).to(device) for name, number in NAMES.items()}
    return {name: model(inputs(device)).detach() for name, model in {**grown, None: network().to(device)}.items()}


# ---- any layer, in any state ---------------------------------------------------------------------


@st.composite
def any_layer(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Arguments of a layer, and a number that says what its seeds have become."""
    features = draw(st.integers(1, 24))
    strategy = draw(st.sampled_from(list(GraftingStrategy)))
    return {
        "features": features,
        "num_seeds": draw(st.integers(1, features + 3)),
        "num_blueprints": draw(st.integers(strategy.rows, 4)),
        "strategy": strategy,
        "chunking": draw(st.sampled_from(["balanced", "uniform"])),
        "blueprint_dtype": draw(st.sampled_from(FLOATS)),
    }, draw(st.integers(0, 2**31))


def made(features: int, **arguments: Any) -> kx.KasminaLayer:
    return kx.KasminaLayer(nn.Linear(3, features), **arguments)


_ODD = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e-40, 2.0])


def scramble_(layer: kx.KasminaLayer, number: int) -> kx.KasminaLayer:
    """About half of the seeds and of the bank get any values that a state and a bank may have."""
    generator = torch.Generator().manual_seed(number)

    def some(shape: tuple[int, ...] | torch.Size, low: int, high: int) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=generator)

    seeds = layer.num_seeds
    ranges = [(0, 11), (-1, layer.num_blueprints), (0, 2**31), (0, 4), (0, 11), (-1, 99), (-5, 5), (0, 3)]
    values = torch.stack([some((seeds,), low, high) for low, high in ranges]).int()
    layer.state.copy_(torch.where(some((seeds,), 0, 2) > 0, values, layer.state))
    alphas = torch.rand(seeds, generator=generator)
    layer.alpha.copy_(torch.where(some((seeds,), 0, 2) > 0, alphas, 1.0))
    bank = layer.blueprint_weights.detach()
    drawn = torch.where(
        some(bank.shape, 0, 4) > 0, torch.randn(bank.shape, generator=generator), _ODD[some(bank.shape, 0, len(_ODD))]
    )
    drawn = torch.where(drawn.isnan(), torch.full_like(bank, torch.nan), drawn.to(bank))  # their payloads are nobody's
    bank.copy_(torch.where(some(bank.shape, 0, 3) > 0, bank, drawn))
    return layer


# ---- a second reader -----------------------------------------------------------------------------


def read_plainly(path: Path) -> dict[str, dict[str, Tensor]]:
    """State, alpha and bank of each layer by the description of the format: safetensors, json and loops, no checks."""
    with safe_open(path, "pt") as file:
        text = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    table = json.loads(text["layers"])
    places = dict.fromkeys(tensors, 0)

    def take(name: str, count: int) -> Tensor:
        start, places[name] = places[name], places[name] + count
        return tensors[name][..., start : start + count]

    found = {}
    for values in table["rows"]:
        row = dict(zip(table["columns"], values, strict=True))
        strategy = GraftingStrategy[row["strategy"].upper()]
        state = take("common_state", 1).repeat(1, row["seeds"])
        alpha = take("common_alpha", 1).repeat(row["seeds"])
        bank = torch.empty(row["rows"], row["features"], dtype=getattr(torch, row["dtype"]))
        for p in range(row["rows"]):
            bank[p] = strategy.neutral[p % strategy.rows]
        seeds = take("seeds", row["stored_seeds"]).tolist()
        for seed, column, a in zip(
            seeds, take("state", len(seeds)).unbind(1), take("alpha", len(seeds)).tolist(), strict=True
        ):
            state[:, seed], alpha[seed] = column, a
        weights = take(f"weights.{row['dtype']}", row["stored_weights"])
        offsets, place = offsets_of(row["features"], row["seeds"], row["chunking"]), 0
        for number in take("slices", row["stored_slices"]).tolist():
            p, seed = divmod(number, row["seeds"])
            start, end = offsets[seed], offsets[seed + 1]
            bank[p, start:end] = weights[place : place + end - start]
            place += end - start
        assert place == len(weights)
        found[row["name"]] = {"state": state, "alpha": alpha, "blueprint_weights": bank}
    return found


def offsets_of(features: int, seeds: int, chunking: str) -> list[int]:
    if chunking == "uniform":
        return [min(i * max(1, features // seeds), features) for i in range(seeds + 1)]
    return [i * (features // seeds) + min(i, features % seeds) for i in range(seeds + 1)]


def size_by_the_formula(path: Path, layers: list[kx.KasminaLayer]) -> int:
    """8 + header + 36 layers + 44 A + 8 L + itemsize W, counted seed by seed."""
    size = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    for layer in layers:
        strategy, offsets = layer.strategy, layer.seed_offsets.tolist()
        kinds = Counter((*layer.state[:, seed].tolist(), bits(layer.alpha[seed])) for seed in range(layer.num_seeds))
        size += 36 + 44 * (layer.num_seeds - max(kinds.values()))
        for seed in range(layer.num_seeds):
            for p in range(layer.num_blueprints):
                part = layer.blueprint_weights[p, offsets[seed] : offsets[seed + 1]]
                neutral = torch.full_like(part, strategy.neutral[p % strategy.rows])
                if bits(part) != bits(neutral):
                    size += 8 + part.nbytes
    return size


# ---- a second writer, for files that lie ---------------------------------------------------------


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header as a dict, and the bytes behind it."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def file_of(header: dict[str, Any], body: bytes) -> bytes:
    """A file with a right sha256, whatever it says."""
    metadata = {key: value for key, value in header.get("__metadata__", {}).items() if key != "sha256"}
    tensors = {key: value for key, value in header.items() if key != "__metadata__"}
    digest = hashlib.sha256(_with_length({"__metadata__": metadata} | tensors) + body).hexdigest()
    return _with_length({"__metadata__": metadata | {"sha256": digest}} | tensors) + body


def _with_length(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text
