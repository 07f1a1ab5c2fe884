"""Layers without a state of their own: ``kernelize`` puts their forward into the layers of a model."""

from torch import Tensor, nn

from .operator.functional import afa_linear


class AFALinear(nn.Module):
    """A frozen linear layer with an AFA-LoRA branch. The layer that it stands for holds ``weight (N, K)``, ``bias
    (N,)`` or None, ``lora_a (r, K)``, ``lora_b (N, r)``, ``alpha_t`` (a number or a 0-dim float32 tensor),
    ``activation`` and ``scaling``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return afa_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b, self.alpha_t,
            activation=self.activation, scaling=self.scaling,
        )  # fmt: skip
