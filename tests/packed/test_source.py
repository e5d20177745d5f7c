"""The source stays the truth: its state dict, its changes, its attributes."""

import copy

import pytest
import timm
import torch
from pack_cases import assert_same, photographs, slimmed
from test_surgery import make, randomised

import vitslim
from vitslim.workflow.latency import example_input, input_shape, measure


def test_the_model_is_left_as_it_is():
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    packed = vitslim.pack(model)
    assert model.training and all(module.training for module in model.modules())
    assert not any(module.training for module in packed.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = photographs(model)
    expected = packed(x)
    model.train()
    assert torch.equal(packed(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


CHANGES = {
    "an optimiser's step": lambda model: torch.optim.SGD(model.parameters(), 0.1).step(),
    "a matrix": lambda model: model.blocks[1].mlp.fc2.weight.mul_(2),
    "a position": lambda model: model.pos_embed[0, 3].add_(torch.randn(24)),
    "the classifier": lambda model: model.head.bias.add_(1),
    "a new parameter": lambda model: setattr(
        model.norm, "weight", torch.nn.Parameter(torch.rand(24))
    ),
    "a new layer": lambda model: setattr(model.blocks[0].mlp, "fc1", torch.nn.Linear(24, 96)),
    "another classifier": lambda model: model.reset_classifier(3),
    "another pool": lambda model: model.reset_classifier(7, "avg"),
    "the pool alone": lambda model: setattr(model, "global_pool", "avg"),
    "a block less": lambda model: model.blocks.pop(1),
    "all data": lambda model: [each.data.mul_(0.9) for each in model.parameters()],
    "a state dict": lambda model: model.load_state_dict(make().state_dict()),
    "tensors of others": lambda model: model.load_state_dict(make().state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_source_is_noticed(change):
    model = make()
    packed, x = vitslim.pack(model), photographs(model)
    before = packed(x)
    model(x).sum().backward()
    with torch.no_grad():
        CHANGES[change](model)
    assert_same(packed, model.eval(), x)
    after = packed(x)
    assert after.shape != before.shape or not torch.equal(after, before)


def test_a_change_that_torch_does_not_count_needs_repack():
    model = make()
    packed, x = vitslim.pack(model), photographs(model)
    model.blocks[0].mlp.fc1.weight.data.mul_(2)
    packed.repack()
    assert_same(packed, model, x)


def test_nothing_is_packed_again_without_a_change():
    model = slimmed()
    packed, x = vitslim.pack(model), photographs(model)
    panels = packed.panels
    packed(x)
    model(x)
    model.train().eval()
    packed(x)
    assert packed.panels is panels
    packed.repack()
    assert packed.panels is not panels


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("keep_source", [True, False])
def test_load_state_dict_packs_again(keep_source, assign):
    model, other = slimmed("DeiT distilled"), slimmed("DeiT distilled")
    for parameter in other.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    packed, x = vitslim.pack(model, keep_source=keep_source), photographs(model)
    result = packed.load_state_dict(other.state_dict(), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same(packed, other, x)


def test_the_state_dict_is_the_sources():
    model = slimmed("registers")
    packed = vitslim.pack(model)
    state = packed.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({})
    missing = packed.load_state_dict({"head.bias": state["head.bias"] + 1}, strict=False)
    assert "pos_embed" in missing.missing_keys
    assert_same(packed, model, photographs(model))


def test_as_a_part_of_another_model():
    model, other = make(), make()
    whole = torch.nn.Sequential(torch.nn.Identity(), vitslim.pack(model))
    state = torch.nn.Sequential(torch.nn.Identity(), other).state_dict()
    assert list(whole.state_dict()) == list(state)
    whole.load_state_dict(state)
    assert_same(whole[1], other, photographs(model))
    with pytest.raises(RuntimeError, match="Missing key"):
        whole.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        whole.load_state_dict({**state, "1.nothing": torch.ones(1)})


def test_without_its_source_the_weights_are_held_once():
    model = slimmed("DeiT-III")
    packed, x = vitslim.pack(model, keep_source=False), photographs(model)
    assert_same(packed, model, x)
    for name, parameter in packed.source.named_parameters():
        assert parameter.is_meta != name.startswith("head")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert vitslim.cost(packed) == vitslim.cost(model)
    state = model.state_dict()
    for call in (
        packed.state_dict,
        packed.repack,
        lambda: packed.forward_intermediates(x),
        lambda: packed.load_state_dict({"head.bias": state["head.bias"]}, strict=False),
        lambda: vitslim.save(packed, "/nowhere"),
    ):
        with pytest.raises(vitslim.VitslimError, match="keep_source=False, which forgets"):
            call()
    assert_same(packed, model, x)
    packed.load_state_dict({name: value.bfloat16() for name, value in state.items()})
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert_same(packed, model, x, 1e-2)


@pytest.mark.parametrize("keep_source", [True, False])
def test_deepcopy_is_independent(keep_source):
    model = slimmed()
    packed, x = vitslim.pack(model, keep_source=keep_source), photographs(model)
    twin, expected = copy.deepcopy(packed), packed(x)
    assert torch.equal(twin(x), expected)
    packed.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    assert torch.equal(twin(x), expected)
    assert not torch.equal(packed(x), expected)
    if keep_source:
        twin.source.head.bias.data.add_(1)
        torch.testing.assert_close(twin(x), expected + 1)


def test_it_passes_for_the_model_it_was_made_of(tmp_path):
    model = slimmed("DeiT")
    packed = vitslim.pack(model)
    assert packed.num_classes == 7 and packed.embed_dim == 24 and packed.plan is model.plan
    assert timm.data.resolve_model_data_config(packed) == timm.data.resolve_model_data_config(model)
    assert input_shape(packed) == (3, 32, 32)
    assert vitslim.cost(packed) == vitslim.cost(model)
    assert packed.get_classifier() is model.head
    x = photographs(model)
    assert len(packed.forward_intermediates(x)[1]) == 3
    assert "head" in dict(packed.named_children()) and "blocks" not in dict(packed.named_children())
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        packed.nothing  # noqa: B018
    bare = vitslim.pack(make(num_classes=0))
    assert example_input(bare, 2).shape == (2, 3, 32, 32)
    assert measure({"bare": bare}, (1,), seconds=0.01, device="cpu")["bare"]["1"] > 0


def test_what_is_saved_is_the_source(tmp_path):
    masked = randomised(make())
    model = vitslim.slim(masked, vitslim.threshold(masked, "macs=60%"))
    vitslim.save(vitslim.pack(model), tmp_path)
    loaded = vitslim.load(tmp_path).eval()
    assert_same(vitslim.pack(loaded), model, photographs(model))
