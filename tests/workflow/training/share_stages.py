"""Searches in one process and in two, in several ways, with the same images per update.

usage: share_stages.py FOLDER IMAGES [TROUBLE]

Every way makes FOLDER/NAME, to be compared by the caller; FOLDER/full and FOLDER/sharded-full are
of two processes whose disks fill up, and FOLDER/full.statuses what they ended with. With TROUBLE,
only a search that begins in two processes, is stopped there, and ends in one: TROUBLE/fewer; and
searches under torchrun, one of whose processes dies: TROUBLE/one and TROUBLE/averaged.
"""

import errno
import json
import os
import signal
import sys
import time
from functools import partialmethod
from pathlib import Path

import forked
from torch import nn
from torch.distributed.run import main as torchrun

FOLDER, IMAGES = Path(sys.argv[1]), sys.argv[2]
SEARCH = [
    *("search", "vit_tiny_patch16_224", "--data", f"folder:{IMAGES}", "--device", "cpu"),
    *("--model-kwargs", "img_size=8", "patch_size=4", "embed_dim=16", "depth=2", "num_heads=2"),
    *("num_classes=2", "--epochs", "3", "--global-batch-size", "8", "--workers", "0"),
    # Mixup pairs the images of one batch, and stochastic depth draws for them.
    *("--mixup", "0", "--cutmix", "0", "--drop-path", "none", "--opt", "momentum", "--lr", "0.05"),
    *("--l1-attention", "0.02", "--l1-mlp", "0.01", "--l1-token", "0.02", "--budget", "macs=60%"),
    *("--round-to", "2", "--resume", "auto", "--checkpoint-steps", "2"),
]
MIXED = ["--mixup", "0.8", "--cutmix", "1", "--drop-path", "0.3"]
HALF = ["--amp", "--amp-dtype", "float16"]
WAYS = {
    "one": (1, []),
    "accumulated": (1, ["--grad-accum-steps", "4"]),
    "two": (2, []),
    "two-accumulated": (2, ["--grad-accum-steps", "2"]),
    "sharded": (2, ["--fsdp", "--model-ema", "--model-ema-decay", "0.5"]),
    "sharded-accumulated": (2, ["--fsdp", "--grad-accum-steps", "2"]),
    "averaged": (1, ["--model-ema", "--model-ema-decay", "0.5"]),
    "proximal": (1, ["--l1-step", "proximal"]),
    "two-proximal": (2, ["--l1-step", "proximal"]),
    "sharded-proximal": (2, ["--l1-step", "proximal", "--fsdp"]),
    # Each has two batches an update.
    "mixed": (1, [*MIXED, "--grad-accum-steps", "2"]),
    "two-mixed": (2, MIXED),
    "sharded-mixed": (2, [*MIXED, "--fsdp", "--grad-checkpointing"]),
    "two-half": (2, HALF),
    "sharded-half": (2, [*HALF, "--fsdp", "--compile"]),
}


def run(name: str, folder: Path, processes: int, more: list[str], stop: bool = False) -> None:
    log = folder / f"{name}.log"
    command = [*SEARCH, *more, "--output", str(folder / name)]
    started = forked.start_world(command, log, processes)
    if stop:
        while not list((folder / name).glob("state/step-*06")):
            time.sleep(0.01)
        os.kill(started[0], signal.SIGTERM)
    statuses = [forked.finish(process) for process in started]
    if any(statuses):
        sys.exit(f"{name}: {log.read_text()}")


def run_on_full_disks(name: str, more: list[str], last: str) -> None:
    """Lets the first process fail at the end of the first checkpoint, and one at all after two.

    Where that one fails first, it is told to stop.
    """
    sync = os.fsync

    def full(descriptor: int) -> None:
        path, rank = Path(f"/proc/self/fd/{descriptor}").readlink(), os.environ["RANK"]
        step = int(path.parent.stem[-10:]) if path.parent.stem.startswith("step-") else 0
        if (rank, step, path.name) == ("0", 2, "state.json") or (rank == last and step >= 6):
            if step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = full
    command = [*SEARCH, *more, "--output", str(FOLDER / name)]
    started = forked.start_world(command, FOLDER / f"{name}.log", 2)
    os.fsync = sync
    statuses = [forked.finish(process) for process in started]
    (FOLDER / f"{name}.statuses").write_text(json.dumps(statuses))


def run_and_die(name: str, folder: Path, more: list[str]) -> None:
    """Runs die_once.py under torchrun, which forks it from what is imported here."""
    log, script = folder / f"{name}.log", Path(__file__).with_name("die_once.py")
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    forking = ["--start-method", "fork", "--run-path", str(script)]
    told = [str(FOLDER), IMAGES, name, *more, "--output", str(folder / name)]
    started = forked.start([*options, *forking, *told], log, torchrun)
    if forked.finish(started):
        sys.exit(f"{name}: {log.read_text()}")


def main() -> None:
    if len(sys.argv) > 3:
        trouble = Path(sys.argv[3])
        run("fewer", trouble, 2, [], stop=True)
        run("fewer", trouble, 1, [])
        run_and_die("one", trouble, [])
        run_and_die("averaged", trouble, ["--fsdp"])
        return
    # The graphs of torch.compile without code of their own: writing that takes a minute.
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    for name, (processes, more) in WAYS.items():
        run(name, FOLDER, processes, more)
    run_on_full_disks("full", [], last="0")
    run_on_full_disks("sharded-full", ["--fsdp"], last="1")


if __name__ == "__main__":
    main()
