"""timm -> reference -> every backend: vit_encoder runs a whole model, dense or slim."""

import random

import pytest
import torch
from accuracy import assert_within_budget
from test_surgery import MODELS, images, make, random_plan, randomised
from torch.utils.flop_counter import FlopCounterMode

import vitslim
from vitslim.ops import use_backend, vit_encoder
from vitslim.packed.layout import packed_arrays, start_tokens

OP = "vit_encoder"
DENSE = {name: (name, {}) for name in MODELS}
DENSE["odd patches"] = ("ViT", {"img_size": (15, 28), "patch_size": (5, 4)})
DENSE["one channel"] = ("DeiT", {"in_chans": 1, "qkv_bias": False})


def dense(name, dtype=torch.float32):
    base, extra = DENSE[name]
    return make(base, dtype, **extra)


def photographs(model, batch=2):
    channels = model.patch_embed.proj.in_channels
    return images(model, batch)[:, :channels].contiguous()


def arrays(model, dtype=None):
    """Returns start, vectors, panels and layout, on the model's device."""
    weight = model.patch_embed.proj.weight
    packed = packed_arrays(model, dtype or weight.dtype)
    return start_tokens(model), packed.vectors, packed.panels, packed.layout


def on(device, *tensors):
    return tuple(tensor.to(device) for tensor in tensors)


def slimmed(name, seed, dtype=torch.float32):
    masked = randomised(dense(name, dtype))
    return vitslim.slim(masked, random_plan(masked, seed))


def tokens_of(model):
    last = model.blocks[-1].tokens if hasattr(model.blocks[-1], "tokens") else None
    patches = model.patch_embed.num_patches if last is None else len(last.keep)
    return model.num_prefix_tokens + patches


@pytest.mark.parametrize("seed", [None, 0, 1], ids=["dense", "slim 0", "slim 1"])
@pytest.mark.parametrize("name", DENSE)
def test_reference_equals_timm_to_1e_10(name, seed):
    wide = torch.float64
    model = dense(name, wide) if seed is None else slimmed(name, seed, wide)
    x = photographs(model)
    with use_backend("reference"), torch.no_grad():
        actual = vit_encoder(x, *arrays(model), tokens_of(model))
        expected = model.forward_features(x)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("seed", [None, 3], ids=["dense", "slim 3"])
@pytest.mark.parametrize("name", DENSE)
def test_backends_keep_the_error_budget(name, seed, forced, device):
    forced(OP, torch.float32)
    model = dense(name) if seed is None else slimmed(name, seed)
    x, packed = photographs(model), arrays(model)
    with torch.no_grad():
        eager, exact = model.forward_features(x), model.double().forward_features(x.double())
    for rows in {1, 3, tokens_of(model)}:
        if rows <= tokens_of(model):
            actual = vit_encoder(*on(device, x, *packed), rows).cpu()
            assert_within_budget(actual, eager[:, :rows], exact[:, :rows], f"{rows} rows")


@pytest.mark.parametrize("sizes", [(97, 1), (130, 5), (33, 3)], ids=str)
def test_widths_that_fill_no_vector(sizes, forced, device):
    forced(OP, torch.float32)
    model = make(embed_dim=sizes[0], num_heads=sizes[1], mlp_ratio=1.7)
    x, packed = photographs(model, 3), arrays(model)
    with torch.no_grad():
        eager, exact = model.forward_features(x), model.double().forward_features(x.double())
    assert_within_budget(vit_encoder(*on(device, x, *packed), 17).cpu(), eager, exact)


def test_bfloat16_weights_round_nothing_but_the_weights(forced, device):
    forced(OP, torch.float32)
    model = slimmed("DeiT-III", 5)
    x, packed = photographs(model), arrays(model, torch.bfloat16)
    assert packed[2].dtype == torch.bfloat16
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.weight.data = module.weight.data.bfloat16().float()
    with torch.no_grad():
        eager, exact = model.forward_features(x), model.double().forward_features(x.double())
    actual = vit_encoder(*on(device, x, *packed), tokens_of(model)).cpu()
    assert_within_budget(actual, eager, exact)


def test_bfloat16_products_agree_with_the_reference(forced, device):
    forced(OP, torch.float32)
    model = slimmed("DeiT", 5)
    x, packed = photographs(model), arrays(model, torch.bfloat16)
    with torch.no_grad():
        exact = model.double().forward_features(x.double())
    actual = vit_encoder(*on(device, x, *packed), 1, bfloat16_products=True).cpu()
    wide = [each.double() if each.dtype == torch.float32 else each for each in packed]
    with use_backend("reference", OP):
        wanted = vit_encoder(x.double(), *wide, 1, bfloat16_products=True)
    size, distance = exact[:, :1].abs().max(), (wanted - exact[:, :1]).abs().max()
    assert 1e-4 * size < distance < 0.05 * size
    # A number that lies close to halfway may go either way, so no closer than this.
    assert (actual - wanted).abs().max() < 0.5 * distance


