"""The forecast says what cutting now would give, and costs a search neither its model nor a row."""

import copy

import pytest
import torch

import vitslim
from vitslim import Masks
from vitslim.masks import mask_parameters
from vitslim.planning.threshold import threshold
from vitslim.workflow.options.choices import PlanOptions
from vitslim.workflow.report.forecast import COLUMNS, Forecast
from vitslim.workflow.runtime.journal import Journal, read_table, write_table

BUDGETS = {"macs-60": {"macs": "60%"}, "attention-0.5": {"attention": 0.5}}


@pytest.fixture
def searched(tiny):
    masked = vitslim.mask(tiny)
    with torch.no_grad():
        for _, parameter in mask_parameters(masked):
            parameter.copy_(torch.rand_like(parameter))
    return masked


def forecast(folder, budgets=BUDGETS, quiet=False, fold=True):
    return Forecast(
        budgets, PlanOptions(round_to=1, fold=fold), folder, Journal("search", None, quiet)
    )


def params(model):
    return float(vitslim.cost(model).params)


def test_every_budget_gets_the_model_that_its_plan_makes(searched, tmp_path):
    seen = []
    rows = forecast(tmp_path)(searched, 1, lambda model: seen.append(model) or 50.0)
    images = torch.randn(2, 1, 8, 8)
    for budget, model, row in zip(BUDGETS.values(), seen, rows, strict=True):
        plan = threshold(searched, budget, round_to=1)
        wanted = vitslim.slim(searched, plan).eval()
        assert torch.equal(model.eval()(images), wanted(images))
        assert (row["params"], row["macs"]) == tuple(vitslim.cost(wanted))
    assert rows[1]["attention"] == 0.5 and rows[1]["mlp"] == rows[1]["token"] == 1.0


def test_folding_is_passed_on(searched, tmp_path):
    seen = []
    for fold in (True, False):
        forecast(tmp_path, fold=fold)(searched, 1, lambda model: seen.append(model) or 50.0)
    assert not torch.equal(seen[0].blocks[0].mlp.fc2.weight, seen[2].blocks[0].mlp.fc2.weight)


def test_the_searched_model_stays_as_it_is(searched, tmp_path):
    before = copy.deepcopy(searched.state_dict())
    searched.train()
    forecast(tmp_path)(searched, 1, lambda model: float(model.eval()(torch.ones(1, 1, 8, 8)).sum()))
    assert searched.training and Masks.of(searched).kinds()
    assert all(torch.equal(before[name], value) for name, value in searched.state_dict().items())


def test_rows_are_on_disk_after_every_epoch(searched, tmp_path, capsys):
    ours = forecast(tmp_path)
    for epoch in (1, 2):
        ours(searched, epoch, lambda _: 97.5)
        rows = read_table(tmp_path / "forecast.csv")
        assert len(rows) == 2 * epoch and tuple(rows[0]) == COLUMNS
    assert [row["budget"] for row in rows[:2]] == ["macs=60%", "attention=0.5"]
    assert (
        "if you stopped now: macs=60% -> 97.5 %, attention=0.5 -> 97.5 %" in capsys.readouterr().out
    )


def test_going_on_replaces_rows_and_drops_later_ones(searched, tmp_path):
    first = forecast(tmp_path)
    for epoch in (1, 2, 3):
        first(searched, epoch, lambda _: 1.0)
    forecast(tmp_path)(searched, 2, lambda _: 2.0)
    rows = read_table(tmp_path / "forecast.csv")
    assert [(row["epoch"], row["accuracy"]) for row in rows] == [
        *[("1", "1.0")] * 2,
        *[("2", "2.0")] * 2,
    ]


def test_another_budget_of_the_same_epoch_stays(searched, tmp_path):
    forecast(tmp_path)(searched, 1, lambda _: 1.0)
    forecast(tmp_path, {"mlp-0.5": {"mlp": 0.5}})(searched, 1, lambda _: 2.0)
    rows = read_table(tmp_path / "forecast.csv")
    assert [row["budget"] for row in rows] == ["macs=60%", "attention=0.5", "mlp=0.5"]


def test_budget_out_of_reach_is_an_empty_cell_and_one_line(searched, tmp_path, capsys):
    budgets = {"params-1": {"params": "1"}, **BUDGETS}
    rows = forecast(tmp_path, budgets)(searched, 1, params)
    assert rows[0]["accuracy"] is None and rows[1]["accuracy"] > 0
    row = read_table(tmp_path / "forecast.csv")[0]
    assert row["budget"] == "params=1" and set(row.values()) == {"1", "params=1", ""}
    out = capsys.readouterr().out
    assert out.count("params=1 cannot be met now: params 1 is out of reach") == 1
    assert "params=1 -> out of reach, macs=60% -> " in out


def test_latency_is_left_out_and_said_once(searched, tmp_path, capsys):
    ours = forecast(tmp_path, {"latency-60": {"latency": "60%"}, **BUDGETS})
    for epoch in (1, 2):
        assert len(ours(searched, epoch, params)) == 2
    assert capsys.readouterr().out.count("latency=60%") == 1


def test_nothing_to_forecast_writes_nothing(searched, tmp_path, capsys):
    ours = forecast(tmp_path, {"latency-60": {"latency": "60%"}})
    assert ours(searched, 1, params) == [] and not list(tmp_path.iterdir())
    assert "if you stopped" not in capsys.readouterr().out


def test_other_processes_evaluate_and_write_nothing(searched, tmp_path, capsys):
    seen = []
    rows = forecast(tmp_path, quiet=True)(searched, 1, lambda model: seen.append(model) or 3.0)
    assert len(rows) == len(seen) == 2
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_half_a_row_of_an_earlier_file_is_no_obstacle(searched, tmp_path):
    write_table(tmp_path / "forecast.csv", COLUMNS, [{"epoch": "", "budget": "macs=60%"}])
    with (tmp_path / "forecast.csv").open("a") as file:
        file.write("x")
    forecast(tmp_path)(searched, 1, params)
    assert len(read_table(tmp_path / "forecast.csv")) == 2
