"""Nothing is lost: stages that were killed, stopped or short of disk end as if nothing had been."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitslim.workflow.training.loop as loop_module
import vitslim.workflow.training.state as state_module
from vitslim.errors import VitslimError
from vitslim.workflow.data.batches import Data
from vitslim.workflow.evaluate import evaluate
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.runtime.context import StageContext
from vitslim.workflow.runtime.interrupt import Stopped
from vitslim.workflow.runtime.world import World
from vitslim.workflow.training.state import StageFolder
from vitslim.workflow.training.train import open_stage, train

HERE = Path(__file__).parent


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_change_neither_masks_nor_weights(images: Path, tmp_path: Path, kills: int) -> None:
    command = [sys.executable, HERE / "kill_stages.py", tmp_path, images, str(kills), "0"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for stage in ("search", "retrain"):
        assert told[stage]["kills"] >= kills
        assert told[stage]["finished"] >= 1
        assert told[stage]["different"] == []


@pytest.fixture
def steps() -> object:
    """Five updates an epoch, a checkpoint after every second one, and everything random on."""
    return settings_for(
        "dense",
        {"epochs": 2, "batch_size": 256, "checkpoint_steps": 2, "device": "cpu", "drop_path": 0.2},
    )


def trained(model, settings, folder, world, **more):
    context = StageContext("dense", settings, world, folder, resume=True)
    stage = open_stage(context, {})
    outcome = train(model, context, stage, **more)
    return {name: value.clone() for name, value in outcome.model.state_dict().items()}


def starting_anew(model):
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def again():
        model.load_state_dict(start)
        return model

    return again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_update_saves_and_says_how_to_go_on(
    tiny, steps, world, tmp_path, monkeypatch, number
) -> None:
    again = starting_anew(tiny)
    whole = trained(again(), steps, tmp_path / "whole", world)
    given = Data.epoch

    def interrupted(self, epoch, start=0):
        for index, batch in enumerate(given(self, epoch, start)):
            if (epoch, index) == (1, 2):
                signal.raise_signal(number)
            yield batch

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Data, "epoch", interrupted)
        trained(again(), steps, tmp_path / "broken", world)
    # Five updates in the first epoch, and the third of the second one is finished.
    steps_of_an_epoch = (tmp_path / "broken/state").glob("step-*")
    assert max(int(path.name.removeprefix("step-")) for path in steps_of_an_epoch) == 8
    assert "after update 8 of 10" in str(stopped.value)
    assert str(stopped.value).endswith("--resume auto")
    resumed = trained(again(), steps, tmp_path / "broken", world)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_signal_while_evaluating_saves_first_and_evaluates_when_gone_on_with(
    tiny, steps, world, tmp_path, monkeypatch
) -> None:
    again = starting_anew(tiny)
    averaged = dataclasses.replace(steps, model_ema=True, model_ema_decay=0.5)
    whole = trained(again(), averaged, tmp_path / "whole", world)
    looked = []

    def look(model, data, row):
        """Evaluates a second time, as a forecast does; the signal comes in the second epoch."""
        if row["epoch"] == 2 and not looked:
            looked.append(row)
            signal.raise_signal(signal.SIGTERM)
        evaluate(model, data, world, averaged)

    with pytest.raises(Stopped, match="after update 10 of 10"):
        trained(again(), averaged, tmp_path / "broken", world, after=look)
    context = StageContext("dense", averaged, world, tmp_path / "broken", resume=True)
    state = open_stage(context, {}).latest()[0]
    assert (state.update, len(state.facts["rows"]), state.accuracy) == (10, 1, None)
    told = []
    resumed = trained(
        again(), averaged, tmp_path / "broken", world, after=lambda *row: told.append(row[2])
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["epoch"] for row in told] == [2]
    assert {n: told[0][n] for n in ("loss", "accuracy")} == {
        n: looked[0][n] for n in ("loss", "accuracy")
    }


def test_a_signal_to_the_whole_group_ends_a_search_that_has_workers(images, tmp_path) -> None:
    """They leave the signal to the main process, and end with it."""
    command = [
        *(sys.executable, "-m", "vitslim", "search", "vit_tiny_patch16_224", "--device", "cpu"),
        *("--data", f"folder:{images}", "--output", str(tmp_path / "out"), "--workers", "1"),
        *("--model-kwargs", "img_size=8", "patch_size=4", "embed_dim=16", "depth=1", "num_heads=2"),
        *("num_classes=2", "--batch-size", "4", "--epochs", "10000"),
    ]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, process_group=0
    )
    try:
        # Workers of training and of evaluation are there after an epoch.
        assert any("epoch 1/" in line for line in run.stdout)
        os.killpg(run.pid, signal.SIGTERM)
        told, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0
    assert "which is saved in" in told


def test_a_full_disk_is_told_and_training_goes_on(
    tiny, steps, world, tmp_path, monkeypatch, capsys
) -> None:
    again = starting_anew(tiny)
    whole = trained(again(), steps, tmp_path / "whole", world)
    write, calls = state_module._write_file, []

    def full(path, data):
        calls.append(path)
        if path.parent.name.startswith("step-0000000005"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(state_module, "_write_file", full)
    with_trouble = trained(again(), steps, tmp_path / "full", world)
    told = [line for line in capsys.readouterr().out.splitlines() if "could not be written" in line]
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert calls
    assert all(torch.equal(whole[name], with_trouble[name]) for name in whole)
    assert not list((tmp_path / "full").rglob("*.tmp"))


def test_a_signal_on_a_full_disk_does_not_say_that_it_was_saved(
    tiny, steps, world, tmp_path, monkeypatch
) -> None:
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_module, "_write_file", full)
    with pytest.raises(VitslimError, match=r"after update 5 of 10, which could not be saved"):
        trained(tiny, steps, tmp_path, world, after=lambda *_: signal.raise_signal(signal.SIGTERM))


def test_the_most_accurate_epoch_is_kept_beside_the_newest_checkpoints(
    tiny, steps, world, tmp_path, monkeypatch
) -> None:
    accuracies = iter([10.0, 30.0, 20.0, 15.0])
    monkeypatch.setattr(loop_module, "evaluate", lambda *_: next(accuracies))
    settings = dataclasses.replace(steps, epochs=4, checkpoint_keep=1, checkpoint_steps=0)
    context = StageContext("dense", settings, world, tmp_path, resume=True)
    stage = open_stage(context, {})
    outcome = train(tiny, context, stage, keep_best=True)
    assert outcome.best == {"epoch": 2, "accuracy": 30.0}
    kept = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert kept == ["step-0000000010", "step-0000000020"]
    best = torch.nn.utils.parameters_to_vector(outcome.best_model.parameters())
    last = torch.nn.utils.parameters_to_vector(outcome.model.parameters())
    assert not torch.equal(best, last)
    saved = stage.at(10)
    assert torch.equal(saved.tensors["model"]["head.weight"], outcome.best_model.head.weight)


def test_the_model_of_another_epoch_is_not_given_for_the_best(
    tiny, steps, world, tmp_path, monkeypatch
) -> None:
    """The checkpoint of the best epoch could not be written; there is one of a good one."""
    accuracies = iter([10.0, 30.0, 90.0, 20.0])
    monkeypatch.setattr(loop_module, "evaluate", lambda *_: next(accuracies))
    write = state_module._write_file

    def full(path, data):
        if path.parent.name.startswith("step-0000000015"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(state_module, "_write_file", full)
    settings = dataclasses.replace(steps, epochs=4, checkpoint_steps=0)
    context = StageContext("dense", settings, world, tmp_path)
    outcome = train(tiny, context, open_stage(context, {}), keep_best=True)
    assert outcome.best == {"epoch": 3, "accuracy": 90.0}
    assert outcome.best_model is None


def test_processes_that_see_different_things_stop(tiny, steps, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(World, "agree", lambda self, number: False)
    world = World(torch.device("cpu"))
    with pytest.raises(VitslimError, match=r"do not see the same in .*: give an --output"):
        trained(tiny, steps, tmp_path, world)
    with pytest.raises(VitslimError, match="do not see the same"):
        open_stage(StageContext("dense", steps, world, tmp_path, resume=True), {})


def test_data_that_has_changed_is_refused(tiny, steps, world, tmp_path) -> None:
    folder = StageFolder(tmp_path, {})
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny,
            StageContext("dense", steps, world, tmp_path),
            folder,
            after=lambda *_: (
                signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT)
            ),
        )
    other = dataclasses.replace(steps, batch_size=128)
    with pytest.raises(VitslimError, match="an epoch had 5 updates and has 11"):
        train(tiny, StageContext("dense", other, world, tmp_path), folder)
