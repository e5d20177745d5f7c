"""The `vitslim` command: parses, delegates, prints. What it delegates to does the work."""

import errno
import json
import math
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from .cli_options import parse
from .cli_training import (
    asked_by,
    compress_verb,
    finetune_verb,
    model_of,
    retrain_verb,
    run_verb,
    search_folder,
    search_verb,
)
from .cli_verbs import EVAL, EVAL_BATCH_SIZE, build_parser
from .errors import VitslimError
from .workflow.options.choices import PLANNING
from .workflow.options.settings import check_device
from .workflow.runtime.interrupt import Stopped

# torch and timm are imported inside the verbs, where they are needed.


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; a user's error is one sentence on stderr and exit status 2."""
    try:
        given = parse(*build_parser(), sys.argv[1:] if arguments is None else arguments)
        VERBS[given.pop("verb")](given)
    except VitslimError as error:
        print(f"vitslim: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A file or a folder that cannot be used as asked; writing to a full disk names none.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename2 or error.filename}: " if error.filename else ""
        print(f"vitslim: error: {where}{error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Training itself finishes its update and saves; this is the time before and after it.
        print("vitslim: interrupted; --resume goes on with what was saved", file=sys.stderr)
        return 130
    except Stopped as stopped:
        # Under torchrun every process stops, and one of them says so.
        if os.environ.get("RANK", "0") == "0":
            print(stopped)
    return 0


def _threshold(given: dict[str, Any]) -> None:
    from .checkpoint import load
    from .masks import Masks
    from .planning.threshold import budget_name, parse_budget
    from .workflow.latency_budget import plan_for
    from .workflow.models import meta_model

    folder = search_folder(given["search"])
    budgets = [parse_budget(text) for text in _need(given, "budget")]
    output, options = Path(given.get("output", folder / "plans")), _part(given, PLANNING)
    masks = Masks.load(folder / "masks.safetensors")
    timed = any("latency" in budget for budget in budgets)
    model = load(folder) if timed else meta_model(str(folder))
    done = []
    for budget in budgets:
        began = time.perf_counter()
        plan = plan_for(model, budget, masks, **options)
        took = (time.perf_counter() - began) * 1e3
        path = output / f"{budget_name(budget)}.json"
        plan.save(path)
        done.append({"plan": str(path), **plan.reached})
        if "json" not in given:
            print(f"{path}: {_figures(**plan.reached)}, planned in {took:.0f} ms")
    if "json" in given:
        print(json.dumps(done))


def _eval(given: dict[str, Any]) -> None:
    from .workflow.data.batches import open_data
    from .workflow.evaluate import evaluate
    from .workflow.models import open_model, packed_for
    from .workflow.options.settings import settings_for
    from .workflow.runtime.world import open_world

    as_json, weights = given.pop("json", False), _packing(given)
    asked = asked_by(given)
    choices, chosen = asked.choices, asked.chosen["dense"]
    name = model_of(choices)
    chosen = {option: value for option, value in chosen.items() if option in EVAL}
    settings = settings_for("dense", {"batch_size": EVAL_BATCH_SIZE, **chosen})
    world = open_world(settings.device)
    model = open_model(name, choices.pretrained, choices.model_kwargs).to(world.device)
    if weights is not None:
        model = packed_for(model, world.device, weights)
    with closing(open_data(settings, model, world)) as data:
        accuracy = evaluate(model, data, world, settings)
    if world.primary:
        facts = {"model": name, "data": settings.data, "accuracy": accuracy}
        print(json.dumps(facts) if as_json else f"{name}: accuracy {accuracy:.2f} %")


def _cost(given: dict[str, Any]) -> None:
    from .cost import cost
    from .planning.threshold import even_plan, parse_budget
    from .workflow.image_size import image_size, pixels
    from .workflow.models import meta_model, open_plan, plan_of

    if "budget" in given and "plan" in given:
        raise VitslimError("--budget and --plan exclude each other.")
    name = given["model"].removeprefix("local-dir:")
    model = meta_model(name, given.get("model_kwargs"))
    facts = {
        "model": name,
        "img_size": image_size(model),
        "dense": cost(model)._asdict(),
    }
    plan = open_plan(given["plan"]) if "plan" in given else plan_of(name)
    if "budget" in given:
        plan = even_plan(model, parse_budget(given["budget"]), given.get("round_to", 1))
    if plan is not None:
        facts["slim"] = cost(model, plan)._asdict()
    if "json" in given:
        print(json.dumps(facts))
        return
    print(f"{facts['model']} at {pixels(facts['img_size'])}")
    for name in ("dense", "slim"):
        if name in facts:
            print(f"  {name}: {_figures(**facts[name])}")


def _export(given: dict[str, Any]) -> None:
    from .checkpoint import load
    from .workflow.export import export

    path = Path(_need(given, "output"))
    form = given.get("format", "onnx" if path.suffix == ".onnx" else "pt2")
    difference = export(load(given["model"]), path, form, given.get("batch_size"))
    print(f"{path}: {form}, largest difference from the model {difference:.1e}")


def _bench(given: dict[str, Any]) -> None:
    from .workflow.latency import format_table, measure
    from .workflow.models import open_model, packed_for
    from .workflow.runtime.world import open_world

    names, weights = given["models"], _packing(given)
    run = Path(names[0])
    if len(names) == 1 and (run / "dense" / "config.json").exists():
        slims = (*sorted(run.glob("slim/*")), *sorted(run.glob("compress/slim/*")))
        folders = (run / "dense", run / "search", *slims)
        names = [str(folder) for folder in folders if (folder / "config.json").exists()]
    device = given.get("device", "auto")
    check_device(device)
    device = open_world(device).device
    models = {name: open_model(name).to(device) for name in names}
    sizes, seconds = given.get("batch_size", (1, 32)), given.get("seconds", 1.0)
    if min(sizes) < 1 or not 0 < seconds < math.inf:
        raise VitslimError("--batch-size must be at least 1, and --seconds above 0.")
    if "tune" in given:
        from .workflow.tune import format_tuned, tune

        found = [each for model in models.values() for n in sizes for each in tune(model, n)]
        if not found:
            raise VitslimError("--tune needs a masked or a slim model among those given.")
        print(format_tuned(found), file=sys.stderr)
    if weights is not None:
        plain, models = models, {}
        for name, model in plain.items():
            models[name] = model
            try:
                models[f"{name}, packed"] = packed_for(model, device, weights)
            except VitslimError as error:
                if device.type != "cpu":
                    raise
                print(f"{name} is measured unpacked alone: {error}", file=sys.stderr)
    latency = measure(models, sizes, seconds=seconds)
    print(json.dumps(latency) if "json" in given else format_table(latency))


def _report(given: dict[str, Any]) -> None:
    from .workflow.report.page import report

    print(report(given["run"]))


def _info(given: dict[str, Any]) -> None:
    from .info import format_info, info

    facts = info()
    print(json.dumps(facts, default=str) if "json" in given else format_info(facts))


VERBS = {
    "run": run_verb,
    "compress": compress_verb,
    "search": search_verb,
    "threshold": _threshold,
    "retrain": retrain_verb,
    "finetune": finetune_verb,
    "eval": _eval,
    "cost": _cost,
    "export": _export,
    "bench": _bench,
    "report": _report,
    "info": _info,
}


def _need(given: dict[str, Any], name: str) -> Any:
    if name not in given:
        raise VitslimError(f"--{name} is needed.")
    return given.pop(name)


def _part(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Takes the named options out of those given."""
    return {name: given.pop(name) for name in names if name in given}


def _packing(given: dict[str, Any]) -> str | None:
    """Takes the options of packing; returns the weights' dtype, or None where nothing is packed."""
    wanted, weights = given.pop("pack", False), given.pop("pack_weights", None)
    if weights is not None and not wanted:
        raise VitslimError("--pack-weights needs --pack.")
    return (weights or "float32") if wanted else None


def _figures(params: float, macs: float) -> str:
    from .workflow.report.story import count

    return f"{count(params)} parameters, {count(macs)} MACs"


if __name__ == "__main__":
    sys.exit(main())
