"""What each verb of the command line takes."""

import argparse
import textwrap
from collections.abc import Mapping
from typing import Any

from . import __version__
from .cli_options import (
    Parser,
    add_budget,
    add_choices,
    add_config,
    add_json,
    add_masks,
    add_model,
    add_output,
    add_pack,
    add_planning,
    add_settings,
    add_settings_of_run,
    add_some_settings,
)
from .workflow.options.recipes import open_recipe

# What `vitslim eval` takes of the settings, and of a recipe.
EVAL = (
    *("data", "data_dir", "train_split", "val_split", "input_key", "target_key"),
    *("train_num_samples", "val_num_samples"),
    *("bad_images", "batch_size", "crop_pct", "workers", "device", "amp", "amp_dtype"),
)
EVAL_BATCH_SIZE = 64
# What `vitslim compress` takes of the choices.
LOOKING = ("calibration_images", "criterion", "rotate", "refit", "kinds")
CUTTING = ("round_to", "floor", "ranking")
COMPRESSING = ("model", "pretrained", "model_kwargs", "output", "budget", *LOOKING, *CUTTING)


def build_parser() -> tuple[Parser, Mapping[str, Parser]]:
    """Builds the parser of `vitslim`, and those of its verbs by name."""
    parser = Parser(
        prog="vitslim",
        description="Makes vision transformers smaller, and really faster: by search, threshold "
        "and retraining, or without training.",
        epilog="example:\n  vitslim run --data digits --budget macs=60% --output runs/digits\n\n"
        "vitslim VERB --help tells about each verb.",
    )
    parser.add_argument(
        "--version", action="version", version=f"vitslim {__version__}", help="print the version"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for add in (
        *(_run, _compress, _finetune, _search, _threshold, _retrain),
        *(_eval, _cost, _export, _bench, _report, _info),
    ):
        add(verbs)
    return parser, verbs.choices


def _verb(
    verbs: Any,
    name: str,
    usage: str,
    what: str,
    example: str,
    config: bool = False,
    more: str = "",
) -> Parser:
    parser: Parser = verbs.add_parser(
        name,
        help=what,
        usage=f"vitslim {name} {usage}",
        description=what[0].upper() + what[1:] + "." + more,
        epilog=f"example:\n{textwrap.indent(example, '  ')}",
    )
    if config:
        add_config(parser)
    return parser


def _run(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "run",
        "--budget BUDGET --output DIR [options]",
        "search, threshold, retrain and report in one folder",
        "vitslim run --data digits --budget macs=60% --output runs/digits\n"
        "vitslim run -c deit_small --data folder:IMAGENET --output runs/deit-s",
        config=True,
        more="\n\nTraining options have timm's names and hold for every stage; --dense-X, "
        "--search-X and\n--retrain-X set X for one stage alone.",
    )
    add_budget(parser)
    add_output(parser, "the run folder")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a timm name or a saved folder; without "
        "weights it is trained first [for digits: a small ViT]",
    )
    add_choices(parser, ("pretrained", "model_kwargs", "train_dense", "fold"))
    add_choices(parser, ("compress", "calibration_images", "criterion", "rotate"))
    add_masks(parser)
    add_planning(parser)
    add_settings_of_run(parser)


def _compress(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "compress",
        "MODEL --budget BUDGET --output DIR [options]",
        "make a trained model smaller in minutes, without training",
        "vitslim compress runs/photos --data folder:PHOTOS --budget macs=60% --budget macs=40% "
        "--output runs/small",
        config=True,
        more="\n\nIts heads are rotated, all units scored, a plan made for each budget, and what "
        "is kept is refitted\nto what the model computed. A folder of images without classes is "
        "enough to look at. Training\noptions have timm's names and are for --retrain-epochs "
        "alone; all defaults are those of the recipe\ncompress.",
    )
    add_model(parser)
    add_budget(parser)
    add_output(parser, "where the slim models, their plans and the report go")
    add_choices(parser, LOOKING, recipe="compress")
    usual = f"{open_recipe('compress')['round_to']}; digits {open_recipe('digits')['round_to']}"
    add_choices(parser.group("threshold"), CUTTING, recipe="compress", round_to=usual)
    parser.group("optimisation").add_argument(
        "--retrain-epochs",
        type=int,
        metavar="N",
        help="train what is left so many epochs, with the dense model as teacher [0]",
    )
    add_settings(parser, "retrain", recipe="compress", without=("epochs",))


def _search(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "search",
        "MODEL --output DIR [options]",
        "learn masks of a model: step one",
        "vitslim search deit_small_patch16_224 --pretrained --data folder:IMAGENET "
        "--output runs/search",
        config=True,
        more="\n\nTraining options have timm's names.",
    )
    add_model(parser)
    add_output(parser, "where the masked model, its masks and the checkpoints go")
    add_budget(parser, "evaluate the model cut to this after every epoch: ")
    add_choices(parser, ("fold", "rotate", "calibration_images"))
    add_masks(parser)
    add_planning(parser)
    add_settings(parser, "search")


