"""The whole way: a smaller model that computes nearly the same."""

import pytest
import torch
from oneshot_cases import make

import vitslim
from vitslim.oneshot import prepare


@torch.no_grad()
def far(slim, model, images):
    return float((slim(images) - model(images)).square().mean())


def test_three_lines(model, images):
    small = vitslim.compress(model, images, "macs=60%")
    assert 0.55 < vitslim.cost(small).macs / vitslim.cost(model).macs <= 0.6
    assert type(small).__name__ == "SlimVisionTransformer"
    plan = vitslim.threshold(model, "macs=60%", masks=vitslim.importance(model, criterion="random"))
    assert far(small, model, images) < 0.3 * far(vitslim.slim(model, plan), model, images)


def test_one_preparation_serves_any_number_of_budgets(model, images):
    prepared = prepare(model, images)
    near = [
        far(prepared.cut(prepared.plan(f"macs={share}%", round_to=1)), model, images)
        for share in (90, 70, 50)
    ]
    assert near == sorted(near)
    again = vitslim.compress(model, images, "macs=50%")
    once = prepared.cut(prepared.plan("macs=50%"))
    for one, other in zip(again.parameters(), once.parameters(), strict=True):
        assert torch.equal(one, other)


def test_saved_and_loaded(model, images, tmp_path):
    small = vitslim.compress(model.float(), images.float(), "macs=60%")
    vitslim.save(small, tmp_path / "small")
    assert torch.equal(
        vitslim.load(tmp_path / "small").eval()(images.float()), small(images.float())
    )


def test_tokens_too(images):
    small = vitslim.compress(make(), images, "macs=60%,token=0.7", kinds=None)
    assert any(len(block.tokens.keep) < 16 for block in small.blocks)


def test_out_of_reach_is_one_sentence(model, images):
    with pytest.raises(vitslim.VitslimError, match="out of reach"):
        vitslim.compress(model, images, "macs=1%")
