"""Kills a search and a retraining at random moments until they are done, over and over.

usage: kill_stages.py FOLDER IMAGES KILLS SEED

Prints, as JSON, for each stage: how often it was killed, how many runs came to their end in spite
of it, and which of their files differ from those of a run that was left alone.
"""

import csv
import json
import random
import shutil
import sys
import time
from pathlib import Path

import forked

FOLDER, IMAGES, KILLS, SEED = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
SMALL = ["img_size=8", "patch_size=4", "embed_dim=16", "depth=2", "num_heads=2", "num_classes=2"]
HOW = [
    *("--data", f"folder:{IMAGES}", "--device", "cpu", "--workers", "0", "--epochs", "3"),
    *("--batch-size", "4", "--grad-accum-steps", "2", "--checkpoint-steps", "1", "--model-ema"),
    *("--model-ema-decay", "0.9", "--lr", "1e-2", "--resume", "auto"),
]
TIMES = ("images_per_second", "seconds")


def search(output: Path) -> list[str]:
    masks = ["--l1-attention", "1e-2", "--l1-mlp", "1e-2", "--l1-token", "1e-2"]
    model = ["vit_tiny_patch16_224", "--model-kwargs", *SMALL]
    budget = ["--budget", "macs=60%", "--round-to", "2"]
    return ["search", *model, *masks, *budget, *HOW, "--output", str(output)]


def retrain(output: Path) -> list[str]:
    searched = FOLDER / "search-whole"
    plan = str(searched / "plans" / "macs-60.json")
    return ["retrain", str(searched), plan, *HOW, "--output", str(output)]


def content(output: Path) -> dict[str, object]:
    """Everything a stage has come to, but the time it took."""
    paths = [*output.glob("*.safetensors"), *output.glob("forecast.csv")]
    files = {path.name: path.read_bytes() for path in paths}
    with (output / "summary.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    return {**files, "summary.csv": rows}


def kill_often(name: str, command) -> dict[str, object]:
    rng = random.Random(f"{name} {SEED}")
    log, whole, broken = FOLDER / f"{name}.log", FOLDER / f"{name}-whole", FOLDER / f"{name}-broken"
    began = time.monotonic()
    assert forked.finish(forked.start(command(whole), log)) == 0, log.read_text()
    seconds = time.monotonic() - began
    expected, kills, finished, different = content(whole), 0, 0, []
    while kills < KILLS or not finished:
        ended = forked.finish_or_kill(forked.start(command(broken), log), rng.uniform(0, seconds))
        if not ended:
            kills += 1
            continue
        finished += 1
        found = content(broken)
        different += [each for each in expected if found.get(each) != expected[each]]
        shutil.rmtree(broken)
    return {"kills": kills, "finished": finished, "different": different, "seconds": seconds}


def main() -> None:
    told = {"search": kill_often("search", search)}
    budget = ["threshold", str(FOLDER / "search-whole"), "--budget", "macs=60%", "--round-to", "2"]
    assert forked.finish(forked.start(budget, FOLDER / "plan.log")) == 0
    told["retrain"] = kill_often("retrain", retrain)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
