"""The table of test_bad_input.py for the operators of the lifecycle and of calibration: each argument wrong in each way."""

from __future__ import annotations

import dataclasses
import functools
import re

import checks
import lifecycle_model as model
import numpy as np
import pytest
import test_bad_input as bad_input
import torch
from cases import Case, build
from lifecycle_checks import function
from test_bad_input import Bad, _meta, _shaped, _to
from torch import Tensor

H, S, U = 12, 3, 4
WITH_OFFSETS = ("reconstruction_loss", "reconstruction_loss_backward")
OPERATORS = ("state_update", "lifecycle_step", "pair_moments", *WITH_OFFSETS)


def good_arguments(op: str, device: torch.device) -> dict[str, object]:
    """Arguments that are right, by name."""
    if op.startswith("reconstruction"):
        inputs = build(Case((5, 4, H), S, chunks="balanced", states="grafted", blueprints=2), device)
        inputs.state[0] = 2
        loss = {} if op == "reconstruction_loss" else {"grad_loss": torch.ones(S, device=device)}
        seeds = dict(seed_offsets=inputs.offsets, state=inputs.state, blueprint_weights=inputs.weights)
        return {**loss, "x": inputs.x, "target": inputs.grad_y, **seeds}
    if op == "pair_moments":
        inputs = build(Case((5, 4, H), S), device)
        moments = torch.arange(6.0 * H, dtype=torch.float64, device=device).view(H, 6)
        return {"x": inputs.x, "t": inputs.grad_y, "moments": moments}
    tensors = model.random_tensors(S, np.random.default_rng(0), device)
    lived = dict(zip(("state", "history", "history_count"), tensors.lived, strict=True))
    if op == "lifecycle_step":
        return {**lived, "alpha": tensors.alpha, "schedule": 1, "ramp_epochs": 5, "advance": True}
    requests = dict(seed_ids=torch.arange(U), values=torch.zeros(U, 4), mask=torch.ones(U), rules=torch.zeros(11, 11))
    return {**lived, **{name: t.int().to(device) for name, t in requests.items()}, "num_blueprints": 2}


def _typed(op: str, name: str, of: str, *others: torch.dtype, dtype: str = "int32") -> list[Bad]:
    wrong = [
        Bad(op, name, str(other), _to(other), f"be {dtype}", str(other).removeprefix("torch.")) for other in others
    ]
    return [*wrong, Bad(op, name, "meta", _meta, f"be on .*, the device of {of}", "meta")]


def _sized(op: str, name: str, named: str, *shapes: tuple[int, ...]) -> list[Bad]:
    must = f"have shape {re.escape(named)}"
    return [Bad(op, name, str(list(shape)), _shaped(*shape), must, re.escape(str(list(shape)))) for shape in shapes]


def _loose(t: Tensor) -> Tensor:
    """The same shape with gaps."""
    return t.repeat_interleave(2, -1)[..., ::2]


def _lived(op: str) -> list[Bad]:
    ints = (torch.int64, torch.float32, torch.int16)
    rows = [(7, S), (9, S), (S, 8), (8 * S,), (8, S, 1), ()]
    bad = [*_sized(op, "state", "[8, S]", *rows[:2], *rows[3:]), *_sized(op, "state", "[8, S]", (S, 8))]
    bad += [Bad(op, "state", str(d), _to(d), "be int32", str(d).removeprefix("torch.")) for d in ints]
    bad += [Bad(op, "state", "meta", _meta, "be on meta, the device of state", "", "history")]
    bad += [Bad(op, "state", "another S", _shaped(8, 5), r"have shape \[S, 10, 2\] = \[5, 10, 2\]", "", "history")]
    bad += [Bad(op, "state", "transposed", lambda t: t.t().contiguous().t(), "be contiguous", "strides")]
    bad += _typed(op, "history", "state", *ints) + _typed(op, "history_count", "state", *ints)
    bad += _sized(op, "history", "[S, 10, 2] = [3, 10, 2]", (S, 10), (S, 2, 10), (S, 9, 2), (S + 1, 10, 2), (0,), ())
    bad += _sized(op, "history_count", "[S] = [3]", (S + 1,), (S - 1,), (S, 1), (0,), ())
    bad += [
        Bad(op, name, "not contiguous", _loose, "be contiguous", "strides") for name in ("history", "history_count")
    ]
    return bad


