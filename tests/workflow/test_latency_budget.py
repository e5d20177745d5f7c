"""A latency budget: the largest plan whose measured share of the dense time is small enough."""

import pytest

import vitslim
from vitslim.errors import VitslimError
from vitslim.workflow import latency_budget
from vitslim.workflow.latency_budget import plan_for


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which half the time goes with the MACs and half is always there."""

    def measure(models, batch_sizes, seconds):
        dense = vitslim.cost(models["dense"]).macs
        times = {name: 0.5 + 0.5 * vitslim.cost(m).macs / dense for name, m in models.items()}
        return {name: {str(batch_sizes[0]): time} for name, time in times.items()}

    monkeypatch.setattr(latency_budget, "measure", measure)


def test_the_share_is_met_and_nearly_used_up(tiny, clock) -> None:
    masked = vitslim.mask(tiny)
    plan = plan_for(masked, {"latency": "80%"}, round_to=1)
    share = plan.reached["macs"] / vitslim.cost(tiny).macs
    assert 0.55 < share <= 0.6
    assert plan.budget == {"latency": "80%"}


def test_other_budgets_need_no_clock(tiny) -> None:
    masked = vitslim.mask(tiny)
    assert plan_for(masked, {"macs": "70%"}) == vitslim.threshold(masked, {"macs": "70%"})


def test_what_no_plan_reaches_is_refused_with_the_best_one(tiny, clock) -> None:
    with pytest.raises(VitslimError, match=r"40% of the dense.*out of reach.*fastest"):
        plan_for(vitslim.mask(tiny), {"latency": 0.4}, round_to=1)


def test_latency_stands_alone(tiny) -> None:
    with pytest.raises(VitslimError, match="stands alone"):
        plan_for(vitslim.mask(tiny), {"latency": "50%", "mlp": 0.5})
