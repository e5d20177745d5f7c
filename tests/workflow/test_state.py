"""States of a stage: whole or absent, damage told in a sentence, changed arguments named."""

import json
from pathlib import Path

import pytest
import torch

from vitslim.errors import VitslimError
from vitslim.workflow.state import StageFolder, State, pack_optimizer, unpack_optimizer


def _state(epoch: int) -> State:
    return State(epoch, {"model": {"w": torch.full((3,), float(epoch))}}, {"rows": [epoch]})


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    folder = StageFolder(tmp_path / "search", {"lr": 0.1, "scale": (0.5, 1.0)})
    for epoch in (1, 2, 3):
        folder.save(_state(epoch))
    return folder


def test_the_newest_state_comes_back_and_two_are_kept(folder: StageFolder) -> None:
    state, trouble = folder.latest()
    assert trouble is None
    assert state.epoch == 3
    assert state.facts == {"rows": [3]}
    assert torch.equal(state.tensors["model"]["w"], torch.full((3,), 3.0))
    names = sorted(path.name for path in (folder.path / "state").iterdir())
    assert names == ["epoch-0002", "epoch-0003"]


def test_a_state_that_was_being_written_is_ignored_and_written_anew(folder: StageFolder) -> None:
    half = folder.path / "state" / "epoch-0004.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert folder.latest()[0].epoch == 3
    folder.save(_state(4))
    assert folder.latest()[0].epoch == 4
    assert not half.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("data", [b"", b"foreign", None], ids=["empty", "foreign", "truncated"])
def test_a_damaged_state_falls_back_to_the_one_before(folder, name, data) -> None:
    path = folder.path / "state" / "epoch-0003" / name
    path.write_bytes(path.read_bytes()[:-2] if data is None else data)
    state, trouble = folder.latest()
    assert state.epoch == 2
    assert "epoch-0003 is damaged" in trouble


def test_an_edited_number_is_noticed(folder: StageFolder) -> None:
    path = folder.path / "state" / "epoch-0003" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert "truncated or was edited" in folder.latest()[1]


def test_nothing_whole_left_is_one_sentence(folder: StageFolder) -> None:
    for path in folder.path.glob("state/*/state.json"):
        path.unlink()
    with pytest.raises(VitslimError, match=r"is damaged.*no older state.*start again"):
        folder.latest()


def test_changed_arguments_are_listed(folder: StageFolder) -> None:
    changed = StageFolder(folder.path, {"lr": 0.2, "scale": (0.5, 1.0), "opt": "sgd"})
    with pytest.raises(VitslimError, match=r"lr was 0\.1 and is now 0\.2; opt was None and is now"):
        changed.latest()
    assert StageFolder(folder.path, {"lr": 0.1, "scale": [0.5, 1.0]}).latest()[0].epoch == 3


def test_a_result_ends_the_stage(folder: StageFolder) -> None:
    folder.finish({"accuracy": 97.5})
    assert folder.result()["accuracy"] == 97.5
    assert not (folder.path / "state").exists()
    with pytest.raises(VitslimError, match="lr was"):
        StageFolder(folder.path, {"lr": 1}).result()
    (folder.path / "result.json").write_text("[1")
    with pytest.raises(VitslimError, match="Cannot read"):
        folder.result()


@pytest.mark.parametrize("opt", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_continues_bit_for_bit(opt) -> None:
    def steps(parameter, optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (parameter**3).sum().backward()
            optimizer.step()

    options = {"lr": 0.1, **({"momentum": 0.9} if opt is torch.optim.SGD else {})}
    whole = torch.nn.Parameter(torch.linspace(0.1, 1, 5))
    first = opt([whole], **options)
    steps(whole, first, 2)
    live, facts = pack_optimizer(first)
    tensors = {name: value.clone() for name, value in live.items()}
    resumed = torch.nn.Parameter(whole.detach().clone())
    second = opt([resumed], **options)
    unpack_optimizer(second, tensors, json.loads(json.dumps(facts)))
    steps(whole, first, 2)
    steps(resumed, second, 2)
    assert torch.equal(whole, resumed)
