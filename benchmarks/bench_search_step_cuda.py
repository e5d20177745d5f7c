"""What a search step costs on a GPU: forward, loss, penalty, backward and AdamW; time and memory.

All ways of vitslim run on one masked model and one optimizer, so that nothing but the way differs:
"Triton: ..." forces the fused kernels of these ops, the rest being plain torch with masks folded
into the weights. float32 parameters, products in bfloat16 by autocast, as people train.
"""

from contextlib import contextmanager

import models
import pytest
import torch
from baselines import compiled, no_fused_op, the_published_way, with_triton
from floor import Pass
from harness import Absent, Aim, Contender
from shapes import CLASSES, GPU_BATCHES, GPU_DEIT

import vitslim

DTYPE = torch.bfloat16
BATCH = max(GPU_BATCHES)
FLOOR = "timm, no masks, compiled"
PUBLISHED = "masks the published way, fp32"
ALL = ("ragged_attention", "masked_mlp", "gated_layer_norm")
# What to force, and whether to compile around it also.
WAYS = {
    "Triton: attention, MLP, norm": (ALL, True),
    "Triton: attention, norm": (("ragged_attention", "gated_layer_norm"), False),
    "Triton: attention": (("ragged_attention",), True),
}
# ImageNet's training images, times the epochs of the paper's search.
SEARCH_IMAGES = 50 * 1_281_167
PAPER_HOURS = {"S": 43, "B": 71}


@contextmanager
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def resident(step):
    """The contender's option that says what a step keeps in memory."""
    return {"resident_mib": step.resident_mib}


def ways_of_vitslim(masked, batch, optimizer, device, compile_all):
    """Returns every sensible way to make the search step with vitslim."""

    def step(network=None):
        return models.Step(masked, batch, network, DTYPE, optimizer)

    as_it_comes = step()
    calls = {
        "search step": Contender(as_it_comes, ours=True, **resident(as_it_comes)),
        "folded, SDPA": Contender(as_it_comes, no_fused_op, **resident(as_it_comes)),
    }
    for name, (ops, compiles) in WAYS.items():
        calls[name] = with_triton(as_it_comes, ops, device, DTYPE, as_it_comes.resident_mib)
        if compiles and (compile_all or ops == ALL):
            call = step(compiled(masked))
            calls[f"{name}, compiled"] = with_triton(call, ops, device, DTYPE, call.resident_mib)
        elif compiles:
            calls[f"{name}, compiled"] = Absent("compiled for DeiT-S alone, to keep it short")
    call = step(compiled(masked))
    calls["folded, SDPA, compiled"] = Contender(call, no_fused_op, **resident(call))
    return calls


def alternatives(model, published, batch, optimizers):
    """Returns timm without masks, and masks the published way."""

    def contender(owner, network=None, dtype=None, around=None):
        call = models.Step(owner, batch, network, dtype, optimizers[owner])
        return Contender(call, **({"around": around} if around else {}), **resident(call))

    return {
        "timm, no masks": contender(model, dtype=DTYPE),
        FLOOR: contender(model, compiled(model), DTYPE),
        PUBLISHED: contender(published),
        "masks the published way, fp32 with TF32": contender(published, around=tf32),
        "masks the published way, bf16": contender(published, dtype=DTYPE),
    }


@pytest.mark.parametrize("shape", GPU_DEIT, ids=lambda shape: shape.name)
def bench_search_step(compare, gpu, shape):
    # The default said aloud: unsaid and restored by `tf32` differ to torch.compile's guards.
    torch.set_float32_matmul_precision("highest")
    model = models.dense(shape).to(gpu)
    masked, published = vitslim.mask(model), the_published_way(model)
    batch = models.images(BATCH, gpu), torch.randint(0, CLASSES, (BATCH,), device=gpu)
    # A rate that leaves the weights where they are: what is timed must stay finite.
    options = {"lr": 1e-7, "fused": gpu == "cuda"}
    optimizers = {
        each: torch.optim.AdamW(each.parameters(), **options) for each in (model, masked, published)
    }
    ours = ways_of_vitslim(masked, batch, optimizers[masked], gpu, shape == GPU_DEIT[0])
    calls = ours | alternatives(model, published, batch, optimizers)
    names = tuple(ours)
    triton = tuple(name for name in names if name.startswith("Triton"))
    macs = 3 * BATCH * vitslim.cost(model).macs
    name = f"search step {shape.name} batch {BATCH} bf16"
    medians = compare(
        name,
        calls,
        FLOOR,
        {"batch": BATCH, "macs": macs, "dtype": "autocast bfloat16"},
        rounds=5,
        slice_s=0.02,
        device=gpu,
        dtype=DTYPE,
        passes=[Pass(0, macs)],
        images=BATCH,
        aims=[
            Aim("1.02 times the step without masks, compiled", (FLOOR,), 1 / 1.02, names),
            Aim("the same, by Triton's kernels", (FLOOR,), 1 / 1.02, triton),
            Aim("1.02 times its memory", (FLOOR,), 1 / 1.02, names, "peak_mib"),
            Aim("8 times the published way in fp32", (PUBLISHED,), 8.0, names),
        ],
    )
    hours = {key: round(each * SEARCH_IMAGES / BATCH / 3600, 2) for key, each in medians.items()}
    compare.note(gpu_hours_of_50_epochs=hours, gpu_hours_of_the_paper=PAPER_HOURS[shape.name])
    for key, each in hours.items():
        print(
            f"{shape.name}: {key}: {BATCH / medians[key]:.0f} images/s, 50 epochs of ImageNet in "
            f"{each:.1f} GPU hours; the paper: {PAPER_HOURS[shape.name]} on V100"
        )
