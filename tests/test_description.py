"""`save` writes what a model is, whatever was done to it, or names the part it cannot describe."""

import copy
import functools
import json

import numpy as np
import pytest
import timm
import torch
from test_surgery import SIZES, images, make, randomised
from timm.layers import DropPath, Mlp, QuickGELU, RmsNorm, SwiGLU
from timm.models.vision_transformer import Attention, LayerScale
from torch import nn

import vitslim
from vitslim.description import build, describe

STAGES = ("dense", "masked", "slim")


@functools.cache
def stages():
    dense = make()
    masked = randomised(dense)
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%", round_to=1))
    return {"dense": dense, "masked": masked, "slim": slim}


def at(stage):
    return copy.deepcopy(stages()[stage])


def activations(make_one):
    def change(model):
        for block in model.blocks:
            block.mlp.act = make_one()

    return change


def put(name, make_one):
    def change(model):
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, make_one())

    return change


def own_eps(model):
    for index, block in enumerate(model.blocks):
        block.norm1.eps = 0.1 * (index + 1)


def heads_of_other_number(model):
    if isinstance(model.blocks[1].attn, Attention):
        model.blocks[1].attn = Attention(24, num_heads=4, qkv_bias=True)


def mixed_dtypes(model):
    model.bfloat16()
    for norm in (each for each in model.modules() if isinstance(each, nn.LayerNorm)):
        norm.float()


def no_key_biases(model):
    qkv = model.blocks[0].attn.qkv
    model.blocks[0].attn.qkv = nn.Linear(qkv.in_features, qkv.out_features, bias=False)


DESCRIBED = {
    "classifier of 5": put("head", lambda: nn.Linear(24, 5)),
    "classifier of layers": put("head", lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(24, 5))),
    "nested classifier": put(
        "head", lambda: nn.Sequential(nn.Sequential(nn.Linear(24, 8), nn.ReLU()), nn.Linear(8, 3))
    ),
    "batch norm in the classifier": put(
        "head", lambda: nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 9))
    ),
    "no classifier": put("head", nn.Identity),
    "reset_classifier": lambda model: model.reset_classifier(4),
    "reset_classifier to nothing": lambda model: model.reset_classifier(0),
    "reset_classifier and pooling": lambda model: model.reset_classifier(4, "avg"),
    "pooling alone": lambda model: setattr(model, "global_pool", "avg"),
    "ReLU": activations(nn.ReLU),
    "QuickGELU": activations(QuickGELU),
    "an activation with a setting": activations(functools.partial(nn.LeakyReLU, 0.3)),
    "an activation of layers": activations(lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.1))),
    "eps of each norm": own_eps,
    "another norm": put("norm", lambda: RmsNorm(24)),
    "no norm": put("norm", nn.Identity),
    "heads of unequal number": heads_of_other_number,
    "a scale": lambda model: setattr(model.blocks[0].attn, "scale", 1.0),
    "no biases of q, k, v": no_key_biases,
    "no bias of fc2": lambda model: setattr(model.blocks[0].mlp.fc2, "bias", None),
    "another MLP": put("blocks.0.mlp", lambda: Mlp(24, 40)),
    "layer scale": put("blocks.0.ls1", lambda: LayerScale(24)),
    "stochastic depth": put("blocks.1.drop_path1", lambda: DropPath(0.3)),
    "dropout": lambda model: setattr(model.head_drop, "p", 0.5),
    "a patch embedding without bias": put(
        "patch_embed.proj", lambda: nn.Conv2d(3, 24, 8, 8, bias=False)
    ),
    "no positions": lambda model: setattr(model, "pos_embed", None),
    "fewer blocks": lambda model: setattr(model, "blocks", model.blocks[:2]),
    "pruned to features": lambda model: model.prune_intermediate_layers(1),
    "tied norms": lambda model: setattr(
        model.blocks[1].norm1, "weight", model.blocks[0].norm1.weight
    ),
    "a block's part used twice": lambda model: setattr(model.blocks[1], "mlp", model.blocks[0].mlp),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "mixed dtypes": mixed_dtypes,
    "checkpointing": lambda model: model.set_grad_checkpointing(True),
    "a note": lambda model: setattr(model.blocks[0], "note", object()),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", DESCRIBED)
