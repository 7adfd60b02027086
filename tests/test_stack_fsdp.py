"""FSDP2: banks in parts, state and telemetry whole; the same numbers, and every write, as of a layer that is not sharded."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from two_ranks import RANKS, Rank, in_two_ranks

import kasmina_ext as kx

ANY = kx.TransitionRules.any()
STRATEGIES = ["multiplicative", "additive", "mixed", "affine"]


def network(device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Banks of three rows, of one and of two: with two ranks a remainder, and a rank without any."""
    torch.manual_seed(5)
    model = nn.Sequential(
        kx.KasminaLayer(nn.Linear(6, 17), num_seeds=5, num_blueprints=3, alpha_schedule="linear", ramp_epochs=4),
        nn.Tanh(),
        kx.KasminaLayer(nn.Linear(17, 16), num_seeds=4, num_blueprints=1, strategy="additive"),
        nn.Tanh(),
        kx.TritonChunkedKasminaLayer(nn.Linear(16, 7), 3, num_blueprints=2),
    )
    for layer in layers_of(model):
        with torch.no_grad():
            layer.blueprint_weights += 0.3 * torch.randn_like(layer.blueprint_weights)
    model[0].extended_state.update_state(
        range(4), {"lifecycle": "grafting", "blueprint": [0, 1, 2, 0], "strategy": range(4)}
    )
    model[0].set_alpha(None, [0.3001, 0.4, 0.6, 0.8, 1.0])
    model[2].extended_state.update_state([0, 1], {"lifecycle": ["grafting", "training"], "blueprint": 0})
    model[4].extended_state.update_state(2, {"lifecycle": "fine_tuning", "blueprint": 1})
    return model.to(device, dtype)


def layers_of(model: nn.Sequential) -> list[kx.KasminaLayer]:
    return [model[0], model[2], model[4]]


def sharded(rank: Rank, model: nn.Sequential, *, each: bool = True, shape: tuple[int, ...] = (RANKS,), **options):
    """``model``, by parts (each layer on its own, and the rest) or as one."""
    names = ("copies", "parts")[-len(shape) :]
    mesh = init_device_mesh(rank.device.type, shape, mesh_dim_names=names)
    if each:
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def pair(rank: Rank, **options) -> tuple[nn.Sequential, nn.Sequential]:
    """The same network whole and in parts."""
    model = network(rank.device)
    return copy.deepcopy(model), sharded(rank, model, **options)


