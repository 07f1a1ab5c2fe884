"""Experts in PEFT: its wrapper of a fused parameter, whose branches run on the operator.

PEFT parametrizes the parameter as W + dW, which takes memory as large as all experts and cannot have an activation or
dropout. Here the experts module computes the branches beside its products; the wrappers, which PEFT nests, tell it
which.
"""

import copy
import inspect
import re
import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from afa_kernels.experts.forward import attach, detach
from afa_kernels.experts.parameters import from_matrices, local, weight_of, why_unsupported
from afa_kernels.layers.base_layer import is_conv1d
from afa_kernels.layers.branch import AdapterCall
from afa_kernels.operator import checks
from afa_kernels.peft.layer import AFALoraLayer, dropout_of
from afa_kernels.peft.state import add_state, is_annealed

TAKES_CONFIG = "config" in inspect.signature(lora.ParamWrapper.update_layer).parameters


class WrappedParameters:
    """What an experts module keeps as ``afa``: the wrapper of each of its parameters that has one."""

    def __init__(self):
        self.wrappers: dict[str, ParamWrapper] = {}

    def assignment(self) -> None:
        return None  # adapter_names is PEFT's error for parameters

    def calls(self, parameter: str) -> list[list[AdapterCall]]:
        wrapper = self.wrappers.get(parameter)
        return [] if wrapper is None else wrapper.calls()


class ParamWrapper(AFALoraLayer, lora.ParamWrapper):
    """PEFT's wrapper of a parameter, for fused experts. PEFT recognizes it by this name.

    Adapters with an :class:`~afa_kernels.peft.AFALoraConfig` have an alpha_t; those of a plain LoRA run without an
    activation.
    """

    adapter_layer_names = (*lora.ParamWrapper.adapter_layer_names, "lora_afa")

    def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config, **kwargs: Any):
        experts = base_layer.get_base_layer() if isinstance(base_layer, lora.ParamWrapper) else base_layer
        reason = why_not(experts, parameter_name)
        if reason is not None:
            raise ValueError(f"target_parameters: {parameter_name} cannot be adapted: {reason}")
        super().__init__(base_layer, adapter_name, parameter_name, config=_of_plain_lora(config), **kwargs)
        self.prepare(adapter_name, config)
        _register(self)
        keep_patterns_quiet(config, kwargs.get("target_name", ""))

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config, **kwargs: Any) -> None:
        if not hasattr(self, "lora_afa"):  # PEFT's __init__ comes through here
            self.lora_afa = nn.ModuleDict()
        else:
            keep_patterns_quiet(config, kwargs.get("target_name", ""))
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=_of_plain_lora(config), **kwargs)
        self.prepare(adapter_name, config)

    def prepare(self, adapter_name: str, config) -> None:
        """Give an adapter what PEFT refuses a parameter: dropout, and an activation."""
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        if is_annealed(config):
            add_state(self, adapter_name, config, self.parameter_name)

    def resolve_lora_variant(self, **_: Any) -> None:
        return None  # PEFT's variants are for layers

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.base_layer(x, *args, **kwargs)

    def calls(self) -> list[list[AdapterCall]]:
        """Return the calls of the active adapters."""
        if self.disable_adapters or self.merged:
            return []
        return [[self._call(name)] for name in self.active_adapters if name in self.lora_A]

    def _weight_now(self) -> Tensor:
        return local(weight_of(self.get_base_layer(), self.parameter_name).detach())

    def _factors_of(self, name: str) -> tuple[Tensor, Tensor]:
        return from_matrices(self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts)

    def _call(self, name: str) -> AdapterCall:
        a, b = self._factors_of(name)
        scaling = self.scaling[name]
        if isinstance(scaling, Tensor):  # where adapters are to be swapped in a compiled model
            b, scaling = b * scaling.to(b), 1.0
        b = b.contiguous()  # once, because in PEFT's layout the B of one expert touches the memory of all
        if name not in self.lora_afa:
            return AdapterCall(a, b, None, checks.options_of_lora(scaling, dropout_of(self, name)))
        state = self.lora_afa[name]
        return AdapterCall(a, b, state.coefficient(), state.options(scaling, dropout_of(self, name)))

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        experts = super().unload_and_optionally_merge_module(*args, **kwargs)
        detach(experts)
        return experts


