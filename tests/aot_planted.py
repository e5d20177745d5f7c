"""Kernels that break a rule each, to show that tests/aot.py sees it. Prints the rows as JSON."""

import json
from types import ModuleType

import aot
import torch
import triton
import triton.language as tl
from aot_cases import Case


@triton.jit
def _copy_kernel(x, out, block: tl.constexpr):
    column = tl.arange(0, block)
    tl.store(out + column, tl.load(x + column))


@triton.jit
def _spill_kernel(x, out, block: tl.constexpr):
    # All values are held until their sum is known: 512 a lane, which has 255 registers.
    column = tl.arange(0, block)
    values = tl.load(x + column)
    tl.store(out + column, values / tl.sum(values, 0))


@triton.jit
def _product_kernel(x, out, block: tl.constexpr, stages: tl.constexpr, precision: tl.constexpr):
    row = tl.arange(0, block)
    tile = row[:, None] * block + row[None, :]
    acc = tl.zeros([block, block], tl.float32)
    for i in tl.range(0, 8, num_stages=stages):
        step = tl.load(x + i * block * block + tile)
        acc = tl.dot(step, step, acc, input_precision=precision)
    tl.store(out + tile, acc)


def planted() -> list[Case]:
    """Returns a case for every rule, named by what is wrong with it, and one that is right."""
    x = torch.empty(8 * 128 * 128, device="meta")
    out = torch.empty(128 * 128, device="meta")
    programs = {
        "nothing": lambda: _copy_kernel[(1,)](x, out, block=1024),
        "narrow": lambda: _copy_kernel[(1,)](x[1:], out, block=1024),
        "spills": lambda: _spill_kernel[(1,)](x, out, block=16 * 1024, num_warps=1),
        "scalar": lambda: _product_kernel[(1,)](
            x, out, block=32, stages=1, precision="ieee", num_warps=4
        ),
        "shared": lambda: _product_kernel[(1,)](
            x, out, block=128, stages=4, precision="tf32", num_warps=8
        ),
    }

    def case(name: str) -> Case:
        def run(_kernels: ModuleType) -> None:
            programs[name]()

        return Case(name, run, aligned=True)

    return [case(name) for name in programs]


if __name__ == "__main__":
    rows = aot.measure_all(aot.record(["sm86"], planted()))
    print(json.dumps({row["cases"][0]: row | {"faults": aot.faults(row)} for row in rows}))
