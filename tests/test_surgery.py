"""Surgery on real timm models: same outputs while masks are one, exact parity after the cut."""

import copy
import inspect
import random

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import vitslim
from vitslim.layers import MaskedAttention, MaskedBlock, SlimAttention, SlimBlock, TokenSelect
from vitslim.masks import mask_parameters
from vitslim.ops import LAYER_OPS, use_backend, why_not
from vitslim.plan import BlockPlan, Plan

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODELS = {
    "ViT": ("vit_tiny_patch16_224", {}),
    "DeiT": ("deit_tiny_patch16_224", {}),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", {}),
    "DeiT-III": ("deit3_small_patch16_224", {}),
    "registers": ("vit_medium_patch16_reg4_gap_256", {}),
    "average pool": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "pre-norm": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "wide image": ("vit_tiny_patch16_224", {"img_size": (32, 64)}),
}


def make(name="ViT", dtype=torch.float32, **kwargs):
    model, extra = MODELS[name]
    model = timm.create_model(model, **(SIZES | {"num_classes": 7} | extra | kwargs))
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def images(model, batch=2):
    weight = model.patch_embed.proj.weight
    shape = (batch, 3, *model.patch_embed.img_size)
    return torch.randn(shape, dtype=weight.dtype, device=weight.device)


def randomised(model, **kwargs):
    masked = vitslim.mask(model, **kwargs)
    for _, parameter in mask_parameters(masked):
        torch.nn.init.uniform_(parameter, 0.2, 1.5)
    return masked


def random_plan(model, seed):
    """Any subset of anything: heads of width 0 to d, tokens that never come back."""
    rng = random.Random(seed)
    alive = list(range(model.patch_embed.num_patches))
    blocks = []
    for block in model.blocks:
        heads, dim = block.attn.num_heads, block.attn.proj.in_features // block.attn.num_heads
        hidden = block.mlp.fc1.out_features
        alive = sorted(rng.sample(alive, rng.randint(1, len(alive))))
        widths = [rng.choice([0, dim, rng.randint(0, dim)]) for _ in range(heads)]
        kept = [sorted(rng.sample(range(dim), width)) for width in widths]
        units = sorted(rng.sample(range(hidden), rng.randint(0, hidden)))
        blocks.append(BlockPlan(kept, units, list(alive)))
    return Plan({"model": "", "args": {}}, {}, {}, 1, blocks)


@pytest.mark.parametrize("name", MODELS)
def test_masked_model_equals_timm_while_masks_are_one(name, monkeypatch):
    model = make(name)
    masked = vitslim.mask(model, token_start="one")
    x = images(model)
    expected = model(x)
    assert (masked(x) - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)
    # Folded and through the same SDPA, to the bit.
    monkeypatch.setattr("vitslim.layers.attention.fused", lambda *_: False)
    assert torch.equal(masked(x), expected)
    assert all(isinstance(block, MaskedBlock) for block in masked.blocks)
    assert not any(isinstance(block, MaskedBlock) for block in model.blocks)


def test_the_papers_gates_change_little():
    model = make()
    x = images(model)
    difference = (vitslim.mask(model)(x) - model(x)).abs().max()
    assert 0 < difference < 0.05


class Removed(torch.nn.Module):
    """A masked block in front of which rows truly leave the sequence."""

    def __init__(self, block, rows):
        super().__init__()
        self.block, self.rows = block, rows

    def forward(self, x):
        gate = self.block.tokens()[self.rows[1]]
        x = x[:, self.rows[0]]
        x = x + self.block.ls1(self.block.attn(self.block.norm1(x, gate)))
        return x + self.block.ls2(self.block.mlp(self.block.norm2(x, gate)))