def _requests() -> list[Bad]:
    op, bad = "state_update", []
    shapes = {"values": "[U, 4] = [4, 4]", "mask": "[U] = [4]", "rules": "[11, 11] = [11, 11]"}
    for name in ("seed_ids", *shapes):
        bad += _typed(op, name, "state", torch.int64, torch.float32, torch.bool)
    wrong = {
        "values": [(U, 3), (U, 5), (U + 1, 4), (4 * U,), (U, 4, 1)],
        "mask": [(U + 1,), (U - 1,), (0,), (U, 1), ()],
        "rules": [(10, 11), (11, 12), (121,), (0, 0), (1, 11, 11)],
    }
    for name, named in shapes.items():
        bad += _sized(op, name, named, *wrong[name])
    bad += [
        Bad(op, "seed_ids", "2-D", _shaped(U, 1), r"have shape \[U\]", "2 dimensions"),
        Bad(op, "seed_ids", "0-D", _shaped(), r"have shape \[U\]", "0 dimensions"),
        Bad(op, "seed_ids", "more", _shaped(U + 1), r"have shape \[U, 4\] = \[5, 4\]", r"\[4, 4\]", "values"),
    ]
    return bad


def _stepped() -> list[Bad]:
    op = "lifecycle_step"
    bad = _typed(op, "alpha", "state", torch.float64, torch.float16, torch.int32, dtype="float32")
    bad += _sized(op, "alpha", "[S] = [3]", (S + 1,), (0,), (S, 1), ())
    bad += [Bad(op, "alpha", "not contiguous", _loose, "be contiguous", "strides")]
    must = r"be 0 \(none\), 1 \(linear\), 2 \(cosine\) or 3 \(sigmoid\)"
    for schedule in (-1, 4, 2**31, -(2**63), 2**63 - 1):
        bad.append(Bad(op, "schedule", str(schedule), lambda _, given=schedule: given, must, str(schedule)))
    return bad


def _paired() -> list[Bad]:
    op, must = "pair_moments", r"have shape \[H, 6\] = \[12, 6\]"
    bad = bad_input._activations(op, "t")
    bad += [dataclasses.replace(b, argument="t") for b in bad_input._grad_y(op)]
    bad += [Bad(op, "x", "fewer rows", lambda t: t[:4], r"have shape of x = \[4, 4, 12\]", "", "t")]
    bad += [Bad(op, "x", "bfloat16", _to(torch.bfloat16), "be bfloat16", "float32", "t")]
    bad += _typed(op, "moments", "x", torch.float32, torch.int64, dtype="float64")
    for shape in ((H, 5), (H, 7), (H - 1, 6), (H + 1, 6), (6, H), (6 * H,), (1, H, 6), (0,), ()):
        bad.append(Bad(op, "moments", str(list(shape)), _shaped(*shape), must, re.escape(str(list(shape)))))
    return [*bad, Bad(op, "moments", "not contiguous", _loose, "be contiguous", "strides")]


def _reconstructed(op: str) -> list[Bad]:
    first = "grad_loss" if op.endswith("backward") else "target"
    bad = [b for b in bad_input._activations(op, "target") if b.what != "fewer features"]
    of_x = r"have shape of x = \[5, 4, 12\]"
    bad += [
        Bad(op, "target", "float64", _to(torch.float64), "be float32", "float64"),
        Bad(op, "target", "meta", _meta, "be on .*, the device of x", "meta"),
        Bad(op, "target", "fewer rows", lambda t: t[:4], of_x, r"\[4, 4, 12\]"),
        Bad(op, "target", "fewer features", lambda t: t[..., :-1], of_x, r"\[5, 4, 11\]"),
        Bad(op, "target", "flat", lambda t: t.reshape(20, H), of_x, r"\[20, 12\]"),
        Bad(op, "x", "fewer rows", lambda t: t[:4], r"have shape of x = \[4, 4, 12\]", "", "target"),
    ]
    bad += bad_input._offsets(op) + [b for b in bad_input._seeds(op) if b.argument != "alpha"]
    if first == "grad_loss":
        bad += _typed(op, first, "x", torch.float64, torch.bfloat16, dtype="float32")
        bad += _sized(op, first, "[S] = [3]", (S + 1,), (0,), (S, 1), ())
    return bad


