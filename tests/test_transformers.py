"""Saved models in transformers, and adapters of peft on models of ours: the real libraries."""

import copy

import pytest
import torch
from test_surgery import images, make, randomised
from torch import nn

import vitslim

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TARGETS = r".*blocks.*\.(qkv|proj|fc1|fc2)"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def stages(name="DeiT", **given):
    masked = randomised(make(name), **given)
    budget = "macs=60%,token=0.6" if vitslim.Masks.of(masked).kinds()[-1] == "token" else "macs=60%"
    return {"masked": masked, "slim": vitslim.slim(masked, vitslim.threshold(masked, budget))}


@pytest.mark.parametrize("name", ["ViT", "DeiT distilled", "registers", "attention pool"])
@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("attention", "mlp", "token")])
@torch.no_grad()
def test_auto_model_loads_a_saved_folder(name, kinds, tmp_path):
    for stage, model in stages(name, kinds=kinds).items():
        vitslim.save(model, tmp_path / stage)
        auto = transformers.AutoModelForImageClassification
        again = auto.from_pretrained(tmp_path / stage).eval()
        x = images(model)
        assert torch.equal(again(pixel_values=x).logits, model(x))
        assert type(again.timm_model) is type(model)
        again.save_pretrained(tmp_path / f"{stage} again")
        twice = auto.from_pretrained(tmp_path / f"{stage} again").eval()
        assert torch.equal(twice(pixel_values=x).logits, model(x))
        # The other way, by padded heads, reads buffers that no file holds.
        square = torch.zeros(1, 1, 1, 1)
        if "token" not in kinds:
            padded = (
                each.forward_features(x, attn_mask=square) for each in (again.timm_model, model)
            )
            assert torch.equal(*padded)


@torch.no_grad()
def test_auto_model_builds_models_of_other_images(tmp_path):
    masked = randomised(make("DeiT", in_chans=1, img_size=(32, 64)))
    slim = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    slim.head = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 5))
    vitslim.save(slim, tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(2, 1, 32, 64)
    assert torch.equal(again(pixel_values=x).logits, slim.eval()(x))


def test_auto_model_takes_another_number_of_labels(tmp_path):
    slim = stages()["slim"]
    vitslim.save(slim, tmp_path)
    auto = transformers.AutoModelForImageClassification
    again = auto.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert again(pixel_values=images(slim)).logits.shape == (2, 3)


def test_the_pipeline_classifies_images(tmp_path):
    from PIL import Image

    slim = stages()["slim"]
    vitslim.save(slim, tmp_path)
    classify = transformers.pipeline("image-classification", model=str(tmp_path))
    found = classify(Image.new("RGB", (40, 50), (200, 10, 90)), top_k=7)
    assert len(found) == 7
    assert sum(each["score"] for each in found) == pytest.approx(1, abs=1e-4)


def test_the_trainer_trains_a_saved_model(tmp_path):
    slim = stages()["slim"]
    vitslim.save(slim, tmp_path / "model")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 7} for i in range(8)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(model=model, args=args, train_dataset=data).train()
    after = model.timm_model.blocks[0].attn.qkv.weight
    assert not torch.equal(after.cpu(), slim.blocks[0].attn.qkv.weight)
    trained = vitslim.slim(make("DeiT"), slim.plan)
    trained.load_state_dict(model.timm_model.state_dict())
    vitslim.save(model.timm_model, tmp_path / "trained")
    x = images(slim)
    assert torch.equal(vitslim.load(tmp_path / "trained").eval()(x), trained.eval()(x))


def adapted(model):
    """Puts LoRA on every linear layer of the blocks, with weights that matter."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS, lora_alpha=4)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


@pytest.mark.parametrize("stage", ["masked", "slim"])
def test_adapters_count_and_merge(stage):
    model = stages()[stage]
    x, wrapped = images(model), adapted(model)
    out = wrapped(x)
    assert not torch.allclose(out, model(x), atol=1e-3)
    out.square().sum().backward()
    lora = {name: each.grad for name, each in wrapped.named_parameters() if "lora_" in name}
    assert len(lora) == 2 * 4 * len(model.blocks)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in lora.values())
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(x), out, rtol=1e-4, atol=1e-5)


def test_masks_on_an_adapted_model_act_as_on_the_merged_one():
    dense = make("DeiT")
    wrapped = adapted(dense)
    inside, x = wrapped.base_model.model, images(dense)
    masked = vitslim.mask(inside, kinds=("attention", "mlp"))
    torch.testing.assert_close(masked(x), inside(x))
    merged = vitslim.mask(copy.deepcopy(wrapped).merge_and_unload(), kinds=("attention", "mlp"))
    for model in (masked, merged):
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if name.endswith(".mask"):
                nn.init.uniform_(parameter, 0.2, 1)
    torch.testing.assert_close(masked(x), merged(x), rtol=1e-4, atol=1e-5)


def test_what_an_adapter_forbids_is_said(tmp_path):
    model = stages()["slim"]
    wrapped = adapted(model)
    inside = wrapped.base_model.model
    for call, said in (
        (lambda: vitslim.save(inside, tmp_path), r"blocks\.0\.attn\.qkv is a peft"),
        (lambda: vitslim.pack(inside), "qkv is a peft"),
        (lambda: vitslim.save(wrapped, tmp_path), "a PeftModel cannot be saved, but the Slim"),
        (
            lambda: vitslim.slim(adapted(make("DeiT")).base_model.model, model.plan),
            r"blocks\.0.* merge",
        ),
    ):
        with pytest.raises(vitslim.VitslimError, match=said):
            call()
