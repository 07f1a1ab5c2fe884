"""AFALoraConfig: PEFT's LoraConfig with an activation and its annealing, and how they are saved.

A configuration describes an adapter. Where the adapter stands, its alpha_t, is in the layers and is read from there.
"""

import copy
import dataclasses
import json
import os
import re
import warnings
import weakref
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from afa_kernels.model import peft_format as fmt
from afa_kernels.operator import checks
from afa_kernels.peft.experts import TAKES_CONFIG, ParamWrapper, is_router, router_wrapper
from afa_kernels.peft.layer import install
from afa_kernels.peft.state import AdapterState
from afa_kernels.schedule import AnnealSchedule

# What else PEFT can put between A and B or around them. From 0.20 on PEFT marks such fields, and
# the marks are checked too.
_OTHER_BRANCHES = {
    "use_dora": "DoRA rescales W + s*B*A by its norm, and a branch that is not linear has no B*A",
    "use_qalora": "QA-LoRA pools the input of A, which the kernels do not",
    "alora_invocation_tokens": "aLoRA switches the branch on for some tokens only",
    "arrow_config": "Arrow routes between adapters",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# The arguments of AnnealSchedule that have a field.
_ARGUMENT_OF = {
    "anneal": "kind",
    "anneal_start": "start",
    "anneal_end": "end",
    "anneal_begin_frac": "begin_frac",
    "anneal_end_frac": "end_frac",
}


@dataclasses.dataclass
class AFALoraConfig(LoraConfig):
    """Configuration of an AFA-LoRA adapter: ``get_peft_model(model, AFALoraConfig(...))``.

    Everything of :class:`peft.LoraConfig` keeps its meaning, except that other variants of the
    branch (DoRA and the like) are refused. A layer returns ``base(x) + scaling * phi(dropout(x) @
    A.T) @ B.T`` with ``phi(z) = (1 - alpha_t) * z + alpha_t * act(z)``; at ``alpha_t = 0`` that is
    PEFT's LoRA.

    Args:
        activation: a name from :func:`afa_kernels.activations`.
        anneal, anneal_start, anneal_end, anneal_begin_frac, anneal_end_frac: the schedule that
            :meth:`schedule` makes and :class:`afa_kernels.callbacks.AnnealCallback` follows, as in
            :class:`afa_kernels.AnnealSchedule`.
        alpha_t: where an adapter made from it starts; by default at ``anneal_start``. Of a configuration in a model's
            ``peft_config``, which is the adapter's own copy, it reads where the adapter stands, the largest value of
            its layers: another adapter that is made from it starts there.
        fuse_mlp: run each MLP block whose layers are adapted as one call that keeps less for the backward
            (:func:`afa_kernels.fuse_mlp`): from when the callbacks, :meth:`AnnealSchedule.attach` or
            :func:`accelerate` see the model, and it is an error there if it has none. It is no part of the adapter, and
            is not saved.

    Raises:
        TypeError, ValueError: an argument does not fit, or asks for another kind of branch.
    """

    activation: str = dataclasses.field(
        # The mark makes PEFT 0.20 and later refuse layers that cannot run this adapter.
        default="silu",
        metadata={"help": "The activation between A and B.", "is_lora_variant": True},
    )
    anneal: str = dataclasses.field(default="linear", metadata={"help": "The kind of annealing schedule."})
    anneal_start: float = dataclasses.field(default=1.0, metadata={"help": "alpha_t before annealing."})
    anneal_end: float = dataclasses.field(default=0.0, metadata={"help": "alpha_t after annealing."})
    anneal_begin_frac: float = dataclasses.field(
        default=0.0, metadata={"help": "The fraction of training at which annealing begins."}
    )
    anneal_end_frac: float = dataclasses.field(
        default=0.8, metadata={"help": "The fraction of training at which annealing ends."}
    )
    alpha_t: float | None = dataclasses.field(default=None, metadata={"help": "The current blend coefficient."})
    fuse_mlp: bool = dataclasses.field(default=False, metadata={"help": "Whether MLP blocks run as one call."})

    def __post_init__(self):
        super().__post_init__()
        checks.options(self.activation, 1.0, 0.0, None)
        self.schedule(1)
        if not isinstance(self.fuse_mlp, bool):
            raise TypeError(f"fuse_mlp: expected True or False, got {type(self.fuse_mlp).__name__}")
        if self._alpha_t is not None:
            self._alpha_t = checks.alpha_value(self._alpha_t)
        self._states: weakref.WeakSet[AdapterState] = weakref.WeakSet()
        self._initialized_by = self.init_lora_weights
        self._has_warned = False
        self._refuse_other_branches()
        self._register_custom_module({nn.Module: self._create_layer})

    def _read_alpha_t(self) -> float:
        if self._states:
            return max(state.alpha_t for state in self._states)
        return self.anneal_start if self._alpha_t is None else self._alpha_t

    def _write_alpha_t(self, value: float | None) -> None:
        self._alpha_t = value

    @property
    def is_fresh(self) -> bool:
        """Whether nobody has said where an adapter made from it starts."""
        return all(state.is_fresh for state in self._states) if self._states else self._alpha_t is None

    @property
    def describes_an_adapter(self) -> bool:
        """Whether it belongs to an adapter of a model."""
        return bool(self._states)

    def describe(self, state: AdapterState) -> None:
        """Belong to an adapter, of which ``state`` is the part in one layer."""
        self._states.add(state)

    def own_copy(self) -> "AFALoraConfig":
        """Return a copy for one adapter, which says where this one says that its adapter stands."""
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy describes no adapter, but what it describes stands where this one's does.
        alpha_t = None if self.is_fresh and self._alpha_t is None else self.alpha_t
        return {**self.__dict__, "_alpha_t": alpha_t, "_states": None, "_custom_modules": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _states=weakref.WeakSet())
        self._register_custom_module({nn.Module: self._create_layer})

    def schedule(self, total_steps: int) -> AnnealSchedule:
        """Return the annealing schedule for a training of ``total_steps`` optimizer steps."""
        arguments = {_ARGUMENT_OF[name]: getattr(self, name) for name in _ARGUMENT_OF}
        try:
            return AnnealSchedule(total_steps, **arguments)
        except (TypeError, ValueError) as error:
            raise type(error)(_in_terms_of_fields(str(error))) from None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json``.

        At ``alpha_t = 0`` it is that of a LoRA, as stock PEFT writes it, and ``afa_config.json`` beside it has the
        activation and the schedule. Before that ``adapter_config.json`` has everything, and readers that would compute
        a plain LoRA refuse it.

        Raises:
            ValueError: the layers of the adapter stand at different alpha_t, or PEFT converts the adapter of another
                initialization (PiSSA) into a LoRA, before ``alpha_t = 0``.

        Warns:
            UserWarning: once, that the adapter is not at ``alpha_t = 0``, and whether nothing has annealed it.
        """
        folder = Path(save_directory)
        alpha_t = self._alpha_t_to_save(folder / fmt.CONFIG_FILE)
        plain = copy.copy(self)
        plain.__class__ = LoraConfig
        if self.target_parameters:
            plain.lora_dropout = 0.0  # stock PEFT refuses it beside parameters
        plain.save_pretrained(save_directory, **kwargs)
        state = {"format_version": fmt.FORMAT_VERSION}
        state |= {name: getattr(self, name) for name in sorted(own_fields() - {"alpha_t", "fuse_mlp"})}
        if self.target_parameters:
            state["lora_dropout"] = self.lora_dropout
        if alpha_t == 0.0:
            _write_json(folder / fmt.AFA_CONFIG_FILE, state)
            return
        (folder / fmt.AFA_CONFIG_FILE).unlink(missing_ok=True)
        config = json.loads((folder / fmt.CONFIG_FILE).read_text(encoding="utf-8"))
        _write_json(folder / fmt.CONFIG_FILE, fmt.unfinished(config, state | {"alpha_t": alpha_t}, alpha_t))

    def _alpha_t_to_save(self, file: Path) -> float:
        states = sorted(self._states, key=lambda state: state.alpha_t)
        if states and states[0].alpha_t != states[-1].alpha_t:
            file.unlink(missing_ok=True)  # PEFT has written the weights, which an older configuration does not fit
            ends = states[0], states[-1]
            one, other = (f"{state.layer_name or 'a layer'} stands at {state.alpha_t:g}" for state in ends)
            raise ValueError(
                f"alpha_t: {one} and {other}, and PEFT's format has one alpha_t for an adapter; set all layers to one "
                "value (afa_kernels.set_alpha_t), or adapt the model with afa_kernels.inject, whose "
                "afa_kernels.save_adapter has one for each layer"
            )
        if self.alpha_t != 0.0 and self.init_lora_weights != self._initialized_by:
            raise ValueError(
                f"path_initial_model_for_weight_conversion: the difference to an adapter that {self._initialized_by!r} "
                f"began with is a LoRA at alpha_t = 0 only, and alpha_t is {self.alpha_t:g}; anneal it first"
            )
        if self._states and self.alpha_t != 0.0 and not self._has_warned:
            self._has_warned = True
            forgotten = "; nothing has annealed it yet: a training takes AnnealCallback() or schedule.attach(model)"
            warnings.warn(
                f"alpha_t: the adapter is saved at {self.alpha_t:g}, where stock PEFT and stock vLLM refuse it, "
                f"because they would compute a plain LoRA{forgotten if self.is_fresh else ''}",
                stacklevel=4,
            )
        return self.alpha_t

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        file = Path(path_json_file)
        attributes, state = fmt.as_finished(file, super().from_json_file(path_json_file, **kwargs))
        state = fmt.one_for_all_layers(file, state)
        alpha_t = state.get("alpha_t", 0.0)
        beside = file.with_name(fmt.AFA_CONFIG_FILE)
        described = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        if "alpha_t" in described:  # version 0.1 wrote it there
            fmt.check_agreement(file, alpha_t, beside, [described["alpha_t"]])
        weights = file.with_name(fmt.WEIGHTS_FILE)
        fmt.check_agreement(file, alpha_t, weights, fmt.alpha_t_in_weights(weights))
        known = own_fields() | {"lora_dropout"}
        described = {name: value for name, value in (described | state).items() if name in known}
        return attributes | described | {"alpha_t": alpha_t}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "AFALoraConfig":
        own = {name: kwargs.pop(name) for name in own_fields() & kwargs.keys()}
        plain = super().from_peft_type(**kwargs)
        if type(plain) is not LoraConfig:
            raise ValueError(f"peft_type: expected the configuration of a LoRA, got {type(plain).__name__}")
        shared = {f.name: getattr(plain, f.name) for f in dataclasses.fields(LoraConfig) if f.init}
        return cls(**shared, **own)

    def _refuse_other_branches(self) -> None:
        for field in dataclasses.fields(LoraConfig):
            marked = field.metadata.get("is_lora_variant", False)
            if (marked or field.name in _OTHER_BRANCHES) and getattr(self, field.name):
                reason = _OTHER_BRANCHES.get(field.name, "it is another kind of branch")
                raise ValueError(f"{field.name}: not possible with AFALoraConfig: {reason}")
            if self.init_lora_weights in field.metadata.get("lora_variants", ()):
                raise ValueError(
                    f"init_lora_weights: {self.init_lora_weights!r} is not possible with "
                    "AFALoraConfig: it is another kind of branch"
                )
        if self.target_parameters and not TAKES_CONFIG:
            raise ValueError("target_parameters: PEFT 0.19 or later is needed: earlier wrappers get no configuration")
        kind = self.init_lora_weights
        if isinstance(kind, str) and kind.startswith(_CHANGES_BASE) and self.alpha_t != 0.0:
            warnings.warn(
                f"init_lora_weights={kind!r} subtracts s*B*A from the base weights, which the "
                f"branch gives back only at alpha_t = 0; at alpha_t = {self.alpha_t:g} the model "
                "does not start as the base model",
                stacklevel=3,
            )

    def _create_layer(self, target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
        """Let PEFT choose and make the layer, then put the branch into it."""
        kwargs.pop("config", None)
        parameter = kwargs.get("parameter_name")
        if parameter is not None:
            wrap = router_wrapper if is_router(target, parameter) else ParamWrapper
            return wrap(target, adapter_name, config=self, **kwargs)
        plain = copy.copy(self)
        plain.__class__ = LoraConfig
        plain._custom_modules = None
        layer = LoraModel._create_new_module(plain, adapter_name, target, **kwargs)
        self.fan_in_fan_out = plain.fan_in_fan_out  # PEFT sets it to what the layer is
        install(layer, adapter_name, self, kwargs.get("target_name", ""))
        return layer


# The dataclass made a field of it; reading it asks the layers.
AFALoraConfig.alpha_t = property(AFALoraConfig._read_alpha_t, AFALoraConfig._write_alpha_t)


def _in_terms_of_fields(message: str) -> str:
    """Return an error of AnnealSchedule with the names that a user of AFALoraConfig wrote."""
    names = {argument: field for field, argument in _ARGUMENT_OF.items()}
    return re.sub(rf"\b({'|'.join(names)})\b(?=[:=])", lambda match: names[match.group()], message)


def own_fields() -> set[str]:
    fields = dataclasses.fields(AFALoraConfig)
    return {f.name for f in fields} - {f.name for f in dataclasses.fields(LoraConfig)}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