def _threshold(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "threshold",
        "SEARCH --budget BUDGET [options]",
        "cut what a search learned to any number of budgets: step two",
        "vitslim threshold runs/digits --budget macs=60% --budget params=200K",
    )
    parser.add_argument("search", metavar="SEARCH", help="a search's folder, or a run's")
    add_budget(parser)
    parser.add_argument("--output", metavar="DIR", help="where NAME.json goes [SEARCH/plans]")
    add_planning(parser, training=False)
    add_json(parser)


def _retrain(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "retrain",
        "SEARCH PLAN --output DIR [options]",
        "cut a searched model to a plan and train what is left: step three",
        "vitslim retrain runs/search runs/search/plans/macs-60.json "
        "--data folder:IMAGENET --output runs/slim",
        config=True,
        more="\n\nTraining options have timm's names.",
    )
    parser.add_argument("search", metavar="SEARCH", help="a search's folder, or a run's")
    parser.add_argument("plan", metavar="PLAN", help="a plan that `vitslim threshold` wrote")
    add_output(parser, "where the slim model and the checkpoints go")
    add_choices(parser, ("fold",))
    parser.add_argument(
        "--dense",
        metavar="MODEL",
        help="the model that --teacher dense means, a timm name or a saved folder "
        "[RUN/dense, or what the search began with]",
    )
    add_settings(parser, "retrain")


def _finetune(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "finetune",
        "MODEL --output DIR [options]",
        "train a model, dense or slim, on other images, from the weights it has",
        "vitslim finetune runs/deit-s/slim/macs-60 --data folder:PHOTOS --output runs/photos",
        config=True,
        more="\n\nIts classifier is made anew where the data has other classes. Training options "
        "have timm's\nnames; their defaults are those of the recipe finetune.",
    )
    add_model(parser)
    parser.add_argument(
        "--img-size",
        type=int,
        metavar="N",
        help="train at N x N pixels; positions are resampled as timm does [the model's size]",
    )
    add_output(parser, "where the model and the checkpoints go")
    add_settings(parser, "finetune")


def _eval(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "eval",
        "MODEL [options]",
        "measure the accuracy of a model on held-out images",
        "vitslim eval runs/digits/slim/macs-60 --data digits",
        config=True,
    )
    add_model(parser)
    add_some_settings(parser, EVAL, batch_size=EVAL_BATCH_SIZE)
    add_pack(parser, "pack the model for the CPU first, as vitslim.pack does")
    add_json(parser)


def _cost(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "cost",
        "MODEL [options]",
        "count parameters and MACs of a model, dense and cut",
        "vitslim cost deit_small_patch16_224 --budget attention=0.7,mlp=0.7 --json",
    )
    parser.add_argument("model", metavar="MODEL", help="a timm name or a saved folder")
    parser.add_argument(
        "--budget",
        metavar="BUDGET",
        help="cut evenly, before any search: macs=60%%, params=12M or attention=0.7,mlp=0.7",
    )
    parser.add_argument("--plan", metavar="PLAN", help="a plan that `vitslim threshold` wrote")
    parser.add_argument("--round-to", type=int, metavar="N", help="widths are multiples of N [1]")
    add_choices(parser, ("model_kwargs",))
    add_json(parser)


def _export(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "export",
        "MODEL --output FILE [options]",
        "write a model for other runtimes",
        "vitslim export runs/digits/slim/macs-60 --output slim.onnx",
    )
    parser.add_argument("model", metavar="MODEL", help="a saved folder")
    parser.add_argument("--output", metavar="FILE", help="the file to write")
    parser.add_argument("--format", choices=("pt2", "onnx"), help="[by the end of FILE, or pt2]")
    parser.add_argument("--batch-size", type=int, metavar="N", help="fix the batch size [any]")


def _bench(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "bench",
        "MODEL [MODEL ...] [options]",
        "measure latency of models, side by side",
        "vitslim bench runs/digits/dense runs/digits/slim/macs-60\nvitslim bench runs/digits",
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="saved folders, timm names, or one run folder; the first is the one compared with",
    )
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="N", help="[1 32]")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="how long each model is timed at each batch size [1]",
    )
    parser.add_argument("--device", help="auto, cpu or cuda [auto]")
    parser.add_argument(
        "--tune",
        action="store_true",
        default=argparse.SUPPRESS,
        help="first try the Triton kernels' configurations on this GPU and keep the fastest",
    )
    add_pack(parser, "measure each model packed for the CPU too, as vitslim.pack does")
    add_json(parser)


def _report(verbs: Any) -> None:
    parser = _verb(
        verbs, "report", "RUN", "draw the report of a run again", "vitslim report runs/digits"
    )
    parser.add_argument("run", metavar="RUN", help="the folder of a run, a search or a retraining")


def _info(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "info",
        "[--json]",
        "tell what is built and which backend runs each op",
        "vitslim info --json",
    )
    add_json(parser)
