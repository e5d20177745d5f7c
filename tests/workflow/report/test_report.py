"""The report stands alone, holds the numbers of the run, and copes with what is missing."""

import json
from html.parser import HTMLParser

import pytest
import timm
import torch
from matplotlib.image import imread

import vitslim
from vitslim import Masks, Plan, VitslimError
from vitslim.allowed import KINDS
from vitslim.planning.threshold import budget_name, threshold
from vitslim.workflow.report import kept, story
from vitslim.workflow.report.page import _subtitle, report

CUT = {"attention": 0.6, "mlp": 0.6}
TOKENS = {**CUT, "token": 0.7}


class Page(HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self, path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.html = path.read_text("utf-8")
        self.feed(self.html)
        self.text = " ".join(self.text.replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def run_folder(tmp_path):
    """Returns a function that writes a run folder with the given budgets."""

    def write(*budgets, tokens=True, attention=True, round_to=8):
        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=96,
            depth=4,
            num_heads=3,
        )
        masks = Masks(
            [torch.rand(3, 32) if attention else None for _ in range(4)],
            [torch.rand(384) for _ in range(4)],
            [torch.rand(16) if tokens else None for _ in range(4)],
        )
        masks.save(tmp_path / "search" / "masks.safetensors")
        params, macs = vitslim.cost(model)
        dense = {"accuracy": 98.33, "params": params, "macs": macs}
        slims, rows = [], ["stage,epoch,loss,penalty,accuracy,lr,images_per_second,seconds"]
        for index, budget in enumerate(budgets):
            plan = threshold(model, budget, masks=masks, round_to=round_to)
            name = budget_name(budget)
            plan.save(tmp_path / "plans" / f"{name}.json")
            slims.append(
                {
                    "name": name,
                    "budget": budget,
                    "plan": f"plans/{name}.json",
                    "folder": f"slim/{name}",
                    "cut": {"accuracy": 41.67},
                    "retrained": {"accuracy": 97.78 - index},
                    **plan.reached,
                    "latency_ms": {"1": 3.0, "32": 10.0},
                }
            )
        for stage in ("dense", "search", *(f"retrain/{each['name']}" for each in slims)):
            penalty = 0.5 if stage == "search" else 0.0
            rows += [f"{stage},{e},{2 / e},{penalty},{90 + e},0.001,800,1.5" for e in range(1, 5)]
        summary = {
            "model": "digits",
            "data": "digits",
            "img_size": 32,
            "seconds": 240.0,
            "environment": {"torch": "2.15.0", "threads": 2, "cpu": "Some CPU"},
            "dense": dense | {"latency_ms": {"1": 2.5, "32": 14.0}},
            "masked": dense | {"accuracy": 96.94, "latency_ms": {"1": 2.6, "32": 14.2}},
            "slim": slims,
        }
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        (tmp_path / "summary.csv").write_text("\n".join(rows) + "\n")
        (tmp_path / "args.yaml").write_text("model: digits\n")
        return tmp_path

    return write


def pictures(folder) -> set[str]:
    return {path.name for path in (folder / "report").glob("*.png")}


def test_page_stands_alone(run_folder):
    page = Page(report(run_folder(TOKENS)))
    assert page.html.startswith("<!DOCTYPE html>") and page.all("html") == [{"lang": "en"}]
    assert len(page.all("title")) == 1 and not page.all("script") and not page.all("link")
    images = page.all("img")
    assert len(images) == 6
    for image in images:
        assert image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 20
    for _, attrs in page.tags:
        assert all(attrs[name].startswith("data:") for name in ("href", "src") if name in attrs)
    assert "url(" not in page.html and "@import" not in page.html


def test_pictures_show_something(run_folder):
    folder = run_folder(TOKENS)
    report(folder)
    assert pictures(folder) == {
        "accuracy.png",
        "masks.png",
        "curves.png",
        "heads-attention-0.6-mlp-0.6-token-0.7.png",
        "mlp-attention-0.6-mlp-0.6-token-0.7.png",
        "tokens-attention-0.6-mlp-0.6-token-0.7.png",
    }
    for name in pictures(folder):
        pixels = imread(folder / "report" / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_page_holds_the_numbers_of_the_summary(run_folder):
    folder = run_folder(TOKENS)
    text = Page(report(folder)).text
    slim = json.loads((folder / "summary.json").read_text())["slim"][0]
    for number in ("98.33 %", "96.94 %", "41.67 %", "97.78 %", "2.50", "14.2", "Some CPU"):
        assert number in text
    for count in (story.count(slim["params"]), story.count(slim["macs"])):
        assert count in text
    assert "runs 1.40x faster at batch 32 and loses 0.55 points of accuracy" in text
    assert "It is not faster at batch 1: it was measured 1.20x slower than the dense" in text
    assert "not complete" not in text


def test_every_budget_has_its_own_structure_and_shares_the_rest(run_folder):
    folder = run_folder(TOKENS, CUT)
    page = Page(report(folder))
    assert len(page.all("img")) == 3 + 2 + 3
    assert "What was kept: attention=0.6,mlp=0.6,token=0.7" in page.text
    assert "slim attention=0.6,mlp=0.6 really removed" in page.text
    assert page.text.index("token=0.7") < page.text.index("slim attention=0.6,mlp=0.6 really")


def test_model_without_token_masks(run_folder):
    folder = run_folder(CUT, tokens=False)
    text = Page(report(folder)).text
    assert not any(name.startswith("tokens") for name in pictures(folder))
    assert "smallest gate" not in text


def test_model_with_mlp_masks_only(run_folder):
    folder = run_folder({"mlp": 0.5}, tokens=False, attention=False)
    report(folder)
    assert pictures(folder) == {"accuracy.png", "masks.png", "curves.png", "mlp-mlp-0.5.png"}


def test_unfinished_run_says_what_is_missing(run_folder):
    folder = run_folder(TOKENS)
    (folder / "summary.json").unlink()
    text = Page(report(folder)).text
    assert "This run is not complete" in text and "summary.json" in text
    assert {"masks.png", "curves.png"} < pictures(folder)


def test_run_that_has_only_begun(tmp_path):
    (tmp_path / "args.yaml").write_text("model: digits\n")
    page = Page(report(tmp_path))
    assert len(page.all("li")) == 4 and not page.all("img")


def test_plan_without_masks_is_drawn_from_the_plan(run_folder):
    folder = run_folder(CUT)
    (folder / "search" / "masks.safetensors").unlink()
    assert "search/masks.safetensors" in Page(report(folder)).text
    assert "heads-attention-0.6-mlp-0.6.png" in pictures(folder)


def test_slim_model_that_is_not_retrained_yet(run_folder):
    folder = run_folder(CUT)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["slim"][0]["retrained"], summary["dense"]["latency_ms"]["1"]
    (folder / "summary.json").write_text(json.dumps(summary))
    text = Page(report(folder)).text
    assert "has not been retrained yet" in text
    assert "the retrained accuracy for attention=0.6,mlp=0.6" in text


def test_half_written_row_of_the_curves_is_left_out(run_folder):
    folder = run_folder(CUT)
    with (folder / "summary.csv").open("a") as file:
        # One row with a cell too many, and one that ends early.
        file.write("search,5,1,1,1,1,1,1,1\nsearch,")
    report(folder)
    assert "curves.png" in pictures(folder)


def test_names_are_escaped(run_folder):
    folder = run_folder(CUT)
    text = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(text.replace('"digits"', '"<script>&"'))
    assert not Page(report(folder)).all("script")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, None, "has none of summary.json"),
        ("summary.json", "{", "is not the summary of a run"),
        ("summary.json", '{"slim": [{}]}', "is not the summary of a run"),
        ("plans/a.json", "{}", "this is not a vitslim plan"),
        ("search/masks.safetensors", "", "cannot read masks"),
    ],
)
def test_wrong_folder_or_broken_file_is_one_sentence(tmp_path, file, content, message):
    if file is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    with pytest.raises(VitslimError, match=message) as error:
        report(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_folder(tmp_path):
    with pytest.raises(VitslimError, match="there is no folder"):
        report(tmp_path / "nowhere")


def test_threshold_lies_between_the_smallest_kept_and_the_largest_cut(run_folder):
    folder = run_folder(TOKENS, round_to=1)
    masks = Masks.load(folder / "search" / "masks.safetensors")
    plan = Plan.load(next((folder / "plans").glob("*.json")))
    values, flags = kept.scores(masks), kept.keeps(plan, masks)
    for kind in KINDS:
        line, blurred = kept.threshold(values[kind], flags[kind])
        assert blurred == 0
        assert values[kind][~flags[kind]].max() <= line <= values[kind][flags[kind]].min()


def test_rounding_that_blurs_the_threshold_is_told(run_folder):
    assert "The lines are blurred: rounding" in Page(report(run_folder(CUT))).text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (4_608_338_000, "4.61 G"),
        (22_050_664, "22.1 M"),
        (999_700, "1.00 M"),
        (113_000, "113 K"),
        (950, "950"),
    ],
)
def test_counts_have_three_digits(number, text):
    assert story.count(number) == text


@pytest.mark.parametrize(
    ("patches", "img_size", "grid"),
    [(196, 224, (14, 14)), (8, [16, 32], (2, 4)), (16, None, (4, 4)), (7, None, (1, 7))],
)
def test_grid_of_the_image(patches, img_size, grid):
    assert kept.grid_of(patches, img_size) == grid


def test_grid_of_oblong_patches():
    assert kept.grid_of(16, [16, 32], [8, 4]) == (2, 8)
    assert kept.grid_of(4, 16, 8) == (2, 2)
    # An older summary tells the height alone.
    assert kept.grid_of(16, 16, [8, 4]) == (4, 4)


@pytest.mark.parametrize(
    ("size", "text"),
    [(224, "224 pixels"), ([32, 64], "32 x 64 pixels"), ([3, 32, 32], "32 pixels")],
)
def test_size_of_the_images(size, text):
    assert f"images of {text}" in _subtitle({"img_size": size})
    assert "images" not in _subtitle({})
