"""The state of one adapter in one layer, beside the parameters that PEFT keeps."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from afa_kernels.alpha_t import Annealed
from afa_kernels.operator import checks
from afa_kernels.operator.activation import IDENTITY
from afa_kernels.operator.options import Options
from afa_kernels.peft.tuner import own_config


class AdapterState(Annealed):
    """What one adapter of one layer is: its activation and its alpha_t, which is not part of the state dict.

    Args:
        config: the adapter's :class:`AFALoraConfig`, or None for a plain LoRA, whose alpha_t is 0 and stays 0.
        start: another state, where alpha_t starts as that; None: as the configuration says.
        layer_name: what PEFT calls the layer, for messages.
    """

    def __init__(self, config, device: torch.device | None, start: Annealed | None = None, layer_name: str = ""):
        super().__init__()
        self.config = config
        self.layer_name = layer_name
        self.activation = IDENTITY if config is None else config.activation
        start = start or config
        alpha_t, is_fresh = (0.0, False) if start is None else (start.alpha_t, start.is_fresh)
        self.start_alpha_t(alpha_t, device, persistent=False, is_fresh=is_fresh)
        self._tell_config()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tell_config()  # a copy of it does not know this copy

    def _tell_config(self) -> None:
        if self.config is not None:
            self.config.describe(self)

    def options(self, scaling: float, dropout_p: float) -> Options:
        """Return the options of a call of this adapter."""
        if self.config is None:
            return checks.options_of_lora(scaling, dropout_p)
        return checks.options(self.activation, scaling, dropout_p, None)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, alpha_t={self.alpha_t:g}"


def is_annealed(config) -> bool:
    """Whether ``config`` is an :class:`AFALoraConfig`."""
    return hasattr(type(config), "own_copy")


def add_state(layer: LoraLayer, adapter_name: str, config, layer_name: str = "") -> None:
    """Give an adapter of ``layer`` its state: that of a plain LoRA without a configuration."""
    states = layer.lora_afa
    # An adapter that is made with the configuration of another one starts where that one stands in this layer.
    start = next((state for state in states.values() if config is not None and state.config is config), None)
    if config is not None:
        config = own_config(config, adapter_name)
    states[adapter_name] = AdapterState(config, device_of(layer, adapter_name), start, layer_name)


def device_of(layer: LoraLayer, adapter_name: str) -> torch.device:
    """Return where alpha_t belongs: beside the adapter, or where that will be loaded to."""
    base = layer.get_base_layer()
    candidates = (layer.lora_B[adapter_name].weight, *base.parameters(), *base.buffers())
    devices = (t.device for t in candidates if t.device.type != "meta")
    return next(devices, candidates[0].device)
