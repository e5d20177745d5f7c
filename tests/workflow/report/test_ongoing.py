"""A run that is going on can be looked at: how far it is, its masks and what a cut would give."""

import json
import os
import re
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitslim
from vitslim import Masks
from vitslim.allowed import KINDS
from vitslim.masks import mask_parameters
from vitslim.planning.threshold import budget_name, parse_budget
from vitslim.workflow.report import story
from vitslim.workflow.report.forecast import COLUMNS as FORECAST
from vitslim.workflow.report.ongoing import Progress, masks_so_far, progress
from vitslim.workflow.report.page import report
from vitslim.workflow.report.record import read_record
from vitslim.workflow.runtime.journal import COLUMNS, write_table

BUDGETS = ("macs=60%", "params=1K")


def masked_model(tiny, granularity="head_dim"):
    masked = vitslim.mask(tiny, granularity)
    with torch.no_grad():
        for _, parameter in mask_parameters(masked):
            parameter.copy_(torch.randn_like(parameter))
    return masked


def checkpoint(stage, update, tensors=None, name="model", **args):
    """Writes what a stage leaves behind as it goes: 10 updates an epoch, 6 epochs."""
    folder = stage / "state" / f"step-{update:010d}"
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        save_file(tensors, folder / f"{name}.safetensors")
    facts = {"format": 2, "update": update, "args": {"epochs": 6, **args}}
    facts["facts"] = {"updates_per_epoch": 10}
    (folder / "state.json").write_text(json.dumps(facts))
    return folder


def in_parts(folder):
    """Makes the weights of a checkpoint those of two processes, each with its rows."""
    path = folder / "model.safetensors"
    shards = [{}, {}]
    for name, value in load_file(path).items():
        halves = value.tensor_split(2) if len(value) > 1 else [value]
        for shard, half in zip(shards, halves, strict=False):
            shard[f"model/{name}"] = half.contiguous()
    path.unlink()
    names = [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    facts = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**facts, "files": dict.fromkeys(names, "")}))
    return [folder / name for name in names]


def summary(folder, **epochs):
    """Writes summary.csv with so many epochs of each stage, of 100 seconds each."""
    rows = [
        {"stage": stage, "epoch": e, "loss": 2 / e, "accuracy": 50 + e, "seconds": 100}
        for stage, count in epochs.items()
        for e in range(1, count + 1)
    ]
    write_table(folder / "summary.csv", COLUMNS, rows)


def forecasts(folder):
    rows = [
        {"epoch": epoch, "budget": budget, "accuracy": accuracy}
        for epoch in (1, 2, 3)
        for budget, accuracy in zip(BUDGETS, (40 + epoch, None), strict=True)
    ]
    write_table(folder / "forecast.csv", FORECAST, rows)


@pytest.fixture
def running(tmp_path, tiny):
    """A run in the fourth epoch of its search."""
    budgets = ", ".join(BUDGETS)
    (tmp_path / "args.yaml").write_text(f"model: tiny\nbudget: [{budgets}]\nretrain_epochs: 9\n")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/result.json").write_text('{"accuracy": 60.0, "args": {"epochs": 4}}')
    checkpoint(tmp_path / "search", 34, masked_model(tiny).state_dict(), kinds=["mlp"])
    summary(tmp_path, dense=4, search=3)
    forecasts(tmp_path)
    return tmp_path


def text_of(page):
    html = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text("utf-8"), flags=re.DOTALL)
    return " ".join(html.replace("\N{NO-BREAK SPACE}", " ").split())


def standing(folder):
    record = read_record(folder)
    return story.standing(record.progress, record.read_at)


def pictures(folder):
    return {path.name for path in (folder / "report").glob("*.png")}


