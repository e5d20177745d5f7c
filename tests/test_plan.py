"""Plans: JSON in and out, and what is not a plan."""

import json

import pytest

from vitslim.plan import BlockPlan, Plan


def make():
    blocks = [BlockPlan([[0, 2], []], [1, 5], [0, 1, 3]), BlockPlan(None, [0], [1])]
    base = {"model": "vit_tiny_patch16_224", "args": {"img_size": 32}}
    return Plan(base, {"macs": "60%"}, {"params": 10, "macs": 20}, 8, blocks)


def test_round_trip(tmp_path):
    plan = make()
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "a" / "plan.json")
    assert Plan.load(tmp_path / "a" / "plan.json") == plan
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["plan.json"]


def test_the_format_of_the_design():
    data = json.loads(make().to_json())
    assert set(data) == {"format", "base", "budget", "reached", "round_to", "blocks"}
    assert data["format"] == 1
    assert data["blocks"][0] == {"heads": [[0, 2], []], "hidden": [1, 5], "tokens": [0, 1, 3]}
    assert make().blocks[0].head_dims == [2, 0]
    assert make().blocks[1].head_dims is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("format"), "not a vitslim plan"),
        (lambda d: d.update(format=2), "format 2 is not the format 1"),
        (lambda d: d.pop("base"), "missing or unknown entry: 'base'"),
        (lambda d: d["blocks"][0].update(depth=3), "missing or unknown entry"),
        (lambda d: d["blocks"][0].update(hidden=[5, 1]), "block 0 .* do not increase"),
        (lambda d: d["blocks"][0].update(heads=[[-1]]), "block 0 .* index that is no index"),
        (lambda d: d["blocks"][1].update(tokens=[2]), "block 1 .* brings back a dropped token"),
    ],
)
def test_what_is_no_plan(change, said):
    data = json.loads(make().to_json())
    change(data)
    with pytest.raises(ValueError, match=said):
        Plan.from_dict(data)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(make().to_json()[:40])
    with pytest.raises(ValueError, match=r"cannot read the plan .*plan\.json: .* not JSON"):
        Plan.load(path)
