"""Contenders take turns, and what counts is the ratio of their medians.

On a machine that others use too, a time means little and a ratio of times taken in turn means much.
So every contender runs once per round, and the medians over all rounds are compared. A contender
that cannot run is recorded as absent with the reason. Losses are recorded like wins.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import records
import shapes
import torch
from floor import Pass, floor_s
from timing import peak_mib, repeats_for, seconds


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        call: Does it once.
        around: Makes a context for a turn, outside what is timed: a backend that is forced.
        ours: The benchmark fails, once everything is recorded, if this one does. Of others it
            takes "cannot run", a RuntimeError or ValueError.
        times: How often one call does it; times are of one.
        resident_mib: Returns what it keeps between calls, which its peak comes on top of.
    """

    call: Callable[[], object]
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    ours: bool = False
    times: int = 1
    resident_mib: Callable[[], float] = float


@dataclass(frozen=True)
class Absent:
    """Stands for a contender that cannot run, and says why."""

    reason: str


@dataclass(frozen=True)
class Aim:
    """What an entry was meant to show.

    Attributes:
        text: The aim in words.
        over: The contenders to beat; the best of them counts. None: the figure itself is judged.
        at_least: Their time over ours.
        ours: The contenders that may reach it; the fastest counts. Empty: the entry's first one.
        of: "us", or another figure of the same two that the entry has, as "peak_mib".
    """

    text: str
    over: tuple[str, ...]
    at_least: float
    ours: tuple[str, ...] = ()
    of: str = "us"


class Compare:
    """Times the contenders of one benchmark and keeps the entry.

    Args:
        benchmark: pytest-benchmark's fixture, which drives the rounds and shows our own times.
        entries: Where the entry goes, by name.
    """

    def __init__(self, benchmark: Any, entries: dict[str, dict[str, Any]]) -> None:
        self.benchmark = benchmark
        self.entries = entries
        self._entry: dict[str, Any] = {}

    def __call__(
        self,
        name: str,
        contenders: Mapping[str, Callable[[], object] | Contender | Absent],
        baseline: str,
        info: Mapping[str, Any],
        *,
        rounds: int = 15,
        slice_s: float = 0.01,
        settle_s: float = 0.0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        passes: Sequence[Pass] = (),
        images: int | None = None,
        aims: Sequence[Aim] = (),
        facts: Callable[[Mapping[str, float]], Mapping[str, Any]] = lambda medians: {},
    ) -> dict[str, float]:
        """Compares contenders and records the entry.

        Args:
            name: Of the entry in the results file, e.g. "ragged_attention forward S batch 8".
            contenders: Name -> a call without arguments, a Contender or an Absent. The first is
                ours: ratios are to it, or to the first that runs where it is absent.
            baseline: The contender that facts and claims are stated against.
            info: What belongs beside the times: bytes, MACs, shapes.
            rounds: How often each contender gets its turn.
            slice_s: A turn repeats a short call for about this many seconds.
            settle_s: A pause before each turn, for threads of the one before that still look out
                for work.
            device: "cuda" times by the GPU's own clock.
            dtype: In which the products of `passes` are.
            passes: What must be done at least, for the fraction of the floor that ours reaches.
            images: How many one call works through; images per second are recorded then.
            aims: Judged by the medians, and recorded whether met or not.
            facts: Returns, from the medians, more to record; aims may be of it.

        Returns:
            The median seconds of each contender that runs.
        """
        running, absent, errors = _warmed_up(contenders, device)
        assert running, f"{name}: no contender runs: {absent}"
        ours = next(iter(contenders))
        to = next(iter(running))
        rounds, slice_s, settle_s = (1, 0, 0) if shapes.SMOKE else (rounds, slice_s, settle_s)
        times = self._take_turns(running, to, rounds, slice_s, settle_s, device)
        medians = {key: statistics.median(values) for key, values in times.items()}
        best = {key: min(values) for key, values in times.items()}
        others = [key for key in running if key != to]
        self._entry = {
            "us": {key: round(1e6 * value, 1) for key, value in medians.items()},
            "ours": ours,
            "also_ours": [key for key, each in running.items() if each.ours and key != ours],
            "ratios_to": to,
            "baseline": baseline,
            "speedup_of_ours_over": {key: round(medians[key] / medians[to], 3) for key in others},
            # The best turns: where they tell another story, other processes were in the medians.
            "speedup_at_best": {key: round(best[key] / best[to], 3) for key in others},
            "absent": absent,
            "rounds": rounds,
            **info,
            **records.facts(device),
        }
        if images is not None:
            rates = {key: round(images / value, 1) for key, value in medians.items()}
            self.note(images_per_s=rates, peak_mib=_peaks(running, device))
        if passes:
            least = floor_s(passes, device, dtype)
            reached = {key: round(least / value, 3) for key, value in medians.items()}
            self.note(floor_us=round(1e6 * least, 2), fraction_of_floor=reached)
        self.note(**facts(medians))
        self.note(aims=[_judged(aim, self._entry) for aim in aims])
        self.entries[name] = self._entry
        self.benchmark.extra_info.update(self._entry, name=name)
        if errors:
            raise next(iter(errors.values()))
        return medians

    def note(self, **facts: Any) -> None:
        """Adds facts to the entry."""
        self._entry |= facts

    def _take_turns(
        self,
        running: dict[str, Contender],
        shown: str,
        rounds: int,
        slice_s: float,
        settle_s: float,
        device: str,
    ) -> dict[str, list[float]]:
        repeats = {}
        for key, each in running.items():
            with each.around():
                repeats[key] = repeats_for(each.call, slice_s, device) if slice_s else 1
        times: dict[str, list[float]] = {key: [] for key in running}

        def everybody_takes_a_turn() -> None:
            for key, each in running.items():
                time.sleep(settle_s)
                with each.around():
                    taken = seconds(each.call, repeats[key], device)
                    times[key].append(taken / each.times)

        def our_call() -> None:
            with running[shown].around():
                seconds(running[shown].call, 1, device)

        # pytest-benchmark calls the setup before each of its rounds. What it times itself is one
        # more call of ours; the ratios come from the turns.
        self.benchmark.pedantic(our_call, setup=everybody_takes_a_turn, rounds=rounds)
        return times


