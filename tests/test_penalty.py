"""The penalty: its weight is spread as told, and sharded masks pay no less than whole ones."""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from test_surgery import make, randomised
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vitslim
from vitslim.allowed import GRANULARITIES, KINDS, SPREADS
from vitslim.cost import Geometry
from vitslim.layers import TokenGate
from vitslim.masks import mask_parameters, mask_weights


def masks_of(model):
    return [parameter for _, parameter in mask_parameters(model)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("per", SPREADS)
def test_the_total_weight_is_the_same_however_it_is_spread(per, granularity):
    masked = vitslim.mask(make(), granularity, skip=["blocks.0.mlp", "blocks.1"])
    for parameter in masks_of(masked):
        nn.init.constant_(parameter, 20.0)
    gates = [m for m in masked.modules() if isinstance(m, TokenGate)]
    dims = {"head_dim": 24, "uniform": 8, "head": 3}[granularity]
    expected = 2 * dims * 20 * 2e-4 + 96 * 20 * 5e-5 + 16 * len(gates) * 1e-4
    parts = mask_weights(masked, per=per)
    assert [part.kind for part, _ in parts] == ["attention"] * 2 + ["mlp"] + ["token"] * 2
    weight = sum(w * part.parameter.numel() for part, w in parts)
    assert weight == pytest.approx(2 * dims * 2e-4 + 96 * 5e-5 + 32 * 1e-4)
    if per == "kind":
        assert vitslim.sparsity_loss(masked, per=per).item() == pytest.approx(expected)


@pytest.mark.parametrize("per", SPREADS)
def test_the_gradient_is_the_weight_times_the_sign(per):
    masked = randomised(make())
    for parameter in masks_of(masked):
        nn.init.uniform_(parameter, -1, 1)
    vitslim.sparsity_loss(masked, per=per).backward()
    for part, weight in mask_weights(masked, per=per):
        expected = weight * part.parameter.sign()
        if part.kind == "token":
            expected = expected * (1 - part.parameter.tanh().square())
        torch.testing.assert_close(part.parameter.grad, expected)


def test_per_unit_every_element_weighs_the_same():
    weights = {weight for _, weight in mask_weights(vitslim.mask(make()), per="unit")}
    assert len(weights) == 1
    assert weights.pop() == pytest.approx((72 * 2e-4 + 288 * 5e-5 + 48 * 1e-4) / (72 + 288 + 48))


@pytest.mark.parametrize("name", ["ViT", "DeiT distilled"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_per_mac_an_element_weighs_what_it_costs(granularity, name):
    masked = vitslim.mask(make(name), granularity)
    geometry = Geometry.of(masked)

    def saved(**smaller):
        blocks = list(geometry.blocks)
        blocks[1] = dataclasses.replace(blocks[1], **smaller)
        return geometry.cost().macs - geometry.cost(blocks).macs

    shape = geometry.blocks[1]
    dims = {"head_dim": 1, "uniform": 3, "head": 8}[granularity]
    macs = {
        "attention": saved(attn_dim=shape.attn_dim - dims),
        "mlp": saved(hidden=shape.hidden - 1),
        "token": saved(tokens=0) / shape.tokens,
    }
    per_mac = {(kind, w / macs[kind]) for (_, kind, *_), w in mask_weights(masked, per="mac")}
    assert [kind for kind, _ in sorted(per_mac)] == sorted(KINDS)
    assert len({f"{weight:.10g}" for _, weight in per_mac}) == 1


@pytest.mark.parametrize("per", SPREADS)
def test_wrapped_models_pay_the_same(per):
    masked = randomised(make())
    penalty = vitslim.sparsity_loss(masked, per=per)
    for wrapped in (torch.compile(masked), nn.DataParallel(masked)):
        assert vitslim.sparsity_loss(wrapped, per=per) == penalty


def test_another_spread_is_refused():
    with pytest.raises(vitslim.VitslimError, match="per kind, unit, mac, not per 'layer'"):
        vitslim.sparsity_loss(vitslim.mask(make()), per="layer")


def test_masks_sharded_over_processes_pay_the_whole_penalty(tmp_path):
    multiprocessing.start_processes(
        shard_and_compare, (str(tmp_path / "meeting"),), nprocs=2, start_method="spawn"
    )


def shard_and_compare(rank, meeting):
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    masked = randomised(make(depth=2), skip=["blocks.0.attn"])
    expected = {per: penalty_and_gradients(masked, per) for per in SPREADS}
    mesh = init_device_mesh("cpu", (2,))
    for part in (*masked.blocks, masked):
        fully_shard(part, mesh=mesh)
    for per in SPREADS:
        penalty, gradients = penalty_and_gradients(masked, per)
        assert type(penalty) is torch.Tensor
        torch.testing.assert_close(penalty, expected[per][0])
        for gradient, whole in zip(gradients, expected[per][1], strict=True):
            torch.testing.assert_close(gradient.full_tensor(), whole)
    # And beside the gradients of a forward pass, which are averaged over the processes.
    out = masked(torch.randn(2, 3, 32, 32))
    (0 * out.sum() + vitslim.sparsity_loss(masked)).backward()
    for parameter, whole in zip(masks_of(masked), expected["kind"][1], strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), whole)
    dist.destroy_process_group()


def penalty_and_gradients(masked, per):
    penalty = vitslim.sparsity_loss(masked, per=per)
    return penalty, torch.autograd.grad(penalty, masks_of(masked))
