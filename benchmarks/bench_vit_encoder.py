"""The packed encoder, dense and slim, against timm, torch.compile, ONNX Runtime and OpenVINO.

The slim model keeps 60% of the MACs, its heads differ in width as after a search. All take the same
images and as many threads; `threads` is what torch, ONNX Runtime and OpenVINO are each told.
"""

import copy
from functools import cache

import memory
import models
import peak
import pytest
import runtimes
import torch
from baselines import compiled
from harness import Aim, Contender
from shapes import ENCODER_BATCHES, ENCODER_DEIT, THREADS

import vitslim

ROUNDS = {"T": 9, "S": 6, "B": 5}
OVER_RUNTIMES = {"T": 1.3, "S": 1.15, "B": 1.15}
OF_PEAK = {1: 0.8, 8: 0.9}
BF16 = torch.bfloat16
# As a server would: no source beside it whose parameters have to be watched.
DEPLOYED = {"keep_source": False}
TURNS = {"slice_s": 0.1, "settle_s": 0.02}


@pytest.fixture(params=THREADS)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where ONNX files are written once and read by every cell."""
    return tmp_path_factory.mktemp("onnx")


@cache
def dense_and_slim(shape):
    """Returns both models and the ratio of their MACs, the same in every cell, as in `folder`."""
    dense = models.dense(shape).eval()
    return dense, *models.slim_at_60(models.searched(dense).eval())


@pytest.mark.parametrize("batch", ENCODER_BATCHES)
@pytest.mark.parametrize("shape", ENCODER_DEIT, ids=lambda shape: shape.name)
def bench_slim(compare, folder, shape, batch, threads):
    dense, slim, ratio = dense_and_slim(shape)
    x = models.images(batch)
    packed = {
        "packed": vitslim.pack(slim, **DEPLOYED),
        "packed, bfloat16 weights": vitslim.pack(slim, weights=BF16, **DEPLOYED),
        "packed, bfloat16 products": vitslim.pack(slim, weights=BF16, products=BF16, **DEPLOYED),
    }
    calls = {name: _call(model, x, ours=True) for name, model in packed.items()}
    calls |= _torch_ways("slim", slim, x, threads) | _torch_ways("timm dense", dense, x, threads)
    with torch.no_grad():
        of_runtimes = runtimes.contenders(
            slim, f"{shape.name}-slim", runtimes.FORMS, folder, x, threads
        )
    aims = [
        Aim("1.45 x the MACs ratio over timm", ("timm dense",), 1.45 * ratio),
        Aim(
            "faster than ONNX Runtime and OpenVINO at their best",
            tuple(of_runtimes),
            OVER_RUNTIMES[shape.name],
        ),
    ]
    _compare(
        compare,
        f"vit_encoder slim {shape.name} batch {batch} threads {threads}",
        calls | of_runtimes,
        (shape, batch, threads),
        {"macs_ratio": round(ratio, 3), "error": _errors({**packed, "slim": slim}, slim, x)},
        slim,
        aims,
    )


@pytest.mark.parametrize("batch", ENCODER_BATCHES)
@pytest.mark.parametrize("shape", ENCODER_DEIT, ids=lambda shape: shape.name)
def bench_dense(compare, folder, shape, batch, threads):
    dense, _, _ = dense_and_slim(shape)
    x = models.images(batch)
    packed = {"packed": vitslim.pack(dense, **DEPLOYED)}
    calls = {"packed": _call(packed["packed"], x, ours=True)}
    calls |= _torch_ways("timm dense", dense, x, threads)
    with torch.no_grad():
        of_runtimes = runtimes.contenders(
            dense, f"{shape.name}-dense", ["padded"], folder, x, threads
        )
    aims = [
        Aim("1.35 over timm", ("timm dense",), 1.35),
        Aim("1.35 over torch.compile", ("timm dense, torch.compile",), 1.35),
        Aim("faster than ONNX Runtime and OpenVINO", tuple(of_runtimes), 1.0),
    ]
    _compare(
        compare,
        f"vit_encoder dense {shape.name} batch {batch} threads {threads}",
        calls | of_runtimes,
        (shape, batch, threads),
        {"error": _errors({**packed, "timm dense": dense}, dense, x)},
        dense,
        aims,
    )


def _compare(compare, name, calls, cell, info, model, aims):
    """Compares the contenders of a cell; adds the peak of the processor and of memory."""
    shape, batch, threads = cell
    kind = "slim" if "slim" in calls else "dense"
    # What a model takes beyond its weights hardly depends on the threads: the most are measured.
    peaks = {}
    if threads == max(THREADS):
        found = memory.peaks_mib(["timm dense", f"packed {kind}"], shape, batch, threads)
        peaks = {key.replace(f"packed {kind}", "packed"): mib for key, mib in found.items()}
        aims = [*aims, Aim("half of timm's memory", ("timm dense",), 2.0, of="peak_mib")]
    aims = [*aims, Aim("of peak", (), OF_PEAK.get(batch, 0.0), of="fraction_of_peak")]
    macs, done = vitslim.cost(model).macs * batch, peak.macs_done(model) * batch
    before = peak.multiply_add_rate(threads)

    def facts(medians):
        after = peak.multiply_add_rate(threads)
        rate = max(before, after)
        # The arithmetic of bfloat16 products has another peak.
        float32 = [key for key in medians if key.startswith("packed") and "products" not in key]
        return {
            "peak_mib": peaks,
            "multiply_adds_per_s": [round(before), round(after)],
            "fraction_of_peak": {k: round(done / medians[k] / rate, 3) for k in float32},
            "fraction_of_peak_if_all_rows_counted": {
                k: round(macs / medians[k] / rate, 3) for k in float32
            },
        }

    with torch.inference_mode():
        compare(
            name,
            calls,
            "timm dense",
            {"batch": batch, "macs": macs, "macs_done": done, **info},
            rounds=ROUNDS[shape.name],
            images=batch,
            aims=aims,
            facts=facts,
            **TURNS,
        )


def _call(model, x, ours=False):
    return Contender(lambda: model(x), ours=ours)


def _torch_ways(name, model, x, threads):
    # Inductor writes the number of threads into its code.
    twin = compiled(model, options={"cpp.threads": threads})
    return {name: _call(model, x), f"{name}, torch.compile": _call(twin, x)}


@torch.no_grad()
def _errors(contenders, model, x):
    """Returns each model's largest error against float64, relative to the largest output."""
    x = x[:1]
    exact = copy.deepcopy(model).double()(x.double())
    largest = exact.abs().max()
    return {
        name: float(f"{float((each(x) - exact).abs().max() / largest):.2g}")
        for name, each in contenders.items()
    }
