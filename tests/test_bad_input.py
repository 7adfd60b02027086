"""Each argument of each operator wrong in each way gives an error that says so, and no harm is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import checks
import pytest
import torch
from cases import Case, build
from lifecycle_checks import function
from torch import Tensor

FLOATS = "be float32, float64, bfloat16 or float16"
H, S, P = 12, 3, 2


def good_arguments(op: str, device: torch.device) -> dict[str, object]:
    """Arguments that are right, by name."""
    inputs = build(Case((5, 4, H), S, chunks="balanced", states="grafted", blueprints=P), device)
    seeds = dict(seed_offsets=inputs.offsets, state=inputs.state, alpha=inputs.alpha, blueprint_weights=inputs.weights)
    telemetry, grad_telemetry = inputs.telemetry, inputs.grad_telemetry
    wanted = dict(grad_x=True, grad_weights=True, grad_alpha=True)
    return {
        "chunked_forward": {"x": inputs.x, **seeds, "telemetry": telemetry, "grad_telemetry": grad_telemetry},
        "chunked_backward": {
            "grad_y": inputs.grad_y,
            "x": inputs.x,
            **seeds,
            "grad_telemetry": grad_telemetry,
            **wanted,
        },
        "telemetry_update": {"x": inputs.x, "seed_offsets": inputs.offsets, "telemetry": telemetry},
        "telemetry_reduce": {"telemetry": telemetry},
        "telemetry_merge": {"telemetry": telemetry, "other": build(Case((5, H), S, rng=1), device).telemetry},
    }[op]


@dataclass(frozen=True)
class Bad:
    """`argument` replaced by `change(argument)`; the error names `blamed` (else the argument), and says `must`, `got`."""

    op: str
    argument: str
    what: str
    change: Callable[[Tensor], Tensor]
    must: str
    got: str
    blamed: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.what}"


def _shaped(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.new_zeros(shape)


def _to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda t: t.to(dtype)


def _meta(t: Tensor) -> Tensor:
    return t.to("meta")


def _doubled(t: Tensor) -> Tensor:
    return torch.cat((t, t), -1)


def _every_second_column(t: Tensor) -> Tensor:
    wide = t.new_zeros(t.shape[0], 2 * t.shape[1])
    return wide[:, ::2]


def _with(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] = value
        return t

    return change


def _activations(op: str, first_after_x: str = "seed_offsets") -> list[Bad]:
    return [
        Bad(op, "x", "int32", _to(torch.int32), FLOATS, "int32"),
        Bad(op, "x", "complex64", _to(torch.complex64), FLOATS, "complex64"),
        Bad(op, "x", "bool", _to(torch.bool), FLOATS, "bool"),
        Bad(op, "x", "float8", _to(torch.float8_e5m2), FLOATS, "float8_e5m2"),
        Bad(op, "x", "0-D", lambda t: t.new_zeros(()), "have 1 to 64 dimensions", "0"),
        Bad(op, "x", "65-D", lambda t: t.new_zeros([1] * 64 + [H]), "have 1 to 64 dimensions", "65"),
        Bad(op, "x", "meta", _meta, "be on meta, the device of x", "", first_after_x),
    ]


def _grad_y(op: str) -> list[Bad]:
    return [
        Bad(op, "grad_y", "float64", _to(torch.float64), "be float32", "float64"),
        Bad(op, "grad_y", "meta", _meta, "be on .*, the device of x", "meta"),
        Bad(op, "grad_y", "fewer rows", lambda t: t[:4], r"have shape of x = \[5, 4, 12\]", r"\[4, 4, 12\]"),
        Bad(op, "grad_y", "fewer features", lambda t: t[..., :-1], r"have shape of x = \[5, 4, 12\]", r"\[5, 4, 11\]"),
        Bad(op, "grad_y", "flat", lambda t: t.reshape(20, H), r"have shape of x = \[5, 4, 12\]", r"\[20, 12\]"),
        Bad(op, "grad_y", "0-D", lambda t: t.new_zeros(()), r"have shape of x = \[5, 4, 12\]", r"\[\]"),
    ]


def _offsets(op: str) -> list[Bad]:
    name = "seed_offsets"
    return [
        Bad(op, name, "int64", _to(torch.int64), "be int32", "int64"),
        Bad(op, name, "float32", _to(torch.float32), "be int32", "float32"),
        Bad(op, name, "meta", _meta, "be on .*, the device of x", "meta"),
        Bad(op, name, "2-D", lambda t: t[None], r"have shape \[S \+ 1\]", r"\[1, 4\]"),
        Bad(op, name, "0-D", lambda t: t[0], r"have shape \[S \+ 1\]", r"\[\]"),
        Bad(op, name, "empty", _shaped(0), r"have shape \[S \+ 1\]", r"\[0\]"),
    ]


def _offset_values(op: str) -> list[Bad]:
    """Looked at on the CPU only."""
    name, alone = "seed_offsets", op != "chunked_backward"  # there, grad_y has the wrong shape first
    return [
        Bad(op, name, "starts at 1", _with(0, 1), "start at 0", "1"),
        Bad(op, name, "starts below 0", _with(0, -1), "start at 0", "-1"),
        Bad(op, name, "decreases", _with(1, 9), "not decrease", "8 after 9 at 2"),
        Bad(op, name, "turns negative", _with(2, -4), "not decrease", "-4 after 4 at 2"),
        Bad(op, name, "beyond H", _with(3, 13), "end at or before H = 12", "13"),
        Bad(op, name, "far beyond H", _with(3, 2**31 - 1), "end at or before H = 12", "2147483647"),
        *(
            [Bad(op, "x", "fewer features", lambda t: t[..., :-1], "end at or before H = 11", "12", name)]
            if alone
            else []
        ),
    ]


def _seeds(op: str) -> list[Bad]:
    table = [
        ("state", torch.int32, r"have shape \[8, S\] = \[8, 3\]", {"[7, 3]": (7, 3), "[8, 4]": (8, 4), "[24]": (24,)}),
        ("alpha", torch.float32, r"have shape \[S\] = \[3\]", {"[4]": (4,), "[0]": (0,), "[3, 1]": (3, 1)}),
    ]
    bad = []
    for name, dtype, must, shapes in table:
        named = str(dtype).removeprefix("torch.")
        for other in (torch.int64, torch.float64, torch.float16):
            bad.append(Bad(op, name, str(other), _to(other), f"be {named}", str(other).removeprefix("torch.")))
        bad.append(Bad(op, name, "meta", _meta, "be on .*, the device of x", "meta"))
        bad += [Bad(op, name, text, _shaped(*shape), must, re.escape(text)) for text, shape in shapes.items()]
    name, must = "blueprint_weights", r"have shape \[P, H\] = \[P, 12\]"
    bad += [Bad(op, name, text, _shaped(*shape), must, re.escape(text)) for text, shape in
            {"[2, 11]": (2, 11), "[2, 13]": (2, 13), "[12]": (12,), "[1, 2, 12]": (1, 2, 12), "[12, 2]": (12, 2)}.items()]  # fmt: skip
    bad.append(Bad(op, name, "int32", _to(torch.int32), FLOATS, "int32"))
    bad.append(Bad(op, name, "meta", _meta, "be on .*, the device of x", "meta"))
    return bad


def _accumulator(op: str, name: str, columns: int) -> list[Bad]:
    must = rf"have shape \[S, {columns}\] = \[3, {columns}\]"
    shapes = [
        (2, columns),
        (4, columns),
        (3, columns - 1),
        (3, columns + 1),
        (3 * columns,),
        (1, 3, columns),
        (columns, 3 + columns),
    ]
    bad = [Bad(op, name, str(list(shape)), _shaped(*shape), must, re.escape(str(list(shape)))) for shape in shapes]
    bad.append(Bad(op, name, "float32", _to(torch.float32), "be float64", "float32"))
    bad.append(Bad(op, name, "meta", _meta, "be on .*, the device of x", "meta"))
    bad.append(Bad(op, name, "not contiguous", _every_second_column, "be contiguous", "strides"))
    return bad


def _reduce_and_merge() -> list[Bad]:
    bad = []
    for op in ("telemetry_reduce", "telemetry_merge"):
        bad += [
            Bad(op, "telemetry", "float32", _to(torch.float32), "be float64", "float32"),
            Bad(op, "telemetry", "[3, 4]", _shaped(3, 4), r"have shape \[S, 5\]", r"\[3, 4\]"),
            Bad(op, "telemetry", "[15]", _shaped(15), r"have shape \[S, 5\]", r"\[15\]"),
            Bad(op, "telemetry", "0-D", _shaped(), r"have shape \[S, 5\]", r"\[\]"),
        ]
    op, must = "telemetry_merge", r"have shape \[S, 5\] = \[3, 5\]"
    return bad + [
        Bad(op, "telemetry", "not contiguous", _every_second_column, "be contiguous", "strides"),
        Bad(op, "telemetry", "meta", _meta, "be on meta, the device of telemetry", "", "other"),
        Bad(op, "other", "meta", _meta, "be on .*, the device of telemetry", "meta"),
        Bad(op, "other", "float32", _to(torch.float32), "be float64", "float32"),
        Bad(op, "other", "[2, 5]", _shaped(2, 5), must, r"\[2, 5\]"),
        Bad(op, "other", "[3, 6]", _shaped(3, 6), must, r"\[3, 6\]"),
        Bad(op, "other", "[0]", _shaped(0), must, r"\[0\]"),
    ]


TABLE = [
    *_activations("chunked_forward"),
    Bad(
        "chunked_forward",
        "x",
        "more features",
        _doubled,
        r"have shape \[P, H\] = \[P, 24\]",
        r"\[2, 12\]",
        "blueprint_weights",
    ),
    *_offsets("chunked_forward"),
    *_seeds("chunked_forward"),
    *_accumulator("chunked_forward", "telemetry", 5),
    *_accumulator("chunked_forward", "grad_telemetry", 3),
    *_activations("chunked_backward", "grad_y"),
    *_grad_y("chunked_backward"),
    *_offsets("chunked_backward"),
    *_seeds("chunked_backward"),
    *_accumulator("chunked_backward", "grad_telemetry", 3),
    *_activations("telemetry_update"),
    *_offsets("telemetry_update"),
    *_accumulator("telemetry_update", "telemetry", 5),
    *_reduce_and_merge(),
]
VALUES = [bad for op in ("chunked_forward", "chunked_backward", "telemetry_update") for bad in _offset_values(op)]


def check(bad: Bad, backend: str, device: torch.device, good: Callable = good_arguments) -> str:
    """A ``good`` call but for one argument fails with the right words, changes no tensor and keeps no handle.

    Returns the message.
    """
    arguments = good(bad.op, device)
    arguments[bad.argument] = bad.change(arguments[bad.argument])
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    before = {name: t.clone() for name, t in tensors.items() if t.dim() <= 64}  # more, CUDA cannot copy
    handles = {name: t._use_count() for name, t in tensors.items()}
    versions = {name: t._version for name, t in tensors.items()}
    message = "no error"
    try:  # not pytest.raises: it keeps the frames of the call, and these the tensors
        function(backend, bad.op)(*arguments.values())
    except RuntimeError as error:
        message = str(error)
    assert re.search(rf"{bad.op}: {bad.blamed or bad.argument} must {bad.must}, got .*{bad.got}", message), message
    for name, t in tensors.items():
        assert t._use_count() == handles[name], f"{name} leaked"
        assert t._version == versions[name], f"{name} was marked as changed"
        if t.device.type != "meta" and name in before:
            raw = torch.uint8 if t.dim() and t.is_contiguous() else t.dtype
            assert torch.equal(t.view(raw), before[name].view(raw)), f"{name} was written"
    return message


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
    """The compiled operators' words are the reference's."""
    cpu = torch.device("cpu")
    messages = [check(bad, backend, cpu).splitlines()[0] for backend in checks.BACKENDS]
    assert messages[0] == messages[1]


def _moved_to_the_cpu() -> list[Bad]:
    """Each argument on the CPU among CUDA tensors; where it decides what device is right, another one is blamed."""
    blamed = {
        ("chunked_forward", "x"): "seed_offsets",
        ("chunked_backward", "x"): "grad_y",
        ("telemetry_update", "x"): "seed_offsets",
        ("telemetry_merge", "telemetry"): "other",
    }
    moved = []
    for op, argument in dict.fromkeys((bad.op, bad.argument) for bad in TABLE):
        if (op, argument) in blamed:
            words = (r"be on cpu, the device of \w+", "cuda:0", blamed[op, argument])
            moved.append(Bad(op, argument, "on the CPU", Tensor.cpu, *words))
        elif op != "telemetry_reduce":
            moved.append(Bad(op, argument, "on the CPU", Tensor.cpu, r"be on cuda:0, the device of \w+", "cpu"))
    return moved


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bad", _moved_to_the_cpu(), ids=str)
@checks.backends
def test_tensors_of_another_device(backend, bad):
    check(bad, backend, torch.device("cuda:0"))


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "values", [(1, 4, 8, 12), (0, 9, 4, 12), (-7, 4, 8, 12), (0, 4, 8, 99), (0, -5, 2**31 - 1, -(2**31)), (12, 8, 4, 0)]
)
def test_bad_offsets_on_cuda_stay_inside_memory(values):
    """They are clamped: what comes out is unspecified, but unowned features stay x and neighbours stay whole."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for op in ("chunked_forward", "chunked_backward", "telemetry_update"):
        arguments = good_arguments(op, torch.device("cuda"))
        arguments["seed_offsets"] = torch.tensor(values, dtype=torch.int32, device="cuda")
        getattr(checks.ops, op)(*arguments.values())
    torch.cuda.synchronize()