TABLE = [
    *_lived("state_update"),
    *_requests(),
    *_lived("lifecycle_step"),
    *_stepped(),
    *_paired(),
    *_reconstructed("reconstruction_loss"),
    *_reconstructed("reconstruction_loss_backward"),
]
VALUES = [bad for op in WITH_OFFSETS for bad in bad_input._offset_values(op) if bad.argument == "seed_offsets"]


check = functools.partial(bad_input.check, good=good_arguments)


@pytest.mark.parametrize("bad", TABLE, ids=str)
@checks.backends
def test_error(backend, device, bad):
    check(bad, backend, device)


@pytest.mark.parametrize("bad", VALUES, ids=str)
@checks.backends
def test_bad_offsets_on_the_cpu(backend, bad):
    check(bad, backend, torch.device("cpu"))


@pytest.mark.parametrize("bad", TABLE + VALUES, ids=str)
def test_both_paths_say_the_same(bad):
    messages = [check(bad, backend, torch.device("cpu")).splitlines()[0] for backend in checks.BACKENDS]
    assert messages[0] == messages[1]


@pytest.mark.parametrize("op", OPERATORS)
def test_tensors_of_another_device(op):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name, value in good_arguments(op, torch.device("cuda:0")).items():
        if isinstance(value, Tensor):
            must = "be on [a-z0-9:]+, the device of [a-z_]+"
            check(Bad(op, name, "on the CPU", Tensor.cpu, must, "", "[a-z_]+"), "ops", torch.device("cuda:0"))


@pytest.mark.parametrize("op", OPERATORS)
@checks.backends
def test_sparse_tensors_are_refused(backend, device, op):
    for name, value in good_arguments(op, device).items():
        if isinstance(value, Tensor):
            arguments = good_arguments(op, device)
            before = {other: t.clone() for other, t in arguments.items() if isinstance(t, Tensor)}
            arguments[name] = value.to_sparse()
            with pytest.raises((RuntimeError, NotImplementedError)):
                function(backend, op)(*arguments.values())
            for other in before.keys() - {name}:
                assert torch.equal(arguments[other], before[other]), other


@pytest.mark.parametrize("op", OPERATORS)
def test_no_tensor_at_all(device, op):
    """None, which torch hands to operators as an undefined tensor, and what the schema refuses."""
    for name, value in good_arguments(op, device).items():
        for wrong in (None, "text", [value]) if isinstance(value, Tensor) else ("text", [value]):
            arguments = {**good_arguments(op, device), name: wrong}
            words = rf"{op}: {name} must be a tensor" if wrong is None else None
            for mode in (torch.enable_grad, torch.inference_mode):
                with mode(), pytest.raises((RuntimeError, TypeError), match=words):
                    getattr(torch.ops.kasmina, op)(*arguments.values())
    with pytest.raises((RuntimeError, TypeError)):
        getattr(torch.ops.kasmina, op)(*list(good_arguments(op, device).values())[:-1])


@pytest.mark.parametrize("op", OPERATORS)
@checks.backends
def test_good_calls_leak_nothing(backend, device, op):
    """Handles: every input's use count is what it was. Memory: 300 calls on a megabyte hold less than 20."""
    arguments = good_arguments(op, device)
    call = function(backend, op)
    tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
    handles = [t._use_count() for t in tensors]
    for _ in range(10):
        call(*arguments.values())
    assert [t._use_count() for t in tensors] == handles
    big = dict(arguments)
    if op == "state_update":
        big |= {name: big[name].repeat(10_000, *[1] * (big[name].dim() - 1)) for name in ("seed_ids", "values", "mask")}
    elif "x" in big:
        big |= {name: big[name].repeat(1000, 1, 1) for name in ("x", "t", "target") if name in big}
    call(*big.values())
    before = bad_input.held_bytes(device)
    for _ in range(300 if checks.compiled(backend, device) else 30):
        call(*big.values())
    assert bad_input.held_bytes(device) - before < 20 * 2**20


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "values", [(1, 4, 8, 12), (0, 9, 4, 12), (-7, 4, 8, 12), (0, 4, 8, 99), (0, -5, 2**31 - 1, -(2**31)), (12, 8, 4, 0)]
)
def test_bad_offsets_on_cuda_stay_inside_memory(values):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for op in WITH_OFFSETS:
        arguments = good_arguments(op, torch.device("cuda"))
        arguments["seed_offsets"] = torch.tensor(values, dtype=torch.int32, device="cuda")
        function("ops", op)(*arguments.values())
    torch.cuda.synchronize()
