"""The state of any optimiser of timm goes through safetensors and JSON unchanged."""

import json

import pytest
import torch
from safetensors.torch import load, save
from timm.optim import create_optimizer_v2

from vitslim.errors import VitslimError
from vitslim.workflow.training.packing import pack_optimizer, unpack_optimizer


def _made(name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.linspace(0.1, 1, 12).view(3, 4))
    bias = torch.nn.Parameter(torch.linspace(-1, 1, 4))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "lr": 0.01}]
    return weight, bias, create_optimizer_v2(groups, name, lr=0.1)


def _steps(weight, bias, optimizer, count: int) -> None:
    torch.manual_seed(0)
    for _ in range(count):
        optimizer.zero_grad()
        ((weight**3).sum() + (bias**2).sum()).backward()
        # Kron compiles its products, which takes seconds and changes nothing about its state.
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()


# Among them states with tensors in groups (lamb), lists of tensors (kron) and dtypes (adafactorbv).
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name", ["adamw", "momentum", "lamb", "lion", "adafactor", "adafactorbv", "kron", "nadamw"]
)
def test_an_optimiser_continues_bit_for_bit(name: str) -> None:
    weight, bias, first = _made(name)
    _steps(weight, bias, first, 2)
    live, facts = pack_optimizer(first)
    tensors = load(save({place: tensor.clone() for place, tensor in live.items()}))
    other_weight, other_bias, second = _made(name)
    with torch.no_grad():
        other_weight.copy_(weight)
        other_bias.copy_(bias)
    unpack_optimizer(second, tensors, json.loads(json.dumps(facts)))
    _steps(weight, bias, first, 2)
    _steps(other_weight, other_bias, second, 2)
    assert torch.equal(weight, other_weight)
    assert torch.equal(bias, other_bias)


def test_a_state_that_is_no_data_is_refused() -> None:
    _, _, optimizer = _made("adamw")
    optimizer.param_groups[0]["surprise"] = object()
    with pytest.raises(VitslimError, match=r"AdamW cannot be saved: choose another --opt"):
        pack_optimizer(optimizer)
