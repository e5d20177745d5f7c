"""The harness of all benchmarks: contenders take turns, and what counts is the ratio of medians.

On a machine that others use too, a time means little and a ratio of times taken in turn means much.
So `compare` runs every contender once per round and compares the medians over all rounds.
pytest-benchmark drives the rounds and owns the table of our own times; the ratios, the losses too,
are printed at the end and merged into `benchmarks/results/<machine>.json`.

    pytest benchmarks -c benchmarks/pytest.ini            # all of them
    pytest benchmarks/bench_ragged_attention.py -c benchmarks/pytest.ini -k "forward and S"
"""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
_entries: dict[str, dict[str, Any]] = {}


def machine_name(device: str = "cpu") -> str:
    """Names the machine by its processor or GPU, never by its host name."""
    if device == "cuda":
        text = torch.cuda.get_device_name()
    else:
        text = f"{_processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    model = fields.get("model name", platform.processor() or platform.machine())
    # A virtual machine may hide the model; the family tells the generation at least.
    zen = {"23": "zen2", "25": "zen3-4", "26": "zen5"}.get(fields.get("cpu family", ""), "")
    generation = f" {zen}" if "AMD" in model and zen else ""
    return re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", "", model) + generation


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(
        command, cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "none"


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronise(device)
    return (time.perf_counter() - start) / repeats


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., dict[str, float]]:
    """Times contenders in turn and records their medians and ratios.

    The fixture is a function:

        compare(name, contenders, baseline, info, rounds=15, slice_s=0.01, device="cpu")

    Args of that function:
        name: Of the entry in the results file, e.g. "ragged_attention forward S batch 8".
        contenders: Name -> a call without arguments. The first one is ours; pytest-benchmark's own
            table shows its times.
        baseline: The contender that facts and claims are stated against.
        info: What belongs beside the times: bytes, MACs, shapes.
        rounds: How often each contender gets its turn.
        slice_s: A turn repeats a short call for about this many seconds.
        device: "cuda" synchronises around every turn.

    Returns:
        The median seconds of each contender.
    """

    def run(
        name: str,
        contenders: dict[str, Callable[[], object]],
        baseline: str,
        info: dict[str, Any],
        rounds: int = 15,
        slice_s: float = 0.01,
        device: str = "cpu",
    ) -> dict[str, float]:
        ours, *others = contenders
        repeats = {}
        for key, call in contenders.items():
            _seconds(call, 2, device)
            repeats[key] = max(1, int(slice_s / max(_seconds(call, 1, device), 1e-7)))
        times: dict[str, list[float]] = {key: [] for key in contenders}

        def everybody_takes_a_turn() -> None:
            for key, call in contenders.items():
                times[key].append(_seconds(call, repeats[key], device))

        def our_call() -> None:
            contenders[ours]()
            _synchronise(device)

        # pytest-benchmark calls the setup before each of its rounds. What it times itself is one
        # more call of ours; the ratios come from the turns.
        benchmark.pedantic(our_call, setup=everybody_takes_a_turn, rounds=rounds)
        medians = {key: statistics.median(values) for key, values in times.items()}
        best = {key: min(values) for key, values in times.items()}
        entry = {
            "us": {key: round(1e6 * value, 1) for key, value in medians.items()},
            "baseline": baseline,
            "speedup_of_ours_over": {key: round(medians[key] / medians[ours], 3) for key in others},
            # The best turns: where they tell another story, other processes were in the medians.
            "speedup_at_best": {key: round(best[key] / best[ours], 3) for key in others},
            "rounds": rounds,
            **info,
            "machine": machine_name(device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
        }
        benchmark.extra_info.update(entry)
        _entries[name] = entry
        return medians

    return run


def _write_results() -> list[Path]:
    """Merges this run's entries into the files of their machines, each replaced in one step."""
    paths = []
    RESULTS.mkdir(exist_ok=True)
    for machine in sorted({entry["machine"] for entry in _entries.values()}):
        path = RESULTS / f"{machine}.json"
        merged = json.loads(path.read_text()) if path.exists() else {}
        merged |= {key: value for key, value in _entries.items() if value["machine"] == machine}
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n")
        beside.replace(path)
        paths.append(path)
    return paths


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints, for each entry, how many times as long as ours every contender took."""
    if not _entries:
        return
    write = terminalreporter.write_line
    terminalreporter.section("time of each contender / time of ours (below 1: ours is slower)")
    for name, entry in _entries.items():
        ours = next(iter(entry["us"]))
        write(f"{name}: {ours} {entry['us'][ours]:.0f} us")
        for key, ratio in entry["speedup_of_ours_over"].items():
            mark = "  <- baseline" if key == entry["baseline"] else ""
            at_best = entry["speedup_at_best"][key]
            loss = "  LOSS" if ratio < 1 else ""
            write(f"    {ratio:6.2f}  (best turns {at_best:6.2f})  {key}{loss}{mark}")
    for path in _write_results():
        write(f"written: {path.relative_to(RESULTS.parent.parent)}")
