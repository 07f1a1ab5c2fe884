"""AFALoraConfig: PEFT's LoraConfig with an activation and its annealing, and how they are saved."""

import copy
import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.utils import CONFIG_NAME
from torch import nn

from afa_kernels import checks
from afa_kernels.peft.experts import TAKES_CONFIG, ParamWrapper, is_router, router_wrapper
from afa_kernels.peft.layer import install
from afa_kernels.peft_format import FORMAT_VERSION, METADATA_KEY
from afa_kernels.schedule import AnnealSchedule

AFA_CONFIG_NAME = "afa_config.json"
# What else PEFT can put between A and B or around them. From 0.20 on PEFT marks such fields, and
# the marks are checked too.
_OTHER_BRANCHES = {
    "use_dora": "DoRA rescales W + s*B*A by its norm, and a branch that is not linear has no B*A",
    "use_qalora": "QA-LoRA pools the input of A, which the kernels do not",
    "alora_invocation_tokens": "aLoRA switches the branch on for some tokens only",
    "arrow_config": "Arrow routes between adapters",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
        alpha_t: where the adapter starts; by default at ``anneal_start``. Holds the current value
            afterwards.
        save: ``"z"`` keeps ``x @ A.T`` for the backward, ``"nothing"`` recomputes it.

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
    save: str = dataclasses.field(default="z", metadata={"help": "What is saved for the backward: 'z' or 'nothing'."})

    def __post_init__(self):
        super().__post_init__()
        checks.options(self.activation, 1.0, 0.0, self.save, None)
        self.schedule(1)
        self.alpha_t = checks.alpha_value(self.anneal_start if self.alpha_t is None else self.alpha_t)
        self._refuse_other_branches()
        self._initial_alpha_t = self.alpha_t
        self._moved = False
        self._register_custom_module({nn.Module: self._create_layer})

    def schedule(self, total_steps: int) -> AnnealSchedule:
        """Return the annealing schedule for a training of ``total_steps`` optimizer steps."""
        return AnnealSchedule(
            total_steps,
            self.anneal,
            start=self.anneal_start,
            end=self.anneal_end,
            begin_frac=self.anneal_begin_frac,
            end_frac=self.anneal_end_frac,
        )

    def begin(self) -> float:
        """Return where a new adapter starts. A configuration that has been through a training
        starts anew."""
        if self._moved:
            self.alpha_t, self._moved = self._initial_alpha_t, False
        return self.alpha_t

    def note_alpha_t(self, value: float) -> None:
        """Take the current value from a layer, so that it is saved."""
        self.alpha_t = value
        self._moved = True

    def to_dict(self) -> dict[str, Any]:
        """Return PEFT's part: what stock PEFT reads, without a word that it does not know."""
        own = own_fields()
        plain = {name: value for name, value in super().to_dict().items() if name not in own}
        if self.target_parameters:
            plain["lora_dropout"] = 0.0  # stock PEFT refuses it beside parameters
        return plain

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json``, which stock PEFT reads as a LoRA, and ``afa_config.json``
        beside it.

        Before ``alpha_t = 0`` the former carries the key ``afa_lora`` too: stock PEFT then warns
        that it ignores it, as it should, because it computes another function.
        """
        super().save_pretrained(save_directory, **kwargs)
        state = {"format_version": FORMAT_VERSION}
        state |= {name: getattr(self, name) for name in sorted(own_fields())}
        if self.target_parameters:
            state["lora_dropout"] = self.lora_dropout
        folder = Path(save_directory)
        _write_json(folder / AFA_CONFIG_NAME, state)
        if self.alpha_t != 0.0:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            note = f"saved at alpha_t = {self.alpha_t:g}: not a plain LoRA yet"
            _write_json(folder / CONFIG_NAME, config | {METADATA_KEY: {"note": note, **state}})

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        attributes = super().from_json_file(path_json_file, **kwargs)
        state = attributes.pop(METADATA_KEY, None)
        beside = Path(path_json_file).with_name(AFA_CONFIG_NAME)
        if state is None and beside.is_file():
            state = json.loads(beside.read_text(encoding="utf-8"))
        # An adapter that says nothing about alpha_t is a plain LoRA.
        return attributes | ({"alpha_t": 0.0} if state is None else _checked(beside, state))

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
        install(layer, adapter_name, self)
        return layer


def own_fields() -> set[str]:
    fields = dataclasses.fields(AFALoraConfig)
    return {f.name for f in fields} - {f.name for f in dataclasses.fields(LoraConfig)}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _checked(file: Path, state: Any) -> dict[str, Any]:
    """Return the fields in a saved state, of this class or of :func:`afa_kernels.save_adapter`."""
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{file}: expected format_version {FORMAT_VERSION}, got {version!r}")
    layers = state.get("layers")
    if layers:
        kinds = {(layer["activation"], layer["alpha_t"]) for layer in layers.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"{file}: the layers differ in activation or alpha_t, which one AFALoraConfig "
                "cannot say; use afa_kernels.load_adapter"
            )
        activation, alpha_t = kinds.pop()
        return {"activation": activation, "alpha_t": alpha_t}
    return {name: state[name] for name in (own_fields() | {"lora_dropout"}) & state.keys()}