def test_opcheck(forced, device):
    forced(OP, torch.float32)
    model = slimmed("DeiT", 6)
    inputs = on(device, photographs(model), *arrays(model))
    torch.library.opcheck(torch.ops.vitslim.vit_encoder_forward, (*inputs, 2, False))


@pytest.mark.parametrize("form", ["channels last", "sliced", "transposed", "expanded"])
def test_strided_images(form, forced, device):
    forced(OP, torch.float32)
    model = make()
    make_strided = {
        "channels last": lambda x: x.to(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat([x, x], 3)[..., 7:39],
        "transposed": lambda x: x.transpose(2, 3),
        "expanded": lambda x: x[:1, :1].expand(2, 3, -1, -1),
    }
    x = make_strided[form](photographs(model).to(device))
    packed = on(device, *arrays(model))
    expected = vit_encoder(x.contiguous(), *packed, 17)
    assert torch.equal(vit_encoder(x, *packed, 17), expected)


def test_empty(forced, device):
    forced(OP, torch.float32)
    model = slimmed("DeiT", 7)
    x, packed = photographs(model).to(device), on(device, *arrays(model))
    assert vit_encoder(x[:0], *packed, 2).shape == (0, 2, 24)
    assert vit_encoder(x, *packed, 0).shape == (2, 0, 24)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_image_disturbs_no_other(value, forced, device):
    forced(OP, torch.float32)
    model = make()
    x, packed = photographs(model, 3).to(device), on(device, *arrays(model))
    clean = vit_encoder(x, *packed, 17)
    x[1, 2, 9, 9] = value
    actual = vit_encoder(x, *packed, 17)
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("value", [1e-42, 1e15, 1e18])
def test_denormal_and_huge_images(value, forced, device):
    forced(OP, torch.float32)
    model = make()
    x, packed = photographs(model) * value, arrays(model)
    with torch.no_grad():
        eager, exact = model.forward_features(x), model.double().forward_features(x.double())
    assert_within_budget(vit_encoder(*on(device, x, *packed), 17).cpu(), eager, exact)


def test_the_same_bits_every_time(forced, device):
    forced(OP, torch.float32)
    model = slimmed("DeiT", 8)
    x, packed = photographs(model, 5).to(device), on(device, *arrays(model))
    first = vit_encoder(x, *packed, 2)
    for _ in range(5):
        assert torch.equal(vit_encoder(x, *packed, 2), first)


def test_flop_counter_counts_what_is_computed():
    model = vitslim.slim(
        masked := randomised(make("DeiT")), vitslim.threshold(masked, {"token": 0.5})
    )
    x, packed = photographs(model), arrays(model)
    with FlopCounterMode(display=False) as counter:
        vit_encoder(x, *packed, tokens_of(model))
    macs = vitslim.cost(model).macs - model.head.weight.numel()
    assert counter.get_total_flops() == 2 * 2 * macs
    with FlopCounterMode(display=False) as counter:
        vit_encoder(x, *packed, 1)
    last, tokens = model.blocks[-1], tokens_of(model)
    width, attn_dim = 24, last.attn.proj.in_features
    left_out = (tokens - 1) * (
        width * (2 * attn_dim + 2 * last.mlp.fc1.out_features) + 2 * tokens * attn_dim
    )
    assert counter.get_total_flops() == 2 * 2 * (macs - left_out)


def test_it_has_no_gradient_and_says_so():
    model = make()
    out = vit_encoder(photographs(model).requires_grad_(), *arrays(model), 1)
    with pytest.raises(vitslim.VitslimError, match="vit_encoder is for inference"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": torch.zeros(3, 32, 32)}, "images must be"),
        ({"images": torch.zeros(1, 3, 32, 32).half()}, "must be float32, got torch.float16"),
        ({"images": torch.zeros(1, 3, 32, 32).double()}, "panels must be torch.float64"),
        ({"images": torch.zeros(1, 3, 32, 32, device="meta")}, "start is on cpu, the images on"),
        ({"start": torch.zeros(17)}, "start must be"),
        ({"start": torch.zeros(17, 24).double()}, "start is torch.float64, images are"),
        ({"layout": torch.zeros(9)}, "layout must be int64"),
        ({"layout": torch.zeros(3, 3).long()}, "layout must be 1-D"),
        ({"rows": -1}, "rows must not be negative"),
        ({"bfloat16_products": True}, "needs panels in bfloat16"),
    ],
)
def test_wrong_arguments_are_named(change, said):
    model = make()
    names = ("start", "vectors", "panels", "layout")
    right = dict(zip(names, arrays(model), strict=True))
    right |= {"images": photographs(model), "rows": 1}
    with pytest.raises(ValueError, match=said):
        vit_encoder(**(right | change))


