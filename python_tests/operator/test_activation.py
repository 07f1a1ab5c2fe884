"""The torch table of activations: the oracle of all others, so it is checked against autograd."""

import pytest
import torch

import afa_kernels as afa
from afa_kernels.operator.activation import ACTIVATIONS, COMPILED_IDS, IDENTITY, phi, phi_slope

pytestmark = pytest.mark.fast

ALPHAS = (0.0, 0.3, 1.0)


@pytest.mark.parametrize("name", afa.activations())
def test_slope_is_the_derivative(name):
    z = torch.linspace(-6, 6, 1001, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(ACTIVATIONS[name].value(z).sum(), z)
    torch.testing.assert_close(ACTIVATIONS[name].slope(z.detach()), want)


@pytest.mark.parametrize("alpha_t", ALPHAS)
@pytest.mark.parametrize("name", afa.activations())
def test_phi_blends_identity_and_activation(name, alpha_t):
    z = torch.randn(100, dtype=torch.float64, requires_grad=True)
    value = phi(z, alpha_t, name)
    torch.testing.assert_close(value, (1 - alpha_t) * z + alpha_t * ACTIVATIONS[name].value(z))
    (want,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(phi_slope(z.detach(), alpha_t, name), want)


def test_ids_are_distinct():
    ids = [COMPILED_IDS[name] for name in (IDENTITY, *ACTIVATIONS)]
    assert ids == list(range(len(ids)))


def test_paper_activations_come_first():
    assert set(afa.activations()) >= {"relu", "silu", "gelu"}
