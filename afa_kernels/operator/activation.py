"""The activation table in torch ops: act(z) and its slope act'(z), the truth that every kernel is
compared with.

One row here, one case in ``csrc/common/activation.h`` and one branch in the Triton kernels make a
new activation; the shared tests pick it up from the table. The ids are the ones in ``activation.h``
(a test compares them). Slopes are made of differentiable torch ops, so that double backward can go
through them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The activation of a call whose alpha_t is known to be 0: phi(z) = z. Such a call carries no tensor for alpha_t, and
# nobody chooses this name: it is not in the table.
IDENTITY = "identity"
LEAKY_SLOPE = 0.01  # torch's default for leaky_relu
_GELU_TANH_CUBIC = 0.044715
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


class Activation(NamedTuple):
    id: int
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _silu_slope(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def _gelu_slope(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2.0))) + z * density


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    t = torch.tanh(_SQRT_2_OVER_PI * (z + _GELU_TANH_CUBIC * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _SQRT_2_OVER_PI * (1 + 3 * _GELU_TANH_CUBIC * z * z)


def _leaky_relu_slope(z: Tensor) -> Tensor:
    positive = (z > 0).to(z.dtype)
    return positive + LEAKY_SLOPE * (1 - positive)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(1, torch.relu, lambda z: (z > 0).to(z.dtype)),
    "silu": Activation(2, F.silu, _silu_slope),
    "gelu": Activation(3, F.gelu, _gelu_slope),
    "gelu_tanh": Activation(4, lambda z: F.gelu(z, approximate="tanh"), _gelu_tanh_slope),
    "leaky_relu": Activation(5, lambda z: F.leaky_relu(z, LEAKY_SLOPE), _leaky_relu_slope),
    "tanh": Activation(6, torch.tanh, lambda z: 1 - torch.tanh(z) ** 2),
    "sin": Activation(7, torch.sin, torch.cos),
}


# What stands for an activation in the compiled kernels.
COMPILED_IDS = {IDENTITY: 0} | {name: activation.id for name, activation in ACTIVATIONS.items()}


def activations() -> tuple[str, ...]:
    """Return the names that ``activation=`` accepts."""
    return tuple(ACTIVATIONS)


def phi(z: Tensor, alpha_t: Tensor | float, activation: str) -> Tensor:
    """Return the annealed activation ``(1 - alpha_t) * z + alpha_t * act(z)``."""
    return (1 - alpha_t) * z + alpha_t * ACTIVATIONS[activation].value(z)


def phi_slope(z: Tensor, alpha_t: Tensor | float, activation: str) -> Tensor:
    """Return ``d phi / d z = (1 - alpha_t) + alpha_t * act'(z)``."""
    return (1 - alpha_t) + alpha_t * ACTIVATIONS[activation].slope(z)
