"""Sets of seeds: each has its own outputs, telemetry and past; switching copies bytes, and does nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
from memory import taken
from seed_file_cases import NAMES, everything, expected, grow_, inputs, layers_of, network, owned_bits, saved
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kasmina_ext as kx
from kasmina_ext.checkpoint import CheckpointMismatch


@pytest.fixture
def files(tmp_path):
    return saved(tmp_path)


# ---- switching -----------------------------------------------------------------------------------


def test_each_set_has_its_outputs(device, files):
    model, x, outputs = network(device=device), inputs(device), expected(device)
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    sets = kx.load_seed_sets(model, files)
    assert sets.names == ("anna", "bert") and sets.active is None
    assert torch.equal(model(x), outputs[None])
    for name in ("anna", "bert", "bert", "anna"):
        sets.switch(name)
        assert sets.active == name and torch.equal(model(x), outputs[name])
    sets.off()
    assert sets.active is None and torch.equal(model(x), outputs[None])
    sets.switch("bert")
    assert torch.equal(model(x), outputs["bert"])
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == pointers


def test_files_that_do_not_fit(files, tmp_path):
    """All are read before anything is written."""
    model = grow_(network(), 3)
    before = everything(model)
    other = kx.save_seeds(model[0], tmp_path / "other")
    with pytest.raises(CheckpointMismatch):
        kx.load_seed_sets(model, files | {"c": other})
    with pytest.raises(FileNotFoundError):
        kx.load_seed_sets(model, files | {"c": tmp_path / "missing"})
    with pytest.raises(TypeError, match="the name of a set must be a str, got int"):
        kx.load_seed_sets(model, {1: files["anna"]})
    with pytest.raises(ValueError, match="no seeds: call graft_ first"):
        kx.load_seed_sets(nn.Linear(3, 3), files)
    assert everything(model) == before


def test_seeds_that_the_model_had(files):
    """Are there again, with all that they have seen, under the name None; off is without any."""
    model, x = grow_(network(), 3), inputs()
    own = model(x)
    before = everything(model)
    sets = kx.load_seed_sets(model, files)
    sets.switch("anna")
    sets.off()
    assert torch.equal(model(x), expected()[None])
    sets.switch(None)
    assert everything(model) == before and torch.equal(model(x), own)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_every_mode(files, mode):
    model, outputs = network(), expected()
    with mode():
        sets = kx.load_seed_sets(model, files)
        sets.switch("anna")
    sets.switch("bert")
    assert torch.equal(model(inputs()), outputs["bert"])
    with mode():
        sets.switch("anna")
        assert torch.equal(model(inputs()), outputs["anna"])
    model(inputs()).sum().backward()
    assert layers_of(model)[0].blueprint_weights.grad.any()


def test_autograd_notices(device, files):
    """All versions go up; a backward of the other set's forward is an error, not a wrong gradient."""
    model = network(device=device)
    sets = kx.load_seed_sets(model, files)
    tensors = [
        tensor
        for layer in layers_of(model)
        for name, tensor in (*layer._buffers.items(), *layer._parameters.items())
        if name != "seed_offsets"
    ]
    versions = [tensor._version for tensor in tensors]
    sets.switch("anna")
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))
    y = model(inputs(device))
    sets.switch("bert")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- what it costs -------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Names of the operators that run, and the bytes that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        if "copy" in function.overloadpacket.__name__:
            self.copied += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **(kwargs or {}))


def test_the_bytes_of_the_seeds_and_no_more(device, files):
    """The operators are copies of lists of tensors, their bytes are those of a set; twice where the one that is left is
    kept; not of the weights around, however large.
    """
    model = network(device=device)
    sets = kx.load_seed_sets(model, files)
    held = [
        tensor.nbytes
        for layer in layers_of(model)
        for name, tensor in (*layer._buffers.items(), *layer._parameters.items())
        if name != "seed_offsets"
    ]
    assert sets.nbytes == sum(held)
    sets.off()
    for call, times in (
        (lambda: sets.switch("anna"), 1),
        (lambda: sets.switch("bert"), 2),
        (lambda: sets.switch("anna", keep=False), 1),
        (lambda: sets.switch("anna"), 0),
        (sets.off, 2),
    ):
        with Operators() as seen:
            call()
        assert seen.copied == times * sets.nbytes
        assert seen.names <= {"_foreach_copy_", "detach"}


