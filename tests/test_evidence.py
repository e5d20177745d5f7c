"""The evidence on photos: its rivals keep what they say, its cells and tables all come about."""

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitslim
from vitslim import VitslimError

ROOT = Path(__file__).parent.parent
DENSE = {
    "img_size": 28,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 2,
    "init_values": 1.0,
}


@pytest.fixture
def evidence(monkeypatch):
    """Imports a module of the study by name."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.evidence.{name}")


@pytest.fixture
def data(tmp_path):
    """Two classes in three splits: 20, 3 and 2 images of each."""
    generator = np.random.default_rng(0)
    splits = {"train": 20, "val": 3, "test": 2}
    for (split, count), (label, name) in itertools.product(
        splits.items(), enumerate(("dark", "light"))
    ):
        folder = tmp_path / "things" / split / name
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 128, (30, 30, 3)) + 127 * label
            Image.fromarray(pixels.astype("uint8")).save(folder / f"{index}.png")
    return tmp_path / "things"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch14_dinov2", **DENSE).eval()


@pytest.fixture
def run(evidence, data, model, tmp_path, capsys):
    """Runs a study of one budget, and returns what it says and what it has gathered."""
    vitslim.save(model, tmp_path / "dense")

    def run(*options, dense=True):
        given = ["--data", f"folder:{data}", "--output", str(tmp_path / "out"), *options]
        given += ["--dense", str(tmp_path / "dense")] if dense else []
        given += ["--calibration", "36", "--batch-size", "8", "--budgets", "50", "--seeds", "0"]
        evidence("study").main(given)
        gathered = json.loads((tmp_path / "out/evidence-things.json").read_text())
        return capsys.readouterr().out.splitlines(), gathered

    return run


@pytest.mark.parametrize("budget", [90, 70, 50])
def test_even_widths_fill_the_budget_with_the_best_of_every_head(evidence, model, budget):
    scores = vitslim.importance(model, criterion="random")
    plan = evidence("widths").even_widths(model, scores, budget)
    share = 100 * plan.reached["macs"] / vitslim.cost(model).macs
    assert budget - 2 < share <= budget
    assert plan.reached["macs"] == vitslim.cost(vitslim.slim(model, plan)).macs
    (width,) = {len(head) for block in plan.blocks for head in block.heads}
    assert len({len(block.hidden) for block in plan.blocks}) == 1
    assert plan.blocks[1].heads[0] == sorted(scores.attention[1][0].topk(width).indices.tolist())


def test_photos_are_limited_by_class_and_shown_as_the_model_was_trained(
    evidence, data, model, tmp_path
):
    photos = evidence("photos").Photos(data, tmp_path / "links", 12, 2)
    assert photos.facts == {
        "data": "things",
        "held_out": "val + test",
        "classes": 2,
        "train_images": 24,
        "held_out_images": 8,
    }
    shown = evidence("photos").Shown(photos, model)
    images, labels = shown.held_out
    assert images.shape == (8, 3, 28, 28)
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert images[labels == 1].min() > images[labels == 0].mean()
    some, same, other = (shown.calibration(20, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(some, same) and not torch.equal(some, other)


def test_data_without_held_out_images_is_refused(evidence, tmp_path):
    with pytest.raises(VitslimError, match="no folders train and val"):
        evidence("photos").Photos(tmp_path, tmp_path / "links")


def test_order_begins_with_ours_and_ends_with_other_seeds(evidence):
    cells = evidence("cells")
    order = cells.in_order([0, 1, 2], [60, 50], [50], [50], [1, 3])
    names = [cell.name for cell in order]
    assert names[:4] == [
        "dense-0-100-cut",
        "ours-0-60-refitted",
        "ours-0-50-refitted",
        "torch-pruning-0-50-cut",
    ]
    assert len(set(names)) == len(names)
    seeds = [cell.seed for cell in order]
    assert seeds.index(1) == 1 + seeds[1:].count(0)
    first = order[seeds.index(1) :][:4]
    assert [(cell.method, cell.seed) for cell in first] == [("ours", 1)] * 2 + [("ours", 2)] * 2
    only = cells.in_order([0], [50], [50], [50], [1], only=["taylor"])
    assert {cell.method for cell in only} == {"dense", "taylor"}


def test_every_cell_comes_about_and_none_twice(evidence, run, model, tmp_path):
    pytest.importorskip("torch_pruning")
    said, first = run("--epochs", "1", "--minutes", "0")
    assert len(said) == 1 and not first["cells"]
    assert said[0].startswith("stopped after 0 minutes, before cell 1 of")
    said, whole = run("--epochs", "1")
    methods = evidence("methods").METHODS
    assert len(said) == len(whole["cells"])
    assert {cell["method"] for cell in whole["cells"]} == {"dense", *methods}
    dense = vitslim.cost(model).macs
    for cell in whole["cells"]:
        assert 0 <= cell["accuracy"] <= 100 and cell["packed"]
        if cell["method"] != "dense":
            assert 0.42 < cell["macs"] / dense <= 0.5
            assert cell["seconds"]
        if cell["epochs"]:
            assert cell["lr"] == {"cut": 5e-5, "refitted": 2e-5}[cell["way"]] or (
                cell["method"] == "scratch"
            )
    said, again = run("--epochs", "1", "--only", "ours")
    assert not said and again["cells"] == whole["cells"]
    assert str(tmp_path) not in json.dumps(again)
    with pytest.raises(VitslimError, match="another recipe"):
        run("--retrain-lr", "1e-3")


def test_a_dense_model_is_fine_tuned_where_there_is_none(run, tmp_path):
    options = ("--model", "test_vit", "--image-size", "32", "--dense-epochs", "1")
    said, found = run(*options, "--only", "magnitude", "--retrain-budgets", dense=False)
    assert [line.split()[1] for line in said[-3:]] == [
        "dense-0-100-cut:",
        "magnitude-0-50-cut:",
        "magnitude-0-50-refitted:",
    ]
    assert vitslim.load(tmp_path / "out/dense").num_classes == 2
    assert found["about"]["macs"] == vitslim.cost(vitslim.load(tmp_path / "out/dense")).macs


def test_even_widths_out_of_reach_are_refused(evidence, model):
    scores = vitslim.importance(model, criterion="random")
    with pytest.raises(VitslimError, match="30% of the MACs is out of reach"):
        evidence("widths").even_widths(model, scores, 30)


@pytest.fixture
def whole(evidence):
    """A study of two seeds with invented figures."""
    order = evidence("cells").in_order([0, 1], [60, 50], [60, 50], [50], [1, 3])
    about = {"data": "things", "held_out": "val", "classes": 2, "train_images": 9}
    about |= {"held_out_images": 4, "calibration_images": 5, "macs": 2e9, "params": 3e6}
    about |= {"machine": "m", "threads": 1, "torch": "2", "commit": "c", "date": "d"}
    cells = []
    for cell in order:
        accuracy = 90.0 if cell.method in ("dense", "ours") else 40.0
        spent = {"cut": 60.0, "retraining": 120.0 * cell.epochs}
        found = {"accuracy": accuracy + 2 * cell.seed, "seconds": spent}
        cells.append({**cell._asdict(), **found, **({"lr": 1e-5} if cell.epochs else {})})
    return {"about": about, "cells": cells}


def test_tables_tell_mean_range_and_minutes(evidence, whole):
    results = evidence("results").Results(whole)
    text = "\n".join(evidence("tables").sections(results))
    assert "Dense: **90.0%**, 2.00 G MACs" in text
    assert "| ours | 91.0 (90.0–92.0) | 91.0 (90.0–92.0) | 1.0 |" in text  # noqa: RUF001
    assert "| method | start | no epoch | 1 epoch | 3 epochs | rate |" in text
    row = next(line for line in text.splitlines() if line.startswith("| from scratch"))
    assert row == (
        "| from scratch | as it is after the cut | - | 41.0 (40.0–42.0), 3.0 min | "  # noqa: RUF001
        "41.0 (40.0–42.0), 7.0 min | 1e-05 |"  # noqa: RUF001
    )


def test_tables_and_pictures_are_written(evidence, whole, tmp_path, monkeypatch):
    path = tmp_path / "evidence-things.json"
    path.write_text(json.dumps(whole))
    arguments = ["tables", str(path), "--into", str(tmp_path / "into")]
    monkeypatch.setattr("sys.argv", arguments)
    evidence("tables").main()
    sizes = {each.name: each.stat().st_size for each in (tmp_path / "into").iterdir()}
    ends = (".json", ".md", ".png", "-time.png")
    assert sorted(sizes) == sorted(f"evidence-things{end}" for end in ends)
    assert all(10_000 < sizes[name] < 300_000 for name in sizes if name.endswith("png"))
