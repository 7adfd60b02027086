"""Stacks on top of each other in two processes: what is distributed compiled, checkpointed, or split by tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_ranks import RANKS, Rank, in_two_ranks

import kasmina_ext as kx
from kasmina_ext import KasminaLayer

ANY = kx.TransitionRules.any()
STEPS = 3


def network(device: torch.device) -> nn.Sequential:
    """Two layers with grafted seeds."""
    torch.manual_seed(5)
    model = nn.Sequential(
        KasminaLayer(nn.Linear(6, 17), num_seeds=5, num_blueprints=3),
        nn.Tanh(),
        KasminaLayer(nn.Linear(17, 16), num_seeds=4),
        nn.Tanh(),
        nn.Linear(16, 3),
    ).to(device, torch.float64)
    for layer in (model[0], model[2]):
        layer.extended_state.update_state(None, {"lifecycle": "grafting", "blueprint": 0})
        layer.set_alpha(None, 0.5)
        with torch.no_grad():
            layer.blueprint_weights += 0.1 * torch.randn_like(layer.blueprint_weights)
    return model


def rows(step: int, rank: Rank) -> Tensor:
    """Of both ranks."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(rank.device)


def own(rank: Rank, x: Tensor) -> Tensor:
    return x.chunk(RANKS)[rank.index].requires_grad_()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def change(model: nn.Sequential, step: int) -> None:
    """Between two steps."""
    model[0].step_lifecycle()
    if step == 0:
        model[0].request_state_transitions([0, 3], "rolled_back")
        model[2].set_alpha(None, 0.9)
    if step == 1:
        model[0].recycle()
        model[0].request_state_transitions([0, 3], "germinated")


def check_gradients(rank: Rank, model: nn.Sequential, called: nn.Module) -> None:
    """Of both ranks together those of one process, in every step of a life; and all is counted once."""
    alone = network(rank.device)
    for step in range(STEPS):
        x = rows(step, rank)
        alone.zero_grad()
        alone(x).square().mean().backward()
        model.zero_grad()
        called(own(rank, x)).square().mean().backward()
        for (name, expected), found in zip(alone.named_parameters(), model.parameters(), strict=True):
            assert found.grad is not None, name
            torch.testing.assert_close(full(found.grad), expected.grad, rtol=1e-9, atol=1e-12)
        change(alone, step)
        change(model, step)
    for layer, twin in ((model[0], alone[0]), (model[2], alone[2])):
        assert layer.telemetry[:, 3].eq(STEPS).all() and layer.grad_telemetry[:, 2].eq(STEPS).all()
        torch.testing.assert_close(layer.sync_telemetry()[:, :3], twin.telemetry[:, :3], rtol=1e-9, atol=1e-11)
        assert layer.lifecycle_digest() == twin.lifecycle_digest()


@pytest.mark.stack("distributed: DDP, compiled before and after it is wrapped")
@in_two_ranks
def test_compiled_ddp(rank: Rank) -> None:
    """Buckets are so small that torch cuts the graph at their borders."""
    torch._dynamo.reset()
    model = network(rank.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 100)
        wrapped = DistributedDataParallel(kx.prepare_ddp(model), bucket_cap_mb=0.0003)
        check_gradients(rank, model, torch.compile(wrapped, backend="aot_eager"))
    torch._dynamo.reset()
    model = network(rank.device)
    compiled = torch.compile(model, backend="aot_eager")
    check_gradients(rank, model, DistributedDataParallel(kx.prepare_ddp(compiled)))


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


@pytest.mark.stack("distributed: DDP and FSDP2 with activation checkpointing")
@in_two_ranks
def test_checkpointing(rank: Rank) -> None:
    for use_reentrant in (False, True):
        for static_graph in (False, True):
            model = network(rank.device)
            prepared = kx.prepare_ddp(Checkpointed(model, use_reentrant))
            check_gradients(rank, model, DistributedDataParallel(prepared, static_graph=static_graph))
    mesh = init_device_mesh(rank.device.type, (RANKS,))
    model = network(rank.device)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    check_gradients(rank, model, fully_shard(Checkpointed(model, False), mesh=mesh))


@pytest.mark.stack("distributed: FSDP2, compiled")
@in_two_ranks
def test_compiled_fsdp(rank: Rank) -> None:
    torch._dynamo.reset()
    mesh = init_device_mesh(rank.device.type, (RANKS,))
    model = network(rank.device)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_gradients(rank, model, torch.compile(model, backend="aot_eager"))


@pytest.mark.stack(
    "distributed: tensor parallel base layer",
    note="its output must be whole on every rank: RowwiseParallel, or ColwiseParallel(output_layouts=Replicate())",
)
@in_two_ranks
def test_a_base_layer_in_parts(rank: Rank) -> None:
    mesh = init_device_mesh(rank.device.type, (RANKS,))
    for style in (ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())):
        layer, alone = network(rank.device)[0], network(rank.device)[0]
        parallelize_module(layer, mesh, {"base_layer": style})
        x = rows(0, rank)
        y, expected = layer(x), alone(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for found, right in zip(layer.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(full(found.grad), right.grad)
        assert layer.sync_lifecycle() is False
    layer = network(rank.device)[0]
    parallelize_module(layer, mesh, {"base_layer": ColwiseParallel()})
    # A GPU's offsets are not looked at.
    problem = r"seed_offsets must end at or before H = [89], got 17|blueprint_weights must have shape \[P, H\]"
    with pytest.raises(RuntimeError, match=f"chunked_forward: ({problem})"):
        layer(rows(0, rank))


@pytest.mark.stack(
    "distributed: FullyShardedDataParallel (FSDP1)",
    refused="RuntimeError when seeds germinate, or an optimizer steps: shard with torch.distributed.fsdp.fully_shard",
)
@in_two_ranks
def test_fsdp1_is_refused(rank: Rank) -> None:
    """It flattens the bank, on some ranks to nothing; every rank gets the error, and nothing is changed."""
    for use_orig_params in (False, True):
        model = network(rank.device)
        model[0].extended_state.set_state(0, "dormant")
        wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=rank.device)
        wrapped(own(rank, rows(0, rank))).square().mean().backward()
        before = model[0].lifecycle_digest()
        for request in (model[0].request_state_transitions, model[0].request_state_transition):
            with pytest.raises(RuntimeError, match="fully_shard, not with FullyShardedDataParallel"):
                request(0, "germinated")
        assert model[0].lifecycle_digest() == before
        if use_orig_params:
            with pytest.raises(RuntimeError, match="fully_shard, not with FullyShardedDataParallel"):
                torch.optim.AdamW(kx.param_groups(wrapped, 0.1)).step()
