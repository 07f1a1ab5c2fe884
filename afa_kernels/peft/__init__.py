"""AFA-LoRA as a PEFT adapter: ``get_peft_model(model, AFALoraConfig(...))``, and plain PEFT LoRA on
the kernels of this package: ``accelerate(model)``."""

from afa_kernels.peft._version import require_peft

require_peft()

from afa_kernels.peft.config import AFALoraConfig  # noqa: E402 - needs the PEFT that was checked
from afa_kernels.peft.layer import AFALoraLayer  # noqa: E402
from afa_kernels.peft.model import (  # noqa: E402
    accelerate,
    install_annealed,
    load_adapter,
    restore,
)

__all__ = [
    "AFALoraConfig",
    "AFALoraLayer",
    "accelerate",
    "install_annealed",
    "load_adapter",
    "restore",
]
