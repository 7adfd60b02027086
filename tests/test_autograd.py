"""Derivatives: against finite differences, and what autograd's users expect of an operator."""

from __future__ import annotations

import weakref

import cases
import checks
import pytest
import torch
from cases import Case, build
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kasmina_ext import ops, reference

NOTHING = torch.empty(0, dtype=torch.float64)
STRATEGIES = ("mul", "add", "mid", "affine")


def step_sized(device, states: str, layout: str = "contiguous"):
    """Float64 inputs and a function of (x, weights, alpha).

    It is linear in each of them, and so are its gradients: central differences are exact for any step. A large one,
    a power of two, drowns dalpha's rounding to float32 and keeps alphas, multiples of 2^-8, free of any.
    """
    inputs = build(
        Case((3, 2, 7), 3, dtype=torch.float64, states=states, chunks="balanced", layout=layout, rng=2), device
    )
    inputs.state[0] = inputs.state[0].clamp(max=6)  # the gradient of a fossil is zero by decree
    alpha = torch.tensor([0.25, 0.5, 0.8125], dtype=torch.float64, device=device)
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.weights[:3].clone(), alpha)]
    return inputs, leaves


STEP = {"eps": 0.25, "atol": 1e-5, "rtol": 1e-6}  # dalpha, of the size of 10, is float32: 10 * 2^-24 / (2 * 0.25)


@pytest.mark.parametrize("layout", ["contiguous", "features_middle"])
@pytest.mark.parametrize("states", STRATEGIES)
@checks.backends
def test_gradcheck(backend, device, states, layout):
    inputs, leaves = step_sized(device, states, layout)

    def function(x, weights, alpha):
        args = (inputs.offsets, inputs.state, alpha.float(), weights, NOTHING.to(device), NOTHING.to(device))
        return checks.BACKENDS[backend].chunked_forward(x, *args)

    assert gradcheck(function, leaves, fast_mode=False, **STEP)


@pytest.mark.parametrize("states", STRATEGIES)
def test_gradgradcheck_of_the_reference(device, states):
    inputs, leaves = step_sized(device, states)

    def function(x, weights, alpha):
        args = (inputs.offsets, inputs.state, alpha.float(), weights, NOTHING.to(device), NOTHING.to(device))
        return checks.reference.chunked_forward(x, *args)

    grad_y = inputs.grad_y.clone().requires_grad_()
    assert gradgradcheck(function, leaves, grad_y, **STEP)


def run(backend: str, inputs, x=None, alpha=None, weights=None) -> torch.Tensor:
    """chunked_forward with some inputs replaced."""
    given = (x, alpha, weights)
    x, alpha, weights = (
        own if other is None else other
        for own, other in zip((inputs.x, inputs.alpha, inputs.weights), given, strict=True)
    )
    args = (inputs.offsets, inputs.state, alpha, weights, inputs.telemetry, inputs.grad_telemetry)
    return checks.BACKENDS[backend].chunked_forward(x, *args)


def leaves_of(case: Case, device):
    return build(case, device).requiring_grad()


SMALL = Case((12, 40), 6, states="grafted", telemetry="fresh")


@pytest.mark.stack(
    "devices and threads: second derivatives",
    refused="RuntimeError: no derivative of its own; the reference has (enable_kernels=False)",
)
def test_second_derivative_names_the_way_out(device):
    inputs = leaves_of(SMALL, device)
    (dx,) = torch.autograd.grad(run("ops", inputs).square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="enable_triton=False"):
        dx.sum().backward()


def test_second_derivative_of_the_reference(device):
    """d/dx of sum dx^2 for the loss sum y^2 with y = a x + b: dx = 2 a y, so 8 a^3 y."""
    inputs = leaves_of(Case((12, 40), 6, states="mul", dtype=torch.float64, telemetry="off"), device)
    y = run("reference", inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs.x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), inputs.x)
    slope = torch.from_numpy(inputs.problem().blend.a).to(device)
    torch.testing.assert_close(second, 8 * slope**3 * y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["x", "alpha", "weights"])
@checks.backends
def test_a_single_input_that_requires_grad(backend, device, name):
    whole = leaves_of(SMALL, device)
    run(backend, whole).square().sum().backward()
    inputs = build(SMALL, device)
    leaf = getattr(inputs, name).requires_grad_()
    run(backend, inputs).square().sum().backward()
    for other in ("x", "alpha", "weights"):
        if other == name:
            assert checks.same_bits(leaf.grad, getattr(whole, name).grad)
        else:
            assert getattr(inputs, other).grad is None
    assert checks.same_bits(inputs.grad_telemetry, whole.grad_telemetry)


