"""The proximal step: closed forms, the lasso's own solution, and zeros that are zeros."""

import math

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import vitslim
from vitslim.masks import mask_parameters, mask_weights
from vitslim.workflow.training.proximal import Proximal

SPREADS = ("kind", "unit", "mac")
ADAMS = ("adam", "adamw", "nadamw", "lamb", "adan")


@pytest.fixture
def masked(tiny):
    model = vitslim.mask(tiny)
    torch.manual_seed(0)
    for _, parameter in mask_parameters(model):
        nn.init.uniform_(parameter, -1, 1)
    return model


def masks_of(model):
    return [parameter for _, parameter in mask_parameters(model)]


def optimizer_of(model, name="momentum", lr=0.1, **options):
    group = {"params": masks_of(model), "weight_decay": 0.0}
    unclipped = {"max_grad_norm": None} if name == "lamb" else {}
    return create_optimizer_v2([group], name, lr=lr, **unclipped, **options)


def with_gradients(model, gradient):
    for parameter in masks_of(model):
        parameter.grad = gradient(parameter)


@pytest.mark.parametrize("per", SPREADS)
def test_without_a_loss_a_step_of_sgd_is_the_gradient_of_the_penalty(masked, per):
    for parameter in masks_of(masked):
        parameter.data.add_(0.5 * parameter.sign())  # farther from zero than the step goes
    penalty = vitslim.sparsity_loss(masked, 0.1, 0.2, 0.3, per)
    gradients = torch.autograd.grad(penalty, masks_of(masked))
    pairs = zip(masks_of(masked), gradients, strict=True)
    expected = [parameter.detach() - 0.1 * gradient for parameter, gradient in pairs]
    optimizer = optimizer_of(masked, momentum=0.0)
    with_gradients(masked, torch.zeros_like)
    optimizer.step()
    Proximal(masked, optimizer, 0.1, 0.2, 0.3, per).step()
    for parameter, wanted in zip(masks_of(masked), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted)


def test_a_step_on_a_quadratic_is_soft_thresholding(masked):
    optimizer = optimizer_of(masked, momentum=0.0)
    parts = mask_weights(masked, 0.5, 2.0, 0.0)
    moved = [part.parameter.detach() - 0.1 * (part.parameter.detach() - 0.2) for part, _ in parts]
    with_gradients(masked, lambda p: p.detach() - 0.2)
    optimizer.step()
    Proximal(masked, optimizer, 0.5, 2.0, 0.0).step(scale=0.5)
    for (part, weight), z in zip(parts, moved, strict=True):
        t = 0.1 * 0.5 * weight
        wanted = torch.where(z > t, z - t, torch.where(z < -t, z + t, 0.0))
        torch.testing.assert_close(part.parameter.detach(), wanted)
    assert all((part.parameter == 0).any() for part, w in parts if w > 1)


@pytest.mark.parametrize("name", ADAMS)
def test_adams_metric_is_that_of_its_own_step(masked, name):
    optimizer = optimizer_of(masked, name, lr=1e-3)
    for _ in range(3):
        with_gradients(masked, torch.randn_like)
        optimizer.step()
    before = [p.detach().clone() for p in masks_of(masked)]
    Proximal(masked, optimizer, 0.1, 0.1, 0.0).step()
    beta, eps = optimizer.param_groups[0]["betas"][-1], optimizer.param_groups[0]["eps"]
    for parameter, old in zip(masks_of(masked), before, strict=True):
        if parameter.dim() == 1 and len(parameter) == 4:
            assert torch.equal(parameter, old)  # token gates, which weigh nothing here
            continue
        v = optimizer.state[parameter]["exp_avg_sq"] / (1 - beta**3)
        wanted = old.sign() * (old.abs() - 1e-3 * 0.1 / (v.sqrt() + eps)).clamp(min=0)
        torch.testing.assert_close(parameter.detach(), wanted)


