"""What is put into a packed model itself: nothing is lost, nothing is there that is not said."""

import copy
import io
import os
import threading

import pytest
import torch
from pack_cases import photographs, slimmed
from test_changes import Lora, assert_says, built, images, said_by
from test_surgery import make
from timm.utils import ModelEmaV3
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune

import vitslim
from vitslim.packed.starts import LIMIT

KEEP = pytest.mark.parametrize("keep_source", [True, False])


def packed_of(keep_source, stage="dense"):
    model = built(stage)
    return vitslim.pack(model, keep_source=keep_source), model, images(model)


@KEEP
def test_what_is_set_is_read_back(keep_source):
    packed, model, x = packed_of(keep_source)
    head, norm = nn.Linear(24, 5), nn.LayerNorm(24)
    packed.head, packed.fc_norm, packed.num_classes, packed.note = head, norm, 5, [1]
    packed._own = "private"
    for source in (packed, packed.source):
        assert (source.head, source.fc_norm, source.num_classes) == (head, norm, 5)
        assert source.note == [1]
    assert packed(x).shape == (2, 5)
    assert packed.note == [1] and packed._own == "private" and packed.num_classes == 5
    model.head, model.fc_norm = head, norm
    assert_says(packed, model, x)
    assert packed.source.head is head and head.training and head.weight.requires_grad
    assert all(each is getattr(packed, name) for name, each in packed.named_children())
    packed.head.bias = None
    del packed.note
    assert packed.source.head.bias is None and not hasattr(packed.source, "note")


@KEEP
def test_hooks_of_its_own_are_called(keep_source):
    packed, model, x = packed_of(keep_source)
    seen = []
    packed.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    handle = packed.register_forward_hook(lambda module, args, out: seen.append(module) or out + 1)
    torch.testing.assert_close(packed(x), said_by(model, 2 * x) + 1, atol=1e-5, rtol=1e-5)
    packed.head = nn.Linear(24, 3)
    packed(x)
    assert seen == [packed, packed]
    twin = copy.deepcopy(packed)
    twin(x)
    assert seen[2] is twin
    handle.remove()
    packed(x)
    assert len(seen) == 3


@KEEP
def test_a_hook_is_given_what_runs(keep_source):
    packed, model, x = packed_of(keep_source)
    packed.head.register_forward_hook(lambda module, args, out: setattr(module, "last", out))
    out = packed(x)
    assert packed.head.last is out and not packed.head.training
    again = packed(x)
    assert packed.head.last is again
    if keep_source:
        # A computation on the model itself is not disturbed.
        assert not hasattr(model.head, "last")
        said_by(model, x)
        assert model.head.last is not again


@KEEP
def test_hooks_on_single_parts_come_and_go(keep_source):
    packed, _, x = packed_of(keep_source)
    before = packed(x)
    handle = packed.blocks[0].register_forward_hook(lambda *args: None)
    for _ in range(2):
        with pytest.raises(vitslim.VitslimError, match=r"blocks\.0 cannot be packed: it has"):
            packed(x)
    handle.remove()
    panels = packed.panels
    assert torch.equal(packed(x), before) and packed.panels is panels


def test_settings_of_timms_methods():
    packed, model, x = packed_of(True)
    packed.reset_classifier(5)
    assert packed.head is model.head and packed.num_classes == 5
    assert_says(packed, model, x)
    packed.set_input_size((48, 32))
    with pytest.raises(vitslim.VitslimError, match="takes images of 48 x 32, got 32 x 32"):
        packed(x)
    assert_says(packed, model, images(model))
    packed.set_input_size(img_size=(40, 40), patch_size=(4, 4))
    assert_says(packed, model, images(model))
    packed.prune_intermediate_layers([0, 1])
    assert_says(packed, model, images(model))


def test_methods_that_need_the_weights_say_that_they_are_forgotten():
    for change in (
        lambda packed: packed.set_input_size((64, 64)),
        lambda packed: setattr(packed.norm, "eps", 1.0),
        lambda packed: setattr(packed, "cls_token", None),
        lambda packed: packed.prune_intermediate_layers([0, 1]),
        lambda packed: packed.source.blocks.append(nn.Identity()),
        lambda packed: packed.apply(lambda module: None),
    ):
        packed, _, x = packed_of(False)
        packed(x)
        with pytest.raises(vitslim.VitslimError, match=r"keep_source=False|cannot be packed"):
            change(packed)
            packed(x)
    packed, model, x = packed_of(False)
    packed.reset_classifier(5)
    # An older timm makes every new head on the CPU.
    if packed.source.head.weight.is_meta:
        with pytest.raises(vitslim.VitslimError, match=r"head is on meta.* packed.head = nn.Lin"):
            packed(x)
    packed.head = nn.Linear(24, 5)
    assert packed(x).shape == (2, 5)
    packed.reset_classifier(0, "avg")
    model.reset_classifier(0, "avg")
    assert_says(packed, model, x)