def test_running_search_is_shown_with_curves_masks_and_forecast(running):
    text = text_of(report(running))
    assert pictures(running) == {"curves.png", "masks.png", "forecast.png"}
    assert "Search: 3.4 of 6 epochs done, about 4 minutes to go at this speed" in text
    assert "Dense model 4 of 4 finished Search 3.4 of 6 going on" in text
    assert "Retraining, macs=60% 0 of 9 not begun Retraining, params=1K 0 of 9 not begun" in text
    assert "those shown are of update 34" in text and "were after update 34 at which" in text
    assert "before any retraining; dashed, the model before slimming." in text
    assert "Out of reach as the masks stand last: params=1K." in text


def test_forecast_and_dense_accuracy_reach_the_record(running):
    record = read_record(running)
    assert record.dense_accuracy == 60.0
    assert [row["accuracy"] for row in record.forecasts["macs=60%"]] == [41.0, 42.0, 43.0]
    assert [set(row) for row in record.forecasts["params=1K"]] == [{"epoch"}] * 3


@pytest.mark.parametrize("granularity", ["head_dim", "uniform", "head"])
def test_masks_of_a_checkpoint_are_those_of_the_model(tmp_path, tiny, granularity):
    masked = masked_model(tiny, granularity)
    wanted = Masks.of(masked)
    # Distillation holds the model it trains under another name.
    for prefix, update in (("", 1), ("student.", 2)):
        tensors = {prefix + name: value for name, value in masked.state_dict().items()}
        folder = checkpoint(tmp_path, update, tensors)
        for parts in (False, True):
            if parts:
                in_parts(folder)
            masks, when = masks_so_far(tmp_path)
            assert when == f"update {update}"
            for kind in wanted.kinds():
                for ours, theirs in zip(getattr(masks, kind), getattr(wanted, kind), strict=True):
                    assert torch.equal(ours, theirs)


def test_averaged_masks_come_before_those_that_are_trained(tmp_path, tiny):
    trained, averaged = masked_model(tiny), masked_model(tiny)
    checkpoint(tmp_path, 7, trained.state_dict())
    checkpoint(tmp_path, 7, averaged.state_dict(), "ema")
    masks, _ = masks_so_far(tmp_path)
    assert torch.equal(masks.mlp[0], Masks.of(averaged).mlp[0])


@pytest.mark.parametrize(
    "damage", ["gone", "part gone", "cut", "no state.json", "being written", "no masks"]
)
def test_newest_checkpoint_that_can_be_read_is_taken(running, tiny, damage):
    tensors = tiny.state_dict() if damage == "no masks" else masked_model(tiny).state_dict()
    newest = checkpoint(running / "search", 38, tensors, kinds=["mlp"])
    weights = newest / "model.safetensors"
    if damage == "gone":
        weights.unlink()
    elif damage == "part gone":
        in_parts(newest)[1].unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no state.json":
        (newest / "state.json").unlink()
        weights.write_bytes(b"")
    elif damage == "being written":
        newest.rename(newest.with_suffix(".tmp"))
    record = read_record(running)
    assert record.masks_at == "update 34" and record.masks.kinds() == KINDS


def test_lone_search_and_its_result(tmp_path, tiny):
    masked = masked_model(tiny)
    checkpoint(tmp_path, 20, masked.state_dict(), kinds=["mlp"], model="tiny", data="digits")
    summary(tmp_path, search=2)
    forecasts(tmp_path)
    text = text_of(report(tmp_path))
    assert "ViT-Slim report: tiny data: digits This folder holds a search" in text
    assert "This search is not complete. Search: 2 of 6 epochs done" in text
    assert pictures(tmp_path) == {"curves.png", "masks.png", "forecast.png"}
    assert "dashed" not in text

    Masks.of(masked).save(tmp_path / "masks.safetensors")
    args = {"epochs": 6, "kinds": ["mlp"], "model": "tiny"}
    (tmp_path / "result.json").write_text(json.dumps({"accuracy": 55.5, "args": args}))
    text = text_of(report(tmp_path))
    assert "not complete" not in text and "With its masks on, the model reaches 55.50 %." in text
    assert "ended the search" in text