def lines_of(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Returns an entry as lines: how many times as long as ours every contender took."""
    to, there = entry["ratios_to"], entry["ratios_to"] == entry["ours"]
    beside = "" if there else " (ours is absent)"
    lines = [f"{name}: {to} {entry['us'][to]:.0f} us{_floor(entry, to)}{_rate(entry, to)}{beside}"]
    for key, ratio in entry["speedup_of_ours_over"].items():
        mark = "  <- baseline" if key == entry["baseline"] else ""
        at_best = entry["speedup_at_best"][key]
        loss = "  LOSS" if ratio < 1 and there and key not in entry["also_ours"] else ""
        floor = _floor(entry, key) if key in entry["also_ours"] else ""
        told = f"{key}{floor}{_rate(entry, key)}{loss}{mark}"
        lines.append(f"    {ratio:6.2f}  (best turns {at_best:6.2f})  {told}")
    reasons: dict[str, list[str]] = {}
    for key, reason in entry["absent"].items():
        reasons.setdefault(reason, []).append(key)
    lines += [f"    absent: {'; '.join(keys)}: {reason}" for reason, keys in reasons.items()]
    return lines


def aim_lines_of(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Returns a line for each aim of an entry, met or missed."""
    lines = []
    for aim in entry["aims"]:
        if aim["met"] is None:
            lines.append(f"not judged: {name}: {aim['aim']}: {aim['why']}")
            continue
        verdict = "met   " if aim["met"] else "MISSED"
        who = f"{aim['ours']} against {aim['over']}" if aim["over"] else aim["ours"]
        lines.append(
            f"{verdict} {aim['reached']:.2f} of {aim['at_least']:.2f}  {name}: {aim['aim']} ({who})"
        )
    return lines


def _floor(entry: Mapping[str, Any], key: str) -> str:
    """Returns how much of what the device could do at best a contender does, where it is known."""
    reached = entry.get("fraction_of_floor", {}).get(key)
    return "" if reached is None else f", {100 * reached:.0f}% of the floor's speed"


def _rate(entry: Mapping[str, Any], key: str) -> str:
    """Returns images per second and peak memory of a contender, where the entry has them."""
    rate, peak = (entry.get(what, {}).get(key) for what in ("images_per_s", "peak_mib"))
    told = "" if rate is None else f", {rate:.0f} images/s"
    return told if peak is None else f"{told}, {peak:.0f} MiB"


def _warmed_up(
    contenders: Mapping[str, Callable[[], object] | Contender | Absent], device: str
) -> tuple[dict[str, Contender], dict[str, str], dict[str, Exception]]:
    """Calls every contender; returns those that run, why others do not, and errors that count."""
    running: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    errors: dict[str, Exception] = {}
    for key, each in contenders.items():
        if isinstance(each, Absent):
            absent[key] = each.reason
            continue
        contender = each if isinstance(each, Contender) else Contender(each)
        try:
            with contender.around():
                # The first calls compile, on a GPU the next ones may record graphs or grow caches.
                seconds(contender.call, 4 if device == "cuda" and not shapes.SMOKE else 1, device)
            running[key] = contender
        except Exception as error:
            absent[key] = _in_one_line(error)
            # What an alternative may say is that it cannot; anything else is a mistake made here.
            if contender.ours or not isinstance(error, RuntimeError | ValueError):
                errors[key] = error
        if key in absent and device == "cuda":
            # A half-done call must not take the memory of those that follow.
            gc.collect()
            torch.cuda.empty_cache()
    return running, absent, errors


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]


def _peaks(running: Mapping[str, Contender], device: str) -> dict[str, float]:
    """Returns the peak MiB of each contender's call; nothing where there is no GPU."""
    if device != "cuda":
        return {}
    peaks = {}
    for key, each in running.items():
        with each.around():
            peaks[key] = round(each.resident_mib() + peak_mib(each.call), 1)
    return peaks


def _judged(aim: Aim, entry: Mapping[str, Any]) -> dict[str, Any]:
    us = entry["us"]
    ours = [key for key in aim.ours or (entry["ours"],) if key in us]
    over = [key for key in aim.over if key in us]
    judged: dict[str, Any] = {"aim": aim.text, "at_least": round(aim.at_least, 3), "met": None}
    if not ours or (aim.over and not over):
        return judged | {"why": "ours is absent" if not ours else "the others are absent"}
    fastest, rival = min(ours, key=us.__getitem__), min(over, key=us.__getitem__, default=None)
    figures = entry.get(aim.of, {})
    if not {fastest, *([rival] if aim.over else [])} <= set(figures):
        return judged | {"why": f"no {aim.of} was measured here"}
    reached = figures[rival] / figures[fastest] if aim.over else figures[fastest]
    judged |= {"ours": fastest, "over": rival, "reached": round(reached, 3)}
    return judged | {"met": reached >= aim.at_least}