def test_a_slim_model_is_cut_for_its_size():
    packed, model, _ = packed_of(True, "slim")
    with pytest.raises(vitslim.VitslimError, match="then plan again"):
        packed.set_input_size((64, 64))
    model.patch_embed.set_input_size((64, 64))
    with pytest.raises(vitslim.VitslimError, match="and 64 arrive; slim a model for images of"):
        packed(images(model))


@KEEP
def test_wrapped_and_shared_heads(keep_source):
    packed, model, x = packed_of(keep_source)
    original = packed.source.head
    packed.head = Lora(packed.head)
    assert packed.source.head.base is original and original.weight.requires_grad
    packed.aux = nn.Linear(24, 7)
    packed.aux.weight = packed.source.head.base.weight
    packed(x)
    assert packed.aux.weight is packed.head.base.weight
    assert packed.source.aux.weight is original.weight
    packed.add_module("more", nn.Linear(2, 2))
    packed.register_buffer("scale", torch.ones(1))
    packed.register_parameter("extra", nn.Parameter(torch.ones(1)))
    assert "more" in dict(packed.source.named_children())
    assert "extra" in dict(packed.source.named_parameters())
    if keep_source:
        assert {"scale", "extra", "more.bias"} <= set(packed.state_dict())
        assert_says(packed, model, x)


@KEEP
def test_a_quantized_head(keep_source):
    packed, _, x = packed_of(keep_source)
    packed.head = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 7))
    small = quantize_dynamic(packed, {nn.Linear})
    expected = packed(x)
    torch.testing.assert_close(small(x), expected, atol=0.05, rtol=0.05)
    assert not torch.equal(small(x), expected)
    assert "quantized" in type(small.source.head[0]).__module__
    expected = small(x)
    small.head_drop = nn.Identity()  # whatever makes the head anew
    torch.testing.assert_close(small(x), expected)


@KEEP
def test_gradients_and_flags(keep_source):
    packed, model, x = packed_of(keep_source)
    model.blocks[0].requires_grad_(False)
    flags = [each.requires_grad for each in model.parameters()]
    packed = vitslim.pack(model, keep_source=keep_source)
    assert [each.requires_grad for each in packed.source.parameters()] == flags
    with pytest.raises(vitslim.VitslimError, match="for inference: train the model"):
        packed.requires_grad_()
    assert packed.requires_grad_(False) is packed
    packed.zero_grad()
    packed(x)
    names = [name for name, each in packed.named_parameters()]
    assert names == ["head.weight", "head.bias"]
    assert not any(each.requires_grad for each in packed.parameters())
    assert [each.requires_grad for each in model.parameters()] == flags
    assert len(list(packed.buffers())) == 4


