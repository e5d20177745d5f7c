"""The epoch loop: what it learns, what it refuses, and that processes do not change it."""

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import vitslim
from vitslim.errors import VitslimError
from vitslim.masks import mask_parameters, sparsity_loss
from vitslim.workflow.journal import Journal, read_summary
from vitslim.workflow.search import search
from vitslim.workflow.settings import settings_for
from vitslim.workflow.state import StageFolder
from vitslim.workflow.train import _optimizer, stage_args, train


def test_search_shrinks_masks_and_says_how_it_goes(tiny, quick, world, tmp_path, capsys) -> None:
    settings = dataclasses.replace(quick, l1_attention=1e-2, l1_mlp=1e-2, l1_token=1e-2)
    masked = search(tiny, settings, tmp_path, world)
    masks = vitslim.Masks.load(tmp_path / "masks.safetensors")
    assert max(mask.max() for mask in masks.mlp) < 1
    assert all(
        torch.equal(a, b) for a, b in zip(masks.mlp, vitslim.Masks.of(masked).mlp, strict=True)
    )
    rows = read_summary(tmp_path / "summary.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["penalty"]) < float(rows[0]["penalty"])
    assert "search: epoch 3/3" in capsys.readouterr().out
    assert float(rows[2]["loss"]) < float(rows[0]["loss"])


def test_masks_have_no_decay_and_a_rate_of_their_own(tiny, quick, world) -> None:
    masked = vitslim.mask(tiny)
    settings = dataclasses.replace(quick, weight_decay=0.5, lr=1e-3, mask_lr_scale=10.0)
    optimizer = _optimizer(masked, settings, world)
    names = {id(parameter): name for name, parameter in masked.named_parameters()}
    where = {
        names[id(parameter)]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(where) == set(names.values())
    for name, _ in mask_parameters(masked):
        assert where[name] == (0.0, pytest.approx(1e-2))
    assert where["blocks.0.mlp.fc1.weight"] == (0.5, 1e-3)
    assert where["pos_embed"] == (0.0, 1e-3)


@pytest.mark.parametrize(
    ("poison", "where"),
    [
        ("blocks.1.mlp.fc1.weight", "the parameter blocks.1.mlp.fc1.weight"),
        (None, "the output of blocks.0.norm2"),
    ],
)
def test_a_loss_that_is_not_finite_names_step_and_layer(
    tiny, quick, world, tmp_path, poison, where
) -> None:
    masked = vitslim.mask(tiny)
    with torch.no_grad():
        if poison:
            dict(masked.named_parameters())[poison][0, 0] = float("nan")
        else:
            # Finite outputs whose variance, in the next norm, is not.
            masked.blocks[0].attn.proj.weight.fill_(3e38)
    stage = StageFolder(tmp_path, stage_args(quick, world))
    with pytest.raises(VitslimError, match=f"epoch 1, step 1, first in {where}"):
        train(masked, quick, stage, world, Journal("search", None), penalty=sparsity_loss)


def test_the_last_state_outlives_a_loss_that_is_not_finite(tiny, quick, world, tmp_path) -> None:
    calls = []

    def breaks_in_epoch_two(model: torch.nn.Module) -> torch.Tensor:
        calls.append(1)
        return sparsity_loss(model) * (float("nan") if len(calls) == 8 else 1)

    masked = vitslim.mask(tiny)
    stage = StageFolder(tmp_path, stage_args(quick, world))
    journal = Journal("search", None, quiet=True)
    with pytest.raises(VitslimError, match="epoch 2, step 3, first in the loss itself"):
        train(masked, quick, stage, world, journal, penalty=breaks_in_epoch_two)
    assert stage.latest()[0].epoch == 1
    outcome = train(masked, quick, stage, world, journal, penalty=sparsity_loss)
    assert all(torch.isfinite(p).all() for p in outcome.model.parameters())


def test_a_gradient_that_is_not_finite_names_its_layer(tiny, quick, world, tmp_path) -> None:
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 0

    tiny.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, output: Root.apply(output))
    stage = StageFolder(tmp_path, stage_args(quick, world))
    with pytest.raises(VitslimError, match=r"gradient is not finite.*blocks.0.mlp.fc1.bias"):
        train(tiny, quick, stage, world, Journal("dense", None, quiet=True))


def test_the_average_is_the_result_and_survives_a_resume(tiny, quick, world, tmp_path) -> None:
    settings = dataclasses.replace(quick, model_ema=True, model_ema_decay=0.9)
    start = {name: value.clone() for name, value in tiny.state_dict().items()}

    def trained(folder: Path, stop_after: int | None) -> dict[str, torch.Tensor]:
        tiny.load_state_dict(start)
        stage = StageFolder(folder, stage_args(settings, world))
        if stop_after:
            save = stage.save

            def save_and_stop(state) -> None:
                save(state)
                if state.epoch == stop_after:
                    raise KeyboardInterrupt

            stage.save = save_and_stop
        outcome = train(tiny, settings, stage, world, Journal("dense", None, quiet=True))
        assert outcome.model is not tiny
        return {name: value.clone() for name, value in outcome.model.state_dict().items()}

    whole = trained(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", 2)
    resumed = trained(tmp_path / "broken", None)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not torch.equal(whole["head.weight"], tiny.state_dict()["head.weight"])


def test_amp_trains_in_bfloat16_with_masks_in_float32(tiny, quick, world, tmp_path) -> None:
    seen = []
    tiny.head.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    settings = dataclasses.replace(quick, amp=True, epochs=1)
    masked = search(tiny, settings, tmp_path, world)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in masked.parameters()} == {torch.float32}
    row = read_summary(tmp_path / "summary.csv")[0]
    assert float(row["loss"]) < 10


def test_mixup_and_a_teacher_train(tiny, world, tmp_path) -> None:
    settings = settings_for(
        "retrain",
        {"epochs": 1, "batch_size": 256, "mixup": 0.8, "cutmix": 1.0, "distill_loss_weight": 1.0},
    )
    teacher = timm.create_model("vit_tiny_patch16_224", **tiny_kwargs(tiny))
    stage = StageFolder(tmp_path, stage_args(settings, world))
    losses = [
        train(
            timm.create_model("vit_tiny_patch16_224", **tiny_kwargs(tiny)),
            settings,
            StageFolder(tmp_path / str(bool(t)), stage.args),
            world,
            Journal("retrain", tmp_path / f"{bool(t)}.csv"),
            teacher=t,
        ).accuracy
        for t in (teacher, None)
    ]
    with_teacher, without = (
        float(read_summary(tmp_path / f"{name}.csv")[0]["loss"]) for name in (True, False)
    )
    assert with_teacher > without
    assert all(0 <= accuracy <= 100 for accuracy in losses)


def tiny_kwargs(model: torch.nn.Module) -> dict[str, int]:
    from vitslim.surgery import describe

    torch.manual_seed(0)
    return describe(model)["args"]


def test_two_processes_search_like_one(images: Path, tmp_path: Path) -> None:
    def command(output: str, batch: int) -> list[str]:
        return [
            *("-m", "vitslim", "search", "vit_tiny_patch16_224", "--data", f"folder:{images}"),
            *("--model-kwargs", "img_size=8", "patch_size=4", "embed_dim=16", "depth=2"),
            *("num_heads=2", "num_classes=2", "--epochs", "3", "--batch-size", str(batch)),
            *("--no-aug", "--mixup", "0", "--cutmix", "0", "--drop-path", "none", "--opt", "sgd"),
            *("--lr", "0.05", "--l1-attention", "0.1", "--l1-mlp", "0.1", "--l1-token", "0.1"),
            *("--workers", "0", "--device", "cpu", "--output", str(tmp_path / output)),
        ]

    torchrun = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    runs = {"one": command("one", 32), "two": [*torchrun, *command("two", 16)]}
    for arguments in runs.values():
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (vitslim.Masks.load(tmp_path / name / "masks.safetensors") for name in runs)
    for kind in ("attention", "mlp", "token"):
        for a, b in zip(getattr(one, kind), getattr(two, kind), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
            assert kind == "token" or a.max() < 0.97
    rows = [list(csv.DictReader((tmp_path / n / "summary.csv").open())) for n in runs]
    assert [r["accuracy"] for r in rows[0]] == [r["accuracy"] for r in rows[1]]
    assert len(rows[1]) == 3