def rows(step: int, rank: Rank) -> Tensor:
    """Of both ranks."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(rank.device)


def own(rank: Rank, x: Tensor) -> Tensor:
    return x.chunk(RANKS)[rank.index]


def optimizer_of(model: nn.Module, **arguments) -> torch.optim.Optimizer:
    return torch.optim.AdamW(kx.param_groups(model, 0.02, 0.1), **arguments)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_network(whole: nn.Sequential, parts: nn.Sequential, exactly: bool = False) -> None:
    """Parameters, and the buffers that the ranks share."""
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-9, "atol": 1e-11}
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(full(b), a, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    for a, b in zip(layers_of(whole), layers_of(parts), strict=True):
        assert a.lifecycle_digest() == b.lifecycle_digest()


@pytest.mark.stack("distributed: FSDP2 fully_shard")
@in_two_ranks
def test_training_is_that_of_one_process(rank: Rank) -> None:
    for options in ({}, {"each": False}, {"each": False, "reshard_after_forward": False}):
        whole, parts = pair(rank, **options)
        for layer in layers_of(parts):
            assert isinstance(layer.blueprint_weights, DTensor) and not any(
                isinstance(buffer, DTensor) for buffer in layer.buffers()
            )
        optimizers = optimizer_of(whole), optimizer_of(parts)
        for step in range(4):
            x = rows(step, rank)
            y, expected = parts(own(rank, x)), own(rank, whole(x))
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            train(whole, optimizers[0], x)
            train(parts, optimizers[1], own(rank, x))
            for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
                assert b.grad is not None
                torch.testing.assert_close(full(b.grad), a.grad, rtol=1e-9, atol=1e-12)
            for model in (whole, parts):
                model[0].step_lifecycle()
                if step == 1:
                    model[0].request_state_transitions([4, 0], ["germinated", "rolled_back"])
                    model[4].request_state_transitions(2, "fossilized", rules=ANY)
                if step == 2:
                    model[0].recycle()
                    model[0].request_state_transitions(0, "germinated")
        same_network(whole, parts)
        seen = kx.distributed.sync_telemetry(parts)
        for name, layer in (("0", whole[0]), ("2", whole[2]), ("4", whole[4])):
            torch.testing.assert_close(seen[name][:, :3], layer.telemetry[:, :3], rtol=1e-9, atol=1e-11)


@pytest.mark.stack("distributed: FSDP2 mixed precision")
@in_two_ranks
def test_mixed_precision_casts_no_buffer(rank: Rank) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = network(rank.device, torch.float32)
    cast = copy.deepcopy(model).to(torch.bfloat16)  # casts the bank, and no buffer either
    parts = sharded(rank, model, mp_policy=policy)
    x = rows(0, rank).to(torch.bfloat16)
    found, expected = parts(x), cast(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    found.float().square().mean().backward()
    expected.float().square().mean().backward()
    for layer, other in zip(layers_of(parts), layers_of(cast), strict=True):
        assert {name: buffer.dtype for name, buffer in layer._buffers.items()} == layer.BUFFER_DTYPES
        assert not any(isinstance(buffer, DTensor) for buffer in layer.buffers())
        assert layer.blueprint_weights.dtype == layer.blueprint_weights.grad.dtype == torch.float32
        assert torch.equal(full(layer.blueprint_weights.grad).bfloat16(), other.blueprint_weights.grad)
        assert torch.equal(layer.telemetry, other.telemetry) and torch.equal(layer.alpha, other.alpha)
    # Small steps are not lost: the bank that is trained is float32.
    parts[0].request_state_transitions(0, "culled", rules=ANY)
    parts[0].recycle(0)
    parts[0].request_state_transitions(0, "germinated")
    assert torch.equal(parts[0].whole_bank()[0, :3], torch.ones(3, device=rank.device))


# ---- writes ----------------------------------------------------------------------------------------------------------


def each_write(layer: kx.KasminaLayer, optimizers: list[torch.optim.Optimizer]):
    """Everything that writes the bank or an optimizer's moments, one at a time."""
    last = layer.num_blueprints - 1
    for strategy in STRATEGIES[: 4 if last else 3]:  # AFFINE takes two rows
        layer.extended_state.set_state(None, "dormant")
        layer.set_blueprint(None, last - (strategy == "affine"), strategy)
        yield layer.request_state_transitions([0, 2], "germinated")
    layer.extended_state.set_state(None, "dormant")
    assert layer.request_state_transition(1, "germinated", {"strategy": "multiplicative", "blueprint": 0})
    yield True
    layer.request_state_transitions([0, 1], ["rolled_back", "cancelled"], rules=ANY)
    yield layer.recycle()
    yield layer.request_state_transitions(None, "germinated", keep_blueprints=True)
    layer.extended_state.set_state(0, "fine_tuning")
    for optimizer in optimizers:
        yield layer.reset_optimizer_state(optimizer, 0)
    for optimizer in optimizers:
        yield layer.reset_optimizer_state(optimizer)


def moved(layer: kx.KasminaLayer, optimizers: list[torch.optim.Optimizer]) -> Tensor:
    """The bank, and all moments of it."""
    tensors = [layer.whole_bank(), *(full(m) for optimizer in optimizers for m in layer.moments(optimizer))]
    return torch.stack([tensor.double() for tensor in tensors])