@pytest.mark.parametrize("change", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_torchs_utilities_leave_the_source_whole(change):
    packed, model, x = packed_of(True)
    change(packed.head)
    packed(x)
    said_by(model, x)  # which fails where there is a hook without what it needs
    assert_says(packed, model, x)


def test_a_function_is_applied_to_the_source():
    packed, model, x = packed_of(True)

    def double(module):
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data * 2

    assert packed.apply(double) is packed
    assert_says(packed, model, x)
    model(x).sum().backward()
    packed.zero_grad()
    assert all(each.grad is None for each in model.parameters())


def test_methods_on_single_blocks_are_in_eval_mode_as_well():
    model = make(drop_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5)
    packed, x = vitslim.pack(model), images(model)
    expected = model.forward_intermediates(x)
    model.train()
    for actual, each in zip(packed.forward_intermediates(x)[1], expected[1], strict=True):
        torch.testing.assert_close(actual, each)
    assert model.training and model.blocks[0].training


def test_what_packing_makes_cannot_be_set():
    packed = packed_of(True)[0]
    for name in ("source", "start", "panels"):
        with pytest.raises(vitslim.VitslimError, match=f"{name} of a packed model cannot be set"):
            setattr(packed, name, None)


def stored(packed):
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [stored, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("stage", ["dense", "slim"])
@KEEP
def test_it_is_copied_and_pickled(again, stage, keep_source):
    model = built(stage)
    packed = vitslim.pack(model, weights=torch.bfloat16, keep_source=keep_source)
    x = images(model)
    packed.note, packed._own = {"a": 1}, 2
    packed.head = nn.Linear(24, 5)
    twin = again(packed)
    assert torch.equal(twin(x), packed(x)) and twin.panels.dtype == torch.bfloat16
    assert twin.note == {"a": 1} and twin._own == 2 and not twin.training
    assert vitslim.cost(twin) == vitslim.cost(packed)
    twin.head.weight.data.zero_()
    assert torch.equal(twin(x)[0], twin.head.bias)
    if again is not copy.copy:
        assert not torch.equal(packed(x)[0], packed.head.bias)
    if keep_source:
        with torch.no_grad():
            twin.source.norm.weight.mul_(0.5)
        assert_says(twin, twin.source, x)
    else:
        with pytest.raises(vitslim.VitslimError, match="keep_source=False"):
            twin.norm.eps = 1.0
            twin(x)


@KEEP
def test_tensors_of_graphs_survive(keep_source):
    model = built("dense")
    model.head.register_forward_hook(lambda module, args, out: setattr(module, "last", out))
    model.kept = model(images(model)) * 2
    assert not model.head.last.is_leaf
    packed, x = vitslim.pack(model, keep_source=keep_source), images(model)
    assert_says(packed, model, x)
    assert not model.kept.is_leaf and model.kept.grad_fn is not None
    twin = copy.deepcopy(packed)
    assert torch.equal(twin.kept, model.kept)
    assert torch.equal(twin(x), packed(x))
    prune.l1_unstructured(model.head, "weight", 0.5)
    parametrizations.weight_norm(model.head, "bias", dim=None)
    packed = vitslim.pack(model, keep_source=keep_source)
    assert_says(packed, model, x)


@pytest.mark.parametrize("name", ["ViT", "DeiT-III"])
def test_the_starts_of_other_sizes_are_bounded(name):
    model = make(name, dynamic_img_size=True)
    packed = vitslim.pack(model)
    sizes = [(8 * down, 8 * across) for down in range(1, 11) for across in range(1, 11)]
    kept = (64, 72)
    for height, width in sizes:
        packed(torch.zeros(1, 3, height, width))
        packed(torch.zeros(1, 3, *kept))
    starts = packed._facts.starts
    assert len(starts) == LIMIT and starts.seen(kept) is not None
    assert starts.seen(sizes[-1]) is not None and starts.seen(sizes[0]) is None
    x = torch.randn(1, 3, *sizes[0])
    torch.testing.assert_close(packed(x), said_by(model, x), atol=1e-5, rtol=1e-5)
    assert_says(packed, model, images(model))


def test_threads_share_the_starts():
    model = make(dynamic_img_size=True)
    packed, wrong = vitslim.pack(model), []
    inputs = [torch.randn(1, 3, 8 * n, 16) for n in range(1, LIMIT + 9)]
    expected = [said_by(model, x) for x in inputs]

    def work(offset):
        for turn in range(2 * len(inputs)):
            index = (7 * turn + offset) % len(inputs)
            if not torch.allclose(packed(inputs[index]), expected[index], atol=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(packed._facts.starts) == LIMIT


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, ModelEmaV3, torch.optim.swa_utils.AveragedModel],
)
@KEEP
def test_wrapped_models(wrap, keep_source):
    wrapped = wrap(built("slim"))
    inner = vitslim.wrapped.bare(wrapped)
    packed, x = vitslim.pack(wrapped, keep_source=keep_source), images(inner)
    assert_says(packed, inner, x)
    if keep_source:
        assert packed.source is inner
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.mul_(0.9)
        assert_says(packed, inner, x)


@pytest.fixture
def group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch has no torch.distributed")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_parallel_and_sharded_models(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = built("dense")
    x = images(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    packed = vitslim.pack(parallel)
    assert packed.source is model
    assert_says(packed, model, x)
    sharded, mesh = built("dense"), init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for keep_source in (True, False):
        assert_says(vitslim.pack(sharded, keep_source=keep_source), model, x)
    # A source that is sharded later says so.
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    with pytest.raises(
        vitslim.VitslimError, match=r"is a DTensor, not a plain tensor; pack it anew"
    ):
        packed(x)


def test_a_sequential_gets_a_sentence():
    with pytest.raises(vitslim.VitslimError):
        vitslim.pack(nn.Sequential(nn.Identity(), make()))
    with pytest.raises(vitslim.VitslimError, match="packed already"):
        vitslim.pack(torch.compile(vitslim.pack(make())))


def test_a_state_dict_has_what_was_put_in():
    packed, model, x = packed_of(True)
    packed.head = nn.Linear(24, 5)
    packed.head.bias = nn.Parameter(torch.full((5,), 3.0))
    assert packed.state_dict()["head.bias"].tolist() == [3.0] * 5
    model.load_state_dict(packed.state_dict())
    assert_says(packed, model, x)


def test_as_a_function_of_its_parameters():
    packed, model, x = packed_of(True)
    before = packed(x)
    weights = {name: torch.zeros_like(each) for name, each in packed.named_parameters()}
    assert not torch.func.functional_call(packed, weights, (x,)).any()
    assert torch.equal(packed(x), before)
    assert_says(packed, model, x)


def test_it_follows_training():
    model = slimmed("DeiT")
    packed, x = vitslim.pack(model), photographs(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        model.train()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_says(packed, model, x)
        assert model.training
