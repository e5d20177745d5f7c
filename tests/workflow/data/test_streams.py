"""Streams: WebDataset shards written by hand, in any number of workers and processes."""

import io
import logging
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from trouble import trouble_of

from vitslim.errors import VitslimError
from vitslim.workflow.data.batches import Data, open_data
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.runtime.world import World

pytest.importorskip("webdataset", reason="pip install webdataset")

CPU = torch.device("cpu")


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    """Four shards of eight images to train on and two of four held out, dark and light in turns."""
    root = tmp_path / "shards"
    root.mkdir()
    for split, count in (("train", 4), ("val", 2)):
        files = [
            (f"{file.parent.name}{file.stem}", file.read_bytes(), int(file.parent.name == "light"))
            for file in sorted((images / split).glob("*/*.png"), key=lambda f: (f.stem, f.parent))
        ]
        for number in range(count):
            with tarfile.open(root / f"{split}-{number}.tar", "w") as tar:
                for name, content, label in files[number::count]:
                    _add(tar, f"{name}.png", content)
                    _add(tar, f"{name}.cls", str(label).encode())
    return root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _model() -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes)


def _open(shards: Path, world: World | None = None, **more: Any) -> Data:
    given = {
        "data": "wds/shards",
        "data_dir": str(shards),
        "train_split": "train-{0..3}.tar",
        "val_split": "val-{0..1}.tar",
        "train_num_samples": 32,
        "batch_size": 8,
        "workers": 1,
    }
    return open_data(settings_for("retrain", {**given, **more}), _model(), world or World(CPU))


def _epoch(data: Data, epoch: int = 0, start: int = 0) -> Tensor:
    return torch.stack([images for images, _ in data.epoch(epoch, start)])


def test_an_epoch_of_a_stream_can_be_replayed_and_begun_at_any_batch(shards: Path) -> None:
    data = _open(shards)
    assert data.steps == 4
    assert data.num_classes == 2
    first = _epoch(data)
    assert first.shape == (4, 8, 3, 8, 8)
    assert not torch.equal(_epoch(data, epoch=1), first)
    # In a new run, whatever was drawn before, and with the loader's own process for 0 workers.
    again = _open(shards, workers=0)
    torch.manual_seed(5)
    assert torch.equal(_epoch(again), first)
    assert torch.equal(_epoch(again, start=3), first[3:])


def test_processes_and_workers_train_on_shards_of_their_own_in_every_epoch(shards: Path) -> None:
    plain = {"no_aug": True, "reprob": 0.0, "batch_size": 4, "workers": 2}
    ranks = [_open(shards, World(CPU, rank, 2), **plain) for rank in range(2)]
    shares = [
        [{tuple(i.flatten().tolist()) for i in _epoch(data, epoch).flatten(0, 1)} for data in ranks]
        for epoch in range(3)
    ]
    for first, second in shares:
        assert len(first) == len(second) == 16
        assert not first & second
    # Which shards they are changes.
    assert any(first != shares[0][0] for first, _ in shares)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_held_out_images_of_a_stream_are_seen_once(shards: Path, workers: int, size: int) -> None:
    batches = [
        torch.cat(
            [images for images, _ in _open(shards, World(CPU, r, size), workers=workers).held_out()]
        )
        for r in range(size)
    ]
    seen = [tuple(image.flatten().tolist()) for image in torch.cat(batches)]
    assert len(seen) == len(set(seen)) == 8


def _spoil(shards: Path) -> None:
    with tarfile.open(shards / "train-2.tar", "a") as tar:
        _add(tar, "spoilt.png", b"no image")
        _add(tar, "spoilt.cls", b"0")


def test_a_bad_image_of_a_stream_stops_in_one_sentence(shards: Path) -> None:
    _spoil(shards)
    sentence = trouble_of(_open(shards, train_num_samples=33))
    assert sentence.startswith(f"spoilt in {shards}/train-2.tar cannot be read (it is no image")
    assert sentence.endswith("--bad-images skip.")
    assert "\n" not in sentence


def test_a_bad_image_of_a_stream_can_be_skipped(shards: Path, tmp_path: Path, monkeypatch) -> None:
    _spoil(shards)
    # In a file, for what a worker says does not come to this process.
    log = logging.FileHandler(tmp_path / "log")
    monkeypatch.setattr(logging.getLogger("timm.data.readers.reader_wds"), "handlers", [log])
    assert len(_epoch(_open(shards, bad_images="skip", train_num_samples=33))) == 5
    assert f"spoilt in {shards}/train-2.tar cannot be read" in (tmp_path / "log").read_text()


def test_more_workers_than_shards_are_told(shards: Path) -> None:
    sentence = trouble_of(_open(shards, train_split="train-0.tar", train_num_samples=16, workers=2))
    assert "ended after 1 of 2 batches" in sentence
    assert "--workers" in sentence


def test_a_stream_of_unknown_length_is_refused(shards: Path) -> None:
    with pytest.raises(VitslimError, match=r"how many images train.*--train-num-samples"):
        _open(shards, train_num_samples=None)


def test_repeats_are_refused_in_a_stream(shards: Path) -> None:
    with pytest.raises(VitslimError, match=r"is a stream.*--aug-repeats"):
        _open(shards, aug_repeats=3)


def test_a_stream_shorter_than_a_batch_is_filled_up_with_its_own_images(shards: Path) -> None:
    data = _open(shards, train_num_samples=31, batch_size=40)
    assert data.steps == 1
    assert _epoch(data).shape == (1, 40, 3, 8, 8)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (b"cat", r"^The label of odd in .*train-0\.tar is the text 'cat'"),
        (b"", r"^The label of odd in .* is missing"),
        (None, r"^odd in .*train-0\.tar has no label: put a number into a \.cls"),
        (b"7", r"^The label of image \d+ of a worker in wds/shards is 7 and the model has 2"),
        (b"-1", r"is -1, which marks images without a label"),
    ],
)
def test_wrong_labels_of_shards_stop_whatever_was_asked(shards: Path, label, sentence) -> None:
    with tarfile.open(shards / "train-0.tar", "a") as tar:
        _add(tar, "odd.png", (shards.parent / "images/train/dark/0.png").read_bytes())
        if label is not None:
            _add(tar, "odd.cls", label)
    data = _open(shards, train_num_samples=33, bad_images="skip")
    assert re.search(sentence, trouble_of(data))


def test_shards_may_hold_any_kind_of_image(shards: Path) -> None:
    with tarfile.open(shards / "val-0.tar", "a") as tar:
        buffer = io.BytesIO()
        Image.new("RGBA", (9, 9)).save(buffer, "TIFF")
        _add(tar, "odd.tiff", buffer.getvalue())
        _add(tar, "odd.cls", b"1")
    seen = torch.cat([images for images, _ in _open(shards).held_out()])
    assert len(seen) == 9
    # What is transparent lies on white.
    assert any((image > 0.9).all() for image in seen)


def test_a_stream_of_other_bits_is_a_bad_image(shards: Path) -> None:
    with tarfile.open(shards / "train-0.tar", "a") as tar:
        buffer = io.BytesIO()
        Image.new("F", (9, 9)).save(buffer, "TIFF")
        _add(tar, "odd.tif", buffer.getvalue())
        _add(tar, "odd.cls", b"1")
    assert "mode F, may have any range" in trouble_of(_open(shards, train_num_samples=33))
    assert len(_epoch(_open(shards, bad_images="skip", train_num_samples=33))) == 5