def _with(index, number):
    def change(images, start, vectors, panels, layout, rows):
        layout = layout.clone()
        layout[index] = number
        return images, start, vectors, panels, layout, rows

    return change


BROKEN = {
    "no layout": lambda i, s, v, p, n, r: (i, s, v, p, n[:0], r),
    "layout ends early": lambda i, s, v, p, n, r: (i, s, v, p, n[:-1], r),
    "layout goes on": lambda i, s, v, p, n, r: (i, s, v, p, torch.cat([n, n[:1]]), r),
    "no vectors": lambda i, s, v, p, n, r: (i, s, v[:0], p, n, r),
    "vectors end early": lambda i, s, v, p, n, r: (i, s, v[:-1], p, n, r),
    "vectors go on": lambda i, s, v, p, n, r: (i, s, torch.cat([v, v[:16]]), p, n, r),
    "no panels": lambda i, s, v, p, n, r: (i, s, v, p[:0], n, r),
    "panels end early": lambda i, s, v, p, n, r: (i, s, v, p[:-1], n, r),
    "panels go on": lambda i, s, v, p, n, r: (i, s, v, torch.cat([p, p[:1]]), n, r),
    "start is short": lambda i, s, v, p, n, r: (i, s[:-1], v, p, n, r),
    "start is narrow": lambda i, s, v, p, n, r: (i, s[:, :-1], v, p, n, r),
    "too many rows": lambda i, s, v, p, n, r: (i, s, v, p, n, 18),
    "absurdly many rows": lambda i, s, v, p, n, r: (i, s, v, p, n, 2**62),
    "images of another size": lambda i, s, v, p, n, r: (i[..., :24], s, v, p, n, r),
    "images between two sizes": lambda i, s, v, p, n, r: (i[..., :31], s, v, p, n, r),
    "images with a channel less": lambda i, s, v, p, n, r: (i[:, :2], s, v, p, n, r),
    "another version": _with(0, 2),
    "patches without height": _with(2, 0),
    "absurd patches": _with(2, 2**62),
    "no width": _with(4, 0),
    "a negative prefix": _with(5, -1),
    "a strange flag": _with(6, 3),
    "negative blocks": _with(8, -1),
    "more blocks": _with(8, 4),
    "absurd blocks": _with(8, 2**62),
    "negative heads": _with(9, -3),
    "absurd heads": _with(9, 2**62),
    "negative hidden": _with(10, -1),
    "absurd hidden": _with(10, 2**61),
    "an unknown activation": _with(11, 6),
    "a negative activation": _with(11, -1),
    "rows that are not there": _with(12, 1),
    "a gate that is not there": _with(13, 1),
    "absurdly many kept": _with(14, 2**62),
    "a negative head": _with(15, -8),
    "an absurd head": _with(15, 2**62),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_arrays_that_do_not_fit_are_refused_in_a_sentence(broken, forced, device):
    forced(OP, torch.float32)
    model = make()
    right = (*on(device, photographs(model), *arrays(model)), 17)
    assert vit_encoder(*right).shape == (2, 17, 24)
    with pytest.raises((ValueError, RuntimeError), match="vit_encoder: "):
        vit_encoder(*BROKEN[broken](*right))


def test_a_row_that_is_not_there_is_refused(forced, device):
    forced(OP, torch.float32)
    model = slimmed("DeiT", 9)
    x, start, vectors, panels, layout = on(device, photographs(model), *arrays(model))
    for number in (17, -1, 2**62):
        broken = layout.clone()
        broken[-1] = number
        with pytest.raises((ValueError, RuntimeError), match="vit_encoder: "):
            vit_encoder(x, start, vectors, panels, broken, 1)


def test_random_numbers_in_the_layout_never_crash(forced, device):
    forced(OP, torch.float32)
    rng = random.Random(0)
    model = slimmed("DeiT", 10)
    x, start, vectors, panels, layout = on(device, photographs(model), *arrays(model))
    refused = 0
    for _ in range(120):
        broken = layout.clone()
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(len(layout))] = rng.choice(
                [-1, 0, 1, 2, 3, 15, 16, 17, 24, 48, 10**6, 2**31, 2**40, 2**62, -(2**63)]
            )
        try:
            out = vit_encoder(x, start, vectors, panels, broken, 1)
        except (ValueError, RuntimeError):
            refused += 1
        else:
            assert out.shape == (2, 1, 24)
    assert refused > 80
