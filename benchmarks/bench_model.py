"""A whole slim model against the dense one and against the other ways to run it.

The slim model keeps 60% of the MACs; its heads differ in width as after a search, because every
head and every layer draws its own level. Tokens are all kept, so the ratio of the MACs is what a
perfect implementation would gain.
"""

from dataclasses import replace

import models
import pytest
import torch
from baselines import compiled, no_fused_op
from harness import Contender
from shapes import BATCHES, DEIT

import vitslim

PADDED = "slim, heads padded for SDPA"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", DEIT, ids=lambda shape: shape.name)
def bench_inference(compare, shape, batch):
    dense = models.dense(shape).eval()
    masked = models.searched(dense).eval()
    slim, ratio = models.slim_at_60(masked)
    x = models.images(batch)
    contenders = {
        "slim": slim,
        "timm dense": dense,
        "timm dense, torch.compile": compiled(dense),
        "masked": masked,
        PADDED: slim,
        "slim, torch.compile": compiled(slim),
    }
    cost = vitslim.cost(slim)
    info = {
        "batch": batch,
        "macs": cost.macs * batch,
        "bytes": 4 * cost.params,
        "macs_ratio": round(ratio, 3),
    }
    with torch.inference_mode():
        calls = {name: Contender(lambda m=model: m(x)) for name, model in contenders.items()}
        calls[PADDED] = replace(calls[PADDED], around=no_fused_op)
        name = f"model inference {shape.name} batch {batch}"
        medians = compare(name, calls, "timm dense", info, rounds=9)
    gained = medians["timm dense"] / medians["slim"] / ratio
    print(f"{shape.name} batch {batch}: {gained:.2f} of the MACs ratio {ratio:.3f} is realised")
