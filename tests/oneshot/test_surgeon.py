"""Scores of the optimal brain surgeon: what refitting cannot restore."""

import pytest
import torch
from oneshot_cases import make

import vitslim
from vitslim.oneshot import importance
from vitslim.oneshot.surgeon import removal


def error_without(moments, writes, gone):
    """The least squares error of what all units write, fitted by those that are there."""
    there = [j for j in range(len(moments)) if j not in gone]
    kept = torch.linalg.solve(moments[there][:, there], moments[there] @ writes)
    change = -writes.clone()
    change[there] += kept
    return float((change * (moments @ change)).sum())


def test_costs_are_what_the_best_fit_loses(monkeypatch):
    monkeypatch.setattr("vitslim.oneshot.surgeon._RIDGE", 0.0)
    rows = torch.randn(50, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    moments, writes = rows.T @ rows, torch.randn(12, 5, dtype=torch.float64)
    costs = removal(moments, writes)
    order = costs.argsort().tolist()
    lost = [error_without(moments, writes, order[: n + 1]) for n in range(11)]
    steps = torch.tensor(lost).diff(prepend=torch.zeros(1)).double()
    torch.testing.assert_close(costs[order][:11].cumsum(0), steps.cumsum(0), rtol=1e-3, atol=0)
    # Each is the cheapest that there was.
    for n in range(4):
        others = [error_without(moments, writes, [*order[:n], j]) for j in order[n:]]
        assert min(others) == pytest.approx(lost[n], rel=1e-5)


def test_a_twin_costs_nothing_and_the_last_of_them_much():
    rows = torch.randn(200, 8, dtype=torch.float64)
    rows[:, 4:] = rows[:, :4]
    costs = removal(rows.T @ rows, torch.ones(8, 3, dtype=torch.float64))
    cheap, dear = costs.sort().values.split(4)
    assert cheap.max() < 0.02 * dear.min()


@pytest.mark.parametrize("scale", [1e-8, 1, 1e8])
def test_units_of_any_size_and_fewer_rows_than_units(scale):
    rows = torch.randn(40, 96, dtype=torch.float64) * torch.logspace(-4, 0, 96) * scale
    rows[:, 7] = 0
    costs = removal(rows.T @ rows, torch.randn(96, 24, dtype=torch.float64))
    assert costs.isfinite().all() and costs[7] == costs.min()
    # No unit is worth more than all that it writes.
    alone = rows.square().sum(0) * 1000
    assert (costs <= alone.max()).all()


@pytest.mark.parametrize("seed", range(4))
def test_an_untrained_model_has_finite_scores(seed):
    torch.manual_seed(seed)
    model = make(dtype=torch.float32, weight_init="jax")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.trunc_normal_(module.weight, std=0.02)
    images = torch.randn(40, 3, 32, 32)
    scores = importance(vitslim.rotate(model, images), images)
    assert all(each.isfinite().all() for each in scores.mlp + scores.attention)


def test_steps_of_several_units_are_near_to_one_at_a_time(monkeypatch):
    rows = torch.randn(400, 96, dtype=torch.float64) * torch.linspace(0.1, 1, 96)
    moments, writes = rows.T @ rows, torch.randn(96, 24, dtype=torch.float64)
    one = removal(moments, writes).argsort()[:48]
    monkeypatch.setattr("vitslim.oneshot.surgeon._STEPS", 24)
    several = removal(moments, writes).argsort()[:48]
    assert len(set(one.tolist()) & set(several.tolist())) >= 44


def test_better_than_scores_that_know_of_no_refitting(images):
    model = make(depth=2)
    with torch.no_grad():
        for block in model.blocks:  # hidden units in pairs that are nearly the same
            fc1 = block.mlp.fc1
            fc1.weight[48:] = fc1.weight[:48] + 0.02 * torch.randn(48, 24).double()
            fc1.bias[48:] = fc1.bias[:48]

    def lost(criterion):
        scores = importance(model, images, criterion, kinds=["mlp"])
        plan = vitslim.threshold(model, {"mlp": 0.5}, masks=scores, round_to=1)
        slim = vitslim.slim(model, plan, calibrate=images)
        return float((slim(images) - model(images)).detach().square().mean())

    assert lost("obs") < 0.5 * lost("fisher")


def test_without_a_classifier_and_with_other_granularities(images):
    features = make(num_classes=0)
    assert all(each.isfinite().all() for each in importance(features, images).mlp)
    with pytest.raises(vitslim.VitslimError, match="take fisher"):
        importance(features, images, granularity="uniform")