def with_units_at_zero(masked, plan):
    """The masked model with dropped units at zero and dropped rows removed."""
    model = copy.deepcopy(masked)
    prefix, before = model.num_prefix_tokens, list(range(model.patch_embed.num_patches))
    for index, (block, keep) in enumerate(zip(model.blocks, plan.blocks, strict=True)):
        zero = torch.zeros_like(block.attn.mask)
        for head, dims in enumerate(keep.heads):
            zero[head, dims] = 1
        block.attn.mask.data.mul_(zero)
        hidden = torch.zeros_like(block.mlp.mask)
        hidden[keep.hidden] = 1
        block.mlp.mask.data.mul_(hidden)
        now = [*range(prefix), *(prefix + before.index(patch) for patch in keep.tokens)]
        original = [*range(prefix), *(prefix + patch for patch in keep.tokens)]
        model.blocks[index] = Removed(block, (now, original))
        before = keep.tokens
    return model


@pytest.mark.parametrize("backend", ["reference", None], ids=["op", "plain torch"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", MODELS)
def test_slim_equals_masked_to_1e_10(name, seed, backend):
    with vitslim.use_backend(backend, "ragged_attention"):
        check_parity(name, seed)


def check_parity(name, seed):
    masked = randomised(make(name, torch.float64))
    plan = random_plan(masked, seed)
    slim = vitslim.slim(masked, plan)
    x = images(masked)
    torch.testing.assert_close(slim(x), with_units_at_zero(masked, plan)(x), atol=1e-10, rtol=1e-10)
    assert not mask_parameters(slim)


class RemovedKeys(Removed):
    """The same where gates act on the keys."""

    def forward(self, x):
        x = x[:, self.rows[0]]
        bias = self.block.tokens.key_bias()[self.rows[1]].expand(x.shape[1], -1)
        x = x + self.block.ls1(self.block.attn(self.block.norm1(x), attn_mask=bias))
        return x + self.block.ls2(self.block.mlp(self.block.norm2(x)))


def closed(masked, plan):
    """The masked model with the gates of dropped tokens at zero, and nothing removed."""
    model = copy.deepcopy(masked)
    for block, keep in zip(model.blocks, plan.blocks, strict=True):
        gone = torch.ones_like(block.tokens.raw, dtype=torch.bool)
        gone[keep.tokens] = False
        block.tokens.raw.data[gone] = 0.0
    return model


CLASS_TOKEN = ["ViT", "DeiT", "DeiT distilled", "DeiT-III", "pre-norm", "wide image"]


@pytest.mark.parametrize("name", CLASS_TOKEN)
def test_the_limit_of_gates_on_keys_is_removal(name, monkeypatch):
    masked = randomised(make(name, torch.float64), token_gate="keys")
    plan = random_plan(masked, 3)
    for keep in plan.blocks:
        keep.heads[:] = [list(range(8)) for _ in keep.heads]
        keep.hidden[:] = range(96)
    monkeypatch.setitem(globals(), "Removed", RemovedKeys)
    removed, x = with_units_at_zero(masked, plan), images(masked)
    torch.testing.assert_close(closed(masked, plan)(x), removed(x), atol=1e-10, rtol=1e-10)
    assert not torch.allclose(masked(x), removed(x))


@pytest.mark.parametrize("name", CLASS_TOKEN)
def test_closed_gates_on_keys_lose_nothing_when_slim(name):
    masked = randomised(make(name, torch.float64), token_start="one", token_gate="keys")
    for block in masked.blocks:
        block.tokens.raw.data.fill_(3.0)  # what is kept is open
    plan = vitslim.threshold(masked, {"token": 1.0}, round_to=1)
    for block, keep in zip(plan.blocks, random_plan(masked, 3).blocks, strict=True):
        block.tokens[:] = keep.tokens
    slim, x = vitslim.slim(masked, plan), images(masked)
    torch.testing.assert_close(slim(x), closed(masked, plan)(x), atol=1e-10, rtol=1e-10)


def test_slimming_forgets_the_bias_of_kept_keys():
    masked = randomised(make(), token_gate="keys")
    slim = vitslim.slim(masked, vitslim.threshold(masked, {"token": 0.5}, round_to=1))
    assert all((block.tokens.gate == 1).all() for block in slim.blocks)
    assert slim(images(slim)).shape == (2, 7)


@pytest.mark.parametrize("start", ["one", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_gates_on_keys_start_where_the_dense_model_is(name, start):
    model = make(name)
    masked = vitslim.mask(model, token_start=start, token_gate="keys")
    x = images(model)
    error = (masked(x) - model(x)).abs().max() / model(x).abs().max().clamp(min=1)
    assert error <= (1e-6 if start == "one" else 1e-2)
    assert (error > 1e-7) == (start == "paper" and model.num_prefix_tokens > 0)
    assert type(masked.blocks[0].norm1) is type(model.blocks[0].norm1)


def test_gates_on_keys_survive_a_round_trip(tmp_path):
    masked = randomised(make("DeiT"), token_start="one", token_gate="keys")
    vitslim.save(masked, tmp_path)
    again, x = vitslim.load(tmp_path).eval(), images(masked)
    assert torch.equal(again(x), masked(x))
    assert again.mask_args == masked.mask_args
    assert again.blocks[0].tokens.place == "keys"
    assert vitslim.threshold(again, "macs=60%") == vitslim.threshold(masked, "macs=60%")


def test_gates_on_keys_train_compiled_and_in_bfloat16():
    masked = randomised(make("DeiT", depth=2), token_gate="keys").train()
    raws = [block.tokens.raw for block in masked.blocks]
    x = images(masked)
    torch.compiler.reset()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(masked(x).square().sum(), raws)
    for grad, wanted in zip(
        torch.autograd.grad(compiled(x).square().sum(), raws), expected, strict=True
    ):
        torch.testing.assert_close(grad, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        out = masked(x)
    for grad, wanted in zip(
        torch.autograd.grad(out.float().square().sum(), raws), expected, strict=True
    ):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


def test_without_folding_the_masks_are_forgotten():
    model = make(dtype=torch.float64)
    masked = randomised(model)
    plan = random_plan(masked, 1)
    x = images(model)
    expected = vitslim.slim(model, plan)(x)
    torch.testing.assert_close(vitslim.slim(masked, plan, fold=False)(x), expected)
    assert not torch.allclose(vitslim.slim(masked, plan)(x), expected)


def test_slimming_leaves_its_argument_alone():
    masked = randomised(make())
    before = copy.deepcopy(masked.state_dict())
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    for parameter in slim.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in masked.state_dict().items())


def test_tokens_really_leave_the_sequence():
    masked = randomised(make("DeiT distilled"))
    plan = vitslim.threshold(masked, {"token": 0.5}, round_to=1)
    slim = vitslim.slim(masked, plan)
    seen = []
    for block in slim.blocks:
        block.norm1.register_forward_hook(lambda *args: seen.append(args[2].shape[1]))
    slim(images(slim))
    assert seen == [2 + len(block.tokens) for block in plan.blocks]
    assert isinstance(slim.blocks[0].tokens, TokenSelect)


@pytest.mark.parametrize("stage", ["masked", "slim"])
@pytest.mark.parametrize("name", ["DeiT", "DeiT distilled", "registers", "average pool"])
def test_the_methods_of_timm_keep_working(name, stage):
    model = make(name)
    new = randomised(model)
    if stage == "slim":
        new = vitslim.slim(new, vitslim.threshold(new, {"attention": 0.6, "token": 0.6}))
    x = images(model)
    features = new.forward_features(x)
    assert features.shape[0] == 2 and features.shape[2] == 24
    torch.testing.assert_close(new.forward_head(features), new(x))
    expected = model.forward_intermediates(x, indices=[0, 2])
    final, maps = new.forward_intermediates(x, indices=[0, 2])
    assert [each.shape for each in maps] == [each.shape for each in expected[1]]
    torch.testing.assert_close(final, features)
    pairs = new.forward_intermediates(x, 2, return_prefix_tokens=True, intermediates_only=True)
    assert pairs[0][1].shape == (2, model.num_prefix_tokens, 24)
    assert new.forward_intermediates(x, output_fmt="NLC")[1][-1].shape == (2, 16, 24)
    if "output_dict" in inspect.signature(type(model).forward_intermediates).parameters:
        assert new.forward_intermediates(x, output_dict=True)["image_intermediates"][0].dim() == 4
    assert len(new.get_intermediate_layers(x, 2)) == 2
    new.train()
    plain = new(x)
    plain = plain[0] if isinstance(plain, tuple) else plain
    new.set_grad_checkpointing()
    again = new(x)
    again = again[0] if isinstance(again, tuple) else again
    torch.testing.assert_close(again, plain)
    again.sum().backward()
    assert new.blocks[0].attn.qkv.weight.grad is not None
    classifier = new.get_classifier()
    assert (classifier[0] if isinstance(classifier, tuple) else classifier).out_features == 7
    new.reset_classifier(3)
    assert new.eval()(x).shape == (2, 3)


def test_dropped_patches_are_zeros_in_intermediates():
    masked = randomised(make())
    plan = vitslim.threshold(masked, {"token": 0.5}, round_to=1)
    slim = vitslim.slim(masked, plan)
    maps = slim.forward_intermediates(images(slim), intermediates_only=True)
    for features, block in zip(maps, plan.blocks, strict=True):
        alive = features.flatten(2).abs().sum((0, 1)).nonzero().flatten().tolist()
        assert alive == block.tokens


def test_masks_have_no_weight_decay():
    masked = vitslim.mask(make())
    names = {name for name, _ in mask_parameters(masked)}
    assert names <= masked.no_weight_decay()
    assert {"pos_embed", "cls_token"} <= masked.no_weight_decay()
    optimizer = create_optimizer_v2(masked, "adamw", lr=1e-3, weight_decay=0.05)
    masks = {id(parameter) for _, parameter in mask_parameters(masked)}
    for group in optimizer.param_groups:
        if group["weight_decay"] > 0:
            assert not masks & {id(parameter) for parameter in group["params"]}
    assert len(names) == 9
    assert (
        "blocks.0.attn.mask"
        not in vitslim.slim(masked, vitslim.threshold(masked, "macs=80%")).no_weight_decay()
    )


def test_penalty_is_the_weighted_l1_norm():
    masked = randomised(make("DeiT"))
    parts = {"attn.mask": 0.0, "mlp.mask": 0.0, "raw": 0.0}
    for name, parameter in mask_parameters(masked):
        suffix = next(each for each in parts if name.endswith(each))
        values = parameter.tanh() if suffix == "raw" else parameter
        parts[suffix] += values.abs().sum().item()
    expected = 2e-4 * parts["attn.mask"] + 5e-5 * parts["mlp.mask"] + 1e-4 * parts["raw"]
    penalty = vitslim.sparsity_loss(masked)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty.item(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert vitslim.sparsity_loss(masked) == penalty
    with pytest.raises(vitslim.VitslimError, match="no masks to penalise"):
        vitslim.sparsity_loss(make())


def test_skip_leaves_parts_alone():
    model = make()
    masked = vitslim.mask(model, skip=["blocks.0", "blocks.*.mlp", "blocks.2.attn"])
    assert type(masked.blocks[0]) is type(model.blocks[0])
    names = [name for name, _ in mask_parameters(masked)]
    assert names == ["blocks.1.attn.mask", "blocks.1.tokens.raw", "blocks.2.tokens.raw"]
    plan = vitslim.threshold(masked, {"attention": 0.5, "token": 0.5}, round_to=1)
    assert plan.blocks[0] == BlockPlan(None, None, None)
    slim = vitslim.slim(masked, plan)
    assert isinstance(slim.blocks[1].attn, SlimAttention)
    assert isinstance(slim.blocks[2], SlimBlock)
    assert slim(images(slim)).shape == (2, 7)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: timm.create_model("resnet18"), "a ResNet cannot be slimmed"),
        (
            lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1),
            "makes its tokens with a HybridEmbed",
        ),
        (lambda: make(qk_norm=True), r"blocks.0 has no attention mask .* normalises q"),
        (
            lambda: timm.create_model("vit_small_patch16_18x2_224", depth=1),
            r"blocks.0 .* it is a ParallelThingsBlock",
        ),
        (lambda: make(dynamic_img_size=True), "dynamic_img_size"),
        (lambda: make(patch_drop_rate=0.1), "patch_drop_rate"),
    ],
)
def test_what_cannot_be_slimmed_is_refused_by_name(build, said):
    with pytest.raises(vitslim.VitslimError, match=said):
        vitslim.mask(build())


def test_qk_norm_can_be_left_alone():
    masked = randomised(make(qk_norm=True), skip=["blocks.*.attn"])
    assert not any(isinstance(block.attn, MaskedAttention) for block in masked.blocks)
    slim = vitslim.slim(masked, vitslim.threshold(masked, {"mlp": 0.5, "token": 0.5}))
    assert slim(images(slim)).shape == (2, 7)


def test_any_image_size_without_token_masks():
    model = make(dynamic_img_size=True)
    masked = randomised(model, kinds=("attention", "mlp"))
    slim = vitslim.slim(masked, vitslim.threshold(masked, "params=60%"))
    assert slim(torch.randn(1, 3, 64, 48)).shape == (1, 7)


def test_plans_of_other_models_are_refused():
    masked = randomised(make())
    plan = vitslim.threshold(masked, "macs=60%")
    with pytest.raises(vitslim.VitslimError, match="the plan has 3 blocks, the model 2"):
        vitslim.slim(make(depth=2), plan)
    with pytest.raises(vitslim.VitslimError, match=r"heads in blocks\.0, the model has 2"):
        vitslim.slim(make(num_heads=2), plan)
    with pytest.raises(vitslim.VitslimError, match="whose img_size is "):
        vitslim.slim(make(img_size=64), plan)
    with pytest.raises(vitslim.VitslimError, match="slim already"):
        vitslim.slim(vitslim.slim(masked, plan), plan)
    with pytest.raises(vitslim.VitslimError, match="no kind of mask is called 'heads'"):
        vitslim.mask(make(), kinds=("heads",))
    with pytest.raises(vitslim.VitslimError, match="no token gate is called 'values'"):
        vitslim.mask(make(), token_gate="values")


@pytest.mark.parametrize("backend", [None, "reference", "triton"])
@pytest.mark.parametrize("stage", ["masked", "slim"])
def test_compiles_without_a_graph_break(stage, backend, device):
    reasons = [why_not(backend, op, device, torch.float32) for op in LAYER_OPS] if backend else []
    if any(reasons):
        pytest.skip(next(filter(None, reasons)))
    model = randomised(make("DeiT", depth=2)).to(device)
    if stage == "slim":
        model = vitslim.slim(model, vitslim.threshold(model, "macs=60%"))
    x = images(model)
    torch.compiler.reset()
    with use_backend(backend):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        parameters = [p for p in model.parameters() if p.requires_grad]
        out, expected = compiled(x), model(x)
        grads = torch.autograd.grad(out.square().sum(), parameters)
        expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    torch.testing.assert_close(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_deepcopy_and_state_dict_round_trip():
    masked = randomised(make())
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    x = images(slim)
    twin = copy.deepcopy(slim)
    twin.load_state_dict(slim.state_dict())
    assert torch.equal(twin(x), slim(x))
    assert twin.forward_intermediates.__self__ is twin