@pytest.mark.stack("distributed: FSDP2, germination and other writes to a sharded bank")
@in_two_ranks
def test_every_write_reaches_every_part(rank: Rank) -> None:
    """Against the same on a layer that is not sharded: bit for bit."""
    for options in ({}, {"each": False}, {"shape": (RANKS, 1)}, {"shape": (1, RANKS)}):
        whole, parts = pair(rank, **options)
        kinds = (
            lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True, foreach=True),
            lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        )
        x = rows(0, rank)
        optimizers = [[kind(model) for kind in kinds] for model in (whole, parts)]
        for model, of_model in zip((whole, parts), optimizers, strict=True):
            model(x).square().mean().backward()  # the same on both ranks, so that not a bit differs
            for optimizer in of_model:
                optimizer.step()
        for a, b in zip(layers_of(whole), layers_of(parts), strict=True):
            b.telemetry.copy_(a.telemetry)
            b._write_bank(None, a.whole_bank())
            for one, other in zip(*optimizers, strict=True):
                for m, n in zip(a.moments(one), b.moments(other), strict=True):
                    kx.placement.write(n, m)
            assert len(moved(a, optimizers[0])) == 5
            states = [moved(a, optimizers[0])]
            for _ in zip(each_write(a, optimizers[0]), each_write(b, optimizers[1]), strict=True):
                states.append(moved(a, optimizers[0]))
                assert torch.equal(states[-1], moved(b, optimizers[1]))
                assert a.lifecycle_digest() == b.lifecycle_digest()
            assert sum(not torch.equal(*pair) for pair in itertools.pairwise(states)) > 5
            for layer in (a, b):
                torch.manual_seed(1)
                layer.reset_parameters()
            assert torch.equal(a.blueprint_weights, b.whole_bank())


@in_two_ranks
def test_writes_while_the_bank_is_gathered_last(rank: Rank) -> None:
    """After a forward without a backward FSDP2 leaves the root's parameters gathered: what is written there is lost."""
    whole, parts = pair(rank, each=False)
    optimizers = optimizer_of(whole), optimizer_of(parts)
    x = rows(0, rank)
    train(whole, optimizers[0], x)
    train(parts, optimizers[1], own(rank, x))
    with torch.no_grad():
        parts(x)
    layer = parts[0]
    assert not isinstance(layer.blueprint_weights, DTensor) and isinstance(layer.lasting_bank, DTensor)
    late = optimizer_of(parts)
    assert late.param_groups[0]["params"][0] is layer.lasting_bank
    for model, optimizer in zip((whole, parts), optimizers, strict=True):
        model[0].request_state_transitions([0, 1, 4], ["rolled_back", "rolled_back", "germinated"])
        model[0].recycle()
        model[0].request_state_transitions([0, 1], "germinated")
        model[0].request_state_transitions([0, 1, 4], "grafting", rules=ANY)
        model[0].set_alpha([0, 1, 4], 0.5)
        model[0].reset_optimizer_state(optimizer, [0, 1])
    with torch.no_grad():
        torch.testing.assert_close(parts(x), whole(x), rtol=1e-9, atol=1e-11)
    parts.reshard()
    with torch.no_grad():
        torch.testing.assert_close(parts(x), whole(x), rtol=1e-9, atol=1e-11)
    parts.reshard()
    for step in range(3):
        train(whole, optimizers[0], rows(step, rank))
        train(parts, optimizers[1], own(rank, rows(step, rank)))
    same_network(whole, parts)


@in_two_ranks
def test_what_is_due_at_the_next_step_is_found_in_parts(rank: Rank) -> None:
    """A seed is fossilized between backward and step: gradient and moments of it are gone from every part, as they are
    from a bank that is whole; wherever FSDP2 left the bank.
    """
    for gathered in (False, True):
        whole, parts = pair(rank, each=False)
        optimizers = optimizer_of(whole), optimizer_of(parts)
        for step in range(2):
            train(whole, optimizers[0], rows(step, rank))
            train(parts, optimizers[1], own(rank, rows(step, rank)))
        optimizers[0].zero_grad()
        whole(rows(2, rank)).square().mean().backward()
        optimizers[1].zero_grad()
        parts(own(rank, rows(2, rank))).square().mean().backward()
        if gathered:
            with torch.no_grad():
                parts(rows(3, rank))
        assert isinstance(parts[0].blueprint_weights, DTensor) == (not gathered)
        for model in (whole, parts):
            model[0].request_state_transitions(0, "fossilized", rules=ANY)
        before = parts[0].whole_bank().clone()
        for layer in (whole[0], parts[0]):
            gradient = full(layer.lasting_bank.grad)
            assert layer.gathers_gradient and gradient.any() and not gradient[0, :3].any()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(parts[0].whole_bank()[0, :3], before[0, :3])
        assert not torch.equal(parts[0].whole_bank(), before)
        for a, b in zip(layers_of(whole), layers_of(parts), strict=True):
            torch.testing.assert_close(b.whole_bank(), a.whole_bank(), rtol=1e-9, atol=1e-11)
            for m, n in zip(a.moments(optimizers[0]), b.moments(optimizers[1]), strict=True):
                torch.testing.assert_close(full(n), m, rtol=1e-9, atol=1e-12)


