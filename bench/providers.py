"""Who is measured: each peer by its public package, each backend of ours, and why one is absent.

A provider turns a frozen ``nn.Linear`` and the two adapter weights into a module (scope "layer"), a branch into a
function (scope "branch"), or adapts a model (scope "model"): as a whole where its users do that (whole_models.py), else
layer by layer. A peer is imported when it is first asked for, because some patch other libraries on import.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import afa_kernels
from afa_kernels.backend import choice, interface
from afa_kernels.operator.activation import ACTIVATIONS
from bench import whole_models
from bench.problem import SCALING
from bench.shapes import DTYPES, Case

_AGAIN = ".again"
Adapter = tuple[nn.Parameter, ...]  # A and B; empty for the frozen layer
Branch = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, A, B, base -> base + branch


@dataclass(frozen=True)
class Provider:
    name: str
    about: str
    function: str  # "frozen", "lora" or "afa": what it computes, hence its truth
    why_not: Callable[[Case], str | None]
    layer: Callable[[nn.Linear, Tensor, Tensor, Case], tuple[nn.Module, Adapter]] | None
    branch: Callable[[Case, bool], Branch] | None = None  # the bool: whether to write into base
    model: Callable[[nn.Module, whole_models.Weights, Case], list[nn.Parameter]] | None = None  # None: layer by layer
    experts: Callable | None = None  # experts.py
    ours: bool = False

    def absent(self, case: Case) -> str | None:
        """Return why this provider cannot be measured on ``case``, or None if it can."""
        if case.scope == "branch" and self.branch is None:
            return "has no branch apart from its layer"
        if case.scope == "layer" and self.layer is None:
            return "adapts whole models"
        return self.why_not(case)

    def adapt(self, model: nn.Module, weights: whole_models.Weights, case: Case) -> list[nn.Parameter]:
        """Put adapters with ``weights`` into ``model``; return A and B of each layer, in order, if it has them."""
        if self.model is not None:
            return self.model(model, weights, case)
        parameters = []
        for name, (a, b) in weights.items():
            linear = model.get_submodule(name)
            n, k = linear.weight.shape
            module, adapter = self.layer(linear, a, b, case._replace(scope="layer", k=k, n=n))
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module)
            parameters.extend(adapter)
        return parameters


def measured_again(name: str) -> str | None:
    """Return the provider that ``name`` is a second instance of: the ratio of the two is the measurement's error."""
    return name.removesuffix(_AGAIN) if name.endswith(_AGAIN) else None


def _import(module: str) -> str | None:
    """Return why ``module`` cannot be imported; None if it can."""
    # PEFT and torchtune import it; it warns that its C++ extensions are for another torch.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        import_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises on import is the reason
        first_line = str(error).strip().partition("\n")[0]
        return f"{module}: {type(error).__name__}: {first_line}"
    return None


def runs(case: Case) -> str | None:
    return None


