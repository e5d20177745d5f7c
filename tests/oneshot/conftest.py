"""A model and images that differ."""

import pytest
import torch
from oneshot_cases import make


@pytest.fixture
def model():
    return make()


@pytest.fixture
def images():
    return torch.randn(40, 3, 32, 32, dtype=torch.float64, generator=_generator())


@pytest.fixture
def labels():
    return torch.randint(5, (40,), generator=_generator())


def _generator():
    return torch.Generator().manual_seed(3)
