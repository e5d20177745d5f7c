"""The options that verbs share, made from the fields of `Choices` and `Settings`."""

import argparse
import ast
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from .errors import VitslimError
from .workflow.options.choices import FIELDS as CHOICES
from .workflow.options.choices import MASK, PLANNING
from .workflow.options.option import OF_A_RUN, kind_of
from .workflow.options.recipes import open_recipe, shipped
from .workflow.options.settings import FIELDS as SETTINGS
from .workflow.options.settings import GROUPS, OF_THE_RUN, belongs, defaults


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

    @property
    def options(self) -> list[str]:
        """All options, as they are written."""
        return list(self._option_string_actions)

    def group(self, title: str) -> Any:
        """Returns the group of options of that title, which is made when first asked for."""
        found = (group for group in self._action_groups if group.title == title)
        return next(found, None) or self.add_argument_group(title)


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


def parse(parser: Parser, verbs: Mapping[str, Parser], arguments: list[str]) -> dict[str, Any]:
    """Returns the verb and every option that was given, by name.

    Args:
        parser: Of everything.
        verbs: Of each verb.
        arguments: Of the command line.
    """
    known, strangers = parser.parse_known_args(arguments)
    if strangers:
        verb = verbs[known.verb]
        close = difflib.get_close_matches(strangers[0], verb.options, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        verb.error(f"unrecognized arguments: {' '.join(strangers)}{hint}")
    return vars(known)


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="RECIPE",
        help=f"options from a recipe of vitslim ({', '.join(shipped())}) or from a YAML file, such "
        "as the args.yaml of a run; may be repeated, later ones win, and flags over all",
    )


def add_choices(
    group: Any, names: Iterable[str], recipe: str | None = None, **defaults: str
) -> None:
    """Adds choices of a run, each with its default.

    Args:
        group: A parser or a group of one.
        names: Of the choices.
        recipe: A shipped one with defaults of the verb's own.
        **defaults: What the help says instead, by name.
    """
    own = {} if recipe is None else open_recipe(recipe)
    for name in names:
        field = CHOICES[name]
        value = own.get(name, [] if field.default is dataclasses.MISSING else field.default)
        shown = defaults.get(name) or _shown(value)
        add_option(group, field, "", f"{field.metadata['help']} [{shown}]")


def add_budget(parser: argparse.ArgumentParser, what: str = "") -> None:
    text = what + CHOICES["budget"].metadata["help"].replace("%", "%%")
    parser.add_argument("--budget", action="append", metavar="BUDGET", help=text)


def add_masks(parser: Parser) -> None:
    add_choices(parser.group("masks"), MASK)


def add_planning(parser: Parser, training: bool = True) -> None:
    """Adds how plans are made; a verb that trains knows the data, whose recipe may say it."""
    usual = str(CHOICES["round_to"].default)
    if training:
        usual += f"; digits {open_recipe('digits')['round_to']}"
    add_choices(parser.group("threshold"), PLANNING, round_to=usual)


def add_settings(
    parser: Parser, stage: str, recipe: str | None = None, without: tuple[str, ...] = ()
) -> None:
    """Adds the settings of one stage, each with its default.

    Args:
        parser: Of the verb.
        stage: Whose settings they are.
        recipe: A shipped one with defaults of the verb's own.
        without: Settings that the verb does not take.
    """
    for name, title in _grouped():
        if belongs(name, stage) and name not in without:
            text = _help(name, (stage,), recipe)
            add_option(parser.group(title), SETTINGS[name], "", text)


def add_settings_of_run(parser: Parser) -> None:
    """Adds the settings of all stages, and hidden ones for a single stage: --search-opt."""
    for name, title in _grouped():
        field, group = SETTINGS[name], parser.group(title)
        stages = tuple(stage for stage in OF_A_RUN if belongs(name, stage))
        # A rate or a number of epochs that is right for one stage is wrong for another.
        apart = name in ("epochs", "lr")
        if not apart:
            add_option(group, field, "", _help(name, stages))
        for stage in stages if name not in OF_THE_RUN else ():
            text = f"{stage}: {_help(name, (stage,))}" if apart else argparse.SUPPRESS
            add_option(group, field, f"{stage}_", text)


def add_some_settings(parser: Parser, names: Iterable[str], **given: Any) -> None:
    """Adds a few settings to a verb that trains nothing.

    Args:
        parser: Of the verb.
        names: Of the settings.
        **given: Defaults of the verb, where they are its own.
    """
    for name in names:
        text = SETTINGS[name].metadata["help"]
        shown = f"{text} [{_shown(given[name])}]" if name in given else _help(name, ("dense",))
        add_option(parser, SETTINGS[name], "", shown)


def add_option(group: Any, field: "dataclasses.Field[Any]", prefix: str, text: str) -> None:
    """Adds the option of a field; `--no-x` too, where it is on or off."""
    option = "--" + (prefix + field.name).replace("_", "-")
    kind, optional = kind_of(field)
    text = text.replace("%", "%%")
    if kind is bool:
        on_off = "store_true" if "no-" in option else argparse.BooleanOptionalAction
        group.add_argument(option, action=on_off, help=text)
        return
    metavar = {int: "N", float: "X"}.get(kind, field.name.rsplit("_", 1)[-1].upper())
    more: dict[str, Any] = {"metavar": metavar}
    if kind == tuple[float, float]:
        more = {"type": float, "nargs": 2, "metavar": ("X", "X")}
    elif kind == tuple[str, ...]:
        more = {"nargs": "+", "metavar": "PART"}
    elif kind == Mapping[str, Any]:
        more = {"nargs": "+", "action": _KeyValues, "metavar": "NAME=VALUE"}
    else:
        more["type"] = _or_none(kind) if optional else kind
    if choices := field.metadata["choices"]:
        more |= {"choices": choices, "metavar": None}
    group.add_argument(option, help=text, **more)


def _grouped() -> Iterable[tuple[str, str]]:
    """Yields the settings with the titles of their groups, in order."""
    title = ""
    for name in SETTINGS:
        title = GROUPS.get(name, title)
        yield name, title


def _help(name: str, stages: tuple[str, ...], recipe: str | None = None) -> str:
    """Tells what a setting is and its default; for several stages, where these differ too."""
    field = SETTINGS[name]
    usual, digits = (
        {stage: defaults(stage, data, recipe).get(name, field.default) for stage in stages}
        for data in ("", "digits")
    )
    shown = _by_stage(usual) + (f"; digits {_by_stage(digits)}" if digits != usual else "")
    return f"{field.metadata['help']} [{shown}]"


def _by_stage(values: Mapping[str, Any]) -> str:
    """Shows one value for all stages: that of the last one, then those that differ from it."""
    last = list(values.values())[-1]
    others = [f"{stage} {_shown(value)}" for stage, value in values.items() if value != last]
    return ", ".join([_shown(last), *others])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return (
            " ".join(each if isinstance(each, str) else f"{each:.3g}" for each in value) or "none"
        )
    return "none" if value is None else str(value)


def _or_none(kind: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--output", metavar="DIR", help=what)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        choices=("auto",),
        help="go on with what is in --output, or start if nothing is there",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"{CHOICES['model'].metadata['help']}; a recipe can name it too",
    )
    add_choices(parser, ("pretrained", "model_kwargs"))


def add_pack(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--pack", action="store_true", help=what)
    parser.add_argument(
        "--pack-weights",
        choices=("float32", "bfloat16"),
        help="weights of packed models; bfloat16 halves their memory [float32]",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
