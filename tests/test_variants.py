"""Masked and slim models are ordinary timm models: what is done to one is not silently lost."""

import copy
import io
import pickle

import pytest
import timm
import torch
from test_surgery import SIZES, images, make, randomised
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitslim
from vitslim.masks import mask_parameters
from vitslim.surgery import MaskedModel, SlimModel
from vitslim.surgery.classes import masked_class, slim_class

NAMES = ("DeiT", "DeiT distilled", "registers", "average pool")


def both(name="DeiT", budget="macs=60%,token=0.6", **given):
    masked = randomised(make(name), **given)
    return masked, vitslim.slim(masked, vitslim.threshold(masked, budget, round_to=1))


def written_and_read(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_their_classes_are_made_of_timms(name):
    model = make(name)
    masked, slim = both(name)
    assert type(masked).__mro__[0].__name__ == f"Masked{type(model).__name__}"
    assert type(slim).__name__ == f"Slim{type(model).__name__}"
    assert isinstance(masked, MaskedModel) and isinstance(slim, SlimModel)
    assert isinstance(masked, type(model)) and isinstance(slim, type(model))
    assert type(masked) is masked_class(type(model)) and type(slim) is slim_class(type(model))
    # Nothing that a class should say hangs on the instance.
    assert not any(callable(v) and not isinstance(v, nn.Module) for v in vars(slim).values())


def test_they_are_built_by_the_arguments_of_timms_class():
    sizes = {**SIZES, "num_classes": 7}
    masked = masked_class(VisionTransformer)(**sizes, masks={"kinds": ["attention"]})
    assert [name for name, _ in mask_parameters(masked)] == [f"blocks.{i}.attn.mask" for i in "012"]
    _, cut = both()
    for plan in (cut.plan, cut.plan.to_dict()):
        slim = slim_class(VisionTransformer)(**sizes, plan=plan).eval()
        slim.load_state_dict(cut.state_dict())
        x = images(slim)
        assert torch.equal(slim(x), cut(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("again", [written_and_read, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_they_are_copied_and_pickled_whole(name, again):
    for model in both(name):
        other, x = again(model), images(model)
        assert type(other) is type(model)
        assert torch.equal(other(x), model(x))
        assert other.no_weight_decay() == model.no_weight_decay()
        maps = [each.forward_intermediates(x, intermediates_only=True) for each in (other, model)]
        assert all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
        if isinstance(model, SlimModel):
            assert other.plan == model.plan
        else:
            assert other.mask_args == model.mask_args
            assert vitslim.Masks.of(other).mlp[0].equal(vitslim.Masks.of(model).mlp[0])


class MyViT(VisionTransformer):
    """Somebody's own class with a method of its own."""

    def doubled(self, x):
        return 2 * self(x)


def test_a_class_of_ones_own_keeps_its_methods():
    masked = randomised(MyViT(num_classes=7, **SIZES).eval())
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    for model in (masked, slim):
        other, x = pickle.loads(pickle.dumps(model)), images(model)
        assert isinstance(other, MyViT)
        assert torch.equal(other.doubled(x), 2 * model(x))


def test_what_is_frozen_and_where_it_is_stays():
    model = make("DeiT", dtype=torch.float64).train()
    model.patch_embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    model.blocks[1].attn.proj_drop.eval()
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    masked = vitslim.mask(model)
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    for other in (masked, slim, vitslim.slim(model, slim.plan)):
        assert {n for n, each in other.named_parameters() if not each.requires_grad} == frozen
        assert {each.dtype for each in other.parameters()} == {torch.float64}
        assert other.training and other.blocks[0].training and other.blocks[1].mlp.training
        assert not other.blocks[1].attn.proj_drop.training
        for block in other.blocks:
            assert block.norm1.training and block.attn.qkv.training and block.mlp.fc2.training


def test_hooks_and_what_they_keep_survive():
    model, calls = make("DeiT"), []

    def keep(module, inputs, output):
        module.last = output
        calls.append(type(module).__name__)

    parts = ("blocks.0", "blocks.0.attn", "blocks.0.mlp", "blocks.0.norm1", "blocks.0.mlp.fc2", "")
    for name in parts:
        model.get_submodule(name).register_forward_hook(keep)
    x = images(model)
    model(x)
    masked = vitslim.mask(model)
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    for other in (masked, slim):
        assert torch.equal(other.blocks[0].attn.last, model.blocks[0].attn.last)
        calls.clear()
        other(x)
        assert len(calls) == len(parts)
        assert not torch.equal(other.blocks[0].mlp.fc2.last, model.blocks[0].mlp.fc2.last)


def test_what_cannot_be_copied_is_named():
    model = make()
    model.blocks[1].attn.log = iter([])
    model.blocks[1].attn.lock = __import__("threading").Lock()
    plan = both("ViT")[1].plan
    for call in (vitslim.mask, lambda m: vitslim.slim(m, plan)):
        with pytest.raises(vitslim.VitslimError, match=r"'lock' of blocks\.1\.attn cannot be"):
            call(model)


@torch.no_grad()
def test_token_masks_are_resampled_only_if_asked():
    masked, slim = both("ViT", {"token": 0.5})
    x = torch.randn(2, 3, 48, 64)
    before = copy.deepcopy(masked.state_dict())
    with pytest.raises(vitslim.VitslimError, match="resample_masks=True"):
        masked.set_input_size(img_size=(48, 64))
    assert all(torch.equal(v, before[k]) for k, v in masked.state_dict().items())
    with pytest.raises(vitslim.VitslimError, match="plan again"):
        slim.set_input_size(img_size=(48, 64))
    slim.set_input_size(img_size=(32, 32))
    masked.set_input_size(img_size=(48, 64), resample_masks=True)
    assert masked.blocks[0].tokens.raw.shape == (48,)
    low, high = before["blocks.0.tokens.raw"].aminmax()
    assert low <= masked.blocks[0].tokens.raw.min() and masked.blocks[0].tokens.raw.max() <= high
    assert masked(x).shape == (2, 7)
    plan = vitslim.threshold(masked, {"token": 0.5}, round_to=1)
    assert vitslim.slim(masked, plan)(x).shape == (2, 7)
    with pytest.raises(vitslim.VitslimError, match="whose img_size is"):
        vitslim.slim(masked, slim.plan)


def test_patches_of_another_size_on_the_same_grid_change_no_masks():
    masked, slim = both("ViT", {"token": 0.5})
    for model in (masked, slim):
        model.set_input_size(img_size=64, patch_size=16)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("attention", "mlp", "token")])
@torch.no_grad()
def test_features_only_gives_the_maps_of_forward_intermediates(kinds, tmp_path):
    budget = "macs=60%,token=0.6" if "token" in kinds else "macs=60%"
    for stage, model in zip(("masked", "slim"), both("ViT", budget, kinds=kinds), strict=True):
        x = images(model)
        want = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        vitslim.save(model, tmp_path / stage)
        given = {"features_only": True, "out_indices": (0, 2)}
        for net in (
            timm.create_model(f"local-dir:{tmp_path / stage}", pretrained=True, **given),
            vitslim.load(tmp_path / stage, **given),
        ):
            got = net.eval()(x)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert net.feature_info.channels() == [24, 24]
            assert net.feature_info.reduction() == [8, 8]


def test_the_last_blocks_can_be_taken_off(tmp_path):
    _, slim = both()
    slim.prune_intermediate_layers(2)
    assert len(slim.blocks) == 3
    slim.prune_intermediate_layers([0, 1])
    vitslim.save(slim, tmp_path)
    again, x = vitslim.load(tmp_path).eval(), images(slim)
    assert torch.equal(again.forward_features(x), slim.forward_features(x))
    assert vitslim.cost(slim) == vitslim.cost(again)


def test_timms_own_ways_to_save_know_what_the_models_are(tmp_path):
    hub = pytest.importorskip("timm.models._hub")
    if timm.__version__ < "1.0.27":
        pytest.skip("this timm does not record how a model was made")
    for stage, model in zip(("masked", "slim"), both(), strict=True):
        model.reset_classifier(5)
        hub.save_for_hf(model, tmp_path / stage, safe_serialization=True)
        again, x = (
            timm.create_model(f"local-dir:{tmp_path / stage}", pretrained=True),
            images(model),
        )
        assert type(again) is type(model)
        assert torch.equal(again.eval()(x), model(x))
