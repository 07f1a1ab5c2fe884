"""AFA-LoRA as a PEFT adapter: ``get_peft_model(model, AFALoraConfig(...))``, or ``add_activation(model)`` where a
framework made the adapters; and plain PEFT LoRA on the kernels of this package: ``accelerate(model)``."""

from afa_kernels.peft._version import require_peft

require_peft()

from afa_kernels.alpha_t import preparations  # noqa: E402
from afa_kernels.peft.config import AFALoraConfig  # noqa: E402 - needs the PEFT that was checked
from afa_kernels.peft.layer import AFALoraLayer  # noqa: E402
from afa_kernels.peft.model import (  # noqa: E402
    accelerate,
    add_activation,
    install_annealed,
    load_adapter,
    restore,
)

preparations.append(install_annealed)  # before the layers of a model are looked for

__all__ = [
    "AFALoraConfig",
    "AFALoraLayer",
    "accelerate",
    "add_activation",
    "install_annealed",
    "load_adapter",
    "restore",
]