class EagerLayer(nn.Module):
    """AFA-LoRA as a PEFT user writes it in torch ops: PEFT's forward with phi between A and B."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, case: Case, alpha_t):
        super().__init__()
        self.base_layer = linear
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        self.activation, self.dropout = case.activation, case.dropout
        if isinstance(alpha_t, Tensor):
            self.register_buffer("alpha_t", alpha_t)
        else:
            self.alpha_t = alpha_t

    def forward(self, x: Tensor) -> Tensor:
        x_branch = F.dropout(x, self.dropout) if self.dropout else x
        return eager_branch(x_branch, self.lora_a, self.lora_b, self.base_layer(x), self.alpha_t, self.activation)


def eager_branch(x, a, b, base, alpha_t, activation):
    z = F.linear(x, a.to(x.dtype))
    h = (1 - alpha_t) * z + alpha_t * ACTIVATIONS[activation].value(z)
    return base + F.linear(h, b.to(x.dtype)) * SCALING


def _adapter(module: nn.Module) -> tuple[nn.Module, Adapter]:
    return module, (module.lora_a, module.lora_b)


def _frozen_layer(linear, a, b, case):
    return linear, ()


def _eager_layer(linear, a, b, case):
    return _adapter(EagerLayer(linear, a, b, case, case.alpha_t))


def _eager_branch(case, inplace):
    return lambda x, a, b, base: eager_branch(x, a, b, base, case.alpha_t, case.activation)


def _alpha_tensor(case: Case) -> Tensor:
    return torch.full((), case.alpha_t, dtype=torch.float32, device=case.device)


def _compiled_layer(linear, a, b, case):
    torch._dynamo.reset()  # after 8 shapes it would give up and run eagerly, in silence
    module, adapter = _adapter(EagerLayer(linear, a, b, case, _alpha_tensor(case)))
    return torch.compile(module, dynamic=False), adapter


def _compiled_branch(case, inplace):
    torch._dynamo.reset()
    compiled = torch.compile(eager_branch, dynamic=False)
    alpha_t = _alpha_tensor(case)  # a float would be compiled into the code
    return lambda x, a, b, base: compiled(x, a, b, base, alpha_t, case.activation)


def _compiled_why_not(case: Case) -> str | None:
    compilers = ("g++", "clang++", "c++")
    if case.device == "cpu" and not any(map(shutil.which, compilers)):
        return f"torch.compile needs a C++ compiler on the CPU, found none of {compilers}"
    return None


def _peft_layer(linear, a, b, case):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=case.r,
        lora_alpha=SCALING * case.r,
        lora_dropout=case.dropout,
        target_modules=["layer"],
        init_lora_weights=False,
    )
    layer = inject_adapter_in_model(config, nn.ModuleDict({"layer": linear}))["layer"]
    adapter = layer.lora_A["default"], layer.lora_B["default"]
    for part, value in zip(adapter, (a, b), strict=True):
        part.weight = nn.Parameter(value)
    return layer, tuple(part.weight for part in adapter)


def _torchtune_why_not(case: Case) -> str | None:
    if case.adapter_dtype != case.dtype:
        return "LoRALinear does not mix dtypes"
    return _import("torchtune.modules.peft")


def _torchtune_layer(linear, a, b, case):
    from torchtune.modules.peft import LoRALinear

    bias = linear.bias is not None
    layer = LoRALinear(linear.in_features, linear.out_features, case.r, SCALING * case.r, case.dropout, bias)
    layer.weight = linear.weight
    if bias:
        layer.bias = linear.bias
    layer.lora_a.weight, layer.lora_b.weight = nn.Parameter(a), nn.Parameter(b)
    return layer, (layer.lora_a.weight, layer.lora_b.weight)


def _on_gpu_only(module: str) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        if case.device == "cpu":
            return "runs on GPUs only"
        if case.adapter_dtype != case.dtype:
            return "does not mix dtypes"
        return _import(module)

    return why_not


class _FunctionLayer(nn.Module):
    """A peer that is a function of a 3-D x, the weights and the scale."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, function: Callable):
        super().__init__()
        self.base_layer = linear
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unsqueeze(0) if x.dim() == 2 else x
        y = self.function(rows, self.base_layer, self.lora_a, self.lora_b)
        return y.view(*x.shape[:-1], y.shape[-1])


def _unsloth_why_not(case: Case) -> str | None:
    if case.dropout:
        return "its fast path has no dropout"
    return _on_gpu_only("unsloth.kernels.fast_lora")(case)


def _unsloth_layer(linear, a, b, case):
    from unsloth.kernels.fast_lora import LoRA_W

    def function(x, linear, a, b):
        y = LoRA_W.apply(x, linear.weight, None, a, b, SCALING)
        return y if linear.bias is None else y + linear.bias

    return _adapter(_FunctionLayer(linear, a, b, function))


def _lorafusion_layer(linear, a, b, case):
    from lorafusion.ops.lora_v1 import fused_linear_lora

    def function(x, linear, a, b):
        return fused_linear_lora(x, linear.weight, a, b, SCALING, dropout_p=case.dropout, linear_bias=linear.bias)

    return _adapter(_FunctionLayer(linear, a, b, function))


def _afa(backend: str | None) -> Provider:
    def why_not(case: Case) -> str | None:
        if backend is None:
            return None
        device = torch.device(case.device)
        call = interface.Call(
            device.type, DTYPES[case.dtype], case.m, case.k, case.n, case.r, case.activation, case.dropout > 0,
            device.index,
        )  # fmt: skip
        return choice.get(backend).why_not(call)

    def layer(linear, a, b, case):
        module = afa_kernels.AFALinear(
            linear,
            r=case.r,
            lora_alpha=SCALING * case.r,
            activation=case.activation,
            dropout=case.dropout,
            dtype=a.dtype,
            backend=backend,
        )
        module.lora_a, module.lora_b = nn.Parameter(a), nn.Parameter(b)
        module.set_alpha_t(case.alpha_t)
        return _adapter(module)

    def branch(case, inplace):
        # A tensor, as a layer passes it while alpha_t moves; the float 0 is known identity.
        alpha_t = _alpha_tensor(case) if case.alpha_t else 0.0
        return lambda x, a, b, base: afa_kernels.afa_lora(
            x, a, b, alpha_t, activation=case.activation, scaling=SCALING, base=base, inplace=inplace,
            dropout_p=case.dropout, backend=backend,
        )  # fmt: skip

    if backend is None:
        adapt = whole_models.inject(share_inputs=None)
        return Provider("afa", "this package, automatic choice", "afa", why_not, layer, branch, adapt, ours=True)
    return Provider(f"afa.{backend}", f"this package, {backend}", "afa", why_not, layer, branch, ours=True)


