"""What packing cannot do is refused in one sentence that says why."""

import pytest
import timm
import torch
from pack_cases import photographs
from test_surgery import make
from timm.layers import PatchEmbed, RmsNorm, SwiGLU
from timm.models.vision_transformer import VisionTransformer

import vitslim
from vitslim.ops import backend_of, use_backend, why_not
from vitslim.workflow.models import packed_for


def test_what_products_need_is_said():
    with pytest.raises(vitslim.VitslimError, match=r"needs weights=torch\.bfloat16"):
        vitslim.pack(make(), products=torch.bfloat16)
    with pytest.raises(vitslim.VitslimError, match=r"weights must be .* got torch\.float16"):
        vitslim.pack(make(), weights=torch.float16)


def test_the_command_line_packs_for_the_cpu_alone():
    with pytest.raises(vitslim.VitslimError, match="--pack is for the CPU, and the device is cuda"):
        packed_for(make(), torch.device("cuda"), "float32")


def test_it_stays_in_eval_mode_in_float32_on_the_cpu():
    packed = vitslim.pack(make())
    with pytest.raises(vitslim.VitslimError, match="for inference"):
        packed.train()
    assert packed.train(False) is packed and packed.eval() is packed
    for call in (packed.half, packed.double, packed.bfloat16, packed.cuda):
        with pytest.raises(vitslim.VitslimError, match="stays in float32 on the CPU"):
            call()
    with pytest.raises(vitslim.VitslimError, match="stays in float32 on the CPU"):
        packed.to("meta")
    assert packed.to("cpu") is packed and packed.to(torch.float32).float().cpu() is packed
    assert packed.to(memory_format=torch.channels_last) is packed


def test_there_is_no_gradient():
    model = make()
    packed, x = vitslim.pack(model), photographs(model)
    assert not packed(x).requires_grad
    with pytest.raises(vitslim.VitslimError, match="inference and has no gradient"):
        packed(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[0], r"images must be \[batch, 3, height, width\], got \[3, 32, 32\]"),
        (lambda x: x[:, :1], r"images must be \[batch, 3, height, width\], got \[2, 1, 32, 32\]"),
        (lambda x: x[..., :24], "takes images of 32 x 32, got 32 x 24"),
        (lambda x: x.half(), "take float32 images on the CPU, got torch.float16 on cpu"),
        (lambda x: x.double(), "got torch.float64 on cpu"),
        (lambda x: x.byte(), "got torch.uint8 on cpu"),
        (lambda x: x.to("meta"), "got torch.float32 on meta"),
    ],
)
def test_images_that_do_not_fit_are_refused(change, said):
    model = make()
    packed = vitslim.pack(model)
    for call in (packed, packed.forward_features):
        with pytest.raises(vitslim.VitslimError, match=said):
            call(change(photographs(model)))


class _Own(VisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x) * 2


class _OwnHead(VisionTransformer):
    def pool(self, x, pool_type=None):
        return x[:, 3]


def _hooked(place):
    model = make()
    module = model.get_submodule(place)
    module.register_forward_hook(lambda *args: None)
    return model


def _with(**changes):
    model = make()
    for name, module in changes.items():
        parent, _, child = name.replace("__", ".").rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: timm.create_model("resnet18"), "a ResNet cannot be packed"),
        (lambda: torch.nn.Linear(2, 2), "a Linear cannot be packed"),
        (lambda: vitslim.mask(make()), "slim it first, vitslim.pack"),
        (lambda: make().half(), r"cls_token is torch.float16; call model.float\(\) first"),
        (lambda: make().to("meta"), r"is on meta, .* call model.cpu\(\) first"),
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "HybridEmbed"),
        (lambda: make(qk_norm=True), "blocks.0 cannot be packed: its attention normalises q; use"),
        (lambda: make(scale_attn_norm=True), "its attention normalises the output"),
        (lambda: make(scale_mlp_norm=True), "its MLP normalises the hidden units"),
        (lambda: make(norm_layer=RmsNorm), "its norm is a RmsNorm, not a LayerNorm"),
        (lambda: make(mlp_layer=SwiGLU), "its MLP is a SwiGLU"),
        (lambda: make(act_layer="tanh"), "its activation is a Tanh, not one of gelu, gelu_tanh"),
        (lambda: make(embed_norm_layer="layernorm"), "its patch embedding is normed"),
        (lambda: make(dynamic_img_size=True, dynamic_img_pad=True), "dynamic_img_pad"),
        (lambda: timm.create_model("vit_small_patch16_18x2_224", depth=1), "ParallelThingsBlock"),
        (lambda: _Own(32, 8, embed_dim=24, depth=1, num_heads=3), "forward_features is not timm's"),
        (lambda: _OwnHead(32, 8, embed_dim=24, depth=1, num_heads=3), "its pool is not timm's"),
        (lambda: vitslim.pack(make()), "this model is packed already"),
        (lambda: _hooked(""), "it has forward hooks"),
        (lambda: _hooked("blocks.1.mlp.act"), "blocks.1.mlp.act cannot be packed: it has forward"),
        (lambda: _with(blocks__1__ls2=torch.nn.Dropout()), "its ls2 is a Dropout"),
        (lambda: _with(blocks__1__attn__qkv=torch.nn.Identity()), "its qkv is a Identity"),
        (lambda: _with(blocks__1__mlp__fc2=torch.nn.Linear(96, 25)), "does not map 24 channels"),
        (lambda: _with(blocks__1__mlp__fc1=torch.nn.Linear(24, 9)), "its layers do not fit"),
        (
            lambda: _with(patch_embed=PatchEmbed(32, 8, 3, 24, flatten=False, output_fmt="NLC")),
            "its patches come as NLC",
        ),
        (lambda: _with(norm=torch.nn.LayerNorm(12)), "not a LayerNorm of 24 channels"),
        (
            lambda: _with(patch_embed__proj=torch.nn.Conv2d(3, 24, 8, 8, padding=1)),
            "not those of a plain convolution",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_with_the_reason(build, said):
    model = build()
    with pytest.raises(vitslim.VitslimError, match=said):
        vitslim.pack(model)


def test_the_head_may_be_hooked():
    seen = []
    model = _hooked("head_drop")
    model.head_drop.register_forward_hook(lambda *args: seen.append(1))
    vitslim.pack(model)(photographs(model))
    assert seen == [1]


def test_a_forced_backend_is_obeyed():
    packed = vitslim.pack(make())
    reason = why_not("triton", "vit_encoder", "cpu", torch.float32)
    with use_backend("triton", "vit_encoder"), pytest.raises(vitslim.VitslimError) as raised:
        packed(torch.randn(1, 3, 32, 32))
    assert str(raised.value).endswith(str(reason))
    assert backend_of("vit_encoder", "cpu", torch.float32) in ("native", "reference")