@checks.backends
def test_nothing_requires_grad(backend, device):
    inputs = build(SMALL, device)
    y = run(backend, inputs)
    assert not y.requires_grad and y.grad_fn is None
    assert inputs.telemetry[:, 3].eq(1).all() and not inputs.grad_telemetry.any()


@checks.backends
def test_idle_seeds_get_zero_gradients_not_none(backend, device):
    inputs = leaves_of(Case((12, 40), 6, states="idle"), device)
    run(backend, inputs).sum().backward()
    assert inputs.weights.grad is not None and not inputs.weights.grad.any()
    assert inputs.alpha.grad is not None and not inputs.alpha.grad.any()
    assert inputs.x.grad.eq(1).all()


@checks.backends
def test_gradients_accumulate(backend, device):
    """Two backwards through one graph and one through another: three times the gradients, three counted backwards."""
    inputs = leaves_of(Case((12, 40), 6, states="grafted", telemetry="fresh", dtype=torch.float64), device)
    loss = run(backend, inputs).square().sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in (inputs.x, inputs.weights)]
    after_one = inputs.grad_telemetry.clone()
    loss.backward()
    run(backend, inputs).square().sum().backward()
    for leaf, grad in zip((inputs.x, inputs.weights), once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * grad, rtol=1e-15, atol=0)  # 2g + g rounds once
    torch.testing.assert_close(inputs.grad_telemetry, 3 * after_one, rtol=1e-15, atol=0)
    assert inputs.telemetry[:, 3].eq(2).all() and inputs.grad_telemetry[:, 2].eq(3).all()


@checks.backends
def test_two_forwards_then_two_backwards(backend, device):
    """Telemetry written in between is no change of a saved tensor."""
    inputs = leaves_of(SMALL, device)
    first, second = run(backend, inputs), run(backend, inputs)
    second.sum().backward()
    first.sum().backward()
    assert inputs.grad_telemetry[:, 2].eq(2).all() and inputs.telemetry[:, 3].eq(2).all()


