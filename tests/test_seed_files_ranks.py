"""Seed files in jobs of several processes: DDP, and banks in parts."""

from __future__ import annotations

import pytest
import torch
from seed_file_cases import grow_, layers_of, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks import Rank, in_two_ranks

import kasmina_ext as kx


@in_two_ranks
def test_ddp(rank: Rank) -> None:
    """The file of the whole job is that of a single process; every rank may write it, and switch sets."""
    single = grow_(network(), 1).to(rank.device)
    path = kx.save_seeds(single, rank.folder / f"single{rank.index}.safetensors")
    model = DistributedDataParallel(kx.prepare_ddp(network(device=rank.device)))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(rank.device)
    kx.load_seeds(model, path)
    assert torch.equal(model(x), single(x))
    both = kx.save_seeds(model, rank.folder / "both.safetensors")
    assert both.read_bytes() == path.read_bytes()
    sets = kx.load_seed_sets(model, {"one": path})
    sets.off()
    assert torch.equal(model(x), network(device=rank.device)(x))
    sets.switch("one")
    assert torch.equal(model(x), single(x))


@in_two_ranks
def test_fsdp2(rank: Rank) -> None:
    """Saved from parts and loaded into parts, also where a pass has just gathered the bank; a set cannot be switched."""
    single = grow_(network(), 1).to(rank.device)
    path = kx.save_seeds(single, rank.folder / f"single{rank.index}.safetensors")
    model = network(device=rank.device)
    mesh = init_device_mesh(rank.device.type, (2,))  # by itself it would be of GPUs where there are any
    for part in (*layers_of(model), model):
        fully_shard(part, mesh=mesh)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(rank.device)
    kx.load_seeds(model, path)
    assert torch.equal(model(x), single(x))
    saved = kx.save_seeds(model, rank.folder / f"parts{rank.index}.safetensors")
    assert saved.read_bytes() == path.read_bytes()

    other = kx.save_seeds(grow_(network(), 2), rank.folder / f"other{rank.index}.safetensors")
    kx.load_seeds(model, other)
    assert torch.equal(model(x), grow_(network(), 2).to(rank.device)(x))
    assert kx.save_seeds(model, saved).read_bytes() == other.read_bytes()

    with pytest.raises(RuntimeError, match="layer '0': its blueprint_weights are sharded: load_seeds can write them"):
        kx.load_seed_sets(model, {"one": path})
    for part in (*layers_of(model), model):
        part.unshard()
    kx.load_seeds(model, path)
    for part in (*layers_of(model), model):
        part.reshard()
    assert kx.save_seeds(model, saved).read_bytes() == path.read_bytes()
