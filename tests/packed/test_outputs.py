"""The packed model computes what timm's does, whatever it is made of and whoever calls it."""

import inspect
import threading

import pytest
import timm
import torch
from pack_cases import KINDS, assert_same, dense, photographs, slimmed
from test_surgery import make, randomised
from timm.layers import Attention

import vitslim
from vitslim.ops import use_backend, vit_encoder
from vitslim.packed import model as packed_model
from vitslim.plan import BlockPlan, Plan


@pytest.mark.parametrize("stage", ["dense", "slim"])
@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_the_models(name, stage):
    if stage == "slim" and "patch dropout" in name:
        pytest.skip("patches are dropped by the masks or by timm, not by both")
    model = dense(name) if stage == "dense" else slimmed(name)
    packed, x = vitslim.pack(model), photographs(model)
    assert_same(packed, model, x)
    features = packed.forward_features(x)
    torch.testing.assert_close(packed.forward_head(features), packed(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(packed.forward_head(features, pre_logits=True), pre_logits)


def test_the_reference_packs_too():
    with use_backend("reference"):
        test_outputs_are_the_models("DeiT distilled", "slim")


def test_only_what_the_head_reads_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(
        packed_model, "vit_encoder", lambda *a: asked.append(a[5]) or vit_encoder(*a)
    )
    for name in ("ViT", "DeiT distilled", "average pool", "max", "pre-norm"):
        model = dense(name)
        vitslim.pack(model)(photographs(model))
    assert asked == [1, 2, 17, 17, 1]


@pytest.mark.parametrize("name", ["ViT", "DeiT distilled", "no class token", "DeiT-III"])
def test_images_of_any_size(name):
    model = make(name, dynamic_img_size=True)
    packed = vitslim.pack(model)
    for size in ((32, 32), (64, 48), (8, 24), (64, 48)):
        assert_same(packed, model, torch.randn(2, 3, *size))
    with pytest.raises(vitslim.VitslimError, match="30 x 32 cannot be cut into patches of 8 x 8"):
        packed(torch.randn(1, 3, 30, 32))
    with torch.no_grad():
        model.pos_embed.add_(torch.randn(24))
    assert_same(packed, model, torch.randn(2, 3, 64, 48))
    skeleton = vitslim.pack(model, keep_source=False)
    assert_same(skeleton, model, torch.randn(2, 3, 32, 32))
    with pytest.raises(vitslim.VitslimError, match="images of 64 x 48 need them"):
        skeleton(torch.randn(2, 3, 64, 48))


def test_parameters_of_any_strides():
    model = make("DeiT-III").to(memory_format=torch.channels_last)
    mlp = model.blocks[1].mlp
    mlp.fc1.weight = torch.nn.Parameter(mlp.fc1.weight.detach().t().contiguous().t())
    model.norm.weight = torch.nn.Parameter(torch.rand(24, 2)[:, 0])
    assert_same(vitslim.pack(model), model, photographs(model))


def test_a_mixture_of_blocks():
    masked = randomised(make(), skip=["blocks.0", "blocks.1.attn"])
    slim = vitslim.slim(masked, vitslim.threshold(masked, {"attention": 0.5, "token": 0.6}))
    kinds = {type(block).__name__ for block in slim.blocks}
    assert kinds == {"Block", "SlimBlock"}
    assert_same(vitslim.pack(slim), slim, photographs(slim))


def test_heads_of_no_width_and_a_block_without_units():
    model = make()
    whole = list(range(24))
    nothing = BlockPlan([[], [], []], [], None)
    plan = [BlockPlan([[0, 3], [], [1]], whole, None), nothing, BlockPlan(None, None, [2, 5])]
    slim = vitslim.slim(model, Plan({"model": "", "args": {}}, {}, {}, 1, plan))
    assert_same(vitslim.pack(slim), slim, photographs(slim))


def test_heads_wider_than_the_model_divides():
    if "attn_head_dim" not in inspect.signature(Attention.__init__).parameters:
        pytest.skip(f"timm {timm.__version__} has no attn_head_dim")
    model = make()
    for block in model.blocks:
        block.attn = Attention(24, 3, attn_head_dim=13, qkv_bias=True).eval()
    assert_same(vitslim.pack(model), model, photographs(model))


def test_a_real_model():
    model = timm.create_model("deit_tiny_patch16_224").eval()
    packed = vitslim.pack(model)
    assert_same(packed, model, torch.randn(2, 3, 224, 224))
    assert (
        packed.panels.numel()
        == sum(block.numel() for name, block in model.named_parameters() if block.dim() in (2, 4))
        - model.head.weight.numel()
    )


def test_bfloat16_weights_halve_the_memory_and_cost_little():
    model = slimmed("DeiT", embed_dim=48)
    x = photographs(model)
    packed = vitslim.pack(model)
    half = vitslim.pack(model, weights=torch.bfloat16)
    products = vitslim.pack(model, weights=torch.bfloat16, products=torch.bfloat16)
    assert half.panels.nbytes <= 0.6 * packed.panels.nbytes
    exact = model(x).detach()
    for each, bound in ((half, 0.02), (products, 0.04)):
        error = (each(x) - exact).abs().max() / exact.abs().max()
        assert 1e-5 < error < bound


def test_images_of_any_strides_and_none_at_all():
    model = make()
    packed, x = vitslim.pack(model), photographs(model)
    assert_same(packed, model, x.to(memory_format=torch.channels_last))
    assert_same(packed, model, x.transpose(2, 3))
    assert_same(packed, model, x[:1].expand(3, -1, -1, -1))
    assert packed(x[:0]).shape == (0, 7)


def test_under_inference_mode_and_autocast():
    with torch.inference_mode():
        model = make()
        packed, x = vitslim.pack(model), photographs(model)
        inside = packed(x)
    assert torch.equal(packed(x), inside)
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = packed.forward_features(x), packed(x)
    assert features.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert (logits - inside).abs().max() <= 0.02 * inside.abs().max()


def test_threads_do_not_disturb_each_other():
    models = [slimmed("DeiT", 1), slimmed("registers", 2)]
    packs = [vitslim.pack(model) for model in models]
    inputs = [photographs(model, batch) for batch, model in zip((3, 5), models, strict=True)]
    expected = [packed(x) for packed, x in zip(packs, inputs, strict=True)]
    wrong = []

    def work(index):
        for turn in range(40):
            which = (index + turn) % 2
            if not torch.equal(packs[which](inputs[which]), expected[which]):
                wrong.append((index, turn))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_that_find_a_change_pack_once():
    model = make()
    packed, x = vitslim.pack(model), photographs(model)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
        expected = model(x)
    outs = []
    threads = [threading.Thread(target=lambda: outs.append(packed(x))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 6
    for out in outs:
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_any_number_of_threads_gives_the_same():
    model = slimmed("DeiT")
    packed, x = vitslim.pack(model), photographs(model, 3)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(packed(x))
    finally:
        torch.set_num_threads(threads)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-5)
