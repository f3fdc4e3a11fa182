"""Fixtures of the attention tests."""

import pytest
import torch

from attention.oracle import VARIANTS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request):
    return request.param
