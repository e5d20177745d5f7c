"""The options that verbs share, made from the settings, and the YAML file that can hold them."""

import argparse
import ast
import dataclasses
import typing
from pathlib import Path
from typing import Any, NoReturn

from .errors import VitslimError
from .workflow.settings import DIGITS, PAPER, STAGES, Settings, belongs

BUDGET_HELP = (
    "macs=60%%, params=12M, latency=60%%, or attention=0.7,mlp=0.7,token=0.8; may be repeated"
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in 100 columns with room for the options' names."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{**kwargs, "max_help_position": 34, "width": 100})


class Parser(argparse.ArgumentParser):
    """argparse with errors in this library's manner, and no guessing of shortened options."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises instead of exiting, so that all errors are told in one place."""
        raise VitslimError(f"{message} (see {self.prog} --help)")


def parse(parser: Parser, arguments: list[str]) -> dict[str, Any]:
    """Parses a command line; a YAML file of `-c` stands under the flags.

    Args:
        parser: Of `vitslim`, with its verbs.
        arguments: The words after `vitslim`.

    Returns:
        The verb and every option that was given, by name.
    """
    given = vars(parser.parse_args(arguments))
    if "config" in given:
        words = _from_yaml(parser, given, Path(given["config"]))
        # Flags come first and what they say is left out of the file, so they win.
        given = vars(parser.parse_args([*arguments, *words]))
        del given["config"]
    return given


def _from_yaml(parser: Parser, given: dict[str, Any], path: Path) -> list[str]:
    """Reads options from YAML as words, so that the parser checks them as it checks flags."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise VitslimError(f"Cannot read {path}: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict):
        raise VitslimError(f"{path} must hold options by name, such as `epochs: 10`.")
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    verb = verbs.choices[given["verb"]]
    actions = {a.dest: a for a in verb._actions if a.option_strings and a.dest != "help"}
    content = {str(key).replace("-", "_"): value for key, value in content.items()}
    unknown = sorted(set(content) - (set(actions) - {"config"}))
    if unknown:
        raise VitslimError(
            f"{path} names options that {given['verb']} does not have: {', '.join(unknown)}."
        )
    return [
        word
        for name, value in content.items()
        if name not in given
        for word in _words(actions[name], value)
    ]


def _words(action: argparse.Action, value: Any) -> list[str]:
    """Writes a YAML value as the words of a command line."""
    option = action.option_strings[0]
    if isinstance(value, bool):
        on_off = isinstance(action, argparse.BooleanOptionalAction)
        return [option] if value else list(action.option_strings[-1:]) if on_off else []
    if isinstance(value, dict):
        return [option, *(f"{key}={each!r}" for key, each in value.items())]
    if isinstance(action, argparse._AppendAction):
        values = value if isinstance(value, list) else [value]
        return [word for each in values for word in (option, str(each))]
    values = value if isinstance(value, list) else [value]
    return [option, *("none" if each is None else str(each) for each in values)]


def add_model_kwargs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        action=_KeyValues,
        metavar="NAME=VALUE",
        help="timm's arguments for the model, e.g. img_size=32 patch_size=4 num_classes=10",
    )


class _KeyValues(argparse.Action):
    """Collects NAME=VALUE words in a dict; values are Python literals or text."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        pairs = dict(getattr(namespace, self.dest, {}))
        for word in values:
            name, equals, text = word.partition("=")
            if not equals:
                parser.error(f"{option_string} takes NAME=VALUE, not {word!r}")
            try:
                pairs[name] = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                pairs[name] = text
        setattr(namespace, self.dest, pairs)


def add_settings(parser: argparse.ArgumentParser, stage: str) -> None:
    """Adds the settings of one stage, each with its default."""
    group = parser.add_argument_group("training options, named as in timm")
    for field in dataclasses.fields(Settings):
        if belongs(field.name, stage):
            usual = PAPER[stage].get(field.name, field.default)
            digits = DIGITS[stage].get(field.name, usual)
            default = _shown(usual) + (f"; digits {_shown(digits)}" if digits != usual else "")
            add_setting(group, field, "", f"{field.metadata['help']} [{default}]")


def add_settings_of_run(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of all stages, and hidden ones for a single stage: --search-opt."""
    group = parser.add_argument_group(
        "training options, named as in timm",
        "They hold for every stage; --dense-X, --search-X and --retrain-X set X for one stage."
        "\n  Defaults are those of `vitslim search` and `vitslim retrain`.",
    )
    for field in dataclasses.fields(Settings):
        if field.name not in ("epochs", "lr"):
            add_setting(group, field, "", field.metadata["help"])
    for stage in STAGES:
        for field in dataclasses.fields(Settings):
            if field.name not in ("data", "data_dir", "device", "seed") and belongs(
                field.name, stage
            ):
                shown = field.name in ("epochs", "lr")
                text = f"{stage}: {field.metadata['help']}" if shown else argparse.SUPPRESS
                add_setting(group, field, f"{stage}_", text)


def add_setting(group: Any, field: "dataclasses.Field[Any]", prefix: str, text: str) -> None:
    option = "--" + (prefix + field.name).replace("_", "-")
    if field.type is bool:
        on_off = "store_true" if "no-" in option else argparse.BooleanOptionalAction
        group.add_argument(option, action=on_off, help=text)
        return
    kinds = typing.get_args(field.type)
    kind = next((k for k in kinds if k is not type(None)), field.type)
    if type(None) in kinds:
        kind = _or_none(kind)
    pair = {"nargs": 2} if field.type == tuple[float, float] else {}
    metavar = field.name.rsplit("_", 1)[-1].upper()
    metavars = (metavar, metavar) if pair else metavar
    group.add_argument(option, type=kind, help=text.replace("%", "%%"), metavar=metavars, **pair)


def _or_none(kind: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{each:.3g}" for each in value)
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--output", metavar="DIR", help=what)
    parser.add_argument("--resume", action="store_true", help="go on with what is in --output")


def add_masks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("masks")
    group.add_argument(
        "--granularity",
        choices=("head_dim", "uniform", "head"),
        help="one value per head and dimension, per dimension, or per head [head_dim]",
    )
    group.add_argument(
        "--kinds",
        nargs="+",
        choices=("attention", "mlp", "token"),
        help="what may be cut [all three]",
    )
    group.add_argument(
        "--token-start",
        choices=("paper", "one"),
        help="token gates start at tanh(3), as in the paper, or at 1 [paper]",
    )
    group.add_argument(
        "--skip", nargs="+", metavar="PART", help="parts to leave alone, e.g. blocks.0 blocks.*.mlp"
    )


def add_planning(parser: argparse.ArgumentParser, round_to: str = "8") -> None:
    group = parser.add_argument_group("threshold")
    group.add_argument(
        "--round-to",
        type=int,
        metavar="N",
        help=f"widths are multiples of N; 1 is exact [{round_to}]",
    )
    group.add_argument(
        "--token-rule",
        choices=("running-min", "any-deeper"),
        help="a token dropped in a layer is dropped in later ones, as in the paper, "
        "or stays while a deeper layer keeps it [running-min]",
    )
    group.add_argument(
        "--floor", type=int, metavar="N", help="units that every layer keeps at least [1]"
    )


def add_fold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        help="multiply what the masks learned into the weights [yes]",
    )


def add_pack(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--pack", action="store_true", help=what)
    parser.add_argument(
        "--pack-weights",
        choices=("float32", "bfloat16"),
        help="weights of packed models; bfloat16 halves their memory [float32]",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a timm name or a saved folder")
    parser.add_argument(
        "--pretrained", action=argparse.BooleanOptionalAction, help="let timm load its weights [no]"
    )
    add_model_kwargs(parser)
