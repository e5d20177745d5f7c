"""Scores without training: what they are, that units of loss are units of loss, bad input."""

import pytest
import torch
import torch.nn.functional as F

import vitslim
from vitslim.allowed import CRITERIA
from vitslim.masks import mask_parameters
from vitslim.oneshot import importance


@pytest.mark.parametrize("granularity", ["head_dim", "uniform", "head"])
def test_taylor_is_half_the_squared_gradient_of_masks_at_one(model, images, labels, granularity):
    images, labels = images[:3], labels[:3]
    masked = vitslim.mask(model, granularity, token_start="one")
    parameters = [parameter for _, parameter in mask_parameters(masked)]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(masked(image[None]), label[None])
        for total, slope in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total += slope.square()
    names = [name for name, _ in mask_parameters(masked)]
    scores = importance(model, (images, labels), "taylor", kinds=None, granularity=granularity)
    for name, total in zip(names, sums, strict=True):
        index, kind = int(name.split(".")[1]), name.split(".")[2]
        kind = {"attn": "attention", "mlp": "mlp", "tokens": "token"}[kind]
        found = getattr(scores, kind)[index]
        expected = total / 6
        if kind == "token":
            # The slope of the raw value, tanh(raw) / tanh(3), is that of the gate times this.
            raw = torch.tensor(3.0, dtype=torch.float64)
            expected = expected / ((1 - raw.tanh() ** 2) / raw.tanh()) ** 2
        torch.testing.assert_close(found.double(), expected.expand_as(found), rtol=1e-5, atol=1e-12)


def test_fisher_is_taylor_with_labels_of_the_models_own(model, images):
    scores = importance(model, images, "fisher", seed=4)
    generator = torch.Generator().manual_seed(4)
    drawn = torch.cat(
        [
            torch.multinomial(model(piece).softmax(-1), 1, generator=generator)[:, 0]
            for piece in (images[:32], images[32:])
        ]
    )
    expected = importance(model, (images, drawn), "taylor")
    found, wanted = (each.attention + each.mlp for each in (scores, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_scores_do_not_depend_on_batches(model, images, labels):
    whole = importance(model, (images, labels), "taylor", kinds=None)
    loader = [(images[i : i + 7], labels[i : i + 7]) for i in range(0, 40, 7)]
    pieces = importance(model, loader, "taylor", kinds=None, batch_size=4)
    for kind in ("attention", "mlp", "token"):
        for one, other in zip(getattr(whole, kind), getattr(pieces, kind), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-12)


def test_activation_is_what_units_give(model, images):
    scores = importance(model, images, "activation", kinds=None)
    seen = {}
    model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, x: seen.update(hidden=x[0]))
    model.blocks[1].attn.proj.register_forward_pre_hook(lambda _, x: seen.update(out=x[0]))
    model(images)
    hidden = seen["hidden"].square().mean((0, 1)).sqrt().float()
    out = seen["out"].square().mean((0, 1)).sqrt().float().view(3, 8)
    torch.testing.assert_close(scores.mlp[1], hidden)
    torch.testing.assert_close(scores.attention[1], out)
    assert scores.token[1].shape == (16,)


def test_magnitude_is_the_norm_of_a_units_weights(model):
    scores = importance(model, criterion="magnitude")
    mlp = model.blocks[0].mlp
    parts = [mlp.fc1.weight[3], mlp.fc1.bias[3:4], mlp.fc2.weight[:, 3]]
    assert scores.mlp[0][3] == pytest.approx(torch.cat(parts).detach().norm().item())
    assert scores.token == [None] * 3


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_gives_a_plan_and_leaves_the_model_alone(model, images, labels, criterion):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = hooks_of(model)
    scores = importance(model, (images, labels), criterion, kinds=None)
    for ranking in ("fractions", "macs"):
        plan = vitslim.threshold(model, "macs=60%", masks=scores, round_to=1, ranking=ranking)
        assert vitslim.cost(vitslim.slim(model, plan)).macs <= 0.601 * vitslim.cost(model).macs
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks == hooks_of(model)


def hooks_of(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x, y: (x.float(), y), "float32 and the model torch.float64"),
        (lambda x, y: ((x * 50).byte(), y), "bytes are divided by 255"),
        (lambda x, y: (x[:, :, :24], y), "3 x 24 x 32, and the model takes 3 x 32 x 32"),
        (lambda x, y: (x * 100, y), "never normalised"),
        (lambda x, y: (x / 0, y), "not finite"),
        (lambda x, y: (x[:1].expand(40, -1, -1, -1), y), "all alike"),
        (lambda x, y: (x, y + 1), "5 classes, 0 to 4"),
        (lambda x, y: (x, y[:-1]), "one an image"),
        (lambda x, y: (x, y.double()), "integers"),
        (lambda x, y: x, "taylor needs labels"),
        (lambda x, y: "folder", "not a str"),
        (lambda x, y: None, "looks at images"),
        (lambda x, y: (x.to("meta"), y), "on meta and the model on cpu"),
    ],
)
def test_bad_images_are_one_sentence(model, images, labels, change, sentence):
    with pytest.raises(vitslim.VitslimError, match=sentence):
        importance(model, change(images, labels), "taylor")


def test_bad_models_and_words_are_one_sentence(model, images):
    with pytest.raises(vitslim.VitslimError, match="no criterion is called 'hessian'"):
        importance(model, images, "hessian")
    with pytest.raises(vitslim.VitslimError, match="scores no kind called 'token'"):
        importance(model, criterion="magnitude", kinds=["token"])
    with pytest.raises(vitslim.VitslimError, match="masked or slim already"):
        importance(vitslim.mask(model).eval(), images)
    with pytest.raises(vitslim.VitslimError, match="training mode"):
        importance(model.train(), images)