def test_no_memory_and_no_waiting(device, files):
    model, x = network(device=device), inputs(device)
    sets = kx.load_seed_sets(model, files)
    optimizer = torch.optim.AdamW(kx.param_groups(model, lr=0.01))
    model(x).sum().backward()
    optimizer.step()
    sets.switch("anna")
    sets.switch("bert")

    def there_and_back():
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            sets.switch("anna")
            with sets.use("bert"):
                pass
            sets.off()
            sets.switch("bert", keep=False)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    assert taken(device, there_and_back) == (0, 0, 0)


# ---- what has been compiled or captured ----------------------------------------------------------


def test_compiled(device, files):
    """One graph for all sets, none of it compiled anew."""
    model, x, outputs = network(device=device), inputs(device), expected(device)
    sets = kx.load_seed_sets(model, files)
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for name in ("anna", "bert", "anna"):
        sets.switch(name)
        assert torch.equal(compiled(x), outputs[name])
    sets.off()
    assert torch.equal(compiled(x), outputs[None])
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured(files):
    """A CUDA graph goes on with the set that is active when it is replayed."""
    device = torch.device("cuda")
    model, x, outputs = network(device=device), inputs(device), expected(device)
    sets = kx.load_seed_sets(model, files)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
    for name in ("anna", "bert", None, "anna"):
        sets.switch(name)
        graph.replay()
        assert torch.equal(y, outputs[name])


# ---- sets come, go, and are saved ----------------------------------------------------------------


def test_add_remove_and_save(files, tmp_path):
    model, outputs = network(), expected()
    sets = kx.load_seed_sets(model, {"anna": files["anna"]})
    report = sets.add("bert", files["bert"])
    assert report["0"]["awake"] == 2 and sets.names == ("anna", "bert")
    with pytest.raises(ValueError, match="there is a set 'bert' already"):
        sets.add("bert", files["anna"])
    for name in NAMES:
        assert sets.save(name, tmp_path / "saved").read_bytes() == files[name].read_bytes()
        sets.switch(name)
        assert sets.save(name, tmp_path / "saved").read_bytes() == files[name].read_bytes()
    layers_of(model)[0].set_alpha(None, 0.5)
    expectation = model(inputs())
    assert sets.add("copy") is None and sets.active == "bert"
    sets.save("bert", tmp_path / "saved", metadata={"changed": True})
    with pytest.raises(ValueError, match="'bert' is active: switch"):
        sets.remove("bert")
    sets.switch("anna")
    sets.remove("bert")
    assert sets.names == ("anna", "copy")
    sets.switch("copy")
    assert torch.equal(model(inputs()), expectation)
    other = network()
    assert kx.load_seeds(other, tmp_path / "saved").metadata == {"changed": True}
    assert torch.equal(other(inputs()), expectation)
    for call in (sets.switch, sets.remove, lambda name: sets.save(name, tmp_path / "x")):
        with pytest.raises(KeyError, match="there is no set 'bert'; known are 'anna', 'copy'"):
            call("bert")
    sets.add("bert", files["bert"])
    sets.switch("bert")
    assert torch.equal(model(inputs()), outputs["bert"])


def test_layers_that_a_file_lacks(files, tmp_path):
    """With strict=False their seeds are new ones, whatever they were in the set before."""
    model = network()
    first = kx.save_seeds({"0": grow_(network(), 1)[0]}, tmp_path / "first")
    with pytest.raises(CheckpointMismatch, match="the file lacks '2'"):
        kx.load_seed_sets(model, {"first": first})
    sets = kx.load_seed_sets(model, files)
    assert sets.add("first", first, strict=False)["2"]["note"] == "not in the file: new seeds"
    sets.switch("bert")
    sets.switch("first")
    assert owned_bits(model[0]) == owned_bits(grow_(network(), 1)[0]) and owned_bits(model[2]) == owned_bits(
        network()[2]
    )


