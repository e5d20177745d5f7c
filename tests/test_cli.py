"""Every verb of the command line on tiny inputs, and its errors in one sentence."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml

import vitslim
from vitslim.cli import VERBS, main
from vitslim.ops import OPS, use_backend, why_not

TINY = ("img_size=8", "patch_size=4", "in_chans=1", "num_classes=10", "embed_dim=16", "depth=2")
TINY += ("num_heads=2",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search and a retraining made by their own verbs, laid out like a run."""
    folder = tmp_path_factory.mktemp("cli")
    quick = ("--data", "digits", "--epochs", "1", "--batch-size", "256", "--device", "cpu")
    torch.manual_seed(0)
    sizes = {key: int(value) for key, value in (pair.split("=") for pair in TINY)}
    vitslim.save(timm.create_model("vit_tiny_patch16_224", **sizes), folder / "dense")
    search = str(folder / "search")
    assert main(["search", str(folder / "dense"), *quick, "--output", search]) == 0
    assert main(["threshold", str(folder), "--budget", "macs=70%", "--round-to", "1"]) == 0
    plan = f"{search}/plans/macs-70.json"
    slim = str(folder / "slim/macs-70")
    assert main(["retrain", search, plan, *quick, "--output", slim]) == 0
    return folder


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_shows_an_example(verb: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  vitslim {verb}" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_search_and_retrain_write_models_that_timm_loads(run: Path) -> None:
    slim = timm.create_model(f"local-dir:{run}/slim/macs-70", pretrained=True)
    reached = vitslim.Plan.load(run / "search/plans/macs-70.json").reached
    assert vitslim.cost(slim)._asdict() == reached
    assert (run / "slim/macs-70/summary.csv").read_text().count("\nretrain,1,") == 1


def test_threshold_plans_several_budgets(run: Path, tmp_path: Path, capsys) -> None:
    budgets = ["--budget", "macs=80%", "--budget", "attention=0.5,mlp=0.5", "--round-to", "1"]
    assert main(["threshold", str(run), *budgets, "--output", str(tmp_path), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [Path(each["plan"]).name for each in done] == [
        "macs-80.json",
        "attention-0.5-mlp-0.5.json",
    ]
    assert all(vitslim.Plan.load(each["plan"]).reached["macs"] == each["macs"] for each in done)


def test_a_latency_budget_is_met_by_measuring(run: Path, tmp_path: Path, capsys) -> None:
    command = ["threshold", str(run), "--output", str(tmp_path), "--round-to", "1", "--budget"]
    assert main([*command, "latency=1%"]) == 2
    assert "out of reach" in capsys.readouterr().err
    assert main([*command, "latency=5"]) == 2
    assert "not a fraction between 0 and 1" in capsys.readouterr().err


def test_eval_says_what_the_search_said(run: Path, capsys) -> None:
    assert main(["eval", str(run / "search"), "--data", "digits", "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    result = json.loads((run / "search/result.json").read_text())
    assert accuracy == pytest.approx(result["accuracy"])


def test_cost_prints_the_papers_table_row(capsys) -> None:
    command = ["cost", "deit_small_patch16_224", "--budget", "attention=0.7,mlp=0.7", "--json"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["model", "img_size", "dense", "slim"]
    assert facts["img_size"] == 224
    assert [round(facts[k]["params"] / 1e6, 1) for k in ("dense", "slim")] == [22.1, 15.7]
    assert [round(facts[k]["macs"] / 1e9, 1) for k in ("dense", "slim")] == [4.6, 3.2]


def test_cost_of_a_folder_and_a_plan(run: Path, capsys) -> None:
    plan = run / "search/plans/macs-70.json"
    assert main(["cost", str(run / "search"), "--plan", str(plan), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["slim"] == vitslim.Plan.load(plan).reached
    assert main(["cost", str(run / "search"), "--plan", str(plan)]) == 0
    assert "dense: " in capsys.readouterr().out


def test_export_writes_a_program(run: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "slim.pt2"
    assert main(["export", str(run / "slim/macs-70"), "--output", str(target)]) == 0
    assert "largest difference" in capsys.readouterr().out
    slim, images = vitslim.load(run / "slim/macs-70").eval(), torch.randn(2, 1, 8, 8)
    program = torch.export.load(target).module()
    torch.testing.assert_close(program(images), slim(images), rtol=1e-4, atol=1e-5)


def test_bench_measures_folders_side_by_side(run: Path, capsys) -> None:
    models = [str(run / "dense"), str(run / "slim/macs-70")]
    options = ["--batch-size", "1", "4", "--seconds", "0.05"]
    assert main(["bench", *models, *options, "--json"]) == 0
    latency = json.loads(capsys.readouterr().out)
    assert list(latency) == models
    assert all(set(each) == {"1", "4"} and min(each.values()) > 0 for each in latency.values())
    assert main(["bench", str(run), *options]) == 0
    assert str(run / "slim/macs-70") in capsys.readouterr().out


def test_eval_of_a_packed_model_says_the_same(run: Path, capsys) -> None:
    command = ["eval", str(run / "slim/macs-70"), "--data", "digits", "--device", "cpu", "--json"]
    accuracies = []
    for options in ([], ["--pack"], ["--pack", "--pack-weights", "bfloat16"]):
        assert main([*command, *options]) == 0
        accuracies.append(json.loads(capsys.readouterr().out)["accuracy"])
    # One of the 360 held-out images may be on the edge.
    assert accuracies[1:] == pytest.approx([accuracies[0]] * 2, abs=0.6)


def test_bench_measures_each_model_packed_too(run: Path, capsys) -> None:
    options = ["--batch-size", "2", "--seconds", "0.02", "--device", "cpu", "--json", "--pack"]
    assert main(["bench", str(run), *options]) == 0
    output = capsys.readouterr()
    dense, search, slim = (str(run / name) for name in ("dense", "search", "slim/macs-70"))
    assert list(json.loads(output.out)) == [
        dense,
        f"{dense}, packed",
        search,
        slim,
        f"{slim}, packed",
    ]
    assert f"{search} is measured unpacked alone: a masked model cannot be packed" in output.err


def test_a_forced_backend_that_cannot_run_is_told_in_one_sentence(run: Path, capsys) -> None:
    if (reason := why_not("triton", "vit_encoder", "cpu", torch.float32)) is None:
        pytest.skip("triton runs vit_encoder here")
    command = ["eval", str(run / "dense"), "--data", "digits", "--device", "cpu", "--pack"]
    with use_backend("triton", "vit_encoder"):
        assert main(command) == 2
    error = capsys.readouterr().err
    assert error == (
        f"vitslim: error: vit_encoder: backend 'triton' was asked for but cannot run: {reason}\n"
    )


def test_info_names_a_backend_for_every_op(capsys) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["ops"]) == list(OPS)
    assert main(["info"]) == 0
    assert "ragged_attention on cpu" in capsys.readouterr().out


def test_yaml_stands_under_flags(run: Path, tmp_path: Path, capsys) -> None:
    config = tmp_path / "search.yaml"
    options = {"epochs": 5, "batch-size": 256, "aa": None, "scale": [0.5, 1], "no_aug": True}
    options |= {"lr": "1e-4", "output": str(tmp_path / "out"), "model_ema": False}
    config.write_text(yaml.safe_dump(options))
    assert main(["search", str(run / "dense"), "-c", str(config), "--epochs", "1"]) == 0
    args = json.loads((tmp_path / "out/result.json").read_text())["args"]
    assert (args["epochs"], args["batch_size"], args["lr"]) == (1, 256, 1e-4)
    assert (args["aa"], args["scale"], args["no_aug"]) == (None, [0.5, 1.0], True)


def test_unknown_yaml_keys_are_refused_by_name(tmp_path: Path, capsys) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("epochs: 3\nlearning_rate: 0.1\nsearch-epochs: 2\n")
    assert main(["run", "-c", str(config), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "that run does not have: epochs, learning_rate." in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run --output OUT", "--budget is needed"),
        ("run --budget macs=60%", "--output is needed"),
        ("run --budget speed=2 --output OUT", "cannot read the budget 'speed=2'"),
        ("run --budget macs=60% --output OUT --data folder:/nowhere", "--model is needed"),
        ("search no_such_model --output OUT", "neither a folder nor a model"),
        ("search RUN/dense --output OUT --opt nonsense --batch-size 64", "optimiser 'nonsense'"),
        ("search RUN/dense --output OUT --sched odd --batch-size 64", "schedule 'odd'"),
        ("search RUN/dense --output RUN/search", "holds an earlier run: add --resume"),
        ("search RUN/dense --output OUT --mixup 0.2 --batch-size 63", "even batch size"),
        ("search RUN/dense --output OUT --epochs many", "invalid int value: 'many'"),
        ("search RUN/dense --output OUT --epochs 0", "--epochs must be at least 1"),
        ("search RUN/dense --output OUT --epoch 3", "unrecognized arguments: --epoch"),
        ("threshold /nowhere --budget macs=60%", "masks"),
        ("threshold RUN --budget macs=1%", "out of reach"),
        ("retrain RUN RUN/search/config.json --output OUT", "lan"),
        (
            "retrain RUN RUN/search/plans/macs-70.json --output OUT --distill-loss-weight 1",
            "teacher",
        ),
        ("eval RUN/dense --data folder:/nowhere", "no image folder /nowhere"),
        ("cost RUN/nothing", "neither a folder nor a model"),
        ("cost deit_tiny_patch16_224 --budget macs=60% --plan x.json", "exclude each other"),
        ("eval RUN/dense --pack-weights bfloat16", "--pack-weights needs --pack"),
        ("eval RUN/search --pack --device cpu", "slim it first"),
        ("export RUN/dense", "--output is needed"),
        ("report /nowhere", "/nowhere"),
        ("bench RUN/dense --batch-size one", "invalid int value"),
        ("nonsense", "invalid choice: 'nonsense'"),
    ],
)
def test_errors_are_one_sentence_without_a_traceback(
    run: Path, tmp_path: Path, capsys, arguments: str, sentence: str
) -> None:
    words = arguments.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")).split()
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.err.startswith("vitslim: error: ")
    assert sentence in output.err
    assert "Traceback" not in output.err
    assert output.err.count("\n") == 1
