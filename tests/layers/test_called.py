"""Parts are called as the modules they are: what is done to one counts as in timm's model."""

import copy

import pytest
import timm
import torch
from test_surgery import images, make, randomised
from torch import nn
from torch.nn.utils import parametrizations, prune

import vitslim
from vitslim.layers import MaskedAttention, MaskedMlp, SlimAttention, SlimMlp
from vitslim.layers.plain import is_plain
from vitslim.masks import mask_parameters
from vitslim.ops import use_backend

PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
KINDS = ("attention", "mlp")


def stages(**given):
    dense = make("DeiT", **given)
    masked = randomised(dense, kinds=KINDS)
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%", round_to=1))
    return {"dense": dense, "masked": masked, "slim": slim}


class Lora(nn.Module):
    """As adapter libraries do it: `weight` and `bias` are those of the layer inside."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        layer = copy.deepcopy(self.base)
        layer.weight.data += self.up.weight @ self.down.weight
        return layer


class Int8(nn.Module):
    """A stand-in for any library's quantised Linear: it can be called, and has no weight."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("numbers", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", None if layer.bias is None else layer.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.numbers.float() * self.scale, self.offset)


def replaced(model, part, make_one):
    model = copy.deepcopy(model)
    for block in model.blocks:
        parent, leaf = part.split(".")
        layer = getattr(getattr(block, parent), leaf)
        setattr(getattr(block, parent), leaf, make_one(layer))
    return model


def folded(layer):
    """What an Int8 layer computes, as a plain one."""
    other, int8 = copy.deepcopy(layer), Int8(layer)
    other.weight.data = int8.numbers.float() * int8.scale
    return other


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stage", ["dense", "masked", "slim"])
def test_an_adapter_counts(stage, part):
    model = stages()[stage]
    adapted = replaced(model, part, Lora)
    merged = copy.deepcopy(adapted)
    for block in merged.blocks:
        parent, leaf = part.split(".")
        setattr(getattr(block, parent), leaf, getattr(getattr(block, parent), leaf).merged())
    x = images(model)
    torch.testing.assert_close(adapted(x), merged(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted(x), model(x), atol=1e-3)
    adapted(x).square().sum().backward()
    for block in adapted.blocks:
        parent, leaf = part.split(".")
        assert getattr(getattr(block, parent), leaf).up.weight.grad.abs().max() > 0


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stage", ["dense", "masked", "slim"])
@torch.no_grad()
def test_an_int8_layer_without_a_weight_is_called(stage, part):
    model = stages()[stage]
    x = images(model)
    quantised, plain = replaced(model, part, Int8), replaced(model, part, folded)
    torch.testing.assert_close(quantised(x), plain(x))
    # The other way too: heads padded, for SDPA.
    mask = torch.zeros(1, 1, 1, 1)
    want = plain.forward_features(x, attn_mask=mask)
    torch.testing.assert_close(quantised.forward_features(x, attn_mask=mask), want)


@pytest.mark.parametrize("stage", ["masked", "slim"])
@torch.no_grad()
def test_torchs_dynamic_quantization_errs_as_on_the_dense_model(stage):
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    models = stages()
    x = images(models["dense"])

    def error(model):
        out = quantize(model, {nn.Linear}, dtype=torch.qint8)(x)
        return float((out - model(x)).norm() / model(x).norm())

    assert 0 < error(models[stage]) < 3 * error(models["dense"])


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def normed(layer):
    return parametrizations.weight_norm(layer)


@pytest.mark.parametrize("change", [pruned, normed])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stage", ["masked", "slim"])
def test_pruned_and_parametrized_layers_are_called(stage, part, change):
    model = replaced(stages()[stage], part, change)
    x = images(model)
    for block in model.blocks:
        parent, leaf = part.split(".")
        layer = getattr(getattr(block, parent), leaf)
        assert not is_plain(layer)
        # What is trained is what the user put there.
        name = "weight_orig" if change is pruned else "parametrizations.weight.original1"
        layer.get_parameter(name).data.mul_(0.5)
    before = model(x)
    for block in model.blocks:
        parent, leaf = part.split(".")
        layer = getattr(getattr(block, parent), leaf)
        if change is pruned:
            prune.remove(layer, "weight")
        else:
            nn.utils.parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [pruned, normed, Lora])