OPERATORS = ("chunked_forward", "chunked_backward", "telemetry_update", "telemetry_reduce", "telemetry_merge")


@pytest.mark.parametrize("op", OPERATORS)
@checks.backends
def test_sparse_tensors_are_refused(backend, device, op):
    for name, value in good_arguments(op, device).items():
        if isinstance(value, Tensor):
            arguments = good_arguments(op, device)
            before = {other: t.clone() for other, t in arguments.items() if isinstance(t, Tensor)}
            arguments[name] = value.to_sparse()
            with pytest.raises((RuntimeError, NotImplementedError)):
                getattr(checks.BACKENDS[backend], op)(*arguments.values())
            for other in before.keys() - {name}:
                assert torch.equal(arguments[other], before[other]), other


@pytest.mark.parametrize("op", OPERATORS)
def test_no_tensor_at_all(device, op):
    """None, which torch hands to operators as an undefined tensor, and what the schema refuses."""
    for name, value in good_arguments(op, device).items():
        for wrong in (None, "text", [value]) if isinstance(value, Tensor) else ():
            arguments = {**good_arguments(op, device), name: wrong}
            words = f"{op}: {name} must be a tensor, got None" if wrong is None else op
            for mode in (torch.enable_grad, torch.inference_mode):
                with mode(), pytest.raises(RuntimeError, match=words):
                    getattr(torch.ops.kasmina, op)(*arguments.values())
    with pytest.raises((RuntimeError, TypeError)):
        getattr(torch.ops.kasmina, op)(*list(good_arguments(op, device).values())[:-1])


