"""What the tests of the experiments share."""

import isolation  # noqa: F401  before torch and transformers: it sets the environment
import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_random_numbers(request):
    """Every test draws its own numbers, the same in every run."""
    torch.manual_seed(sum(map(ord, request.node.name)))
