"""States of a stage: whole or absent, damage told in a sentence, changed arguments named."""

from pathlib import Path

import pytest
import torch

from vitslim.errors import VitslimError
from vitslim.workflow.training.state import StageFolder, State


def _state(update: int, accuracy: float | None = None) -> State:
    tensors = {"model": {"w": torch.full((3,), float(update))}}
    return State(update, tensors, {"rows": [update]}, accuracy)


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    folder = StageFolder(tmp_path / "search", {"lr": 0.1, "scale": (0.5, 1.0)})
    for update in (1, 2, 3):
        folder.save(_state(update))
    return folder


def test_the_newest_state_comes_back_and_two_are_kept(folder: StageFolder) -> None:
    state, trouble = folder.latest()
    assert trouble is None
    assert state.update == 3
    assert state.facts == {"rows": [3]}
    assert torch.equal(state.tensors["model"]["w"], torch.full((3,), 3.0))
    names = sorted(path.name for path in (folder.path / "state").iterdir())
    assert names == ["step-0000000002", "step-0000000003"]


def test_a_state_that_was_being_written_is_ignored_and_written_anew(folder: StageFolder) -> None:
    half = folder.path / "state" / "step-0000000004.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert folder.latest()[0].update == 3
    folder.save(_state(4))
    assert folder.latest()[0].update == 4
    assert not half.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("data", [b"", b"foreign", None], ids=["empty", "foreign", "truncated"])
def test_a_damaged_state_falls_back_to_the_one_before(folder, name, data) -> None:
    path = folder.path / "state" / "step-0000000003" / name
    path.write_bytes(path.read_bytes()[:-2] if data is None else data)
    state, trouble = folder.latest()
    assert state.update == 2
    assert "step-0000000003 is damaged" in trouble


def test_an_edited_number_is_noticed(folder: StageFolder) -> None:
    path = folder.path / "state" / "step-0000000003" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert "truncated or was edited" in folder.latest()[1]


def test_nothing_whole_left_is_one_sentence(folder: StageFolder) -> None:
    for path in folder.path.glob("state/*/state.json"):
        path.unlink()
    with pytest.raises(VitslimError, match=r"is damaged.*no older checkpoint.*start again"):
        folder.latest()


def test_changed_arguments_are_listed(folder: StageFolder) -> None:
    changed = StageFolder(folder.path, {"lr": 0.2, "scale": (0.5, 1.0), "opt": "sgd"})
    with pytest.raises(VitslimError, match=r"lr was 0\.1 and is now 0\.2; opt was None and is now"):
        changed.latest()
    assert StageFolder(folder.path, {"lr": 0.1, "scale": [0.5, 1.0]}).latest()[0].update == 3


def test_a_result_ends_the_stage(folder: StageFolder) -> None:
    folder.finish({"accuracy": 97.5})
    assert folder.result()["accuracy"] == 97.5
    assert not (folder.path / "state").exists()
    with pytest.raises(VitslimError, match="lr was"):
        StageFolder(folder.path, {"lr": 1}).result()
    (folder.path / "result.json").write_text("[1")
    with pytest.raises(VitslimError, match="Cannot read"):
        folder.result()


def test_the_most_accurate_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path, {}, keep=1)
    for update, accuracy in ((1, 50.0), (2, None), (3, 70.0), (4, None), (5, 60.0), (6, None)):
        folder.save(_state(update, accuracy))
    assert folder.at(3).accuracy == 70.0
    assert folder.latest()[0].update == 6
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["step-0000000003", "step-0000000006"]


def test_a_damaged_checkpoint_does_not_crowd_out_those_that_follow(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path, {}, keep=2)
    folder.save(_state(5, 50.0))
    folder.save(_state(10, 90.0))
    (tmp_path / "state/step-0000000010/model.safetensors").write_bytes(b"cut")
    state, trouble = folder.latest()
    assert state.update == 5
    assert "step-0000000010 is damaged" in trouble
    assert folder.at(10) is None
    folder.keep = 1
    for update, accuracy in ((6, 60.0), (7, None)):
        folder.save(_state(update, accuracy))
        newest, trouble = folder.latest()
        assert (newest.update, trouble) == (update, None)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "step-0000000006",
        "step-0000000007",
    ]


def test_a_checkpoint_is_there_while_one_of_the_same_update_replaces_it(
    tmp_path: Path, monkeypatch
) -> None:
    folder = StageFolder(tmp_path, {}, keep=1)
    folder.save(_state(5, None))
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        folder.save(_state(5, 70.0))
    assert (folder.latest()[0].update, folder.latest()[0].accuracy) == (5, None)
    folder.save(_state(5, 70.0))
    assert (folder.latest()[0].update, folder.latest()[0].accuracy) == (5, 70.0)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-0000000005"]


def test_a_state_is_copied_before_it_is_written(tmp_path: Path) -> None:
    folder, state = StageFolder(tmp_path, {}), _state(1)
    write = folder.writer(state)
    state.tensors["model"]["w"].zero_()
    state.facts["rows"].append("later")
    write()
    read = folder.latest()[0]
    assert torch.equal(read.tensors["model"]["w"], torch.ones(3))
    assert read.facts == {"rows": [1]}
