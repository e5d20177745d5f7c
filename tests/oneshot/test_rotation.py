"""Rotated models compute the same, and their first dimensions are the best."""

import pytest
import torch
from oneshot_cases import make

import vitslim
from vitslim.calibration import Images
from vitslim.families import family_of
from vitslim.oneshot import rotate
from vitslim.oneshot.moments import felt, moments_of, roots
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


def test_moments_of_a_rotated_model_are_diagonal_and_fall(model, images, monkeypatch):
    """What Eckart-Young asks for, in the metric of the loss: see the formulas of `rotate`."""
    # What is mixed in has another share of the moments in another basis.
    monkeypatch.setattr("vitslim.oneshot.moments._UNWEIGHTED", 0.0)
    rotated = rotate(model, images)
    family, seen = family_of(rotated, "tested"), Images(images, rotated)
    before = moments_of(model, family, Images(images, model), hidden=False)
    after = moments_of(rotated, family, seen, hidden=False)
    for block, one, other in zip(rotated.blocks, before, after, strict=True):
        torch.testing.assert_close(one.after[0], other.after[0])  # the same loss, the same labels
        for head in range(3):
            q, k = other.queries[head], other.keys[head]
            torch.testing.assert_close(q, k, rtol=1e-6, atol=1e-8 * float(q.max()))
            worth = q.diagonal()
            torch.testing.assert_close(q, worth.diag(), rtol=1e-6, atol=1e-8 * float(q.max()))
            expected = torch.linalg.svdvals(roots(one.queries[head])[0] @ roots(one.keys[head])[0])
            torch.testing.assert_close(worth, expected, rtol=1e-6, atol=0)
            part = slice(8 * head, 8 * head + 8)
            out = other.outputs[part, part]
            torch.testing.assert_close(out, torch.eye(8).double(), rtol=0, atol=1e-7)
            writes = block.attn.proj.weight[:, part].T @ felt(
                family.halves(block)[0], other.after[0]
            )
            gram = writes @ writes.T
            torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-6)
            assert (gram.diagonal().diff() < 0).all()


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
