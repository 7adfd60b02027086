"""Save and load a layer of a million seeds, against safetensors' save_file and load_file of the same tensors plus sha256.

Both work in the same directories, in turns: in memory (where the machine offers it), so that only the work counts, and
on the disk. Ours is durable when it returns (fsync); for the disk, times are also given against a peer that is.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timing
import torch
from results import RESULTS as FOLDER
from results import evidence
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

from kasmina_ext import KasminaLayer

SEEDS = 1_000_000
TARGET = 2.0
RESULTS = FOLDER / "bench_checkpoint.json"
MEMORY = Path("/dev/shm")


def make_layer(seeds: int) -> KasminaLayer:
    """No two tensors alike, nothing zero: what a page or a file system could leave out."""
    layer = KasminaLayer(nn.Linear(1, seeds), num_seeds=seeds)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.blueprint_weights.normal_(generator=generator)
        for name in ("alpha", "telemetry", "grad_telemetry", "performance_metrics"):
            layer._buffers[name].uniform_(generator=generator)
        for name in ("history", "history_count"):
            layer._buffers[name].random_(0, 10, generator=generator)
        layer.state[0].random_(0, 11, generator=generator)
    return layer


def tensors_of(layer: KasminaLayer) -> dict[str, torch.Tensor]:
    return dict(layer._buffers) | {"blueprint_weights": layer.blueprint_weights.detach()}


# ---- the peer ------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def peer_save(tensors: dict[str, torch.Tensor], path: Path, durable: bool) -> str:
    save_file(tensors, path)
    if durable:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return sha256_of(path)


def peer_load(path: Path, layer: KasminaLayer | None) -> dict[str, torch.Tensor]:
    """The tensors; with a layer, copied into its own, which is what loading a layer ends with."""
    sha256_of(path)
    tensors = load_file(path)
    if layer is not None:
        with torch.no_grad():
            for name, tensor in tensors_of(layer).items():
                tensor.copy_(tensors[name])
    return tensors


# ---- the race ------------------------------------------------------------------------------------


def bench(directory: Path, seeds: int, rounds: int) -> dict:
    layer, other = make_layer(seeds), KasminaLayer(nn.Linear(1, seeds), num_seeds=seeds)
    tensors, path = tensors_of(layer), directory / "peer.safetensors"
    layer.checkpoint_dir = other.checkpoint_dir = directory / "ours"
    verify(layer, other, tensors, path)
    manager = layer.checkpoint_manager
    last = [""]

    def save() -> None:
        last[0] = layer.save_checkpoint("latest")

    calls: dict[str, Callable[[], object]] = {
        "save": save,
        "peer_save": lambda: peer_save(tensors, path, durable=False),
        "peer_save_durable": lambda: peer_save(tensors, path, durable=True),
        "load_into_layer": lambda: other.load_checkpoint(last[0]),
        "peer_load_into_layer": lambda: peer_load(path, other),
        "load": lambda: manager.load_layer(last[0]),
        "peer_load": lambda: peer_load(path, None),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            result = call()
            times[name].append(time.perf_counter() - started)
            del result
        manager.prune(keep=1)
        path.unlink()
        peer_save(tensors, path, durable=False)
    result = {name: timing.quantiles(seconds) for name, seconds in times.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    result["MB"] = round(size / 1e6, 1)
    for ours, peer in RATIOS:
        result[f"{ours}_times_{peer}"] = round(result[ours]["p50"] / result[peer]["p50"], 2)
    return result


# The last one gives the peer an advantage: its tensors are in no layer yet, nor read, since load_file maps the file.
RATIOS = [
    ("save", "peer_save"),
    ("save", "peer_save_durable"),
    ("load", "peer_load"),
    ("load_into_layer", "peer_load_into_layer"),
    ("load_into_layer", "peer_load"),
]


def verify(layer: KasminaLayer, other: KasminaLayer, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Both give back the same bits."""
    name = layer.save_checkpoint("verified")
    other.load_checkpoint(name)
    peer_save(tensors, path, durable=False)
    found = peer_load(path, None)
    for key, tensor in tensors_of(other).items():
        if not torch.equal(tensor, tensors[key]) or not torch.equal(found[key], tensors[key]):
            raise SystemExit(f"{key} came back wrong, so there is nothing to time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default benchmarks/results/bench_checkpoint.json")
    options = parser.parse_args()
    console, rows = Console(), {}
    for place, parent in (("memory", MEMORY if MEMORY.is_dir() else None), ("disk", Path(tempfile.gettempdir()))):
        if parent is None:
            continue
        directory = Path(tempfile.mkdtemp(dir=parent))
        try:
            with console.status(f"{options.seeds} seeds, {place}"):
                rows[place] = bench(directory, options.seeds, options.rounds)
        finally:
            shutil.rmtree(directory)
    record = evidence.machine() | {"commit": evidence.commit(), "source_sha256": evidence.source_hash()}
    record |= {"device": f"cpu, {torch.get_num_threads()} threads", "seeds": options.seeds, "target": TARGET}
    evidence.write_json(options.out, record | {"microseconds": rows})
    table = Table(title=f"checkpoint of {options.seeds} seeds: ms p20 / p50 / p80, torch {record['torch']}")
    for column in ("", *rows):
        table.add_column(column)
    for name in next(iter(rows.values())):
        table.add_row(name.replace("_", " "), *(_text(row[name]) for row in rows.values()))
    console.print(table)


def _text(value: object) -> str:
    return " / ".join(f"{us / 1e3:.0f}" for us in value.values()) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    main()