@torch.no_grad()
def test_what_was_changed_is_saved(change, stage, tmp_path):
    if change == "no positions" and timm.__version__ < "1.0.17":
        pytest.skip("this timm forgets the class token where there are no positions")
    model = at(stage)
    torch.manual_seed(1)
    DESCRIBED[change](model)
    model.eval()
    x = images(model)
    vitslim.save(model, tmp_path)
    again = vitslim.load(tmp_path).eval()
    assert torch.equal(again(x), model(x))
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    # Saved again it would be the same, and it can be fine-tuned as any model of timm's.
    assert describe(again) == json.loads(json.dumps(describe(model)))
    if "classif" in change:
        assert vitslim.load(tmp_path, num_classes=6).eval()(x).shape[-1] == 6


class Mine(nn.Module):
    def forward(self, x):
        return x.relu()


class MyViT(timm.models.VisionTransformer):
    """Somebody's own model."""


def wrapped_fc1(model):
    fc1 = model.blocks[0].mlp.fc1
    model.blocks[0].mlp.fc1 = nn.utils.parametrizations.weight_norm(fc1)


def _for_int8(layer):
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return layer


REFUSED = {
    "blocks.0.mlp.act is a .*Mine": put("blocks.0.mlp.act", Mine),
    "blocks.1 has hooks": lambda model: model.blocks[1].register_forward_hook(lambda *_: None),
    "blocks.0 has a forward of its own": lambda model: setattr(
        model.blocks[0], "forward", lambda x: x
    ),
    "the model has a tensor of its own, 'mean'": lambda model: model.register_buffer(
        "mean", torch.zeros(3)
    ),
    "blocks.0.mlp.fc1 is a .*ParametrizedLinear": wrapped_fc1,
    "blocks.0.mlp.fc1 is a .*quantized": lambda model: put(
        "blocks.0.mlp.fc1",
        lambda: torch.ao.nn.quantized.dynamic.Linear.from_float(_for_int8(nn.Linear(24, 96))),
    )(model),
    "on the meta device": lambda model: model.to("meta"),
    "blocks.0.mlp.drop1.p is a Tensor": lambda model: setattr(
        model.blocks[0].mlp.drop1, "p", torch.tensor(0.1)
    ),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_described_is_named_and_nothing_is_written(said, stage, tmp_path):
    model = at(stage)
    REFUSED[said](model)
    with pytest.raises(vitslim.VitslimError, match=said) as caught:
        vitslim.save(model, tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_hooks_that_only_observe_may_be_left_behind(tmp_path):
    model, seen = at("slim"), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    vitslim.save(model, tmp_path, ignore_hooks=True)
    x = images(model)
    assert torch.equal(vitslim.load(tmp_path).eval()(x), model(x))
    assert seen == [1]


def test_a_class_of_ones_own_can_be_masked_and_cut_but_not_saved(tmp_path):
    mine = MyViT(num_classes=7, **SIZES)
    masked = randomised(mine)
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    assert isinstance(slim, MyViT)
    for model in (mine, masked, slim):
        with pytest.raises(vitslim.VitslimError, match="MyViT"):
            vitslim.save(model, tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"act_layer": nn.ReLU},
        {"act_layer": "relu"},
        {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-2)},
        {"norm_layer": RmsNorm},
        {"mlp_layer": SwiGLU},
        {"embed_norm_layer": nn.LayerNorm},
        {"num_classes": np.int64(7), "embed_dim": np.int64(24), "mlp_ratio": np.float32(2)},
        {"qk_norm": True},
        {"init_values": 0.1},
        {"pos_embed": "none"},
        {"drop_rate": 0.1, "drop_path_rate": 0.2, "attn_drop_rate": 0.1},
        {"patch_drop_rate": 0.3},
        {"dynamic_img_size": True},
        {"global_pool": "map"},
    ],
    ids=str,
)
def test_arguments_that_json_cannot_hold_are_told_by_their_effect(given, tmp_path):
    model = make(**given)
    vitslim.save(model, tmp_path)
    again, x = vitslim.load(tmp_path).eval(), images(model)
    assert torch.equal(again(x), model(x))
    assert repr(again.train()).replace("np.int64(24)", "24") == repr(model.train()).replace(
        "np.int64(24)", "24"
    )


