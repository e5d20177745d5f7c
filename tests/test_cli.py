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
from vitslim.workflow.models import open_dense, open_teacher
from vitslim.workflow.options.asked import ask
from vitslim.workflow.options.option import OF_A_RUN
from vitslim.workflow.options.settings import settings_for
from vitslim.workflow.runtime.interrupt import Stopped

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


@pytest.mark.parametrize("verb", ["run", "search", "retrain", "finetune", "compress"])
def test_help_groups_the_options_and_tells_their_defaults(verb: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    titles = ("masks", "data", "optimisation", "precision and speed", "checkpoints", "distillation")
    assert [title for title in titles if f"\n{title}:\n" in text] == [
        *titles[verb in ("retrain", "finetune", "compress") :]
    ]
    assert "deit_small_fast" in text
    # The first group is of options that have no default, and every other option tells its own.
    for group in text.split("\n\nexample:")[0].split(":\n  --")[1:]:
        for option in group.split("\n\n")[0].split("\n  --"):
            assert option.rstrip().endswith("]"), option


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


def test_cost_tells_height_and_width_of_oblong_images(capsys) -> None:
    command = ["cost", "deit_tiny_patch16_224", "--model-kwargs", "depth=1", "img_size=[32,64]"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["img_size"] == [32, 64]
    assert main(command) == 0
    assert "deit_tiny_patch16_224 at 32 x 64 pixels" in capsys.readouterr().out
    assert main(["cost", "deit_tiny_patch16_224"]) == 0
    assert "deit_tiny_patch16_224 at 224 pixels" in capsys.readouterr().out


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
    options |= {"model": str(run / "dense"), "retrain": {"opt": "none of the search's business"}}
    config.write_text(yaml.safe_dump(options))
    assert main(["search", "-c", str(config), "--epochs", "1"]) == 0
    args = json.loads((tmp_path / "out/result.json").read_text())["args"]
    assert (args["epochs"], args["images_per_update"], args["lr"]) == (1, 256, 1e-4)
    assert (args["aa"], args["scale"], args["no_aug"]) == (None, [0.5, 1.0], True)
    assert args["model"] == str(run / "dense")


def test_unknown_yaml_keys_are_refused_by_name(tmp_path: Path, capsys) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("epochs: 3\nlearning_rate: 0.1\nsearch-epochs: 2\n")
    assert main(["run", "-c", str(config), "--output", str(tmp_path / "out")]) == 2
    assert f"{config} has what no verb knows: learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def asked_of_run(monkeypatch: pytest.MonkeyPatch, words: list[str]):
    """What `vitslim run` hands on, without doing it."""
    jobs: list = []
    monkeypatch.setattr("vitslim.workflow.run.run", jobs.append)
    assert main(["run", *words]) == 0
    return jobs.pop()


@pytest.mark.parametrize("recipe", ["digits", "deit_small", "deit_small_fast", "deit_base"])
def test_args_yaml_of_a_run_asks_for_the_same_run(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["-c", recipe, "--output", str(tmp_path), "--search-lr", "0.25", "--round-to", "2"]
    words += ["--budget", "macs=50%", "--budget", "attention=0.5,mlp=0.6", "--token-gate", "keys"]
    job = asked_of_run(monkeypatch, [*words, "--ranking", "macs", "--no-fold", "--seed", "7"])
    assert (job.stages["search"].lr, job.plans.round_to, job.plans.fold) == (0.25, 2, False)
    assert (job.masks.token_gate, job.plans.ranking) == ("keys", "macs")
    assert job.budgets == ("macs=50%", "attention=0.5,mlp=0.6")
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(dict(job.given), sort_keys=False))
    again = asked_of_run(monkeypatch, ["-c", str(tmp_path / "args.yaml")])
    assert again == job
    resumed = asked_of_run(monkeypatch, ["-c", str(tmp_path / "args.yaml"), "--resume"])
    assert resumed.resume and not again.resume


@pytest.mark.parametrize(("stage", "folder"), [("search", "search"), ("retrain", "slim/macs-70")])
def test_a_stage_keeps_what_it_was_asked(run: Path, stage: str, folder: str) -> None:
    path = run / folder / "args.yaml"
    told = yaml.safe_load(path.read_text())
    given = {"epochs": 1, "batch_size": 256, "device": "cpu"}
    assert ask([str(path)], {}).stages(stage)[stage] == settings_for(stage, given)
    assert set(told) & set(OF_A_RUN) == {stage}
    assert told["output"] == str(run / folder)
    assert told.get("model") == (str(run / "dense") if stage == "search" else None)


def test_resuming_rewrites_args_yaml_but_a_refused_one_does_not(run: Path, capsys) -> None:
    search, words = run / "search", ["search", str(run / "dense"), "--output", str(run / "search")]
    before = (search / "args.yaml").read_text()
    same = ["--epochs", "1", "--batch-size", "256", "--device", "cpu", "--resume", "auto"]
    assert main([*words, *same, "--lr", "0.1"]) == 2
    assert "lr was 0.0005 and is now 0.1" in capsys.readouterr().err
    assert (search / "args.yaml").read_text() == before
    # How the work is done may change, and is told as it is now.
    assert main([*words, *same, "--workers", "1"]) == 0
    assert yaml.safe_load((search / "args.yaml").read_text())["search"]["workers"] == 1
    (search / "args.yaml").write_text(before)


def test_a_search_forecasts_its_budgets(run: Path, tmp_path: Path) -> None:
    words = [str(run / "dense"), "--epochs", "1", "--batch-size", "256", "--device", "cpu"]
    words += ["--budget", "macs=80%", "--round-to", "1", "--no-fold", "--output"]
    assert main(["search", *words, str(tmp_path / "out")]) == 0
    rows = (tmp_path / "out/forecast.csv").read_text().splitlines()
    assert len(rows) == 2 and rows[1].startswith("1,macs=80%,")


@pytest.mark.parametrize("teacher", ["dense", "RUN/dense"])
def test_retrain_finds_its_teacher(run: Path, tmp_path: Path, teacher: str) -> None:
    plan = str(run / "search/plans/macs-70.json")
    words = ["--epochs", "1", "--batch-size", "256", "--device", "cpu", "--output"]
    words += [str(tmp_path / "out"), "--distill-loss-weight", "0.5", "--teacher"]
    assert main(["retrain", str(run), plan, *words, teacher.replace("RUN", str(run))]) == 0


def test_the_dense_model_is_found_beside_the_search_or_in_its_record(
    run: Path, tmp_path: Path
) -> None:
    dense = vitslim.load(run / "dense").state_dict()

    def same(model: torch.nn.Module) -> bool:
        return all(torch.equal(dense[name], value) for name, value in model.state_dict().items())

    assert same(open_dense(run / "search"))
    (tmp_path / "args.yaml").write_text((run / "search/args.yaml").read_text())
    assert same(open_dense(tmp_path))
    assert same(open_dense(tmp_path / "nothing", str(run / "dense")))
    (tmp_path / "args.yaml").write_text("model: vit_tiny_patch16_224\n")
    with pytest.raises(vitslim.VitslimError, match="name one with --dense"):
        open_dense(tmp_path)


def test_a_teacher_is_frozen_and_no_part_of_the_student(run: Path) -> None:
    dense, cpu = vitslim.load(run / "dense"), torch.device("cpu")
    teacher = open_teacher("dense", dense, cpu, 10)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in dense.parameters())
    assert not {id(p) for p in dense.parameters()} & {id(p) for p in teacher.parameters()}
    for name, given, classes, sentence in (
        ("dense", None, 10, "there is none: give --dense"),
        ("dense", dense, 7, "10 classes and the student 7"),
        ("no_such_model", None, 10, "neither a folder nor a model"),
        ("test_vit", dense, 10, "cannot make test_vit with its weights"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(vitslim.VitslimError) as raised:
            patch.setattr("timm.create_model", _offline)
            open_teacher(name, given, cpu, classes)
        assert sentence in str(raised.value)
    assert open_teacher("dense", dense, cpu, None) is not dense


def _offline(name: str, pretrained: bool = False, **kwargs: object) -> None:
    raise OSError("the hub cannot be reached.\nCheck the connection.")


def test_a_run_that_was_asked_to_stop_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def stop(given: object) -> None:
        raise Stopped("stopped; go on with\n  vitslim run --resume auto")

    monkeypatch.setitem(VERBS, "info", stop)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "stopped; go on with\n  vitslim run --resume auto\n"
    # Of many processes one tells.
    monkeypatch.setenv("RANK", "1")
    assert main(["info"]) == 0
    assert capsys.readouterr().out == ""


def test_the_version_is_told(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"vitslim {vitslim.__version__}\n"


def test_an_error_that_is_no_users_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(given: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(VERBS, "info", fail)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_eval_takes_its_model_and_its_data_from_a_recipe(run: Path, tmp_path: Path, capsys) -> None:
    config = tmp_path / "r.yaml"
    config.write_text(f"model: {run}/dense\ndata: folder:/nowhere\nsearch: {{epochs: 3}}\n")
    assert main(["eval", "-c", str(config)]) == 2
    assert "no image folder /nowhere" in capsys.readouterr().err
    assert main(["eval", "-c", str(config), "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == f"{run}/dense"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run --output OUT", "--budget is needed"),
        ("run --budget macs=60%", "--output is needed"),
        ("run --budget speed=2 --output OUT", "cannot read the budget 'speed=2'"),
        ("run --budget macs=60% --output OUT --data folder:/nowhere", "--model is needed"),
        ("search no_such_model --output OUT", "neither a folder nor a model"),
        ("search RUN/dense --output OUT --opt nonsense --batch-size 64", "optimiser 'nonsense'"),
        ("search --output OUT", "MODEL is needed"),
        ("search RUN/dense --output RUN", "is the folder of a whole run"),
        ("search RUN/dense --output OUT --resume maybe", "invalid choice: 'maybe'"),
        ("search RUN/dense --output OUT --l1-per head", "invalid choice: 'head'"),
        ("search RUN/dense --output OUT --teacher dense", "needs --distill-loss-weight"),
        ("search RUN/dense --output OUT --budget speed=2", "cannot read the budget"),
        ("run -c deit_smal --output OUT", "neither a file nor one of compress, deit_base"),
        ("run -c swin_tiny --output OUT", "a SwinTransformer cannot be masked"),
        ("search -c swin_tiny --output OUT", "a SwinTransformer cannot be masked"),
        ("run -c deit_small --no-pretrained --output OUT", "no image folder imagenet"),
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
            "needs --teacher",
        ),
        (
            "retrain RUN RUN/search/plans/macs-70.json --output OUT --dense RUN/dense",
            "--dense tells what --teacher dense means",
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
        ("search RUN/dense --output OUT --epoch 3", "did you mean --epochs? (see vitslim search"),
        (
            "cost swin_tiny_patch4_window7_224",
            "a SwinTransformer cannot be counted in parameters and MACs",
        ),
        ("cost vit_small_r26_s32_224", "hybrids cannot be counted"),
        (
            "cost vit_small_patch16_18x2_224",
            "the cost of blocks.0, a ParallelThingsBlock, cannot be counted",
        ),
        ("cost deit_tiny_patch16_224 --budget macs=inf", "is no amount"),
        ("cost vit_tiny_patch16_224 --model-kwargs class_token=False", "needs the class token"),
        ("search RUN/dense --output RUN/dense", "holds a model, which would be lost"),
        ("search RUN/dense --output OUT --skip blocks.0.atn", "skip names 'blocks.0.atn'"),
        ("search RUN/slim/macs-70 --output OUT", "this model is slim already"),
        ("search RUN/search --output OUT", "this model is masked already"),
        ("search RUN/dense --output OUT --kinds mlp --budget token=0.5", "has no token masks"),
        ("run --model RUN/dense --output OUT --budget macs=1%", "out of reach"),
        ("run --model RUN/dense --output RUN/search --budget macs=70%", "folder of a search or a"),
        ("search RUN/dense --output RUN/dense/config.json/x", "Not a directory"),
        ("export RUN/dense --output RUN --batch-size 1", "Is a directory"),
        ("bench RUN/dense --batch-size 0", "--batch-size must be at least 1"),
        ("bench RUN/dense --device banana", "--device is auto, cpu, cuda or cuda:N"),
        ("search RUN/dense --output OUT --aa banana --batch-size 64", "banana"),
        ("search RUN/dense --output OUT --sched plateau --batch-size 64", "schedule 'plateau'"),
        (
            f"search vit_tiny_patch16_224 --model-kwargs {' '.join(TINY)} --output OUT "
            "--teacher dense --distill-loss-weight 1",
            "which has no weights: add --pretrained",
        ),
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
