"""Every public function takes a model in whatever torch and timm wrap around it."""

import copy

import pytest
import torch
from test_surgery import make, randomised
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vitslim
from vitslim.wrapped import bare, copy_of, is_sharded


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    world = {"init_method": f"file://{store}", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **world)
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_a_sharded_model_looks_at_no_images(group):
    model = sharded(make().eval())
    images = torch.randn(40, 3, 32, 32)
    for verb in (vitslim.rotate, vitslim.importance):
        with pytest.raises(vitslim.VitslimError, match=r"sharded|FSDP"):
            verb(model, images)
    with pytest.raises(vitslim.VitslimError, match=r"the model is sharded \(FSDP2\)"):
        vitslim.compress(model, images, "macs=60%")
    assert vitslim.compress(copy_of(model).eval(), images, "macs=60%")(images).isfinite().all()


WRAPS = {
    "torch.compile": torch.compile,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
    "AveragedModel": AveragedModel,
    "FSDP2": sharded,
    "compiled DDP": lambda m: torch.compile(nn.parallel.DistributedDataParallel(m)),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_models_are_taken_by_every_function(wrap, group, tmp_path):
    dense = make()
    masked = randomised(dense)
    plan = vitslim.threshold(masked, "macs=60%", round_to=1)
    slim = vitslim.slim(masked, plan)
    x = torch.randn(2, 3, 32, 32)
    d, m, s = (WRAPS[wrap](copy.deepcopy(each)) for each in (dense, masked, slim))
    assert vitslim.sparsity_loss(m).item() == pytest.approx(vitslim.sparsity_loss(masked).item())
    masks = [vitslim.Masks.of(each) for each in (m, masked)]
    assert all(torch.equal(a, b) for a, b in zip(*(each.attention for each in masks), strict=True))
    assert vitslim.threshold(m, "macs=60%", round_to=1) == plan
    assert vitslim.threshold(d, "macs=60%", round_to=1, masks=masks[0]) == plan
    assert vitslim.cost(s) == vitslim.cost(slim)
    assert vitslim.cost(m, plan) == vitslim.cost(slim)
    assert torch.equal(vitslim.slim(m, plan)(x), slim(x))
    assert torch.equal(vitslim.mask(d)(x), vitslim.mask(dense)(x))
    torch.testing.assert_close(vitslim.pack(s)(x), slim(x))
    vitslim.save(s, tmp_path)
    assert torch.equal(vitslim.load(tmp_path).eval()(x), slim(x))


def test_a_sharded_model_is_copied_whole(group):
    model, x = make(), torch.randn(2, 3, 32, 32)
    model.blocks[0].register_forward_hook(lambda module, _, output: setattr(module, "got", output))
    want = model(x)
    twin = copy_of(sharded(copy_of(model)))
    assert not any(is_sharded(each) for each in twin.modules())
    assert [type(a) for a in twin.modules()] == [type(b) for b in model.modules()]
    assert torch.equal(twin(x), want)
    assert torch.equal(twin.blocks[0].got, model.blocks[0].got)


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.5


@pytest.mark.parametrize(
    "call",
    [
        vitslim.Masks.of,
        vitslim.cost,
        vitslim.mask,
        vitslim.pack,
        lambda model: vitslim.threshold(model, "macs=60%"),
        lambda model: vitslim.slim(model, vitslim.threshold(randomised(make()), "macs=60%")),
        lambda model: vitslim.save(model, "nowhere"),
    ],
)
def test_a_sequential_around_a_model_gets_a_sentence(call):
    with pytest.raises(vitslim.VitslimError, match=r"take it out with \.get_submodule\('1'\)"):
        call(nn.Sequential(Normalize(), make()))
    with pytest.raises(vitslim.VitslimError, match="a Linear cannot be"):
        call(nn.Linear(2, 2))


def test_what_no_wrapper_hides_is_bare():
    model = make()
    assert bare(model) is model
    assert bare(torch.compile(nn.DataParallel(model))) is model
