"""Rotated models compute the same, and their first dimensions are the best."""

import pytest
import torch
from oneshot_cases import make

import vitslim
from vitslim.oneshot import rotate
from vitslim.plan import BlockPlan, Plan

MODELS = {
    "ViT": ("vit_tiny_patch16_224", {}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_medium_patch16_reg4_gap_256", {}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 1.0}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "normed q and k": ("vit_tiny_patch16_224", {"qk_norm": True}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_rotated_equals_the_model_it_came_from(name, dtype, error, images):
    architecture, options = MODELS[name]
    model = make(architecture, dtype, **options)
    images = images.to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rotated = rotate(model, images)
    other = torch.randn(4, 3, 32, 32, dtype=dtype)
    expected = model(other)
    assert (rotated(other) - expected).abs().max() < error * expected.abs().max()
    assert type(rotated) is type(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    turned = rotated.blocks[0].attn.qkv.weight != model.blocks[0].attn.qkv.weight
    queries, keys, values = turned.chunk(3)
    assert values.any()
    assert bool(queries.any() and keys.any()) == (name != "normed q and k")


@torch.no_grad()
def slim_to(model, dims):
    """Cuts every head of a model to some dimensions."""
    blocks = [BlockPlan([list(dims)] * 3) for _ in model.blocks]
    return vitslim.slim(model, Plan({"model": "", "args": {}}, {}, {}, 1, blocks))


@torch.no_grad()
def test_first_dimensions_are_the_best(model, images):
    rotated = rotate(model, images)
    expected = model.forward_features(images)

    def error(which, dims):
        return float((slim_to(which, dims).forward_features(images) - expected).norm())

    first, last, unturned = (
        error(rotated, range(4)),
        error(rotated, range(4, 8)),
        error(model, range(4)),
    )
    assert first < 0.7 * last
    assert first < 0.8 * unturned


@torch.no_grad()
def test_scores_of_rank_r_are_the_best_there_are(model, images):
    """Eckart-Young: |q k^T - its first r dimensions|, over all pairs of tokens, is the smallest."""
    rotated, seen = rotate(model, images), {}
    for index, each in enumerate((model, rotated)):
        qkv = each.blocks[0].attn.qkv
        qkv.register_forward_hook(lambda _, x, out, index=index: seen.update({index: out}))
        each(images)
    (q, k), (turned_q, turned_k) = (
        [part.unflatten(-1, (3, 8))[:, :, 0] for part in seen[i].chunk(3, -1)[:2]] for i in (0, 1)
    )
    k, turned_k = (each - each.mean(1, keepdim=True) for each in (k, turned_k))
    whole = q.flatten(0, 1) @ k.flatten(0, 1).T
    for rank in (1, 4, 7):
        best = torch.linalg.svdvals(whole)[rank:].norm()
        cut = turned_q.flatten(0, 1)[:, :rank] @ turned_k.flatten(0, 1)[:, :rank].T
        torch.testing.assert_close((whole - cut).norm(), best, rtol=1e-6, atol=1e-9)


def test_a_singular_covariance_is_no_error(images):
    model = make()
    attn = model.blocks[1].attn
    torch.nn.init.zeros_(attn.qkv.weight[24:48].detach())  # keys that are all alike
    torch.nn.init.zeros_(attn.qkv.weight[48:60].detach())  # and values of which some are
    expected, rotated = model(images), rotate(model, images)
    assert (rotated(images) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_refusals_are_one_sentence(model, images):
    with pytest.raises(vitslim.VitslimError, match="7 images are too few for heads 8 wide"):
        rotate(model, images[:7])
    with pytest.raises(vitslim.VitslimError, match="masked or slim already"):
        rotate(vitslim.mask(model).eval(), images)
    model.blocks[1].attn.proj = torch.nn.Sequential(model.blocks[1].attn.proj)
    with pytest.raises(vitslim.VitslimError, match=r"blocks\.1 cannot be rotated: its proj"):
        rotate(model, images)
