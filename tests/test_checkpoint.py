"""Saved models come back bit for bit, through timm too; damaged ones are named in a sentence."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from test_surgery import MODELS, images, make, randomised

import vitslim


def cut(masked):
    return vitslim.slim(masked, vitslim.threshold(masked, {"macs": "60%"}))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", ["dense", "masked", "slim"])
def test_round_trip_is_bit_equal(name, stage, tmp_path):
    model = make(name)
    if stage != "dense":
        model = randomised(model, token_start="one")
    if stage == "slim":
        model = cut(model)
    vitslim.save(model, tmp_path)
    x = images(model)
    assert torch.equal(vitslim.load(tmp_path).eval()(x), model(x))
    through_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(through_timm(x), model(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_a_second_process_needs_only_the_import(tmp_path):
    model = cut(randomised(make()))
    vitslim.save(model, tmp_path)
    code = (
        "import sys, timm, torch, vitslim\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "print(model(torch.ones(1, 3, 32, 32)).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == model(torch.ones(1, 3, 32, 32)).sum().item()


def test_saved_again_after_loading_and_after_a_new_classifier(tmp_path):
    model = cut(randomised(make()))
    model.reset_classifier(4)
    vitslim.save(model, tmp_path / "a")
    again = vitslim.load(tmp_path / "a").eval()
    vitslim.save(again, tmp_path / "b")
    x = images(model)
    assert torch.equal(vitslim.load(tmp_path / "b").eval()(x), model(x))
    assert again.plan.blocks == model.plan.blocks
    assert vitslim.cost(again) == vitslim.cost(model)


def test_another_number_of_classes_keeps_the_body(tmp_path):
    model = cut(randomised(make()))
    vitslim.save(model, tmp_path)
    fresh = vitslim.load(tmp_path, num_classes=5).eval()
    x = images(model)
    assert fresh(x).shape == (2, 5)
    assert torch.equal(fresh.forward_features(x), model.forward_features(x))


def damage(folder, how):
    weights, config = folder / "model.safetensors", folder / "config.json"
    data, text = weights.read_bytes(), config.read_text()
    if how == "truncated weights":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "edited weights":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "foreign weights":
        weights.write_bytes(b"GIF89a" * 100)
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated config":
        config.write_text(text[: len(text) // 2])
    elif how == "foreign config":
        config.write_text('{"name": "left-pad"}')
    elif how == "edited plan":
        whole = json.loads(text)
        whole["model_args"]["plan"]["blocks"][0]["hidden"] = [3, 1]
        config.write_text(json.dumps(whole))
    elif how == "smaller plan":
        whole = json.loads(text)
        whole["model_args"]["plan"]["blocks"][0]["hidden"] = [1, 3]
        config.write_text(json.dumps(whole))
    elif how == "no config":
        config.unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated weights", "model.safetensors is truncated or was changed"),
        ("edited weights", "model.safetensors is truncated or was changed"),
        ("foreign weights", "model.safetensors is truncated or was changed"),
        ("no weights", "model.safetensors cannot be read"),
        ("truncated config", "config.json is damaged, it is not JSON"),
        ("foreign config", "not the config of a model"),
        ("edited plan", "the plan in config.json is broken: block 0 .* do not increase"),
        ("smaller plan", "does not hold a model that fits its config.json"),
        ("no config", "config.json cannot be read"),
    ],
)
def test_damage_gets_one_sentence(how, said, tmp_path):
    vitslim.save(cut(randomised(make())), tmp_path)
    damage(tmp_path, how)
    with pytest.raises(vitslim.VitslimError, match=said) as caught:
        vitslim.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_timm_is_told_of_damage_too(tmp_path):
    vitslim.save(cut(randomised(make())), tmp_path)
    damage(tmp_path, "truncated weights")
    with pytest.raises(vitslim.VitslimError, match="truncated or was changed"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_model_timm_cannot_name_is_not_saved(tmp_path):
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, num_heads=3)
    with pytest.raises(vitslim.VitslimError, match="not a name timm can build"):
        vitslim.save(model, tmp_path)
    with pytest.raises(vitslim.VitslimError, match="built from a saved folder"):
        timm.create_model("vitslim_vit")