def _identity() -> Provider:
    """Return ``afa`` at alpha_t = 0, beside ``afa`` in a case of another alpha_t."""
    ours = _afa(None)

    def at_zero(case: Case) -> Case:
        return case._replace(alpha_t=0.0)

    return Provider(
        "afa.identity",
        "afa at alpha_t = 0, whatever that of the case is",
        "lora",
        lambda case: None if case.alpha_t else "the case is at alpha_t = 0 itself",
        lambda linear, a, b, case: ours.layer(linear, a, b, at_zero(case)),
        lambda case, inplace: ours.branch(at_zero(case), inplace),
        lambda model, weights, case: ours.model(model, weights, at_zero(case)),
        ours=True,
    )


def _again(provider: Provider, **changes: object) -> Provider:
    about = f"{provider.name} measured again: their ratio is the measurement's error"
    return replace(provider, name=provider.name + _AGAIN, about=about, **changes)


def _needs_peft(case: Case) -> str | None:
    return _import("peft")


def providers() -> dict[str, Provider]:
    """Return every provider by name, peers first. ``afa.torch`` is the best composition of torch
    ops, RunLoRA's idea: every intermediate of rank r, large results accumulated in place."""
    frozen = Provider("frozen", "the frozen layer alone", "frozen", runs, _frozen_layer, model=whole_models.nothing)
    peers = (
        frozen,
        _again(frozen, layer=None),
        Provider("peft", "PEFT, plain LoRA", "lora", _needs_peft, _peft_layer, model=whole_models.peft),
        Provider("torchtune", "LoRALinear", "lora", _torchtune_why_not, _torchtune_layer),
        Provider("unsloth", "LoRA_W, plain LoRA", "lora", _unsloth_why_not, _unsloth_layer),
        Provider(
            "lorafusion",
            "fused_linear_lora, plain LoRA",
            "lora",
            _on_gpu_only("lorafusion.ops.lora_v1"),
            _lorafusion_layer,
        ),
        Provider("eager", "AFA-LoRA in PyTorch code, as in PEFT", "afa", runs, _eager_layer, _eager_branch),
        Provider(
            "compiled",
            "the same code, compiled by torch.compile",
            "afa",
            _compiled_why_not,
            _compiled_layer,
            _compiled_branch,
        ),
    )
    afa = _afa(None)
    through_peft, accelerated = (
        Provider(name, about, function, _needs_peft, None, model=adapt, ours=True)
        for name, about, function, adapt in (
            ("afa.peft", "this package through PEFT, AFALoraConfig", "afa", whole_models.annealed),
            ("afa.accelerate", "PEFT's plain LoRA on the kernels of this package", "lora", whole_models.accelerated),
        )
    )
    separate = Provider(
        "afa.separate",
        "afa, every layer alone",
        "afa",
        runs,
        None,
        model=whole_models.inject(share_inputs=False),
        ours=True,
    )
    whole = (through_peft, _again(through_peft), accelerated, _again(accelerated), separate)
    ours = (afa, _again(afa), _identity(), *whole, *map(_afa, one_backend()))
    return {provider.name: provider for provider in (*peers, *ours)}


def one_backend() -> list[str]:
    """Return the backends that are providers of their own, under the name "afa." with theirs."""
    return [name for name in choice.names() if choice.get(name).automatic]


def by_default(device: str, scope: str) -> list[str]:
    """Return the names of those that are measured in ``scope`` unless others are asked for: not the oracle, which is
    right and never fast; on the CPU, where "afa" is "afa.cpu", not that a third time; and no model is compiled, which
    takes longer than all the rest."""
    left_out = {"afa.reference"}
    if torch.device(device).type == "cpu":
        left_out.add("afa.cpu")
    if scope == "model":
        left_out.add("compiled")
    found = providers().items()
    return [name for name, provider in found if name not in left_out and (scope == "model" or provider.layer)]