@pytest.mark.parametrize("part", PARTS)
def test_such_a_dense_model_can_be_masked_but_not_cut(part, change):
    model = replaced(make("DeiT"), part, change)
    x = images(model)
    masked = vitslim.mask(model, kinds=KINDS)
    torch.testing.assert_close(masked(x), model(x), rtol=1e-4, atol=1e-5)
    for _, parameter in mask_parameters(masked):
        nn.init.uniform_(parameter, 0.2, 1)
    plan = vitslim.threshold(masked, "macs=60%")
    leaf = part.partition(".")[2]
    for each in (model, masked):
        with pytest.raises(vitslim.VitslimError, match=rf"the plan cuts .* blocks\.0.*its {leaf}"):
            vitslim.slim(each, plan)
    with pytest.raises(vitslim.VitslimError, match="a config cannot describe"):
        vitslim.save(masked, "nowhere")


def test_a_pruned_norm_carries_no_gates():
    model = make("DeiT")
    prune.l1_unstructured(model.blocks[1].norm1, "weight", 0.5)
    with pytest.raises(vitslim.VitslimError, match=r"blocks\.1 has no token mask .* is pruned"):
        vitslim.mask(model)
    masked = vitslim.mask(model, skip=["blocks.1.tokens"], token_start="one")
    x = images(model)
    torch.testing.assert_close(masked(x), model(x))


@pytest.mark.parametrize("stage", ["masked", "slim"])
@torch.no_grad()
def test_hooks_on_any_linear_fire_and_may_change_its_output(stage):
    models = stages()
    model, x = models[stage], images(models["dense"])
    seen = set()
    for name, each in model.named_modules():
        if isinstance(each, nn.Linear):
            each.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(x)
    assert seen == {n for n, each in model.named_modules() if isinstance(each, nn.Linear)}
    before = model(x)
    for part in PARTS:
        handle = model.blocks[1].get_submodule(part).register_forward_hook(lambda *a: a[2] * 1.5)
        assert not torch.allclose(model(x), before, atol=1e-4), part
        handle.remove()
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_a_fused_op_gives_way_to_what_watches_its_parts():
    mlp = SlimMlp(8, 6).eval()
    x, seen = torch.randn(2, 5, 8), []
    for name in ("fc1", "act", "drop1", "fc2"):
        with use_backend("reference", "masked_mlp"):
            want = mlp(x)
            handle = mlp.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
            torch.testing.assert_close(mlp(x), want)
            handle.remove()
            assert seen == [1], name
            seen.clear()


@torch.no_grad()
def test_hooks_of_all_modules_see_every_linear():
    slim = stages()["slim"]
    seen = []
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, *_: seen.append(type(module)))
    with use_backend("reference", "masked_mlp"):
        slim(images(slim))
    handle.remove()
    assert seen.count(nn.Linear) == sum(type(m) is nn.Linear for m in slim.modules())


@pytest.mark.parametrize("stage", ["masked", "slim"])
@pytest.mark.parametrize("how", ["fused_attn", "hook", "pre-hook", "module"])
@torch.no_grad()
def test_attention_maps_are_made_for_whoever_looks_at_them(stage, how):
    models = stages()
    x, maps = images(models["dense"]), {}
    model = models[stage]
    want = model(x)
    for index, block in enumerate(model.blocks):
        drop = block.attn.attn_drop
        if how == "fused_attn":
            block.attn.fused_attn = False
        elif how == "hook":
            drop.register_forward_hook(lambda m, i, out, index=index: maps.update({index: out}))
        elif how == "pre-hook":
            drop.register_forward_pre_hook(lambda m, i, index=index: maps.update({index: i[0]}))
        else:
            block.attn.attn_drop = nn.Identity()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    if "hook" in how:
        assert [each.shape for each in maps.values()] == [(2, 3, 17, 17)] * 3
        for each in maps.values():
            torch.testing.assert_close(each.sum(-1), torch.ones(2, 3, 17))


@torch.no_grad()
def test_attention_maps_are_those_of_the_dense_model_while_masks_are_one():
    dense = make("DeiT")
    models = {"dense": dense, "masked": vitslim.mask(dense, kinds=KINDS)}
    whole = [list(range(8)) for _ in range(3)]
    masks = vitslim.Masks.of(models["masked"])
    plan = vitslim.threshold(dense, "macs=100%", masks=masks, round_to=1)
    assert plan.blocks[0].heads == whole
    models["slim"] = vitslim.slim(dense, plan)
    x, found = images(dense), {}
    for name, model in models.items():
        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(
                lambda m, i, out, name=name: found.setdefault(name, []).append(out)
            )
        model(x)
    for name in ("masked", "slim"):
        for mine, timms in zip(found[name], found["dense"], strict=True):
            torch.testing.assert_close(mine, timms)