@pytest.mark.parametrize("name", ["x", "offsets", "state", "alpha", "weights"])
@checks.backends
def test_in_place_change_between_forward_and_backward(backend, device, name):
    inputs = leaves_of(SMALL, device)
    x = inputs.x * 1
    y = run(backend, inputs, x=x)
    with torch.no_grad():
        (x if name == "x" else getattr(inputs, name)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert not inputs.grad_telemetry.any()


@checks.backends
def test_writing_through_a_view_of_the_state_is_a_change_too(backend, device):
    inputs = leaves_of(SMALL, device)
    y = run(backend, inputs)
    inputs.state[0].fill_(8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.stack("devices and threads: inference_mode and no_grad")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@checks.backends
def test_without_a_graph(backend, device, mode):
    inputs = leaves_of(SMALL, device)
    want = run(backend, inputs)
    before = inputs.telemetry[:, 3].clone()
    with mode():
        y = run(backend, inputs)
        assert not y.requires_grad
    assert torch.equal(y, want)
    assert torch.equal(inputs.telemetry[:, 3], before + 1)


@pytest.mark.stack("devices and threads: inference_mode and no_grad")
@checks.backends
def test_tensors_of_inference_mode(backend, device):
    """Buffers made in inference mode take telemetry there."""
    with torch.inference_mode():
        inputs = build(SMALL, device)
        run(backend, inputs)
        assert inputs.telemetry[:, 3].eq(1).all()


@checks.backends
def test_views_of_parameters(backend, device):
    """Gradients flow into the tensors that alpha and the bank are views of."""
    inputs = build(SMALL, device)
    bank = torch.cat((inputs.weights * 0, inputs.weights)).requires_grad_()
    alphas = torch.stack((inputs.alpha, inputs.alpha * 0), 1).requires_grad_()
    run(backend, inputs, weights=bank[4:], alpha=alphas[:, 0]).square().sum().backward()
    whole = leaves_of(SMALL, device)
    run(backend, whole).square().sum().backward()
    assert checks.same_bits(bank.grad[4:], whole.weights.grad) and not bank.grad[:4].any()
    assert checks.same_bits(alphas.grad[:, 0], whole.alpha.grad) and not alphas.grad[:, 1].any()


@checks.backends
def test_output_may_be_changed_in_place(backend, device):
    """relu_ after the layer, an everyday pattern; y is not saved."""
    inputs, other = leaves_of(SMALL, device), leaves_of(SMALL, device)
    run(backend, inputs).relu_().sum().backward()
    run(backend, other).relu().sum().backward()
    assert checks.same_bits(inputs.x.grad, other.x.grad)


@checks.backends
def test_saved_tensor_hooks(backend, device):
    """What the graph keeps goes through autograd's hooks (offloading, checkpointing rely on it)."""
    inputs, packed = leaves_of(SMALL, device), []

    def pack(t):
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(backend, inputs)
    y.sum().backward()
    assert any(t.shape == inputs.x.shape for t in packed)


@pytest.mark.stack("devices and threads: torch.func.grad")
@checks.backends
def test_func_grad(backend, device):
    """torch.func.grad gives what autograd gives."""
    inputs, whole = build(SMALL, device), leaves_of(SMALL, device)

    def loss(x, weights, alpha):
        return run(backend, inputs, x, alpha, weights).square().sum()

    grads = torch.func.grad(loss, argnums=(0, 1, 2))(inputs.x, inputs.weights, inputs.alpha)
    assert inputs.telemetry[:, 3].eq(1).all() and inputs.grad_telemetry[:, 2].eq(1).all()
    run(backend, whole).square().sum().backward()
    for got, leaf in zip(grads, (whole.x, whole.weights, whole.alpha), strict=True):
        assert checks.same_bits(got, leaf.grad)


@pytest.mark.stack("devices and threads: functional_call")
@checks.backends
def test_functional_call(backend, device):
    """Per-parameter gradients through a module, as torch.func users write them."""
    inputs = build(SMALL, device)

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(inputs.weights)

        def forward(self, x):
            return run(backend, inputs, x, None, self.weights)

    module = Scale()

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (inputs.x,)).square().sum()

    grads = torch.func.grad(loss)(dict(module.named_parameters()))
    module(inputs.x).square().sum().backward()
    assert checks.same_bits(grads["weights"], module.weights.grad)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("case", [SMALL, Case((3, 5, 40), 6, dtype=torch.bfloat16, telemetry="fresh")], ids=str)
def test_the_way_past_the_dispatcher_has_the_operators_bits(device, case, grad):
    ways = []
    for chunked_forward in (ops.chunked_forward, torch.ops.kasmina.chunked_forward):
        inputs = leaves_of(case, device)
        with torch.set_grad_enabled(grad):
            y = chunked_forward(inputs.x, *inputs.seeds, inputs.telemetry, inputs.grad_telemetry)
        assert y.requires_grad is grad
        if grad:
            y.backward(inputs.grad_y)
        ways.append((y, inputs.telemetry, inputs.grad_telemetry, inputs.x.grad, inputs.weights.grad, inputs.alpha.grad))
    for one, other in zip(*ways, strict=True):
        assert one is other is None if not grad and one is None else checks.same_bits(one, other)


class SeenByDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class SeenByFunction(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverloadPacket):
            self.names.append(func._qualified_op_name)
            assert any(arg.requires_grad for arg in args), "the operator as the user calls it, not its inside"
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_operator(device):
    """Modes and tracers, though an unwatched call goes another way."""
    inputs = leaves_of(SMALL, device)
    with SeenByDispatch() as seen:
        run("ops", inputs).sum().backward()
    assert [name for name in seen.names if "kasmina" in name] == [
        "kasmina::chunked_forward",
        "kasmina::chunked_backward",
    ]
    with SeenByFunction() as seen:
        run("ops", inputs)
    assert seen.names == ["kasmina::chunked_forward"]
    graph = make_fx(lambda x: run("ops", inputs, x=x))(inputs.x).graph
    assert torch.ops.kasmina.chunked_forward.default in [node.target for node in graph.nodes]
    constants = build(SMALL, device)
    traced = torch.jit.trace(lambda x: run("ops", constants, x=x), inputs.x, check_trace=False)
    assert "kasmina::chunked_forward" in [node.kind() for node in traced.inlined_graph.nodes()]


def test_a_tensor_that_a_transform_left_behind(device):
    """It is the tensor that it wrapped: its graph of the transform is gone."""
    inputs, left = leaves_of(SMALL, device), []

    def leave(x):
        left.append(x * 2)
        return left[0].sum()

    torch.func.grad(leave)(inputs.x.detach())
    run("ops", inputs, x=left[0]).backward(inputs.grad_y)
    expected = leaves_of(SMALL, device)
    run("ops", expected, x=expected.x.detach() * 2).backward(inputs.grad_y)
    assert checks.same_bits(inputs.weights.grad, expected.weights.grad)


@pytest.mark.stack(
    "devices and threads: vmap",
    refused="RuntimeError: cannot be vmapped; the reference can (enable_kernels=False, telemetry=False)",
)
def test_vmap_is_refused(device):
    inputs = build(Case((5, 12, 40), 6), device)
    with pytest.raises(RuntimeError, match="chunked_forward.*vmap"):
        torch.func.vmap(lambda x: run("ops", inputs, x))(inputs.x)
    with pytest.raises(RuntimeError, match="telemetry_update.*vmap"):
        torch.func.vmap(lambda x: checks.ops.telemetry_update(x, inputs.offsets, inputs.telemetry))(inputs.x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.short)
def test_autocast_leaves_dtypes_alone(device, dtype):
    """x keeps its dtype under autocast, whatever the bank's; so do the gradients."""
    for case in (SMALL, Case((12, 40), 6, dtype=dtype, weights_dtype=torch.float32)):
        inputs, plain = leaves_of(case, device), leaves_of(case, device)
        with torch.autocast(device.type, dtype=dtype):
            y = run("ops", inputs)
        y.sum().backward()
        run("ops", plain).sum().backward()
        assert y.dtype == inputs.x.dtype
        for name in ("x", "weights", "alpha"):
            assert checks.same_bits(getattr(inputs, name).grad, getattr(plain, name).grad)


@checks.backends
def test_nothing_outlives_its_graph(backend, device):
    """No reference cycle or stray handle keeps y, x or the bank alive."""
    inputs = leaves_of(SMALL, device)
    x = inputs.x * 1
    counts = [t._use_count() for t in (*inputs.seeds, inputs.telemetry, inputs.grad_telemetry)]
    y = run(backend, inputs, x=x)
    y.sum().backward()
    del y
    assert [t._use_count() for t in (*inputs.seeds, inputs.telemetry, inputs.grad_telemetry)] == counts
    gone = weakref.ref(x)
    del x
    assert gone() is None


def _cubed(fn, inputs):
    """A loss of x and the bank; telemetry off, since a vmapped call cannot collect."""
    none = torch.empty(0, dtype=torch.float64)
    return lambda x, w: (fn(x, inputs.offsets, inputs.state, inputs.alpha, w, none, none) ** 3).sum()


@pytest.mark.parametrize("argnum", [0, 1], ids=["x", "weights"])
def test_nested_transforms_of_the_reference(argnum):
    """torch.func's second derivatives are those of torch.autograd.functional, a zero additive weight included."""
    inputs = build(Case((3, 12), 4, dtype=torch.float64, states="grafted"), torch.device("cpu"))
    inputs.weights[:, ::3] = 0.0
    loss, point = _cubed(reference.chunked_forward, inputs), (inputs.x, inputs.weights)
    expected = torch.autograd.functional.hessian(loss, point)[argnum][argnum]
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.func.hessian(loss, argnums=argnum)(*point), expected)
    reverse = torch.func.jacrev(torch.func.jacrev(loss, argnums=argnum), argnums=argnum)(*point)
    torch.testing.assert_close(reverse, expected)


def test_what_the_operator_cannot_differentiate_is_an_error():
    """Forward mode and nested transforms would silently give zero."""
    inputs = build(Case((3, 12), 4, dtype=torch.float64, states="grafted"), torch.device("cpu"))
    loss, x, w = _cubed(ops.chunked_forward, inputs), inputs.x, inputs.weights
    gradient = torch.func.grad(loss)
    for attempt in (
        lambda: torch.func.grad(lambda z: gradient(z, w).sum())(x),
        lambda: torch.func.jvp(lambda z: loss(z, w), (x,), (x,)),
        lambda: torch.func.jvp(lambda z: gradient(z, w), (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="enable_triton=False"):
            attempt()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="enable_triton=False"):
        loss(forward_ad.make_dual(x, torch.ones_like(x)), w)
