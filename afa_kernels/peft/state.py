"""The state of one adapter in one layer, beside the parameters that PEFT keeps."""

import torch
from peft.tuners.lora import LoraLayer

from afa_kernels.alpha import Annealed


class AdapterState(Annealed):
    """What one adapter of one layer is: its activation and its alpha_t, which is not part of the state dict.

    Args:
        config: the :class:`AFALoraConfig`, which is told each new value so that it can be saved; or
            None for a plain LoRA, whose alpha_t is 0 and stays 0.
    """

    def __init__(self, config, device: torch.device | None):
        super().__init__()
        self.config = config
        self.activation = "relu" if config is None else config.activation
        self.save = "z" if config is None else config.save
        self.start_alpha_t(0.0 if config is None else config.begin(), device, persistent=False)

    @property
    def annealed(self) -> bool:
        return self.config is not None

    def write_alpha_t(self, value: float) -> None:
        super().write_alpha_t(value)
        self.config.note_alpha_t(self.alpha_t)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, alpha_t={self.alpha_t:g}"


def device_of(layer: LoraLayer, adapter_name: str) -> torch.device:
    """Return where alpha_t belongs: beside the adapter, or where that will be loaded to."""
    base = layer.get_base_layer()
    candidates = (layer.lora_B[adapter_name].weight, *base.parameters(), *base.buffers())
    devices = (t.device for t in candidates if t.device.type != "meta")
    return next(devices, candidates[0].device)
