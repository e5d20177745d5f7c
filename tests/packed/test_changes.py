"""After any change, made through the source or through the packed model, both say the same."""

import copy
import functools
from types import MethodType

import pytest
import timm
import torch
from pack_cases import slimmed
from test_surgery import make
from timm.layers import DropPath, LayerNorm, RmsNorm
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune

import vitslim


class Lora(nn.Module):
    """Low-rank weights beside a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Shifted(VisionTransformer):
    def pool(self, x, pool_type=None):
        return x[:, 3]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def put(path, module):
    """Returns a change that puts `module(what was there)` in place of a part."""

    def change(model):
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent) if parent else model
        setattr(parent, name, module(getattr(parent, name)))

    return change


def new_head():
    return nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def int8(layer):
    return quantize_dynamic(nn.Sequential(layer), {nn.Linear})[0]


def cut_by_hand(model):
    """As quick scripts prune: the weights are cut, `out_features` is forgotten."""
    mlp = model.blocks[2].mlp
    units = mlp.fc1.weight.shape[0] // 2 + 1
    mlp.fc1.weight = nn.Parameter(mlp.fc1.weight[:units])
    mlp.fc1.bias = nn.Parameter(mlp.fc1.bias[:units])
    mlp.fc2.weight = nn.Parameter(mlp.fc2.weight[:, :units])


def scaled_slowly(model):
    model.blocks[1].attn.fused_attn = False
    model.blocks[1].attn.scale = 0.9


def swap_parts(model):
    first, second = model.blocks[1], model.blocks[2]
    first.mlp, second.mlp = second.mlp, first.mlp


def hook_that_counts(model):
    def count(module, args, out):
        module.calls = getattr(module, "calls", 0) + 1

    model.head.register_forward_hook(count)


# What the next call does as well; without the source too.
OF_THE_HEAD = {
    "a linear head": put("head", lambda _: nn.Linear(24, 4)),
    "a head of several layers": put("head", lambda _: new_head()),
    "no head": put("head", lambda _: nn.Identity()),
    "LoRA on the head": put("head", Lora),
    "an int8 head": put("head", int8),
    "a norm before the head": put("fc_norm", lambda _: LayerNorm(24, eps=0.1)),
    "dropout before the head": put("head_drop", lambda _: nn.Dropout(0.9)),
    "a layer in place of that dropout": put("head_drop", lambda _: nn.Linear(24, 24)),
    "the head's bias": lambda model: setattr(model.head, "bias", parameter(7)),
    "no bias": lambda model: setattr(model.head, "bias", None),
    "the head in place": lambda model: model.head.weight.mul_(2),
    "the head's data": lambda model: setattr(model.head.weight, "data", torch.randn(7, 24)),
    "the head pruned": lambda model: prune.l1_unstructured(model.head, "weight", 0.5),
    "the head parametrized": lambda model: parametrizations.weight_norm(model.head),
    "the head initialised": lambda model: model.head.reset_parameters(),
    "a hook on the head": lambda model: model.head.register_forward_hook(lambda m, a, y: 2 * y),
    "a hook before": lambda model: model.fc_norm.register_forward_pre_hook(
        lambda m, args: (args[0] + 1,)
    ),
    "a hook on the dropout": lambda model: model.head_drop.register_forward_hook(
        lambda m, args, y: y - 1
    ),
    "a hook that leaves a number": hook_that_counts,
    "the head frozen": lambda model: model.head.requires_grad_(False),
    "another pool": lambda model: setattr(model, "global_pool", "avg"),
    "the number of classes": lambda model: setattr(model, "num_classes", 5),
    "another forward of the head": lambda model: setattr(model.head, "forward", lambda x: 2 * x),
    "the head's own other forward": lambda model: setattr(
        model.head, "forward", MethodType(lambda self, x: 3 * x @ self.weight.T, model.head)
    ),
    "spectral norm": lambda model: nn.utils.spectral_norm(model.head),
    "a note": lambda model: setattr(model, "note", ["kept"]),
    "a tensor kept": lambda model: setattr(model, "kept", 2 * model.head.weight),
    "checkpointing": lambda model: model.set_grad_checkpointing(),
}

# The same, of a model that pools by attention.
OF_A_POOL = {
    "its norm's eps": lambda model: setattr(model.attn_pool.norm, "eps", 1.0),
    "its latent": lambda model: model.attn_pool.latent.mul_(3),
    "a hook in it": lambda model: model.attn_pool.mlp.register_forward_hook(lambda m, a, y: 3 * y),
    "a layer of it": put("attn_pool.mlp.fc1", Lora),
    "average pooling": lambda model: model.reset_classifier(0, "avg"),
}

# What the next call does as well; without the source it says that it cannot.
OF_THE_ENCODER = {
    "norm.eps": lambda model: setattr(model.norm, "eps", 0.5),
    "a block's eps": lambda model: setattr(model.blocks[1].norm2, "eps", 0.5),
    "the activation": put("blocks.0.mlp.act", lambda _: nn.SiLU()),
    "the activation's setting": lambda model: setattr(
        model.blocks[0].mlp.act, "approximate", "tanh"
    ),
    "the scale": lambda model: setattr(model.blocks[1].attn, "scale", 0.9),
    "the scale, not fused": scaled_slowly,
    "a new norm": put("norm", lambda _: LayerNorm(24, eps=0.1)),
    "no norm": put("norm", lambda _: nn.Identity()),
    "a norm's weight": lambda model: setattr(model.blocks[0].norm1, "weight", parameter(24)),
    "a bias": lambda model: setattr(model.blocks[1].mlp.fc2, "bias", parameter(24)),
    "a bias less": lambda model: setattr(model.blocks[1].mlp.fc2, "bias", None),
    "units cut by hand": cut_by_hand,
    "drop path": put("blocks.0.drop_path1", lambda _: DropPath(0.5)),
    "a class token": lambda model: setattr(model, "cls_token", parameter(1, 1, 24)),
    "positions in place": lambda model: model.pos_embed.mul_(2),
    "no positions": lambda model: setattr(model, "pos_embed", None),
    "a block less": lambda model: model.blocks.pop(2),
    "parts swapped": swap_parts,
    "a weight in place": lambda model: model.blocks[1].attn.qkv.weight.mul_(2),
    "a weight's data": lambda model: setattr(
        model.blocks[1].attn.proj.weight, "data", model.blocks[1].attn.proj.weight.data * 2
    ),
    "patches": lambda model: model.patch_embed.proj.weight.mul_(2),
    "timm's initialisation": lambda model: model.init_weights(),
}

# What neither can do: a part of the sentence, or None where it need only be one.
REFUSED = {
    "a hook on a block": (
        lambda model: model.blocks[1].register_forward_hook(lambda m, a, y: 2 * y),
        "blocks.1 cannot be packed: it has forward hooks",
    ),
    "a hook before a layer": (
        lambda model: model.blocks[0].attn.qkv.register_forward_pre_hook(lambda m, args: None),
        "blocks.0.attn.qkv cannot be packed: it has forward hooks",
    ),
    "a hook on the norm": (
        lambda model: model.norm.register_forward_hook(lambda m, a, y: 2 * y),
        "norm cannot be packed: it has forward hooks",
    ),
    "another forward": (
        lambda model: setattr(model.blocks[1].attn, "forward", lambda x, **_: 2 * x),
        "blocks.1.attn cannot be packed: its forward was replaced",
    ),
    "LoRA on qkv": (put("blocks.1.attn.qkv", Lora), "its qkv is a Lora, not a Linear"),
    "LoRA on fc1": (put("blocks.1.mlp.fc1", Lora), "its fc1 is a Lora, not a Linear"),
    "int8 layers": (
        put("blocks.2.mlp.fc2", int8),
        r"its fc2 is a torch\.ao\.nn\S*\.Linear, not a Linear",
    ),
    "pruned": (
        lambda model: prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5),
        r"blocks.0.mlp.fc1 cannot be packed: torch.nn.utils computes its weight .*prune.remove",
    ),
    "a parametrized layer": (
        lambda model: parametrizations.weight_norm(model.blocks[0].attn.proj),
        "its proj is a ParametrizedLinear",
    ),
    "a parametrized token": (
        lambda model: nn.utils.parametrize.register_parametrization(model, "cls_token", Doubled()),
        "it has a parametrization of its own",
    ),
    "another activation": (put("blocks.0.mlp.act", lambda _: nn.Tanh()), "activation is a Tanh"),
    "another norm": (put("norm", lambda _: RmsNorm(24)), "its norm is a RmsNorm"),
    "a layer in place of dropout": (
        put("blocks.0.mlp.drop1", lambda _: nn.Tanh()),
        "its drop1 is a Tanh",
    ),
    "a layer in place of drop path": (
        put("blocks.0.drop_path2", lambda _: nn.Tanh()),
        "its drop_path2 is a Tanh",
    ),
    "a layer after the positions": (put("pos_drop", lambda _: nn.Tanh()), "its pos_drop is a Tanh"),
    "blocks in another container": (
        put("blocks", lambda blocks: nn.ModuleList(blocks)),
        "a ModuleList, not a Sequential",
    ),
    "positions of another size": (
        lambda model: setattr(model, "pos_embed", parameter(1, 9, 24)),
        None,
    ),
    "a norm that does not fit": (
        lambda model: setattr(model.blocks[0].norm1, "bias", parameter(23)),
        None,
    ),
    "a bias that does not fit": (
        lambda model: setattr(model.blocks[0].mlp.fc1, "bias", parameter(5)),
        "its layers do not fit each other",
    ),
    "no norm at all": (lambda model: setattr(model, "norm", None), "it has no norm; put one there"),
    "no head at all": (lambda model: delattr(model, "head"), "it has no head; put one there"),
    "a head of torch.jit": (
        put("head", torch.jit.script),
        r"made by torch\.jit\.script, of which there is no copy",
    ),
    "scales that do not fit": (
        put("blocks.0.ls1", lambda _: LayerScale(1)),
        "its ls1 does not have 24 values",
    ),
    "prefix tokens that are not there": (
        lambda model: setattr(model, "num_prefix_tokens", 3),
        "its positions do not fit its patches .17 tokens for 16 patches",
    ),
    "images of another size": (
        lambda model: setattr(model.patch_embed, "img_size", (64, 64)),
        "its positions do not fit its patches .17 tokens for 64 patches",
    ),
    "steps of another size": (
        lambda model: setattr(model.patch_embed.proj, "stride", (4, 4)),
        "not those of a plain convolution",
    ),
    "heads that do not fit": (
        lambda model: setattr(model.blocks[0].attn, "num_heads", 6),
        "its layers do not fit each other",
    ),
    "another class": (
        lambda model: setattr(getattr(model, "source", model), "__class__", Shifted),
        "its pool is not timm's",
    ),
    "as a half": (lambda model: model.half(), "float16"),
    "a block as a half": (lambda model: model.blocks[1].half(), "float16"),
    "as doubles": (lambda model: model.double(), "float64"),
    "on meta": (lambda model: model.to("meta"), "meta"),
    "a head as a half": (lambda model: model.head.half(), "float16"),
    "a masked model's parts": (
        lambda model: setattr(model, "blocks", vitslim.mask(make()).blocks),
        "a masked model cannot be packed",
    ),
}
CHANGES = OF_THE_HEAD | OF_THE_ENCODER


@functools.cache
def originals():
    torch.manual_seed(0)
    return {"dense": make(), "slim": slimmed()}


def built(stage):
    return copy.deepcopy(originals()[stage])


@torch.no_grad()
def changed(change, target):
    torch.manual_seed(1)
    change(target)


@torch.no_grad()
def said_by(model, x):
    """What a model says in eval mode; it is left in its own."""
    modes = {module: module.training for module in model.modules()}
    try:
        return model.eval()(x)
    finally:
        for module, mode in modes.items():
            module.training = mode


def images(model):
    return torch.randn(2, 3, *model.patch_embed.img_size)


def assert_says(packed, model, x):
    actual, expected = packed(x), said_by(model, x)
    assert actual.shape == expected.shape and not actual.requires_grad
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", ["dense", "slim"])
@pytest.mark.parametrize("through", ["source", "packed"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_followed(name, through, stage):
    if name == "no positions" and timm.__version__ < "1.0.17":
        pytest.skip("this timm forgets the class token where there are no positions")
    model = built(stage).train()
    packed, x = vitslim.pack(model), images(model)
    packed(x)
    changed(CHANGES[name], packed if through == "packed" else model)
    modes = {module: module.training for module in model.modules()}
    first = packed(x)
    assert packed.source is model
    assert_says(packed, model, x)
    assert torch.equal(packed(x), first)
    assert all(module.training == mode for module, mode in modes.items())


@pytest.mark.parametrize("stage", ["dense", "slim"])
@pytest.mark.parametrize("name", CHANGES)
def test_without_the_source_the_head_can_be_changed(name, stage):
    if name == "a weight's data":
        pytest.skip("there is none: nothing is put into what is on meta")
    model = built(stage)
    packed, x = vitslim.pack(model, keep_source=False), images(model)
    packed(x)
    try:
        changed(CHANGES[name], packed)
        after = packed(x)
    except vitslim.VitslimError as error:
        assert name in OF_THE_ENCODER and "keep_source=False, which forgets" in str(error)
    else:
        changed(CHANGES[name], model)
        torch.testing.assert_close(after, said_by(model, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("through", ["source", "packed"])
@pytest.mark.parametrize("name", OF_A_POOL)
def test_a_change_of_the_pool_is_followed(name, through):
    model = make("attention pool")
    packed, x = vitslim.pack(model), images(model)
    before = packed(x)
    changed(OF_A_POOL[name], packed if through == "packed" else model)
    after = packed(x)
    assert packed.source is model and not torch.equal(after, before)
    assert_says(packed, model, x)


@pytest.mark.parametrize("name", CHANGES)
def test_without_the_source_nothing_else_changes_it(name):
    model = built("slim")
    packed, x = vitslim.pack(model, keep_source=False), images(model)
    before = packed(x)
    changed(CHANGES[name], model)
    assert torch.equal(packed(x), before)


@pytest.mark.parametrize("keep_source", [True, False])
@pytest.mark.parametrize("through", ["source", "packed"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name, through, keep_source):
    if through == "source" and not keep_source:
        pytest.skip("the packed model has nothing to do with it any more")
    if through == "packed" and name in (
        "a parametrized token",
        *(() if keep_source else ("int8 layers",)),
    ):
        pytest.skip("torch itself refuses that")
    change, said = REFUSED[name]
    model = built("dense")
    packed, x = vitslim.pack(model, keep_source=keep_source), images(model)
    with pytest.raises(vitslim.VitslimError, match=said if keep_source else None):
        changed(change, packed if through == "packed" else model)
        packed(x)
    model = built("dense")
    changed(change, model)
    with pytest.raises(vitslim.VitslimError, match=said):
        vitslim.pack(model)
