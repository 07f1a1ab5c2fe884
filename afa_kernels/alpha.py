"""alpha_t as a module keeps it: a tensor that kernels read, its value as a number, and whether it is 0."""

import torch
from torch import Tensor, nn

from afa_kernels import checks

_SMALLEST = torch.finfo(torch.float32).tiny  # below it the float32 buffer would be subnormal or 0


class Annealed(nn.Module):
    """Base of the modules that have an alpha_t: the branches of this package, and an adapter in a layer of PEFT.

    ``alpha_t_buffer`` is 0-dim and float32 on every device and in every dtype that the module is cast to. It is written
    in place, so that a new value neither recompiles a compiled model nor waits for the device. ``identity`` is a Python
    flag that changes only when 0 is reached or left: a compiled model is guarded on it alone, and recompiles then.
    """

    def start_alpha_t(self, value: float, device: torch.device | None, *, persistent: bool) -> None:
        """Make the buffer, in ``__init__``; ``persistent`` as in ``register_buffer``."""
        buffer = torch.full((), value, dtype=torch.float32, device=device)
        self.register_buffer("alpha_t_buffer", buffer, persistent=persistent)
        self._alpha_t = value
        self.identity = value == 0.0

    @property
    def alpha_t(self) -> float:
        """The blend coefficient as a Python number; reading it does not touch the device."""
        return self._alpha_t

    def coefficient(self) -> Tensor | None:
        """Return what the operator takes: None at identity, where there is no activation."""
        return None if self.identity else self.alpha_t_buffer

    def write_alpha_t(self, value: float) -> None:
        """Set the blend coefficient to a checked value. One that float32 cannot hold as a normal number becomes 0."""
        value = normal(value)
        with torch.no_grad():
            self.alpha_t_buffer.fill_(value)
        self._note_alpha_t(value)

    def _note_alpha_t(self, value: float) -> None:
        self._alpha_t = value
        if self.identity != (value == 0.0):  # written only on a change: compiled code guards on it
            self.identity = value == 0.0

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        buffer = self.alpha_t_buffer
        if buffer.dtype != torch.float32:  # cast to 16 bit it has lost digits
            self.alpha_t_buffer = torch.full((), self._alpha_t, dtype=torch.float32, device=buffer.device)
        elif buffer.device.type != "meta":
            with torch.no_grad():
                buffer.fill_(self._alpha_t)  # to_empty() leaves it undefined
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = prefix + "alpha_t_buffer"
        alpha = None if "alpha_t_buffer" in self._non_persistent_buffers_set else state_dict.get(key)
        try:
            value = self._alpha_t if alpha is None else checks.alpha_value(float(alpha), key)
        except (TypeError, ValueError, RuntimeError) as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.alpha_t_buffer.dtype != torch.float32:  # load_state_dict(assign=True) takes the dtype that it finds
            self.alpha_t_buffer = self.alpha_t_buffer.to(torch.float32)
        self._note_alpha_t(value)


def normal(value: float) -> float:
    """Return ``value``, or 0 where float32 cannot hold it as a normal number."""
    return 0.0 if value < _SMALLEST else value
