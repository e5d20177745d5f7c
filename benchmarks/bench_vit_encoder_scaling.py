"""How the packed encoder's time grows with the batch and with the tokens; plots.py draws it."""

import models
import peak
import pytest
import torch
from shapes import BATCH_SIZES, ENCODER_DEIT, IMAGES

import vitslim

# One size tells the shape of the curves.
SHAPE = ENCODER_DEIT[min(1, len(ENCODER_DEIT) - 1)]
ROUNDS = 5
PATCH = 16


@pytest.mark.parametrize("batch", BATCH_SIZES)
def bench_batch_size(compare, batch):
    _compare(compare, f"vit_encoder batch size {SHAPE.name} {batch:02}", batch, None)


@pytest.mark.parametrize("image", IMAGES)
def bench_tokens(compare, image):
    tokens = (image // PATCH) ** 2 + 1
    _compare(compare, f"vit_encoder tokens {SHAPE.name} {tokens:03}", 1, image)


def _compare(compare, name, batch, image):
    dense = models.dense(SHAPE, image).eval()
    slim, _ = models.slim_at_60(models.searched(dense).eval())
    x = models.images(batch, image=image)
    called = {"packed slim": slim, "packed dense": dense, "timm dense": dense}
    packed = {name: vitslim.pack(model) for name, model in list(called.items())[:2]}
    calls = {**called, **packed}
    info = {
        "batch": batch,
        "tokens": dense.patch_embed.num_patches + 1,
        "macs_of": {
            # Of what is done: the packed model leaves out rows of the last block.
            label: batch * (peak.macs_done(model) if label in packed else vitslim.cost(model).macs)
            for label, model in called.items()
        },
    }
    with torch.inference_mode():
        compare(
            name,
            {label: lambda m=model: m(x) for label, model in calls.items()},
            "timm dense",
            info,
            rounds=ROUNDS,
            images=batch,
            slice_s=0.1,
            settle_s=0.02,
        )
