"""The report of a run or a stage: one page of HTML that stands alone, its pictures beside it."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from ...files import atomic_write
from ..image_size import pixels
from . import pictures, story
from .record import Record, read_record


def report(run_folder: str | Path) -> Path:
    """Writes `report/index.html` and its pictures for a run or a stage, finished or going on.

    Args:
        run_folder: Folder that `vitslim run`, `compress`, `search`, `retrain` or `finetune` writes.

    Returns:
        Path of the page.

    Raises:
        VitslimError: The folder is none of these, or a file in it is broken.
    """
    record = read_record(Path(run_folder))
    summary = record.summary
    plans = {**record.plans, **record.compressed}
    sections = [pictures.section(record, name, plan) for name, plan in plans.items()]
    common = {
        "accuracy": pictures.accuracy(summary),
        "masks": pictures.masks(record),
        "curves": pictures.curves(record) + pictures.forecast(record),
    }
    target = record.folder / "report"
    drawn = [picture for each in sections for picture in each.widths + each.tokens]
    for picture in [*drawn, *common["accuracy"], *common["masks"], *common["curves"]]:
        atomic_write(target / picture.file, picture.content)
    template = resources.files("vitslim.workflow.report").joinpath("report.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tied"] = _tied
    page = environment.from_string(template).render(
        title=f"ViT-Slim report: {_name(record)}",
        subtitle=_subtitle({**record.args, **summary}),
        outcome=story.outcome(summary),
        what=story.WHAT[record.kind],
        opening=story.opening(record.kind, summary),
        standing=story.standing(record.progress, record.read_at),
        steps=story.steps(record.progress),
        missing=record.missing,
        # A lone search has an accuracy and nothing to compare it with.
        rows=[] if record.kind == "search" else story.table(summary),
        searching=record.kind != "compress",
        compressing=record.kind == "compress" or bool(record.compressed),
        classes=story.class_table(summary),
        models=list(summary.get("by_class") or ()),
        sizes=story.latency_sizes(summary),
        sections=sections,
        facts=_facts(record),
        **common,
    )
    atomic_write(target / "index.html", page)
    return target / "index.html"


def _tied(text: str) -> str:
    """Keeps a number and its unit on one line."""
    return re.sub(r"(?<=\d) (?=[%GMK])", "\N{NO-BREAK SPACE}", text)


def _name(record: Record) -> str:
    """Names the model, or the folder where the model is not known yet."""
    known = record.summary.get("model") or record.args.get("model")
    return str(known or record.folder.resolve().name)


def _subtitle(summary: Mapping[str, Any]) -> str:
    size, seconds = summary.get("img_size"), summary.get("seconds")
    parts = []
    if summary.get("data"):
        parts.append(f"data: {summary['data']}")
    if size:
        parts.append(f"images of {pixels(size)}")
    if seconds:
        amount = f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
        parts.append(f"the whole run took {amount}")
    return " · ".join(parts)


def _facts(record: Record) -> list[tuple[str, str]]:
    """Lists what the numbers depend on, and where the slim models are."""
    names = {"cpu": "processor", "gpu": "GPU", "threads": "CPU threads", "torch": "PyTorch"}
    environment = record.summary.get("environment") or {}
    facts = [(names.get(name, name), str(value)) for name, value in environment.items() if value]
    if classes := record.summary.get("classes"):
        facts.append((f"{len(classes)} classes", story.listed(classes)))
    if images := record.summary.get("images"):
        facts.append(("images looked at", str(images)))
    for slim in story.slims(record.summary):
        if slim.get("folder"):
            way = ", compressed" if story.is_compressed(slim) else ""
            facts.append((f"slim model, {slim['budget']}{way}", str(slim["folder"])))
    return facts