@in_two_ranks
def test_reconstruction_loss_of_a_sharded_bank(rank: Rank) -> None:
    for options in ({}, {"each": False}):
        whole, parts = pair(rank, **options)
        for model in (whole, parts):
            model[0].extended_state.set_state([0, 1], "training")
        x = rows(0, rank)
        for model, batch in ((whole, x), (parts, own(rank, x))):
            hidden = (
                model[0].base_layer(batch)
                if model is whole
                else F.linear(batch, *map(full, (parts[0].weight, parts[0].bias)))
            )
            for _ in range(2):  # accumulates
                (model(batch).square().mean() + model[0].reconstruction_loss(hidden).sum()).backward()
            model[0].reconstruction_loss(hidden).sum().backward()
        for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(full(b.grad), a.grad, rtol=1e-9, atol=1e-12)


@in_two_ranks
def test_deferred_initialization(rank: Rank) -> None:
    with torch.device("meta"):
        model = nn.Sequential(kx.KasminaLayer(nn.Linear(6, 17), num_seeds=5), nn.Linear(17, 2))
    fully_shard(model, mesh=init_device_mesh(rank.device.type, (RANKS,)))
    model.to_empty(device=rank.device)
    for module in (model[0].base_layer, model[0], model[1]):
        module.reset_parameters()
    neutral = torch.tensor([1.0, 0.0], device=rank.device)[:, None].expand(2, 17)
    assert torch.equal(model[0].whole_bank(), neutral)
    with torch.no_grad():
        model(torch.randn(3, 6, device=rank.device))
    assert not isinstance(model[0].blueprint_weights, DTensor) and torch.equal(model[0].whole_bank(), neutral)
    assert model[0].lifecycle_digest() == kx.KasminaLayer(nn.Linear(6, 17), num_seeds=5).lifecycle_digest()
    assert (model[0].telemetry[:, 0] > 0).all() and rank.same(model[0].alpha)


def test_a_bank_that_cannot_be_written(device):
    """FullyShardedDataParallel flattens it; nothing is changed before that is noticed."""
    layer = kx.KasminaLayer(nn.Linear(3, 8, device=device), num_seeds=2)
    layer._parameters["blueprint_weights"] = nn.Parameter(torch.zeros(5, device=device))
    before = layer.lifecycle_digest()
    for write in (
        lambda: layer.request_state_transitions(0, "germinated"),
        lambda: layer.request_state_transition(0, "germinated"),
        layer.reset_parameters,
    ):
        with pytest.raises(RuntimeError, match=r"has shape \[5\] instead of \[2, 8\].*fully_shard, not with"):
            write()
        assert layer.lifecycle_digest() == before
    assert not layer.request_state_transitions(0, "germinated", keep_blueprints=True).any()


# ---- state dicts, checkpoints, another number of ranks ---------------------------------------------------------------


@pytest.mark.stack("distributed: FSDP2 fully_shard")
@in_two_ranks
def test_state_dicts(rank: Rank) -> None:
    whole, parts = pair(rank)
    parts(rows(rank.index, rank))
    found = get_model_state_dict(parts)
    assert list(found) == list(whole.state_dict())
    assert isinstance(found["0.blueprint_weights"], DTensor) and not isinstance(found["0.state"], DTensor)
    everything = get_model_state_dict(parts, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank.first:
        fresh = network(torch.device("cpu"))
        fresh.load_state_dict(everything)
        same_network(fresh.to(rank.device), whole, exactly=True)
        assert torch.equal(fresh[0].telemetry, parts[0].telemetry)
    whole[0].set_alpha(1, 0.0)
    with torch.no_grad():
        whole[0].blueprint_weights[1] = 4.0
    set_model_state_dict(parts, whole.state_dict(), options=StateDictOptions(full_state_dict=True))
    same_network(whole, parts, exactly=True)
    assert isinstance(parts[0].blueprint_weights, DTensor)


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, part) -> None:
    for step in steps:
        train(model, optimizer, part(step))
        model[0].step_lifecycle()
        if step == 1:
            model[0].request_state_transitions(0, "rolled_back")
        if step == 3:
            model[0].recycle()
            model[0].request_state_transitions(0, "germinated")


