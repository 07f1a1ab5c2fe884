"""The state of one adapter in one layer, beside the parameters that PEFT keeps."""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

SMALLEST_ALPHA = torch.finfo(torch.float32).tiny  # a smaller float32 would be subnormal or 0


class AdapterState(nn.Module):
    """What one adapter of one layer is: its activation and its alpha_t.

    Kernels read the buffer ``alpha_t``, 0-dim and float32 whatever dtype the model is cast to; it
    is written in place and not part of the state dict. ``identity`` is a Python flag that changes
    only when 0 is reached or left, so a compiled model recompiles then and at no other value.

    Args:
        config: the :class:`AFALoraConfig`, which is told each new value so that it can be saved; or
            None for a plain LoRA, whose alpha_t is 0 and stays 0.
    """

    def __init__(self, config, device: torch.device | None):
        super().__init__()
        self.config = config
        self.activation = "relu" if config is None else config.activation
        self.save = "z" if config is None else config.save
        self.number = 0.0 if config is None else config.begin()
        self.identity = self.number == 0.0
        self.register_buffer(
            "alpha_t",
            torch.full((), self.number, dtype=torch.float32, device=device),
            persistent=False,
        )

    @property
    def annealed(self) -> bool:
        return self.config is not None

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.alpha_t.fill_(value)
        self.number = value
        if self.identity != (value == 0.0):  # written only on a change: compiled code guards on it
            self.identity = value == 0.0
        self.config.note_alpha_t(value)

    def coefficient(self) -> float | Tensor:
        """Return what the operator takes: the number 0 at identity, which selects plain GEMMs."""
        return 0.0 if self.identity else self.alpha_t

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.alpha_t.dtype != torch.float32:  # cast to 16 bit it has lost digits
            device = self.alpha_t.device
            self.alpha_t = torch.full((), self.number, dtype=torch.float32, device=device)
        elif self.alpha_t.device.type != "meta":
            with torch.no_grad():
                self.alpha_t.fill_(self.number)  # to_empty() leaves it undefined
        return self

    def extra_repr(self) -> str:
        return f"activation={self.activation}, alpha_t={self.number:g}"


def device_of(layer: LoraLayer, adapter_name: str) -> torch.device:
    """Return where alpha_t belongs: beside the adapter, or where that will be loaded to."""
    base = layer.get_base_layer()
    candidates = (layer.lora_B[adapter_name].weight, *base.parameters(), *base.buffers())
    devices = (t.device for t in candidates if t.device.type != "meta")
    return next(devices, candidates[0].device)