def test_repr(files):
    sets = kx.load_seed_sets(network(), files)
    sets.switch("bert")
    assert repr(sets) == f"SeedSets('anna', 'bert' (active); 9 seeds of 2 layers, {sets.nbytes / 1024:.1f} KiB each)"


# ---- what becomes of the model -------------------------------------------------------------------


def test_a_model_that_moves_or_is_cast(device, files):
    model = network()
    sets = kx.load_seed_sets(model, files)
    sets.switch("anna")
    for move in (lambda m: m.to(device), lambda m: m.double(), lambda m: m.to("cpu")):
        move(model)
        for name, number in NAMES.items():
            sets.switch(name)
            twin = grow_(network(), number).to(next(model.parameters()))
            for ours, theirs in zip(layers_of(model), layers_of(twin), strict=True):
                assert owned_bits(ours) == owned_bits(theirs) and ours.alpha.device == theirs.alpha.device
    sets.add("copy", files["anna"])
    sets.switch("copy")
    assert torch.equal(model(inputs().double()), grow_(network(), 1).double()(inputs().double()))


def test_layers_that_cannot_be_switched_any_more(files):
    """Nothing is copied, also where only one of them is such."""
    for spoil, reason in (
        (lambda m: kx.fold_(m), "its base layer has taken its place \\(fold_\\): unfold_ puts it back"),
        (
            lambda m: nn.utils.parametrize.register_parametrization(m[2], "blueprint_weights", nn.Identity()),
            "parametrized",
        ),
    ):
        model = network()
        sets = kx.load_seed_sets(model, files)
        sets.switch("anna")
        spoil(model)
        before = everything(model)
        with pytest.raises(RuntimeError, match=f"cannot be switched in layer '[02]': .*{reason}"):
            sets.switch("bert")
        assert everything(model) == before and sets.active == "anna"


def test_interrupted_between_two_launches(files, monkeypatch):
    model, outputs = network(), expected()
    sets = kx.load_seed_sets(model, files)
    sets.switch("anna")
    original, calls = torch._foreach_copy_, []

    def interrupted(into, out_of):
        calls.append(into)
        if len(calls) == groups + 2:  # after the first launch of the second copy
            raise KeyboardInterrupt
        original(into, out_of)

    groups = len({(tensor.device, tensor.dtype) for tensor in sets._own.tensors})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sets.switch("bert")
    assert sets.active == "anna" and groups > 1
    for name in ("anna", "bert", "anna"):
        sets.switch(name)
        assert torch.equal(model(inputs()), outputs[name])


def test_files_are_named(files):
    model = network()
    before = everything(model)
    for given in ([*files.values()], str(files["anna"])):
        with pytest.raises(TypeError, match="files must be a dict of the sets' names and their files, got (list|str)"):
            kx.load_seed_sets(model, given)
    assert everything(model) == before


def test_folded_and_unfolded_again(files):
    model, outputs = network(), expected()
    sets = kx.load_seed_sets(model, files)
    sets.switch("anna")
    folded = kx.fold_(model)
    assert torch.allclose(folded(inputs()), outputs["anna"], atol=1e-5)
    kx.unfold_(folded)
    sets.switch("bert")
    assert torch.equal(model(inputs()), outputs["bert"])


# ---- threads -------------------------------------------------------------------------------------


def test_threads_with_sets_of_their_own(device, files):
    """Who runs the model inside of use has its own set, whatever the others do; and two switches never mix."""
    model, x, outputs = network(device=device), inputs(device), expected(device)
    sets = kx.load_seed_sets(model, files)
    problems: list[str] = []
    begin = threading.Barrier(5)

    def serve(name: str | None) -> None:
        begin.wait()
        for _ in range(40):
            with sets.use(name), torch.no_grad():
                if not torch.equal(model(x), outputs[name]):
                    problems.append(f"{name} got another's output")

    def disturb() -> None:
        begin.wait()
        for number in range(40):
            (sets.off, lambda: sets.switch("anna"))[number % 2]()

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("anna", "bert", "anna", None)]
    threads.append(threading.Thread(target=disturb))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems and not any(thread.is_alive() for thread in threads)
    sets.switch("bert")
    assert torch.equal(model(x), outputs["bert"])
