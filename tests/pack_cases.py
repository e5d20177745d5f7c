"""The models that packing is tested on, and what "the same" means."""

import pytest
import timm.layers
import torch
from test_surgery import MODELS, images, make, random_plan, randomised

import vitslim

MORE = {
    "no pool": ("ViT", {"global_pool": ""}),
    "avgmax": ("ViT", {"global_pool": "avgmax"}),
    "max": ("ViT", {"global_pool": "max", "fc_norm": False}),
    "prr": ("ViT", {"global_pool": "prr"}),
    "prefix in the pool": (
        "ViT",
        {"global_pool": "avg", "pool_include_prefix": True},
    ),
    "features": ("ViT", {"num_classes": 0}),
    "no final norm": ("ViT", {"final_norm": False}),
    "registers beside a class token": ("ViT", {"reg_tokens": 3}),
    "positions of patches alone": (
        "ViT",
        {"reg_tokens": 2, "no_embed_class": True},
    ),
    "no positions": ("ViT", {"pos_embed": "none"}),
    "no biases": ("ViT", {"qkv_bias": False, "proj_bias": False}),
    "layer scale": ("ViT", {"init_values": 0.3}),
    "one channel": ("ViT", {"in_chans": 1}),
    "oblong patches": ("ViT", {"img_size": (15, 28), "patch_size": (5, 4)}),
    "a rim that no patch covers": ("ViT", {"img_size": (35, 44)}),
    "dropout": ("ViT", {"pos_drop_rate": 0.5, "drop_path_rate": 0.5}),
    "patch dropout": ("ViT", {"patch_drop_rate": 0.5}),
    "two classifiers without classes": ("DeiT distilled", {"num_classes": 0}),
    "one block": ("ViT", {"depth": 1}),
}
for _act in ("gelu_tanh", "quick_gelu", "silu", "relu"):
    MORE[_act] = ("ViT", {"act_layer": _act})
KINDS = {name: (name, {}) for name in MODELS} | MORE
# Absent from older timm, or the class token gets lost there.
NEWER = ("prr", "no positions")


def dense(name, **kwargs):
    if name in NEWER and not hasattr(timm.layers, "AttentionPoolPrr"):
        pytest.skip(f"timm {timm.__version__} is too old for {name}")
    base, extra = KINDS[name]
    return make(base, **(extra | kwargs))


def photographs(model, batch=2):
    channels = model.patch_embed.proj.in_channels
    return images(model, batch)[:, :channels].contiguous()


def slimmed(name="ViT", seed=0, **kwargs):
    masked = randomised(dense(name, **kwargs))
    return vitslim.slim(masked, random_plan(masked, seed))


def assert_same(packed, model, x, tolerance=1e-5):
    """Compares logits and features; the model is asked in eval mode."""
    with torch.no_grad():
        for actual, expected in (
            (packed(x), model(x)),
            (packed.forward_features(x), model.forward_features(x)),
        ):
            assert actual.shape == expected.shape and actual.dtype == expected.dtype
            difference = (actual - expected).abs().max()
            assert difference <= tolerance * expected.abs().max(), difference