def is_router(module: nn.Module, parameter: str) -> bool:
    """Whether ``parameter`` is a matrix in a module that computes with it in its own way, as the router of a mixture.

    PEFT counts routers among ``"all-linear"``. There is no place for a branch beside its product, only W + dW.
    """
    is_layer = isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)
    return parameter == "weight" and not is_layer and module.weight.dim() == 2


def is_router_wrapper(layer: nn.Module) -> bool:
    return isinstance(layer, lora.ParamWrapper) and is_router(layer.get_base_layer(), layer.parameter_name)


def router_wrapper(router: nn.Module, adapter_name: str, *, config, **kwargs: Any) -> lora.ParamWrapper:
    """Return PEFT's own wrapper of a router's matrix: a plain LoRA, without an activation or dropout."""
    warn_of_router(router)
    keep_patterns_quiet(config, kwargs.get("target_name", ""))
    return lora.ParamWrapper(router, adapter_name, config=_of_plain_lora(config), **kwargs)


def warn_of_router(router: nn.Module) -> None:
    warnings.warn(
        f"the weight of {type(router).__name__} gets a LoRA without an activation: only linear layers and fused "
        "experts can have one",
        stacklevel=2,
    )


def keep_patterns_quiet(config, name: str) -> None:
    """Ignore PEFT's warning that the keys of ``rank_pattern`` and ``alpha_pattern`` that match the parameter ``name``
    "did not match any targeted module and were ignored".

    PEFT 0.21 looks for them among the modules alone, once all wrappers are made. Its warning names every key without a
    module; it is ignored where each of these has matched a parameter.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        known = vars(config).setdefault(f"_parameters_of_{field}", [])
        known += [k for k in getattr(config, field) or () if k not in known and re.match(rf"(.*\.)?({k})$", name)]
        keys = "|".join(re.escape(repr(key)) for key in known)
        if keys:
            text = rf"The following {field} keys did not match any targeted module and were ignored: \[(,? ?({keys}))+]"
            warnings.filterwarnings("ignore", text, RuntimeWarning, r"peft\.tuners")


def why_not(experts: nn.Module, parameter: str) -> str | None:
    """Return why PEFT's wrapper of a parameter cannot run on the operator, or None if it can."""
    if hasattr(getattr(experts, parameter), "device_mesh"):
        return "it is sharded, and PEFT keeps whole adapters; use afa_kernels.inject"
    return why_unsupported(experts, parameter)


def why_not_wrapper(layer: lora.ParamWrapper) -> str | None:
    """Return why the branches of PEFT's own wrapper cannot run on the operator, or None if they can."""
    return None if isinstance(layer, ParamWrapper) else why_not(layer.get_base_layer(), layer.parameter_name)


def install(layer: lora.ParamWrapper, adapter_name: str, config) -> None:
    """Give an adapter that the wrapper has already what its configuration says.

    Raises:
        ValueError: it cannot run on the operator; the message says why.
    """
    reason = adopt(layer)
    if reason is not None:
        raise ValueError(f"target_parameters: {layer.parameter_name} cannot be adapted: {reason}")
    layer.prepare(adapter_name, config)


def adopt(layer: lora.ParamWrapper) -> str | None:
    """Let the branches of PEFT's own wrapper run on the operator, or return why they cannot."""
    reason = why_not_wrapper(layer)
    if reason is None and not isinstance(layer, ParamWrapper):
        layer.__class__ = ParamWrapper
        layer.lora_afa = nn.ModuleDict()
        _register(layer)
    return reason


def release(layer: ParamWrapper) -> None:
    """Undo :func:`adopt`, unless the layer has an annealed adapter."""
    if layer.lora_afa:
        return
    experts = layer.get_base_layer()
    del experts.afa.wrappers[layer.parameter_name]
    if not experts.afa.wrappers:
        detach(experts)
    del layer.lora_afa
    layer.__class__ = lora.ParamWrapper


def _register(wrapper: ParamWrapper) -> None:
    experts = wrapper.get_base_layer()
    if not hasattr(experts, "afa"):
        attach(experts, WrappedParameters())
    experts.afa.wrappers[wrapper.parameter_name] = wrapper


def _of_plain_lora(config) -> LoraConfig:
    """Return what PEFT's wrapper takes of a configuration."""
    plain = copy.copy(config)
    plain.__class__ = LoraConfig
    plain.lora_dropout = 0.0
    return plain
