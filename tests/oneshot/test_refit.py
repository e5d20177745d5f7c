"""Refitting after a cut: what it minimises, how near it comes, bad input."""

import random

import pytest
import torch
from oneshot_cases import make

import vitslim
from vitslim.calibration import Images, felt_tokens, refit
from vitslim.calibration.ridge import Moments, put_weights, weights_of
from vitslim.families import family_of
from vitslim.masks import mask_parameters
from vitslim.plan import BlockPlan, Plan


def plan_of(blocks):
    return Plan({"model": "", "args": {}}, {}, {}, 1, blocks)


def narrow(model, heads=5, hidden=60, tokens=None, seed=0):
    """Keeps so many dimensions of every head, hidden units and patches, drawn by chance."""
    rng = random.Random(seed)
    blocks, alive = [], list(range(16))
    for index, _ in enumerate(model.blocks):
        if tokens is not None and index:
            alive = sorted(rng.sample(alive, tokens[index]))
        blocks.append(
            BlockPlan(
                [sorted(rng.sample(range(8), heads)) for _ in range(3)],
                sorted(rng.sample(range(96), hidden)),
                None if tokens is None else list(alive),
            )
        )
    return plan_of(blocks)


def loss(slim, model, images):
    return float((slim(images) - model(images)).square().mean())


