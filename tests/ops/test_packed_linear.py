"""nn.Linear -> reference -> every backend: packed_linear is what it says it is."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_within_budget
from torch.utils.flop_counter import FlopCounterMode

import vitslim
from vitslim.ops import pack_weight, packed_linear, use_backend
from vitslim.ops.packed_linear import ACTIVATIONS, panel_elements

OP = "packed_linear"
SHAPES = [  # rows, in, out
    ((2, 197), 192, 576),
    ((1, 50), 64, 100),
    ((7,), 33, 17),
    ((3, 5, 2), 1, 1),
    ((1,), 257, 16),
    ((13,), 15, 31),
    ((2, 11), 48, 7),
]


def make(rows, depth, out, device="cpu", parts=("bias", "residual", "scale", "norm")):
    """Returns x, the weight and the named parts of the call, in float32."""
    x = torch.randn(*rows, depth, device=device)
    weight = torch.randn(out, depth, device=device) / max(depth, 1) ** 0.5
    kwargs = {"bias": None}
    for part, size in (("bias", (out,)), ("residual", (*rows, out)), ("scale", (out,))):
        if part in parts:
            kwargs[part] = torch.randn(size, device=device)
    if "norm" in parts:
        kwargs["norm_weight"] = torch.rand(depth, device=device) + 0.5
        kwargs["norm_bias"] = torch.randn(depth, device=device)
    return x, weight, kwargs


def plain(x, weight, bias, activation="none", residual=None, scale=None, norm=None):
    """What the op means, in modules of torch and in the dtype of x."""
    functions = {"none": lambda x: x, "gelu": F.gelu, "silu": F.silu, "relu": F.relu}
    functions["gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")
    functions["quick_gelu"] = lambda x: x * torch.sigmoid(1.702 * x)
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], *norm, 1e-6)
    y = functions[activation](F.linear(x, weight, bias))
    return y if residual is None else residual + y * (1 if scale is None else scale)


def expected(x, weight, kwargs, activation="none", wide=False):
    def cast(tensor):
        return tensor.double() if wide and tensor is not None else tensor

    given = {name: cast(kwargs.get(name)) for name in ("bias", "residual", "scale")}
    norm = None
    if "norm_weight" in kwargs:
        norm = (cast(kwargs["norm_weight"]), cast(kwargs["norm_bias"]))
    return plain(cast(x), cast(weight), activation=activation, norm=norm, **given)


def call(x, weight, kwargs, activation="none", dtype=None, **more):
    panels = pack_weight(weight, dtype or weight.dtype)
    bias = kwargs["bias"]
    rest = {name: value for name, value in kwargs.items() if name != "bias"}
    return packed_linear(x, panels, bias, len(weight), activation, **rest, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out", [1, 16, 35])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_panels_stand_as_the_header_says(out, depth, dtype):
    weight = torch.randn(out, depth).to(dtype)
    panels = pack_weight(weight, dtype)
    assert panels.shape == (panel_elements(out, depth, dtype),)
    left = panels.clone()
    for row, column in itertools.product(range(out), range(depth)):
        if dtype == torch.float32:
            place = (row // 16 * depth + column) * 16 + row % 16
        else:
            pairs = (depth + 1) // 2
            place = ((row // 16 * pairs + column // 2) * 16 + row % 16) * 2 + column % 2
        assert panels[place] == weight[row, column]
        left[place] = 0
    assert (left == 0).all()
    assert torch.equal(pack_weight(weight.t().contiguous().t(), dtype), panels)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_reference_equals_plain_torch(shape, activation):
    x, weight, kwargs = make(*shape)
    kwargs = {name: value.double() for name, value in kwargs.items()}
    with use_backend("reference", OP):
        actual = call(x.double(), weight.double(), kwargs, activation)
    exact = expected(x.double(), weight.double(), kwargs, activation)
    torch.testing.assert_close(actual, exact, atol=1e-10, rtol=1e-10)


def test_reference_equals_a_linear_layer():
    layer = torch.nn.Linear(33, 50).double()
    x = torch.randn(3, 4, 33, dtype=torch.float64)
    with use_backend("reference", OP):
        actual = packed_linear(x, pack_weight(layer.weight, torch.float64), layer.bias.detach(), 50)
    torch.testing.assert_close(actual, layer(x).detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backends_keep_the_error_budget(shape, activation, forced, device):
    forced(OP, torch.float32)
    x, weight, kwargs = make(*shape, device)
    exact = expected(x, weight, kwargs, activation, wide=True)
    eager = expected(x, weight, kwargs, activation)
    assert_within_budget(call(x, weight, kwargs, activation), eager, exact)


@pytest.mark.parametrize(
    "parts", [(), ("bias",), ("residual",), ("residual", "scale"), ("norm",)], ids=str
)
def test_every_part_may_be_absent(parts, forced, device):
    forced(OP, torch.float32)
    x, weight, kwargs = make((2, 9), 40, 33, device, parts)
    exact = expected(x, weight, kwargs, "gelu", wide=True)
    assert_within_budget(
        call(x, weight, kwargs, "gelu"), expected(x, weight, kwargs, "gelu"), exact
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_weights_round_nothing_but_the_weights(shape, forced, device):
    forced(OP, torch.float32)
    x, weight, kwargs = make(*shape, device)
    rounded = weight.bfloat16().float()
    exact = expected(x, rounded, kwargs, "gelu", wide=True)
    actual = call(x, weight, kwargs, "gelu", torch.bfloat16)
    assert_within_budget(actual, expected(x, rounded, kwargs, "gelu"), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_products_round_the_left_operand_to_even(shape, forced, device):
    forced(OP, torch.float32)
    x, weight, kwargs = make(*shape, device, parts=("bias", "residual"))
    x.view(-1)[0] = 1 + 2**-8  # halfway between two: goes to the even one, which is 1
    rounded, left = weight.bfloat16().float(), x.bfloat16().float()
    exact = expected(left, rounded, kwargs, "relu", wide=True)
    actual = call(x, weight, kwargs, "relu", torch.bfloat16, bfloat16_products=True)
    assert_within_budget(actual, expected(left, rounded, kwargs, "relu"), exact)


def test_bfloat16_products_after_a_norm(forced, device):
    forced(OP, torch.float32)
    x, weight, kwargs = make((2, 19), 96, 40, device)
    actual = call(x, weight, kwargs, "none", torch.bfloat16, bfloat16_products=True)
    exact = expected(x, weight, kwargs, wide=True)
    error = (actual - exact).abs().max() / exact.abs().max()
    assert 0 < error < 2**-7


def test_opcheck(forced, device):
    forced(OP, torch.float32)
    x, weight, kwargs = make((2, 5), 7, 18, device)
    panels = pack_weight(weight)
    norm = (kwargs["norm_weight"], kwargs["norm_bias"], 1e-6)
    epilogue = (kwargs["bias"], 18, "gelu", kwargs["residual"], kwargs["scale"])
    forward = torch.ops.vitslim.packed_linear_forward
    torch.library.opcheck(forward, (x, panels, *epilogue, *norm, False))
    nothing = (None, 18, "none", None, None, None, None, 1e-6)
    torch.library.opcheck(forward, (x, pack_weight(weight, torch.bfloat16), *nothing, True))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "offset"])
def test_strided_input(layout, forced, device):
    forced(OP, torch.float32)
    _, weight, kwargs = make((4, 6), 20, 33, device)
    make_strided = {
        "sliced": lambda: torch.randn(8, 6, 27, device=device)[::2, :, 3:23],
        "transposed": lambda: torch.randn(4, 20, 6, device=device).transpose(1, 2),
        "expanded": lambda: torch.randn(1, 6, 20, device=device).expand(4, -1, -1),
        "offset": lambda: torch.randn(4 * 6 * 20 + 1, device=device)[1:].view(4, 6, 20),
    }
    x = make_strided[layout]()
    whole = call(x.contiguous(), weight, kwargs, "silu")
    kwargs["residual"] = kwargs["residual"].transpose(0, 1).contiguous().transpose(0, 1)
    kwargs["bias"] = torch.stack([kwargs["bias"]] * 2, 1)[:, 0]
    torch.testing.assert_close(call(x, weight, kwargs, "silu"), whole)


@pytest.mark.parametrize("shape", [((0,), 8, 5), ((2, 0), 8, 5), ((3,), 0, 5), ((3,), 8, 0)])
def test_empty(shape, forced, device):
    forced(OP, torch.float32)
    x, weight, kwargs = make(*shape, device, parts=("bias", "residual", "scale"))
    actual = call(x, weight, kwargs)
    torch.testing.assert_close(actual, expected(x, weight, kwargs))
    assert actual.shape == (*shape[0], shape[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, 1e-42])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_input_gives_what_torch_gives(value, activation, forced, device):
    forced_backend = forced(OP, torch.float32)
    x, weight, kwargs = make((6,), 21, 34, device, parts=("bias",))
    x[2, 3] = value
    if abs(value) == float("inf"):
        x[4] = value  # a sum that meets both infinities
    weight[5, 3] = 0.0
    # In float64, for torch's vectorised float32 GELU makes NaN of +inf, its plain one does not.
    wanted = expected(x, weight, kwargs, activation, wide=True).float()
    actual = call(x, weight, kwargs, activation)
    if forced_backend == "reference" and activation == "gelu":
        actual = torch.where(wanted.isposinf() & actual.isnan(), wanted, actual)
    torch.testing.assert_close(actual, wanted, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_is_lost_in_the_norm_and_no_other(value, forced, device):
    forced(OP, torch.float32)
    x, weight, kwargs = make((6,), 21, 34, device)
    clean = call(x, weight, kwargs)
    x[2, 3] = value
    actual = call(x, weight, kwargs)
    assert actual[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(actual[others], clean[others])


def test_compiles_without_a_graph_break():
    x, weight, kwargs = make((2, 9), 12, 20)
    panels = pack_weight(weight)

    def function(x):
        return packed_linear(x, panels, kwargs["bias"], 20, "gelu", kwargs["residual"])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


def test_flop_counter_counts_the_product():
    x, weight, kwargs = make((2, 50), 12, 20)
    with FlopCounterMode(display=False) as counter:
        call(x, weight, kwargs)
    assert counter.get_total_flops() == 2 * 2 * 50 * 12 * 20


def test_it_has_no_gradient_and_says_so():
    x, weight, kwargs = make((2, 9), 12, 20)
    out = call(x.requires_grad_(), weight, kwargs)
    with pytest.raises(vitslim.VitslimError, match="packed_linear is for inference"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.randn(3, 13)}, r"panels must have shape \[208\], got \[192\]"),
        ({"x": torch.randn(3, 12).half()}, "x must be float32, got torch.float16"),
        ({"x": torch.tensor(1.0)}, r"must be \[..., in\]"),
        ({"panels": torch.randn(192).half()}, "must be torch.float32 or torch.bfloat16"),
        ({"bias": torch.randn(9)}, r"bias must have shape \[10\], got \[9\]"),
        ({"bias": torch.randn(10).double()}, "bias is torch.float64, x torch.float32"),
        ({"out_features": -1}, "must not be negative"),
        ({"activation": "mish"}, "no activation is called 'mish'; there are none, gelu"),
        ({"residual": torch.randn(2, 10)}, r"residual must have shape \[3, 10\]"),
        ({"scale": torch.randn(10)}, "scale is for a residual"),
        ({"norm_weight": torch.randn(12)}, "come together"),
        ({"bfloat16_products": True}, "needs panels in bfloat16"),
        ({"x": torch.randn(3, 12, device="meta")}, "panels is on cpu, the input on meta"),
    ],
)
def test_wrong_arguments_are_named(change, said):
    right = {"x": torch.randn(3, 12), "panels": torch.randn(192), "bias": None, "out_features": 10}
    assert packed_linear(**right).shape == (3, 10)
    with pytest.raises(ValueError, match=said):
        packed_linear(**(right | change))


@pytest.mark.parametrize("elements", [0, 1, 191, 193])
def test_panels_of_another_size_are_refused_by_the_backend_too(elements, forced, device):
    forced(OP, torch.float32)
    x, panels = torch.randn(3, 12, device=device), torch.randn(elements, device=device)
    with pytest.raises((ValueError, RuntimeError), match="panels"):
        torch.ops.vitslim.packed_linear_forward(
            x, panels, None, 10, "none", None, None, None, None, 1e-6, False
        )
