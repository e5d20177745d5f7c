"""A whole slim model on a GPU in bfloat16 against the dense one, both as they are and compiled.

The slim model keeps 60% of the MACs and all tokens, so the ratio of the MACs is what a perfect
implementation would gain. At batch 1 launches cost more than kernels: there both also run
compiled to CUDA graphs (mode="reduce-overhead").
"""

import models
import pytest
import torch
from baselines import compiled, no_fused_op, with_triton
from floor import Pass
from harness import Absent, Aim, Contender
from shapes import GPU_BATCHES, GPU_DEIT

import vitslim

OP = "ragged_attention"
DTYPE = torch.bfloat16
GRAPHS = {"mode": "reduce-overhead"}


@pytest.mark.parametrize("batch", GPU_BATCHES)
@pytest.mark.parametrize("shape", GPU_DEIT, ids=lambda shape: shape.name)
def bench_inference(compare, gpu, shape, batch):
    dense = models.dense(shape).eval()
    slim, ratio = models.slim_at_60(models.searched(dense).eval())
    cost = vitslim.cost(slim)
    dense, slim = dense.to(gpu, DTYPE), slim.to(gpu, DTYPE)
    x = models.images(batch, gpu, DTYPE)
    large = batch == max(GPU_BATCHES)

    def slim_way(model):
        return with_triton(lambda: model(x), [OP], gpu, DTYPE)

    def dense_way(model):
        return Contender(lambda: model(x))

    def padded_way(model):
        return Contender(lambda: model(x), no_fused_op)

    calls = {
        "slim, Triton": slim_way(slim),
        "slim, Triton, compiled": slim_way(compiled(slim)),
        "slim": Contender(lambda: slim(x), ours=True),
        "slim, heads padded for SDPA": padded_way(slim),
        "timm dense": dense_way(dense),
        "timm dense, compiled": dense_way(compiled(dense)),
    }
    if large:
        calls["slim, heads padded for SDPA, compiled"] = padded_way(compiled(slim))
    else:
        calls["slim, Triton, CUDA graphs"] = slim_way(compiled(slim, **GRAPHS))
        calls["timm dense, CUDA graphs"] = dense_way(compiled(dense, **GRAPHS))
        if shape != GPU_DEIT[0]:
            for name in ("slim, Triton, compiled", "timm dense, compiled"):
                calls[name] = Absent("compiled to CUDA graphs alone, to keep the suite short")
    ours = tuple(name for name in calls if name.startswith("slim, Triton"))
    rivals = tuple(name for name in calls if name.startswith("timm dense, "))
    aims = [Aim("0.9 of the MACs ratio, dense compiled", rivals, 0.9 * ratio, ours)]
    with torch.inference_mode():
        medians = compare(
            f"model inference {shape.name} batch {batch} bf16",
            calls,
            "timm dense, compiled" if large else "timm dense, CUDA graphs",
            {"batch": batch, "macs_ratio": round(ratio, 3), "dtype": "bfloat16"},
            rounds=9,
            slice_s=0.02,
            device=gpu,
            dtype=DTYPE,
            passes=[Pass(DTYPE.itemsize * cost.params, cost.macs * batch)],
            images=batch,
            aims=aims if large else (),
        )
    for name in ours:
        if name in medians:
            gained = min(medians[rival] for rival in rivals if rival in medians) / medians[name]
            print(
                f"{shape.name} batch {batch}: {name}: {gained:.2f} times the best dense one, "
                f"{gained / ratio:.2f} of the MACs ratio {ratio:.3f}"
            )