@pytest.mark.stack("distributed: elastic restart on another number of ranks")
@in_two_ranks
def test_fsdp_goes_on_with_another_number_of_ranks(rank: Rank) -> None:
    """2 -> 1 -> 2 through torch.distributed.checkpoint, against one process that was never stopped."""
    alone = network(rank.device)
    go_on(alone, optimizer_of(alone), range(6), lambda step: rows(step, rank))

    def resharded(path) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sharded(rank, network(rank.device))
        optimizer = optimizer_of(model)
        if path is not None:
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.load(state, checkpoint_id=path)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return model, optimizer

    def half(step: int) -> Tensor:
        return own(rank, rows(step, rank))

    model, optimizer = resharded(None)
    go_on(model, optimizer, range(2), half)
    two, one = rank.folder / "two", rank.folder / "one"
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=two)

    if rank.first:  # the only one there is now
        model = network(rank.device)
        optimizer = optimizer_of(model)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=two, no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        go_on(model, optimizer, range(2, 4), lambda step: rows(step, rank))
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=one, no_dist=True)
    torch.distributed.barrier()

    model, optimizer = resharded(one)
    go_on(model, optimizer, range(4, 6), half)
    same_network(alone, model)


# ---- agreement -------------------------------------------------------------------------------------------------------


@in_two_ranks
def test_a_replica_that_diverged_is_healed(rank: Rank) -> None:
    """HSDP: each rank has a whole bank, as a DTensor."""
    _, parts = pair(rank, shape=(RANKS, 1))
    optimizer = optimizer_of(parts)
    train(parts, optimizer, rows(0, rank))
    if not rank.first:
        parts[2].request_state_transitions([2, 3], "germinated")
        kx.placement.write(parts[0].lasting_bank, 9.0)
        kx.placement.write(parts[4].moments(optimizer)[0], 1.0)
    healed = kx.distributed.sync_lifecycle(parts, optimizer=optimizer)
    assert healed == ([] if rank.first else ["0", "2", "4"])
    for layer in layers_of(parts):
        assert rank.same(layer.state) and rank.same(layer.lasting_bank.to_local())
        assert rank.same(layer.moments(optimizer)[0].to_local())


@in_two_ranks
def test_a_controller_of_a_sharded_model(rank: Rank) -> None:
    """It decides as one that sees a whole model and the same telemetry, bank and all."""
    whole, parts = pair(rank, each=False)
    events = [], []
    models = [whole, parts]
    optimizers = [optimizer_of(model) for model in models]
    controls = [
        kx.GrowthController(model, optimizer, budget=1.0, tick_every=1, scale=0.02, watch=2, points=1, log=log.append)
        for model, optimizer, log in zip(models, optimizers, events, strict=True)
    ]
    held = [rows(step, rank) for step in (100, 101, 102)]
    held[1] *= 1.0 if rank.first else torch.nan  # that rank still takes part in what the pass communicates
    for step in range(30):
        for model, optimizer, control in zip(models, optimizers, controls, strict=True):
            optimizer.zero_grad()
            loss = (model(rows(step, rank)) - 1).square().mean()  # both ranks the same, so that whole is theirs, too
            loss.backward()
            optimizer.step()
            control.step(loss)
            if step % 12 == 11:
                control.evaluate(held, lambda x, model=model: (model(x) - 1).square().mean(1))
    same_network(whole, parts)
    for control in controls:
        control.flush()  # a GPU's last events are on their way
    moves = [[(event["step"], event["layer"], event["seed"], event["to"]) for event in log] for log in events]
    assert moves[0] == moves[1] and (len(moves[0]) > 15) == rank.first
