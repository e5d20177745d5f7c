"""Tuning: every case a model runs is tried, only a real gain is kept, and what is kept is used."""

import pytest
import timm
import torch
from conftest import TINY

import vitslim
from vitslim.errors import VitslimError
from vitslim.ops import OPS, use_backend, why_not
from vitslim.workflow.tune import format_tuned, tune

REASONS = [why_not("triton", op, "cpu", torch.float32) for op in OPS]
interpreted = pytest.mark.skipif(any(REASONS), reason=str(next(filter(None, REASONS), "")))


@pytest.fixture
def masked():
    return vitslim.mask(timm.create_model("vit_tiny_patch16_224", **TINY))


@pytest.fixture
def backend(monkeypatch, tmp_path):
    import vitslim.triton_kernels as backend

    monkeypatch.setattr(backend.tuned, "path", lambda device: tmp_path / "tuned.json")
    backend.tuned.load.cache_clear()
    yield backend
    backend.tuned.load.cache_clear()


def clock(seconds_of):
    """Returns a timer that runs the call and tells what `seconds_of` says of the nth call."""
    calls = []

    def timer(call):
        call()
        calls.append(call)
        return seconds_of(len(calls))

    return timer


@interpreted
def test_the_fastest_candidate_is_kept_and_used(masked, backend):
    found = tune(masked, 1, clock(lambda n: 1.0 / n))  # every next one is faster
    kernels = {each.kernel.removesuffix("_forward") for each in found}
    assert {"ragged_attention", "masked_mlp", "gated_layer_norm"} <= kernels
    cpu = torch.device("cpu")
    stored = backend.tuned.load(cpu)
    for each in found:
        last = backend.CANDIDATES[each.kernel][-1]
        assert each.config in backend.CANDIDATES[each.kernel]
        assert stored[f"{each.kernel} {each.key}"] == each.config
        assert f"{each.kernel} {each.key}" in format_tuned(found)
    assert any(each.config == last for each in found)
    x = torch.randn(1, 1, 8, 8)
    with use_backend("triton"):
        tuned_out = masked(x)
    torch.testing.assert_close(tuned_out, masked(x), atol=1e-4, rtol=1e-4)


@interpreted
def test_noise_is_not_a_gain(masked, backend):
    found = tune(masked, 1, clock(lambda n: 1.0 if n == 1 else 0.98))
    assert found and not any(each.config for each in found)
    assert backend.tuned.load(torch.device("cpu")) == {}


@interpreted
def test_a_model_without_our_kernels_has_nothing_to_tune(backend):
    assert tune(timm.create_model("vit_tiny_patch16_224", **TINY), 1) == []


def test_a_broken_or_foreign_file_is_not_believed(backend, tmp_path):
    cpu = torch.device("cpu")
    for text in ("", "{", '{"configs": {"a": {}}}', '{"made_by": {}, "configs": {"a": {}}}', "[]"):
        (tmp_path / "tuned.json").write_text(text)
        backend.tuned.load.cache_clear()
        assert backend.tuned.load(cpu) == {}


def test_where_triton_cannot_run_the_reason_is_given(masked):
    with pytest.raises(VitslimError, match="nothing to tune here: triton takes"):
        tune(masked.double(), 1)
