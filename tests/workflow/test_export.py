"""An exported file computes what the model computes, or is not written."""

import sys

import pytest
import timm
import torch
from timm.layers import is_exportable

import vitslim
from vitslim.workflow import export as export_module
from vitslim.workflow.export import export
from vitslim.workflow.latency import example_input


@pytest.fixture(params=["dense", "masked", "slim"])
def model(request):
    dense = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=5,
    )
    if request.param == "dense":
        return dense
    masked = vitslim.mask(dense)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if request.param == "masked":
        return masked
    budget = {"attention": 0.6, "mlp": 0.6, "token": 0.6}
    return vitslim.slim(masked, vitslim.threshold(masked, budget, round_to=1))


def test_pt2_takes_any_batch_size_and_needs_no_vitslim_op(model, tmp_path):
    difference = export(model, tmp_path / "new" / "model.pt2")
    assert 0 <= difference < 1e-4
    program = torch.export.load(tmp_path / "new" / "model.pt2")
    assert "vitslim" not in str(program.graph)
    images = example_input(model, 5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model.eval()(images))


def test_pt2_of_one_batch_size(model, tmp_path):
    export(model, tmp_path / "model.pt2", batch_size=1)
    program = torch.export.load(tmp_path / "model.pt2")
    assert program.module()(example_input(model, 1)).shape == (1, 5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_computes_the_same(model, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install onnxscript onnxruntime")
    assert 0 <= export(model, tmp_path / "model.onnx", "onnx") < 1e-4
    assert (tmp_path / "model.onnx").stat().st_size > 10_000


@pytest.mark.parametrize("model", ["slim"], indirect=True)
class TestFailures:
    def test_onnx_without_onnxscript_names_the_command(self, model, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(vitslim.VitslimError, match="pip install onnxscript"):
            export(model, tmp_path / "model.onnx", "onnx")
        assert not list(tmp_path.iterdir())

    def test_a_file_that_differs_is_not_written(self, model, tmp_path, monkeypatch):
        monkeypatch.setitem(export_module.TOLERANCE, torch.float32, -1.0)
        with pytest.raises(vitslim.VitslimError, match="differs from the model"):
            export(model, tmp_path / "model.pt2")
        assert not list(tmp_path.iterdir())

    def test_wrong_arguments(self, model, tmp_path):
        with pytest.raises(vitslim.VitslimError, match="format must be one of pt2, onnx"):
            export(model, tmp_path / "model.pt", "pt")
        with pytest.raises(vitslim.VitslimError, match="batch_size must be at least 1"):
            export(model, tmp_path / "model.pt2", batch_size=0)

    def test_model_and_timm_are_left_as_they_were(self, model, tmp_path):
        model.train()
        before = is_exportable()
        export(model, tmp_path / "model.pt2")
        assert is_exportable() == before
        assert all(module.training for module in model.modules())