@pytest.mark.parametrize("op", OPERATORS)
@checks.backends
def test_good_calls_leak_nothing(backend, device, op):
    """Handles: every input's use count is what it was. Memory: 300 calls (30 of the slow reference) on 1 MB hold less than 20."""
    arguments = good_arguments(op, device)
    call = getattr(checks.BACKENDS[backend], op)
    tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
    handles = [t._use_count() for t in tensors]
    for _ in range(10):
        call(*arguments.values())
    assert [t._use_count() for t in tensors] == handles
    if "x" not in arguments:
        return
    big = {**arguments, "x": arguments["x"].repeat(1000, 1, 1)}
    if "grad_y" in big:
        big["grad_y"] = arguments["grad_y"].repeat(1000, 1, 1)
    call(*big.values())
    before = held_bytes(device)
    for _ in range(300 if checks.compiled(backend, device) else 30):
        call(*big.values())
    assert held_bytes(device) - before < 20 * big["x"].nbytes


def held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@checks.backends
def test_after_an_error_the_next_call_works(backend, device):
    arguments = good_arguments("chunked_forward", device)
    call = checks.BACKENDS[backend].chunked_forward
    want = call(*arguments.values())
    for _ in range(20):
        with pytest.raises(RuntimeError, match="chunked_forward: alpha"):
            call(*{**arguments, "alpha": arguments["alpha"].double()}.values())
    assert torch.equal(call(*arguments.values()), want)
