"""Recipes: the paper's numbers as they stand there, layers, records, and errors by name."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

import vitslim
from vitslim.errors import VitslimError
from vitslim.workflow.options.asked import Asked, ask, record
from vitslim.workflow.options.choices import FIELDS as CHOICES
from vitslim.workflow.options.choices import MASK, PLANNING
from vitslim.workflow.options.option import OF_A_RUN
from vitslim.workflow.options.recipes import open_recipe, shipped
from vitslim.workflow.options.settings import FIELDS as SETTINGS
from vitslim.workflow.options.settings import GROUPS, OF_THE_RUN, Settings, settings_for

PAPER_SEARCH = {
    "epochs": 50,
    "lr": 5e-4,
    "sched": "none",
    "warmup_epochs": 0,
    "opt": "adamw",
    "weight_decay": 1e-3,
    "l1_attention": 2e-4,
    "l1_mlp": 5e-5,
    "l1_token": 1e-4,
    "l1_per": "kind",
    "l1_step": "subgradient",
    "l1_warmup_epochs": 0,
    "mask_lr_scale": 1,
}
PAPER_RETRAIN = {
    "global_batch_size": 1024,
    "epochs": 300,
    "lr": None,
    "lr_base": 5e-4,
    "sched": "cosine",
    "warmup_epochs": 5,
    "min_lr": 1e-5,
    "opt": "adamw",
    "weight_decay": 0.05,
}
DEIT = {
    "aa": "rand-m9-mstd0.5-inc1",
    "aug_repeats": 3,
    "reprob": 0.25,
    "remode": "pixel",
    "crop_pct": 0.875,
    "mixup": 0.8,
    "cutmix": 1.0,
    "smoothing": 0.1,
    "drop_path": 0.1,
    "clip_grad": None,
    "model_ema": False,
    "amp": False,
    "distill_loss_weight": 0.0,
}


def of(settings: Settings, expected: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in expected}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def rerecorded(asked: Asked, path: Path, *names: str) -> Asked:
    """What is asked for by the args.yaml of what was asked for."""
    whole = record(dataclasses.asdict(asked.choices), asked.stages(*names))
    return ask([write(path, yaml.safe_dump(whole, sort_keys=False))], {})


def test_these_are_shipped() -> None:
    papers = ("compress", "deit_base", "deit_small", "deit_small_fast", "digits")
    assert shipped() == (*papers, "finetune", "swin_tiny")


@pytest.mark.parametrize("name", sorted({*shipped()} - {"compress", "finetune"}))
def test_a_shipped_recipe_serves_every_stage_and_names_a_model(name: str) -> None:
    asked = ask([name], {})
    assert set(asked.stages(*OF_A_RUN)) == set(OF_A_RUN)
    assert asked.choices.budget
    assert asked.choices.model == "digits" or timm.is_model_pretrained(asked.choices.model)


@pytest.mark.parametrize(
    ("name", "model", "search_batch", "budget"),
    [
        ("deit_small", "deit_small_patch16_224", 1024, ("attention=0.7,mlp=0.7",)),
        ("deit_base", "deit_base_patch16_224", 512, ("attention=0.6,mlp=0.6",)),
        (
            "swin_tiny",
            "swin_tiny_patch4_window7_224",
            1024,
            ("attention=0.8,mlp=0.8", "attention=0.7,mlp=0.7"),
        ),
    ],
)
def test_the_papers_numbers(
    name: str, model: str, search_batch: int, budget: tuple[str, ...]
) -> None:
    asked = ask([name], {})
    stages = asked.stages(*OF_A_RUN)
    assert (asked.choices.model, asked.choices.pretrained) == (model, True)
    assert asked.choices.budget == budget
    searched = PAPER_SEARCH | DEIT | {"global_batch_size": search_batch}
    assert of(stages["search"], searched) == searched
    assert of(stages["retrain"], PAPER_RETRAIN | DEIT) == PAPER_RETRAIN | DEIT
    # 5e-4 * batch / 512, as the paper has it.
    assert stages["retrain"].lr_base * stages["retrain"].images_per_update(8) / 512 == 1e-3


def test_the_papers_numbers_are_written_out_and_no_mere_defaults() -> None:
    recipe = open_recipe("deit_small")
    written = {**recipe, **recipe["search"]}
    assert set(PAPER_SEARCH) <= set(written)
    assert set(PAPER_RETRAIN) <= {*recipe, *recipe["retrain"]}
    assert set(DEIT) - {"distill_loss_weight"} <= set(recipe)


@pytest.mark.parametrize("stage", ["search", "retrain"])
def test_without_a_recipe_the_defaults_are_the_papers(stage: str) -> None:
    ours = settings_for(stage, {"data": "folder:imagenet"})
    theirs = ask(["deit_small"], {}).stages(stage)[stage]
    changes = {n for n in SETTINGS if getattr(ours, n) != getattr(theirs, n)}
    assert changes == {"global_batch_size", "aug_repeats", "crop_pct"}


def test_digits_are_the_default_where_the_data_is_digits() -> None:
    asked = ask([], {"budget": ["macs=50%"]})
    named = ask(["digits"], {})
    assert asked.stages(*OF_A_RUN) == named.stages(*OF_A_RUN)
    assert (asked.choices.round_to, asked.choices.budget) == (4, ("macs=50%",))
    # A model and a budget are the user's to choose.
    assert (asked.choices.model, ask([], {}).choices.budget) == (None, ())
    rates = [settings_for(stage, {}).lr for stage in OF_A_RUN]
    epochs = [settings_for(stage, {}).epochs for stage in OF_A_RUN]
    assert (rates, epochs) == ([1e-3, 5e-4, 1e-3], [45, 15, 40])
    search = settings_for("search", {})
    assert (search.l1_attention, search.l1_mlp, search.mask_lr_scale) == (1e-3, 2e-4, 10)
    assert (search.scale, search.aa, search.threads) == ((0.8, 1.0), None, 1)


def test_the_fast_recipe_is_modern() -> None:
    stages = ask(["deit_small_fast"], {}).stages(*OF_A_RUN)
    for stage in ("search", "retrain"):
        assert stages[stage].amp and stages[stage].amp_dtype == "bfloat16"
        assert stages[stage].compile and stages[stage].channels_last
        assert (stages[stage].teacher, stages[stage].distill_loss_weight) == ("dense", 0.5)
        assert stages[stage].lr is None
    assert (stages["search"].epochs, stages["retrain"].epochs) == (10, 100)
    assert stages["retrain"].model_ema and not stages["search"].model_ema


def test_a_section_holds_for_its_stage_and_the_top_for_all(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "a.yaml", "weight_decay: 0.2\nretrain: {weight-decay: 0.3}\nsearch-epochs: 7\n"
    )
    stages = ask([recipe], {}).stages(*OF_A_RUN)
    assert [stages[stage].weight_decay for stage in OF_A_RUN] == [0.2, 0.2, 0.3]
    assert [stages[stage].epochs for stage in OF_A_RUN] == [45, 7, 40]


def test_a_later_recipe_wins_and_flags_over_all(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "seed: 1\nopt: lion\nsearch: {weight_decay: 0.1}\nfloor: 2")
    second = write(tmp_path / "b.yaml", "opt: sgd\nretrain: {opt: lamb}\nfloor: 3\n")
    asked = ask([first, second], {})
    stages = asked.stages(*OF_A_RUN)
    assert [stages[stage].opt for stage in OF_A_RUN] == ["sgd", "sgd", "lamb"]
    assert (stages["search"].seed, asked.choices.floor) == (1, 3)
    # Also over what a recipe has in a section.
    flags = {"opt": "adan", "weight_decay": 0.5, "search_epochs": 3, "floor": 4}
    asked = ask([first, second], flags)
    stages = asked.stages(*OF_A_RUN)
    assert {stages[stage].opt for stage in OF_A_RUN} == {"adan"}
    assert {stages[stage].weight_decay for stage in OF_A_RUN} == {0.5}
    assert (stages["search"].epochs, asked.choices.floor) == (3, 4)


def test_the_last_word_on_the_data_says_whose_defaults_hold(tmp_path: Path) -> None:
    recipe = write(tmp_path / "a.yaml", "data: folder:somewhere\n")
    assert ask([recipe], {"data": "digits"}).choices.round_to == 4
    assert ask([recipe], {"data": "digits"}).stages("search")["search"].batch_size == 32
    assert ask(["digits", recipe], {}).stages("search")["search"].data == "folder:somewhere"
    assert ask([recipe], {}).choices.round_to == 8


def test_a_choice_takes_the_place_of_what_it_stands_instead_of() -> None:
    stages = ask(["deit_small"], {"batch_size": 64, "lr_base": 1e-3}).stages(*OF_A_RUN)
    assert {s.global_batch_size for s in stages.values()} == {None}
    assert stages["search"].lr is None and stages["search"].lr_base == 1e-3
    both = ask(["deit_small"], {"batch_size": 64, "global_batch_size": 128}).stages("search")
    assert both["search"].global_batch_size == 128
    plain = ask(["deit_small_fast"], {"distill_loss_weight": 0.0}).stages(*OF_A_RUN)
    assert {s.teacher for s in plain.values()} == {None}


@pytest.mark.parametrize("name", [None, *shipped()])
def test_a_record_asks_for_the_same(name: str | None, tmp_path: Path) -> None:
    flags = {
        "model_kwargs": {"img_size": 32, "num_classes": 10},
        "scale": [0.3, 0.9],
        "search_lr": 3e-5,
        "retrain_aa": None,
        "skip": ["blocks.0"],
        "distill_loss_weight": 0.1 + 0.2,
        "output": "somewhere",
    }
    asked = ask([name] if name else [], flags)
    again = rerecorded(asked, tmp_path / "args.yaml", *OF_A_RUN)
    assert again.choices == asked.choices
    assert again.stages(*OF_A_RUN) == asked.stages(*OF_A_RUN)
    assert asked.stages("search")["search"].teacher == "dense"


@pytest.mark.parametrize("stage", ["search", "retrain"])
def test_the_record_of_one_stage_leaves_the_others_alone(stage: str, tmp_path: Path) -> None:
    asked = ask(["deit_small"], {"epochs": 3, "seed": 5, "lr": 0.5})
    again = rerecorded(asked, tmp_path / "args.yaml", stage)
    assert again.stages(stage) == asked.stages(stage)
    other = {"search": "retrain", "retrain": "search"}[stage]
    left = again.stages(other)[other]
    assert (left.seed, left.data) == (5, "folder:imagenet")
    assert left.epochs == settings_for(other, {"data": "folder:imagenet"}).epochs


def test_a_record_says_everything() -> None:
    asked = ask([], {})
    whole = record(dataclasses.asdict(asked.choices), asked.stages(*OF_A_RUN))
    said = {*whole, *(name for stage in OF_A_RUN for name in whole[stage])}
    assert said == {*CHOICES, *SETTINGS, *OF_A_RUN}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rate: 0.1", "R has what no verb knows: learning_rate"),
        ("weight_decy: 0.1", "weight_decy (did you mean weight_decay?)"),
        ("search: {l1_atention: 1}", "search.l1_atention (did you mean search.l1_attention?)"),
        ("search-epoch: 3", "search.epoch (did you mean search.epochs?)"),
        ("retrain: {l1_mlp: 1}", "retrain.l1_mlp (it holds in another stage)"),
        ("search: {data: digits}", "search.data (it holds for the whole run)"),
        ("epochs: many", "In R, epochs must be a whole number, not 'many'."),
        ("search: {epochs: 2.5}", "In R, search.epochs must be a whole number, not 2.5."),
        ("lr: [1, 2]", "In R, lr must be a number, not [1, 2]."),
        ("amp: bf16", "In R, amp must be true or false, not 'bf16'."),
        ("epochs: true", "In R, epochs must be a whole number, not True."),
        ("opt: null", "In R, opt must be text, not None."),
        ("scale: 0.5", "In R, scale must be two numbers, not 0.5."),
        ("model_kwargs: 3", "In R, model_kwargs must be values by name, not 3."),
        ("budget: 0.6", "In R, budget must be text or a list of it, not 0.6."),
        ("l1_per: head", "In R, l1_per is one of kind, unit, mac, not 'head'."),
        ("kinds: [mlp, head]", "In R, kinds is one of attention, mlp, token, not 'head'."),
        ("search: 3", "In R, search must hold options by name."),
        ("- epochs", "R must hold options by name"),
        ("epochs: [", "Cannot read R: "),
        ("\x00", "Cannot read R: "),
        ("epochs: 1\nepochs: 2", "Cannot read R: epochs is there twice"),
        ("batch_size: .inf", "In R, batch_size must be a whole number, not inf."),
    ],
)
def test_what_is_wrong_is_told_by_file_and_key(tmp_path: Path, text: str, sentence: str) -> None:
    recipe = write(tmp_path / "r.yaml", text)
    with pytest.raises(VitslimError) as raised:
        ask([recipe], {})
    told = str(raised.value)
    assert sentence.replace("R", recipe, 1) in told if "R" in sentence else sentence in told
    assert "\n" not in told


def test_an_unknown_recipe_is_told_with_those_there_are() -> None:
    with pytest.raises(VitslimError, match="neither a file nor one of compress, deit_base, "):
        ask(["deit_smal"], {})


def test_a_teacher_and_its_weight_belong_together(tmp_path: Path) -> None:
    with pytest.raises(VitslimError, match="--teacher needs --distill-loss-weight"):
        ask([], {"teacher": "dense"}).stages(*OF_A_RUN)
    # Also where an earlier run recorded that it had neither.
    rerecorded(ask([], {}), tmp_path / "args.yaml", *OF_A_RUN)
    with pytest.raises(VitslimError, match="--teacher needs --distill-loss-weight"):
        ask([str(tmp_path / "args.yaml")], {"teacher": "dense"}).stages(*OF_A_RUN)
    one = ask([], {"teacher": "x", "retrain_distill_loss_weight": 1.0}).stages(*OF_A_RUN)
    assert [one[stage].teacher for stage in OF_A_RUN] == [None, None, "x"]


def test_names_and_groups_fit_together() -> None:
    assert not set(CHOICES) & set(SETTINGS)
    assert not any(name.startswith(tuple(OF_A_RUN)) for name in (*CHOICES, *SETTINGS))
    assert set(GROUPS) <= set(SETTINGS) and set(OF_THE_RUN) <= set(SETTINGS)
    assert next(iter(GROUPS)) == next(iter(SETTINGS))


@pytest.mark.parametrize(
    ("names", "function"), [(MASK, vitslim.mask), (PLANNING, vitslim.threshold)]
)
def test_the_defaults_of_choices_are_those_of_the_functions(
    names: tuple[str, ...], function: Any
) -> None:
    parameters = inspect.signature(function).parameters
    assert {n: CHOICES[n].default for n in names} == {n: parameters[n].default for n in names}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"lr": -1.0}, "--lr must be at least 0, not -1."),
        ({"lr": float("nan")}, "--lr must be at least 0, not nan."),
        ({"lr": float("inf")}, "--lr must be at least 0, not inf."),
        ({"smoothing": 1.0}, "--smoothing must be at least 0 and below 1, not 1."),
        ({"clip_grad": 0.0}, "--clip-grad must be above 0, not 0."),
        ({"hflip": 4.0}, "--hflip must be at least 0 and at most 1, not 4."),
        ({"scale": (0.5, 0.2)}, "--scale takes the smaller number first, not 0.5 0.2."),
        ({"scale": (0.0, 1.0)}, "--scale must be above 0 and at most 1, not 0 1."),
        ({"threads": 0}, "--threads must be at least 1, not 0."),
        ({"seed": 10**25}, "--seed must be at least 0 and below"),
        ({"remode": "banana"}, "remode is one of const, rand, pixel, not 'banana'."),
        ({"device": "meta"}, "--device is auto, cpu, cuda or cuda:N, not 'meta'."),
        ({"round_to": 0}, "--round-to must be at least 1, not 0."),
    ],
)
def test_what_is_out_of_range_is_told_with_its_range(given, sentence: str) -> None:
    with pytest.raises(VitslimError) as raised:
        ask([], given).stages("search")
    assert sentence in str(raised.value)
