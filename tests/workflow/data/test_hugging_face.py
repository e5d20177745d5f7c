"""Hugging Face tables and streams: columns are found, labels are checked before training."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vitslim.errors import VitslimError
from vitslim.workflow.data.batches import Data, open_data
from vitslim.workflow.data.hugging_face import columns
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.runtime.world import World

datasets = pytest.importorskip("datasets", reason="pip install datasets")

NAMES = datasets.ClassLabel(names=["dark", "light"])


# timm 1.0.16 tells the reader of streams what a newer `datasets` does not know.
STREAMS = pytest.mark.skipif(
    find_spec("timm.data.readers._hfds") is None, reason="an older timm and a newer datasets"
)


@pytest.fixture(autouse=True)
def silent() -> None:
    datasets.disable_progress_bars()


def _write(root: Path, **named: Any) -> Path:
    """Writes splits of eight rows: columns of images, or (feature, labels)."""
    rows, features = {}, {}
    for name, column in named.items():
        feature, values = column or (datasets.Image(), None)
        features[name] = feature
        rows[name] = values or [Image.new("RGB", (9, 9), (30 * index,) * 3) for index in range(8)]
    table = datasets.Dataset.from_dict(rows, datasets.Features(features))
    (root / "table").mkdir()
    for split in ("train", "validation"):
        table.to_parquet(root / "table" / f"{split}.parquet")
    return root / "table"


def _open(table: Path, kind: str = "hfds", **more: Any) -> Data:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes)
    given = {"data": f"{kind}/{table}", "data_dir": str(table.parent / "cache"), "workers": 0}
    given |= {"batch_size": 4, "train_num_samples": 8, "val_num_samples": 8}
    return open_data(settings_for("retrain", {**given, **more}), model, World(torch.device("cpu")))


def _whole(*values: Any) -> tuple[Any, list[Any]]:
    return datasets.Value("int64"), [*values, *[0] * (8 - len(values))]


@pytest.mark.parametrize("kind", ["hfds", pytest.param("hfids", marks=STREAMS)])
def test_columns_of_other_names_are_found_by_their_type(tmp_path: Path, kind: str) -> None:
    table = _write(tmp_path, tile=None, kind=(NAMES, [0, 1] * 4), place=_whole(7))
    data = _open(table, kind)
    assert data.num_classes == 2
    targets = torch.cat([target for _, target in data.held_out()])
    assert targets.tolist() == [0, 1] * 4


def test_columns_can_be_named(tmp_path: Path) -> None:
    table = _write(tmp_path, a=None, b=None, fine=(NAMES, [1] * 8), coarse=(NAMES, [0] * 8))
    for given, sentence in (
        ({}, r"several columns of images \(a, b\): name one with --input-key"),
        ({"input_key": "a"}, r"several columns of labels \(fine, coarse\).*--target-key"),
        ({"input_key": "a", "target_key": "d"}, "no column 'd'.*correct --target-key"),
        (
            {"input_key": "fine", "target_key": "fine"},
            "Column fine of .* holds no images but ClassLabel",
        ),
        ({"input_key": "c"}, r"no column 'c', only a, b, fine, coarse: correct --input-key"),
    ):
        with pytest.raises(VitslimError, match=sentence):
            _open(table, **given)
    data = _open(table, input_key="b", target_key="coarse")
    assert [target.tolist() for _, target in data.held_out()] == [[0] * 4] * 2


def test_a_column_that_nothing_tells_is_asked_for() -> None:
    settings = settings_for("retrain", {"data": "hfds/x"})
    features = {"image": datasets.Image(), "kind": datasets.Value("int64")}
    with pytest.raises(VitslimError, match=r"which of its columns has the labels \(image, kind\)"):
        columns(features, settings)
    assert columns({**features, "label": features["kind"]}, settings) == ("image", "label")


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (
            _whole(0, -1),
            r"row 1 of .*train is -1, which marks images without a label",
        ),
        (_whole(0, None), "row 1 of .*missing"),
        (_whole(2, 6), r"row 0 of .*the first of 2 such rows, is 2 and .*num_classes=7 or more"),
        ((datasets.Value("float32"), [0.5] * 8), r"is 0\.5, which is no whole number"),
        ((datasets.Value("string"), ["cat"] * 8), "is the text 'cat'.*class_encode_column"),
        ((datasets.List(NAMES), [[0, 1]] * 8), "one label per image"),
    ],
)
def test_wrong_labels_are_told_before_anything_is_trained(tmp_path, labels, sentence) -> None:
    with pytest.raises(VitslimError, match=sentence):
        _open(_write(tmp_path, image=None, label=labels))


@STREAMS
def test_wrong_labels_of_a_stream_are_told_as_they_come(tmp_path: Path) -> None:
    data = _open(_write(tmp_path, image=None, label=_whole(0, 5)), "hfids")
    with pytest.raises(VitslimError, match=r"image 1 of a worker in hfids/.* is 5 and the model"):
        list(data.held_out())


def test_rows_without_an_image_are_bad_images(tmp_path: Path) -> None:
    images = [None, *[Image.new("RGB", (9, 9))] * 7]
    table = _write(tmp_path, image=(datasets.Image(), images), label=(NAMES, [0, 1] * 4))
    with pytest.raises(VitslimError, match=r"Row 0 of split validation .*image is empty"):
        list(_open(table).held_out())
    assert len(list(_open(table, bad_images="skip").held_out())) == 2


@pytest.mark.parametrize("data", ["digits", "folder:x", "torch/cifar10"])
def test_columns_of_other_data_are_refused(tmp_path: Path, data: str) -> None:
    with pytest.raises(VitslimError, match="has no columns: leave out --input-key"):
        _open(tmp_path, data=data, input_key="img")