@pytest.mark.parametrize("method", ["fx", "hook"])
@pytest.mark.parametrize("stage", ["masked", "slim"])
@torch.no_grad()
def test_timms_extractor_of_attention_maps_works(stage, method):
    from timm.utils import AttentionExtract

    model = stages()[stage]
    for block in model.blocks:
        block.attn.fused_attn = False
    found = AttentionExtract(copy.deepcopy(model), method=method)(images(model))
    assert len(found) == 3
    for each in found.values():
        torch.testing.assert_close(each.sum(-1), torch.ones(2, 3, 17))


@pytest.mark.parametrize("budget", ["macs=60%", "macs=60%,token=0.6"])
@pytest.mark.parametrize("stage", ["masked", "slim"])
@torch.no_grad()
def test_torch_fx_traces_as_on_timms_model(stage, budget):
    extract = pytest.importorskip("torchvision.models.feature_extraction")
    kinds = (*KINDS, "token") if "token" in budget else KINDS
    model = randomised(make("DeiT"), kinds=kinds)
    if stage == "slim":
        model = vitslim.slim(model, vitslim.threshold(model, budget))
    x, seen = images(model), {}
    names = {"blocks.0": "a", "blocks.1.mlp.fc2": "b", "blocks.2.attn.proj": "c", "norm": "d"}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, i, out, name=name: seen.update({name: out})
        )
        for name in names
    ]
    model(x)
    for handle in handles:
        handle.remove()
    for make_net in (
        lambda: extract.create_feature_extractor(model, names, suppress_diff_warning=True),
        lambda: timm.models.create_feature_extractor(model, names),
    ):
        found = make_net().eval()(x)
        for name, key in names.items():
            torch.testing.assert_close(found[key], seen[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["masked", "slim"])
def test_checkpointing_keeps_gradients_of_what_was_put_in(stage):
    model = replaced(stages()[stage], "mlp.fc2", Lora).train()
    x = images(model)
    wanted = [each for each in model.parameters() if each.requires_grad]
    plain = torch.autograd.grad(model(x).square().sum(), wanted)
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x).square().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("stage", ["masked", "slim"])
def test_functional_call_takes_other_weights(stage):
    model = stages()[stage]
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    x = images(model)
    out = torch.func.functional_call(model, dict(other.named_parameters()), x)
    torch.testing.assert_close(out, other(x))


@pytest.mark.parametrize("stage", ["masked", "slim"])
def test_torch_func_differentiates_for_each_image(stage):
    model = stages()[stage]
    weights, x = dict(model.named_parameters()), images(model)

    def loss(weights, image):
        return torch.func.functional_call(model, weights, image[None]).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    total = torch.autograd.grad(model(x).square().sum(), list(weights.values()))
    for each, want in zip(per_image.values(), total, strict=True):
        torch.testing.assert_close(each.sum(0), want, rtol=1e-4, atol=1e-4)


def test_a_part_whose_forward_was_replaced_is_refused():
    masked = stages()["masked"]
    plan = vitslim.threshold(masked, "macs=60%")
    for part in ("blocks.0", "blocks.0.attn", "blocks.0.mlp"):
        dense = make("DeiT")
        dense.get_submodule(part).forward = lambda x: x
        for call in (vitslim.mask, lambda model: vitslim.slim(model, plan)):
            with pytest.raises(vitslim.VitslimError, match="has a forward of its own"):
                call(dense)


@pytest.mark.parametrize("stage", ["masked", "slim"])
def test_models_with_adapters_compile_in_one_graph(stage):
    model = replaced(stages(depth=2)[stage], "mlp.fc2", Lora)
    x = images(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_layers_built_on_meta_fill_their_own_buffers():
    dims = [4, 0, 2]
    made = SlimAttention(12, dims, 0.5)
    ghost = SlimAttention(12, dims, 0.5, device="meta").to_empty(device="cpu")
    ghost.init_non_persistent_buffers()
    assert torch.equal(ghost.rows, made.rows) and torch.equal(ghost.columns, made.columns)
    for layer in (MaskedAttention, MaskedMlp, SlimMlp):
        assert all(each.is_meta for each in layer(12, 4, device="meta").parameters())