def test_a_dense_model_that_timm_can_describe_needs_timm_alone(tmp_path):
    for change in (lambda model: None, lambda model: model.reset_classifier(4, "avg")):
        model = at("dense")
        change(model)
        vitslim.save(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architecture"].startswith("vit_")
        assert "import vitslim" not in (tmp_path / "README.md").read_text()
    model.blocks[0].mlp.act = nn.ReLU()
    vitslim.save(model, tmp_path)
    assert "import vitslim" in (tmp_path / "README.md").read_text()


def test_tied_parameters_stay_tied(tmp_path):
    dense = make("DeiT distilled")
    dense.head_dist.weight = dense.head.weight
    masked = randomised(dense)
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    for model in (dense, masked, slim):
        vitslim.save(model, tmp_path)
        again, x = vitslim.load(tmp_path).eval(), images(model)
        assert torch.equal(again(x), model(x))
        assert again.head_dist.weight is again.head.weight
    fresh = vitslim.load(tmp_path, num_classes=3)
    assert fresh(images(fresh)).shape == (2, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_another_size_and_other_channels_are_fitted_as_timm_does(stage, tmp_path):
    model = make() if stage == "dense" else randomised(make(), kinds=("attention", "mlp"))
    if stage == "slim":
        model = vitslim.slim(model, vitslim.threshold(model, "macs=60%"))
    vitslim.save(model, tmp_path)
    larger = vitslim.load(tmp_path, img_size=(48, 64)).eval()
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size=(48, 64))
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(larger(x), resized(x))
    vitslim.save(larger, tmp_path / "again")
    assert torch.equal(vitslim.load(tmp_path / "again").eval()(x), larger(x))
    grey = vitslim.load(tmp_path, in_chans=1).eval()
    weight = model.patch_embed.proj.weight
    torch.testing.assert_close(grey.patch_embed.proj.weight, weight.sum(1, keepdim=True))


def test_token_masks_are_resampled_on_load_and_dropped_patches_refused(tmp_path):
    masked = randomised(make())
    vitslim.save(masked, tmp_path / "masked")
    larger = vitslim.load(tmp_path / "masked", img_size=48)
    assert larger.blocks[0].tokens.raw.shape == (36,)
    expected = copy.deepcopy(masked)
    expected.set_input_size(img_size=48, resample_masks=True)
    torch.testing.assert_close(larger.blocks[0].tokens.raw, expected.blocks[0].tokens.raw)
    plan = vitslim.threshold(masked, {"token": 0.5})
    vitslim.save(vitslim.slim(masked, plan), tmp_path / "slim")
    with pytest.raises(vitslim.VitslimError, match="then plan again with"):
        vitslim.load(tmp_path / "slim", img_size=48)


def test_a_config_names_no_class_but_of_torch_and_timm():
    told = describe(at("dense"))
    for name in ("os.system", "torch.nn.modules.linear.F", "builtins.eval", "timm.layers.nothing"):
        with pytest.raises(vitslim.VitslimError, match="no layer of torch or timm"):
            build({**told, "parts": {"head": {"type": name}}})
    with pytest.raises(vitslim.VitslimError, match="tells of nothing"):
        build({**told, "parts": {"nothing.here": {"set": {"eps": 1}}}})
    with pytest.raises(vitslim.VitslimError, match="names a dtype 'load'"):
        build({**told, "dtypes": {"": "load"}})


def test_describing_draws_no_random_numbers():
    model, before = at("slim"), torch.get_rng_state()
    describe(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_readme_of_somebody_else_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine\n")
    vitslim.save(at("slim"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine\n"


def test_a_file_is_no_place_for_a_model(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(vitslim.VitslimError, match="is a file, and a model is saved as a folder"):
        vitslim.save(at("slim"), tmp_path / "model")


def test_arguments_that_do_not_go_with_a_plan_are_told(tmp_path):
    vitslim.save(at("slim"), tmp_path)
    with pytest.raises(vitslim.VitslimError, match="the plan has 3 blocks, the model 4"):
        vitslim.load(tmp_path, depth=4)
    with pytest.raises(vitslim.VitslimError, match=r"the plan is a dict; read one with"):
        vitslim.slim(at("masked"), at("slim").plan.to_dict())
