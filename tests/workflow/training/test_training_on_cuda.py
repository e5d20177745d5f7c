"""Training on a GPU: prefetching, autocast, compilation, one process of NCCL, and going on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import vitslim
from vitslim.allowed import KINDS
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.runtime.journal import read_summary
from vitslim.workflow.runtime.world import open_world
from vitslim.workflow.search import search

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SMALL = {
    "img_size": 8,
    "patch_size": 4,
    "num_classes": 2,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
}


def searched(images: Path, output: Path, device: str = "cuda", **more):
    torch.manual_seed(0)
    given = {"data": f"folder:{images}", "epochs": 2, "batch_size": 8, "workers": 2, **more}
    settings = settings_for("search", {"drop_path": None, **given})
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    return search(model, StageContext("search", settings, open_world(device), output))


@pytest.mark.parametrize(
    "more",
    [
        {"amp": True},
        {"amp": True, "amp_dtype": "float16"},
        {"amp": True, "compile": True, "channels_last": True},
        {"grad_checkpointing": True, "grad_accum_steps": 2},
        {"model_ema": True, "l1_step": "proximal", "clip_grad": 1.0},
    ],
    ids=lambda more: "-".join(more),
)
def test_a_search_trains(images: Path, tmp_path: Path, more) -> None:
    model = searched(images, tmp_path, **more)
    assert next(model.parameters()).is_cuda
    rows = read_summary(tmp_path / "summary.csv")
    assert len(rows) == 2
    assert all(0 < float(row["loss"]) < 5 for row in rows)
    assert vitslim.Masks.load(tmp_path / "masks.safetensors").kinds() == KINDS


def test_the_gpu_learns_what_the_cpu_learns(images: Path, tmp_path: Path) -> None:
    how = {"mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "opt": "momentum", "lr": 0.05}
    on_gpu = searched(images, tmp_path / "gpu", **how)
    on_cpu = searched(images, tmp_path / "cpu", **how, device="cpu")
    for a, b in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_torchrun_with_nccl(images: Path, tmp_path: Path, more) -> None:
    shape = [f"{name}={value}" for name, value in SMALL.items()]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "vitslim"),
            *("search", "vit_tiny_patch16_224", "--model-kwargs", *shape, "--epochs", "2"),
            *("--data", f"folder:{images}", "--batch-size", "8", "--checkpoint-steps", "2"),
            *("--device", "cuda", "--amp", *more, "--output", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(read_summary(tmp_path / "summary.csv")) == 2