@pytest.mark.parametrize(
    ("name", "lr", "options"),
    [
        ("momentum", 0.05, {"momentum": 0.0}),
        ("momentum", 0.01, {"momentum": 0.9}),
        ("momentum", 0.02, {"momentum": 0.9, "dampening": 0.5}),
        ("sgd", 0.01, {"momentum": 0.9}),
        *((name, 0.05, {}) for name in ADAMS),
        ("adamw", 0.05, {"amsgrad": True}),
    ],
)
def test_training_ends_at_the_lasso_with_exact_zeros(masked, name, lr, options):
    torch.manual_seed(1)
    masks = [part for part, _ in mask_weights(masked) if part.kind != "token"]
    goals = [torch.randn_like(part.parameter) for part in masks]
    curves = [torch.rand_like(part.parameter) + 0.5 for part in masks]
    optimizer = optimizer_of(masked, name, lr, **options)
    proximal = Proximal(masked, optimizer, 0.4, 0.3, 0.0)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / 600)) / 2
        for part, goal, curve in zip(masks, goals, curves, strict=True):
            part.parameter.grad = curve * (part.parameter.detach() - goal)
        optimizer.step()
        proximal.step()
    for part, goal, curve in zip(masks, goals, curves, strict=True):
        edge = {"attention": 0.4, "mlp": 0.3}[part.kind] / curve
        wanted = goal.sign() * (goal.abs() - edge).clamp(min=0)
        torch.testing.assert_close(part.parameter.detach(), wanted, atol=0.02, rtol=0)
        gone = goal.abs() < 0.9 * edge
        assert gone.any()
        assert (part.parameter[gone] == 0).all()
        assert (part.parameter[goal.abs() > 1.2 * edge] != 0).all()


def test_masks_that_the_loss_does_not_feel_go_to_zero_under_adam(masked):
    optimizer = optimizer_of(masked, "adamw", lr=1e-3)
    with_gradients(masked, torch.zeros_like)
    optimizer.step()
    Proximal(masked, optimizer).step()
    assert all((parameter == 0).all() for parameter in masks_of(masked))


def test_token_gates_close_for_good(masked):
    optimizer = optimizer_of(masked, momentum=0.0)
    proximal = Proximal(masked, optimizer, 0.0, 0.0, 0.1)
    raws = [part.parameter for part, _ in mask_weights(masked) if part.kind == "token"]
    others = [p.detach().clone() for p in masks_of(masked) if not any(p is raw for raw in raws)]
    for _ in range(200):
        with_gradients(masked, torch.zeros_like)
        optimizer.step()
        proximal.step()
    assert all((raw == 0).all() for raw in raws)
    left = [p for p in masks_of(masked) if not any(p is raw for raw in raws)]
    assert all(torch.equal(a, b) for a, b in zip(left, others, strict=True))


def test_no_weight_no_step_and_untrained_masks_stay(masked):
    trained, *others = masks_of(masked)
    before = [p.detach().clone() for p in masks_of(masked)]
    optimizer = torch.optim.SGD([trained], lr=0.1)
    proximal = Proximal(masked, optimizer)
    proximal.step(scale=0.0)
    assert torch.equal(trained, before[0])
    proximal.step()
    assert not torch.equal(trained, before[0])
    assert all(torch.equal(a, b) for a, b in zip(others, before[1:], strict=True))


def test_a_mask_that_adam_has_not_moved_stays(masked):
    optimizer = optimizer_of(masked, "adamw")
    before = [p.detach().clone() for p in masks_of(masked)]
    Proximal(masked, optimizer).step()
    assert all(torch.equal(a, b) for a, b in zip(masks_of(masked), before, strict=True))


def test_a_restored_optimiser_goes_on_with_its_own_rates(masked):
    optimizer = optimizer_of(masked, momentum=0.0)
    proximal = Proximal(masked, optimizer, 1.0, 1.0, 0.0)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.0
    optimizer.load_state_dict(state)
    before = [p.detach().clone() for p in masks_of(masked)]
    proximal.step()
    assert all(torch.equal(a, b) for a, b in zip(masks_of(masked), before, strict=True))


NO_METRIC = ["lion", "rmsprop", "adafactor", "novograd", "sgdp", "adopt", "radam", "nadam", "adamp"]


@pytest.mark.parametrize("name", [*NO_METRIC, "lookahead_adamw"])
def test_an_optimiser_without_a_known_metric_is_refused(masked, name):
    with pytest.raises(vitslim.VitslimError, match="use --l1-step subgradient, or --opt adamw"):
        Proximal(masked, optimizer_of(masked, name))


@pytest.mark.parametrize(
    ("name", "named"), [("lambc", "Lamb with max_grad_norm"), ("cnadamw", "NAdamW with caution")]
)
def test_what_changes_the_steps_of_a_known_optimiser_is_refused(masked, name, named):
    with pytest.raises(vitslim.VitslimError, match=named):
        Proximal(masked, optimizer_of(masked, name))


def test_a_model_without_masks_is_refused(tiny):
    with pytest.raises(vitslim.VitslimError, match="no masks to penalise"):
        Proximal(tiny, torch.optim.SGD(tiny.parameters(), lr=0.1))
