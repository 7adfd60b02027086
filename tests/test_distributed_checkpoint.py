"""torch.distributed.checkpoint of models with our layers, between one process and two, whole and sharded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from growing import Classifier
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kasmina_ext import param_groups

PROCESSES = 2


def model_of(seed: int) -> nn.Module:
    """A model whose tensors all are as this seed makes them, on any machine and rank."""
    torch.manual_seed(0)
    model, random = Classifier(schedule="linear"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=random))
        for layer in model.layers:
            # None that the optimizer forgets: the gradients below are not what such seeds would have.
            layer.lifecycle_states = torch.randint(2, 7, (layer.num_seeds,), generator=random)
            layer.blueprint_ids = torch.randint(layer.num_blueprints, (layer.num_seeds,), generator=random)
            layer.history.random_(0, 11, generator=random)
            layer.history_count.random_(0, 50, generator=random)
    return model


def trained(seed: int, shard: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model_of(seed)
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, seed)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors, whole, by name; of sharded ones every process has to ask."""
    state = state_of(model, optimizer)
    found = dict(state["model"])
    for name, values in state["optimizer"]["state"].items():
        found |= {f"{name} {key}": value for key, value in values.items()}
    return {name: (t.full_tensor() if hasattr(t, "placements") else t).clone() for name, t in found.items()}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys() and any("exp_avg_sq" in name for name in one)
    differs = [name for name in one if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])]
    assert not differs, differs


def load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **options: bool) -> None:
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=directory, **options)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def germinate(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What a transition does to bank and moments it does to their shards."""
    layer.extended_state.set_state(None, "DORMANT")
    layer.request_state_transitions(None, "GERMINATED", 0, "affine")
    bank = layer.blueprint_weights
    whole = bank.full_tensor() if hasattr(bank, "placements") else bank
    assert whole[0].eq(1).all() and whole[1].eq(0).all()
    assert optimizer.state[bank]["exp_avg"].any()
    optimizer.state_dict()
    assert not optimizer.state[bank]["exp_avg"].any()


def work(rank: int, directory: Path) -> None:
    """In each of the processes: save what the test will load alone, load what it has saved alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory / 'store'}", rank=rank, world_size=PROCESSES)
    try:
        for name, shard in (("whole", False), ("sharded", True)):
            dcp.save(state_of(*trained(2, shard)), checkpoint_id=directory / name)
            model, optimizer = trained(3, shard)
            if shard:
                bank = model.second.blueprint_weights
                assert 2 * bank.to_local().numel() == bank.numel()
            load(directory / "alone", model, optimizer)
            assert_equal(bits(model, optimizer), bits(*trained(1)))
            before = model(torch.ones(4, 6))
            model.zero_grad()
            before.square().sum().backward()
            optimizer.step()
            assert not torch.equal(model(torch.ones(4, 6)), before)
            if shard:
                model.reshard()  # as after a backward
            germinate(model.second, optimizer)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_between_one_process_and_two(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dcp.save(state_of(*trained(1)), checkpoint_id=tmp_path / "alone", no_dist=True)
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=PROCESSES)
    for name in ("whole", "sharded"):
        model, optimizer = trained(3)
        bank = model.first.blueprint_weights
        load(tmp_path / name, model, optimizer, no_dist=True)
        assert_equal(bits(model, optimizer), bits(*trained(2)))
        assert model.first.blueprint_weights is bank


def test_a_sharded_bank_goes_through_torch_not_through_the_layer(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = model_of(1)
        model.first.save_checkpoint(checkpoint_dir=tmp_path / "saved")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded: use torch.distributed.checkpoint"):
            model.first.save_checkpoint(checkpoint_dir=tmp_path / "saved")
        with pytest.raises(ValueError, match="sharded: use torch.distributed.checkpoint"):
            model.first.load_checkpoint(checkpoint_dir=tmp_path / "saved")
        with torch.no_grad():
            model(torch.ones(4, 6))  # the bank is gathered now, for a while
        assert not hasattr(model.first.blueprint_weights, "placements")
        with pytest.raises(ValueError, match="sharded: use torch.distributed.checkpoint"):
            model.first.save_checkpoint(checkpoint_dir=tmp_path / "saved")
    finally:
        dist.destroy_process_group()
    assert os.listdir(tmp_path / "saved") != []


@pytest.mark.parametrize("blocking", [True, False])
def test_a_sharded_base_and_the_optimizer_of_one_are_refused_too(tmp_path, blocking):
    """Their tensors have no memory of their own."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layer, saved = model_of(1).second.requires_grad_(True), tmp_path / "saved"

        def stepped() -> torch.optim.Optimizer:
            optimizer = torch.optim.AdamW(layer.parameters())
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            return optimizer

        layer.save_checkpoint(checkpoint_dir=saved, include_base=True)
        layer.save_checkpoint("moments", checkpoint_dir=saved, optimizer=stepped())
        fully_shard(layer.base_layer, mesh=init_device_mesh("cpu", (1,)))
        optimizer = stepped()
        for options in ({"include_base": True}, {"optimizer": optimizer}):
            with pytest.raises(
                ValueError, match="whose (base|optimizer).* is sharded: use torch.distributed.checkpoint"
            ):
                layer.save_checkpoint(checkpoint_dir=saved, blocking=blocking, **options)
        with pytest.raises(ValueError, match="a base layer whose weight is sharded"):
            layer.load_checkpoint(checkpoint_dir=saved)
        with pytest.raises(ValueError, match="fit the optimizer: parameter .* is sharded"):
            layer.load_checkpoint("moments", checkpoint_dir=saved, optimizer=optimizer)
        layer.save_checkpoint(checkpoint_dir=saved, blocking=True)
    finally:
        dist.destroy_process_group()