def test_lone_retraining_and_its_result(tmp_path, tiny):
    checkpoint(tmp_path, 20, plan="abc")
    summary(tmp_path, retrain=2)
    text = text_of(report(tmp_path))
    assert "This retraining is not complete. Retraining: 2 of 6 epochs done" in text
    assert "the retrained accuracy and what is kept" in text

    masked = masked_model(tiny)
    slim = vitslim.slim(masked, vitslim.threshold(masked, {"mlp": 0.5}, round_to=1))
    vitslim.save(slim, tmp_path)
    facts = {"retrained": {"accuracy": 77.0}, "cut": {"accuracy": 44.0}, "args": {"plan": "abc"}}
    (tmp_path / "result.json").write_text(json.dumps({**facts, "params": 100, "macs": 1000}))
    text = text_of(report(tmp_path))
    assert "not complete" not in text and "With the budget mlp=0.5 the slim model" in text
    assert "What was kept: mlp=0.5" in text and "44.00 %" in text
    assert {"curves.png", "mlp-mlp-0.5.png"} <= pictures(tmp_path)


def test_stage_inside_a_run_says_where_its_curves_are(running):
    (missing, _) = read_record(running / "search").missing
    assert "those of a stage inside a run are in the folder of the run" in missing


def test_budget_added_to_a_finished_run_is_going_on(running):
    slim = {"name": "macs-60", "budget": {"macs": "60%"}, "retrained": {"accuracy": 70.0}}
    done = {"dense": {"accuracy": 60.0}, "masked": {"accuracy": 58.0}, "slim": [slim]}
    (running / "summary.json").write_text(json.dumps(done))
    checkpoint(running / "retrain/params-1K", 15, plan="abc")
    assert "Retraining, params=1K: 1.5 of 6 epochs done" in standing(running)


@pytest.mark.parametrize("content", ["[", "- 3", "budget: [x, macs=60%]\nepochs: many", "data: 7"])
def test_unreadable_arguments_only_hide_what_they_would_tell(running, content):
    (running / "args.yaml").write_text(content)
    assert "Search: 3.4 of 6 epochs done" in standing(running)


def test_a_stage_that_was_long_silent_has_probably_stopped(running):
    assert "probably stopped" not in standing(running)
    folder = next((running / "search/state").iterdir())
    before = time.time() - 7200
    os.utime(folder, (before, before))
    text = standing(running)
    assert "the last checkpoint was written 2.0 hours before this page." in text
    assert "it has probably stopped: go on with --resume" in text


def test_nothing_is_said_of_a_stage_that_is_done(tmp_path):
    assert story.standing([Progress("search", True, 3)], 0.0) is None
    states = [state for *_, state in story.steps([Progress("dense", False), Progress("x", False)])]
    assert states == ["next", "not begun"]
    assert not progress("search", tmp_path, []).finished
    assert "no checkpoint has been written yet" in story.standing([Progress("dense", False)], 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 seconds"), (150, "2 minutes"), (9000, "2.5 hours"), (1e6, "12 days")],
)
def test_durations_are_rough(seconds, text):
    assert story.duration(seconds) == text


def test_plans_of_a_running_run_are_in_the_order_of_its_budgets(running, tiny):
    for text in (*BUDGETS[:1], "attention=0.5"):
        budget = parse_budget(text)
        plan = vitslim.threshold(masked_model(tiny), budget, round_to=1)
        plan.save(running / "plans" / f"{budget_name(budget)}.json")
    # By name alone attention=0.5, which was not asked for in args.yaml, would be first.
    assert list(read_record(running).plans) == ["macs=60%", "attention=0.5"]


def test_run_whose_model_came_with_weights_is_no_lone_search(running):
    summary(running, search=3)
    assert read_record(running).kind == "run"
