"""How much memory inference takes beyond the weights, each model in a process of its own.

Counted are the pages that the first two calls add at their peak. Before them a tiny model of the
same kind has run, so that what libraries set up once does not count, and what building the model
left free has been given back.
"""

import ctypes
import gc
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import models
import shapes
import timm
import torch
from torch import nn

import vitslim

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peaks_mib(
    contenders: Sequence[str], shape: shapes.Shape, batch: int, threads: int
) -> dict[str, float]:
    """Returns the MiB of each contender, see `_built`; nothing where no process can tell."""
    if not CLEAR_REFS.exists():
        return {}
    # Processes of a server that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "vitslim"])
    cells = [(name, shape, batch, threads, shapes.SMOKE) for name in contenders]
    # At the same time: here nothing is timed.
    with context.Pool(len(cells), maxtasksperchild=1) as pool:
        return dict(zip(contenders, pool.starmap(_peak_mib, cells, chunksize=1), strict=True))


def _peak_mib(contender: str, shape: shapes.Shape, batch: int, threads: int, smoke: bool) -> float:
    if smoke:
        shapes.shrink()
    torch.set_num_threads(threads)
    tiny = timm.create_model(models.NAMES["T"], depth=1, img_size=32, num_classes=8).eval()
    tiny = _built(contender, tiny)
    model = _built(contender, models.dense(shape).eval())
    images = models.images(batch)
    with torch.inference_mode():
        tiny(torch.randn(2, 3, 32, 32))
        del tiny
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _kib("VmRSS")
        CLEAR_REFS.write_text("5")
        for _ in range(2):
            model(images)
    # No less than a page, so that others can be compared with it.
    return round(max(_kib("VmHWM") - before, 4) / 1024, 3)


def _built(contender: str, dense: nn.Module) -> nn.Module:
    """Returns the model "timm dense", "packed dense", "slim" or "packed slim"."""
    if contender.endswith("slim"):
        dense, _ = models.slim_at_60(models.searched(dense).eval())
    return vitslim.pack(dense, keep_source=False) if contender.startswith("packed") else dense


def _kib(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