@torch.no_grad()
def test_ridge_is_the_minimum_of_its_loss():
    layer = torch.nn.Linear(6, 3).double()
    x, y, w = torch.randn(50, 6).double(), torch.randn(50, 3).double(), torch.rand(50).double()
    moments = Moments(layer)
    for part in (slice(0, 20), slice(20, 50)):
        moments.add(x[part], y[part], w[part])
    start, strength = weights_of(layer), 0.1
    solved = moments.solve(start, strength)
    columns = torch.cat([x, torch.ones(50, 1)], 1)
    ridge = (columns.square() * w[:, None]).sum(0)

    def value(weights):
        rows = ((columns @ weights - y).square() * w[:, None]).sum()
        return rows + strength * (ridge[:, None] * (weights - start).square()).sum()

    weights = solved.clone().requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(value(weights), weights)[0]
    assert slope.abs().max() < 1e-5 * ridge.max()
    put_weights(layer, solved)
    torch.testing.assert_close(layer(x), columns @ solved)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ridge_of_columns_that_are_the_same_or_never_there(dtype):
    layer = torch.nn.Linear(8, 3).to(dtype)
    x = torch.randn(500, 8)
    x[:, 4:6], x[:, 6:] = x[:, :2], 0
    moments = Moments(layer)
    moments.add(x.to(dtype), (x @ torch.ones(8, 3)).to(dtype), torch.ones(500, dtype=dtype))
    solved = moments.solve(weights_of(layer), 1e-9)
    assert solved.isfinite().all()
    torch.testing.assert_close(solved[6:8], weights_of(layer)[6:8])
    error = x @ solved[:8].float() + solved[8].float() - x.sum(1, keepdim=True)
    assert error.abs().max() < (1e-2 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"init_values": 0.5}),
        ("vit_tiny_patch16_224", {"proj_bias": False, "qkv_bias": False}),
        ("vit_medium_patch16_reg4_gap_256", {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_a_refitted_model_is_nearer_to_the_dense_one(name, options, images):
    model = make(name, **options)
    plan = narrow(model)
    plain, refitted = vitslim.slim(model, plan), vitslim.slim(model, plan, calibrate=images)
    fresh = torch.randn(40, 3, 32, 32, dtype=torch.float64)
    assert loss(refitted, model, images) < 0.5 * loss(plain, model, images)
    assert loss(refitted, model, fresh) < 0.8 * loss(plain, model, fresh)
    assert vitslim.cost(refitted) == vitslim.cost(plain)


def test_units_that_others_can_make_up_for_cost_nothing(images):
    """Twins of hidden units are cut, and refitting gives their share to those that stay."""
    model = make()
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        mlp.fc1.weight[48:] = mlp.fc1.weight[:48]
        mlp.fc1.bias[48:] = mlp.fc1.bias[:48]
    plan = plan_of([BlockPlan(), BlockPlan(None, list(range(48)), None), BlockPlan()])
    slim = vitslim.slim(model, plan)
    assert loss(slim, model, images) > 1e-3
    refit(slim, model, Images(images, model), strengths=(1e-12,))
    assert loss(slim, model, images) < 1e-10


def test_after_a_search_and_the_removal_of_tokens(model, images):
    masked = vitslim.mask(model, token_start="one").eval()
    for _, parameter in mask_parameters(masked):
        torch.nn.init.uniform_(parameter, 0.7, 1.3)
    plan = narrow(model, tokens=(16, 12, 8))
    plain = vitslim.slim(masked, plan)
    for target in (None, model):
        refitted = vitslim.slim(masked, plan, calibrate=images, target=target)
        goal = masked if target is None else target
        assert loss(refitted, goal, images) < 0.8 * loss(plain, goal, images)
        assert [len(b.tokens.keep) for b in refitted.blocks] == [16, 12, 8]


def test_states_on_disk_and_any_batches_give_the_same(model, images):
    plan = narrow(model)
    whole, spilled = vitslim.slim(model, plan), vitslim.slim(model, plan)
    refit(whole, model, Images(images, model, 8), strengths=(1e-3,))
    refit(spilled, model, Images(list(images.split(8)), model, 8), strengths=(1e-3,), memory=0)
    for one, other in zip(whole.parameters(), spilled.parameters(), strict=True):
        assert torch.equal(one, other)
    halves = vitslim.slim(model, plan)
    refit(halves, model, Images(images, model, 5), strengths=(1e-3,))
    torch.testing.assert_close(whole(images), halves(images), rtol=1e-8, atol=1e-8)


def test_fewer_images_are_taken_evenly(model, images, labels):
    whole = Images([(images[i : i + 7], labels[i : i + 7]) for i in range(0, 40, 7)], model, 4)
    some = whole.evenly(10)
    assert (some.count, whole.count, whole.evenly(50).count) == (10, 40, 40)
    taken = torch.cat([batch for batch, _ in some])
    assert torch.equal(taken, images[3::4])
    assert torch.equal(torch.cat([each for _, each in some]), labels[3::4])


def test_what_the_loss_feels_of_tokens(model, images):
    felt = felt_tokens(model, family_of(model, "tested"), Images(images, model))
    assert [len(block) for block in felt] == [2, 2, 2]
    last = felt[2][1]
    assert last[0] > 0 and not last[1:].any()  # the head reads the class token alone
    assert all((each > 0).all() for block in felt[:2] for each in block)
    plan = narrow(model)
    near, alike = vitslim.slim(model, plan), vitslim.slim(model, plan)
    refit(near, model, Images(images, model), felt=felt)
    refit(alike, model, Images(images, model))
    assert loss(near, model, images) < loss(alike, model, images)


def test_a_block_of_somebody_elses_is_left_alone(images):
    class Doubled(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, **options):
            return 2 * self.block(x, **options)

    model = make()
    keep = narrow(model).blocks
    model.blocks[1] = Doubled(model.blocks[1]).eval()
    plan = plan_of([keep[0], BlockPlan(), keep[2]])
    plain, refitted = vitslim.slim(model, plan), vitslim.slim(model, plan, calibrate=images)
    assert loss(refitted, model, images) < 0.8 * loss(plain, model, images)
    for verb in (vitslim.rotate, vitslim.importance):
        with pytest.raises(vitslim.VitslimError, match=r"blocks\.1.*it is a .*Doubled"):
            verb(model, images)


def test_nothing_changes_but_the_copy(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = {name: p.requires_grad_(False) for name, p in model.named_parameters()}
    slim = vitslim.slim(model, narrow(model), calibrate=images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert frozen and not any(p.requires_grad for p in slim.parameters())
    for module in (*model.modules(), *slim.modules()):
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_other_dtypes(model, images, dtype):
    half, plan = model.to(dtype), narrow(model)
    plain = vitslim.slim(half, plan)
    refitted = vitslim.slim(half, plan, calibrate=images.to(dtype))
    assert refitted.blocks[0].mlp.fc2.weight.dtype == dtype
    assert loss(refitted, half, images.to(dtype)) < 0.6 * loss(plain, half, images.to(dtype))
    small = vitslim.compress(half, images.to(dtype), "macs=60%")
    assert small(images.to(dtype)).isfinite().all()


def test_bad_input_is_one_sentence(model, images):
    plan = narrow(model)
    for data, sentence in [
        (images[:5], "5 images are too few for heads 8 wide"),
        (images[:, :1], "1 x 32 x 32, and the model takes 3 x 32 x 32"),
        (images.float(), "torch.float32 and the model torch.float64"),
        (images[:1].repeat(40, 1, 1, 1), "all alike"),
        (images * torch.nan, "not finite"),
        (iter([images]), "a list or DataLoader"),
    ]:
        with pytest.raises(vitslim.VitslimError, match=sentence):
            vitslim.slim(model, plan, calibrate=data)
    with pytest.raises(vitslim.VitslimError, match="they must be alike"):
        vitslim.slim(model, plan, calibrate=images, target=make(depth=2))
    with pytest.raises(vitslim.VitslimError, match="target is in training mode"):
        vitslim.slim(model, plan, calibrate=images, target=make().train())
    with pytest.raises(vitslim.VitslimError, match="call model"):
        vitslim.slim(model.train(), plan, calibrate=images)
