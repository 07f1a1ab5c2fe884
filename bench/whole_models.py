"""How a model is adapted as a whole (scope "model"): as a user of each package does it, then with the given weights."""

from torch import Tensor, nn

import afa_kernels
from bench.problem import SCALING
from bench.shapes import Case

Weights = dict[str, tuple[Tensor, Tensor]]  # A and B of each linear layer, by its name in the model


def nothing(model: nn.Module, weights: Weights, case: Case) -> list[nn.Parameter]:
    return []


def inject(share_inputs: bool | None):
    """Return what adapts a model by :func:`afa_kernels.inject`."""

    def adapt(model: nn.Module, weights: Weights, case: Case) -> list[nn.Parameter]:
        afa_kernels.inject(
            model,
            list(weights),
            r=case.r,
            lora_alpha=SCALING * case.r,
            activation=case.activation,
            dropout=case.dropout,
            share_inputs=share_inputs,
        )
        afa_kernels.set_alpha_t(model, case.alpha_t)
        parameters = []
        for name, (a, b) in weights.items():
            layer = model.get_submodule(name)
            layer.lora_a, layer.lora_b = nn.Parameter(a), nn.Parameter(b)
            parameters += [layer.lora_a, layer.lora_b]
        return parameters

    return adapt


def peft(model: nn.Module, weights: Weights, case: Case) -> list[nn.Parameter]:
    """Add PEFT's plain LoRA."""
    from peft import LoraConfig

    return _through_peft(LoraConfig, model, weights, case)


def accelerated(model: nn.Module, weights: Weights, case: Case) -> list[nn.Parameter]:
    """Add PEFT's plain LoRA and let it run on the kernels of this package."""
    from afa_kernels.peft import accelerate

    parameters = peft(model, weights, case)
    accelerate(model)
    return parameters


def annealed(model: nn.Module, weights: Weights, case: Case) -> list[nn.Parameter]:
    """Add AFA-LoRA through PEFT, with a schedule, as a callback attaches one; it stays at the alpha_t of the case."""
    from afa_kernels.peft import AFALoraConfig

    parameters = _through_peft(AFALoraConfig, model, weights, case, activation=case.activation)
    afa_kernels.AnnealSchedule(total_steps=1, start=case.alpha_t, end=case.alpha_t).attach(model)
    return parameters


def _through_peft(config, model: nn.Module, weights: Weights, case: Case, **options: object) -> list[nn.Parameter]:
    from peft import inject_adapter_in_model

    options |= {"r": case.r, "lora_alpha": SCALING * case.r, "lora_dropout": case.dropout, "init_lora_weights": False}
    inject_adapter_in_model(config(target_modules=list(weights), **options), model)
    parameters = []
    for name, values in weights.items():
        layer = model.get_submodule(name)
        for part, value in zip((layer.lora_A["default"], layer.lora_B["default"]), values, strict=True):
            part.weight = nn.Parameter(value)
            parameters.append(part.weight)
    return parameters
