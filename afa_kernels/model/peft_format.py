"""PEFT's LoRA checkpoint as files: its configuration, its names, and what AFA-LoRA adds to it."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from afa_kernels.experts import ExpertBranch
from afa_kernels.layers.branch import Branch
from afa_kernels.operator import checks
from afa_kernels.operator.activation import ACTIVATIONS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
AFA_CONFIG_FILE = "afa_config.json"  # AFALoraConfig describes a finished adapter there; alpha_t is never in it
METADATA_KEY = "afa_lora"
FORMAT_VERSION = 1
PREFIX = "base_model.model."
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
# What PEFT can put into a LoRA checkpoint and these layers cannot compute: each must be absent or
# empty.
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "monteclora_config", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
# Initialisations that leave the base weights alone. The others (PiSSA, say) pair the adapter with
# changed ones.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    """Whether ``value`` maps regular expressions to numbers (rank_pattern, alpha_pattern)."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(_is_number(v) for v in value.values()):
        return False
    try:
        return all(re.compile(key) for key in value)
    except re.error:
        return False


def _is_list_of_names(value: Any) -> bool:
    names = [] if value is None else value
    return isinstance(names, list) and all(isinstance(name, str) and name for name in names)


_REQUIRED = {
    "r": _is_number,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: value is None or (_is_number(value) and 0 <= value < 1),
    "rank_pattern": _is_pattern,
    "alpha_pattern": _is_pattern,
    "modules_to_save": _is_list_of_names,
    "target_parameters": _is_list_of_names,
}


# What stock readers refuse where it holds a text of ours, which PEFT then quotes: vLLM the first, PEFT both (the second
# also where the adapter is not the first of a model).
_REFUSED = ("bias", "task_type")


def unfinished(config: dict[str, Any], state: dict[str, Any], alpha_t: float) -> dict[str, Any]:
    """Return the configuration of an adapter at ``alpha_t > 0`` with its ``state``: stock readers refuse it, because
    they would compute a plain LoRA."""
    note = (
        f"saved by afa_kernels at alpha_t = {alpha_t:g}, where the branch is not linear yet and the adapter is no "
        "LoRA; read it with afa_kernels, or anneal it to alpha_t = 0 and save it again"
    )
    replaced = {key: config.get(key) for key in _REFUSED}
    return config | dict.fromkeys(_REFUSED, note) | {METADATA_KEY: {"note": note, **replaced, **state}}


def as_finished(file: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Undo :func:`unfinished`: return the configuration and the state, which is empty where alpha_t is 0.

    Raises:
        ValueError: the state is not one that this version reads.
    """
    config = dict(config)
    state = config.pop(METADATA_KEY, None)
    if state is None:
        return config, {}
    _check_version(file, state)
    return config | {key: state[key] for key in (*_REFUSED, "lora_dropout") if key in state}, state


def one_for_all_layers(file: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint with the activation and the alpha_t that all its layers have."""
    layers = checked_layers(file, state)
    kinds = {(layer["activation"], layer["alpha_t"]) for layer in layers.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{file}: the layers differ in activation or alpha_t, which one AFALoraConfig cannot say; use "
            "afa_kernels.load_adapter"
        )
    return state | dict(zip(("activation", "alpha_t"), *kinds, strict=True)) if kinds else state


def alpha_t_in_weights(file: Path) -> list[float]:
    """Return the values of the layers that :func:`afa_kernels.save_adapter` wrote to a file with weights; none for one
    that PEFT wrote, or that is not there."""
    if not file.is_file():
        return []
    with load_safetensors().safe_open(os.fspath(file), framework="pt") as opened:
        state = _state_in(file, opened)
    return [layer["alpha_t"] for layer in checked_layers(file, state or {}).values()]


def check_agreement(file: Path, alpha_t: float, other: Path, values: list[float]) -> None:
    """Raise unless ``values`` of alpha_t in another file of a checkpoint are those of its configuration."""
    differing = [value for value in values if value != alpha_t]
    if differing:
        raise ValueError(
            f"{file} says alpha_t = {alpha_t:g} and {other} says {differing[0]:g}: they belong to different adapters. "
            "Save the adapter once more, into an empty folder"
        )


def peft_config(model: nn.Module, layers: dict[str, Branch], trained: list[str]) -> dict[str, Any]:
    """Return PEFT's LoraConfig, with keys that PEFT has known since 0.17, so that none warns.

    ``r`` and ``lora_alpha`` are those of the experts where there are some, and modules that have others get patterns:
    PEFT 0.21 warns of a pattern of a parameter that it matched no module.
    """
    modules = {name: layer for name, layer in layers.items() if not isinstance(layer, ExpertBranch)}
    first = next((layer for name, layer in layers.items() if name not in modules), None) or next(iter(layers.values()))
    rslora = all(layer.use_rslora for layer in layers.values())

    def lora_alpha(layer: Branch) -> float:
        # PEFT has one switch for all layers; where they differ, the numerator makes up for it.
        return layer.lora_alpha if layer.use_rslora == rslora else layer.scaling * layer.r

    name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name_or_path or None,
        "inference_mode": True,
        "r": first.r,
        "lora_alpha": lora_alpha(first),
        # Stock PEFT refuses it beside parameters; the trained adapter is the same.
        "lora_dropout": first.dropout if len(modules) == len(layers) else 0.0,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": sum(layer.transposed for layer in modules.values()) * 2 > len(layers),
        "init_lora_weights": True,
        "target_modules": _target_modules(model, list(modules)),
        "target_parameters": sorted(layers.keys() - modules.keys()) or None,
        "modules_to_save": trained or None,
        "rank_pattern": {_exactly(n): m.r for n, m in layers.items() if m.r != first.r},
        "alpha_pattern": {_exactly(n): lora_alpha(m) for n, m in layers.items() if lora_alpha(m) != lora_alpha(first)},
    }


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """Return full names, or a regular expression where PEFT would match another suffix too."""
    others = [name for name, _ in model.named_modules() if name not in names]
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(re.escape(name) for name in names)
    return sorted(names)


def read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and what it says of an adapter above ``alpha_t = 0``."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a readable JSON file: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file}: expected peft_type 'LORA', got {kind!r}")
    config, state = as_finished(file, config)
    for key, fits in _REQUIRED.items():
        if not fits(config.get(key)):
            raise ValueError(f"{file}: {key} is missing or not usable: {config.get(key)!r}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{file}: {key}={config[key]!r} is not supported by AFA layers")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias={config['bias']!r} is not supported, expected 'none'")
    if config.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
        raise ValueError(f"{file}: init_lora_weights={config['init_lora_weights']!r} changes the base weights")
    return config, state


def read_weights(file: Path) -> tuple[dict[str, Tensor], Any]:
    safetensors = load_safetensors()
    try:
        with safetensors.safe_open(os.fspath(file), framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
            return tensors, _state_in(file, opened)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from None


def _state_in(file: Path, opened) -> Any:
    """Return what :func:`afa_kernels.save_adapter` wrote beside the tensors of a file, or None."""
    try:
        return json.loads((opened.metadata() or {}).get(METADATA_KEY, "null"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: metadata {METADATA_KEY} is not readable: {error}") from None


def _check_version(file: Path, state: Any) -> None:
    version = state.get("format_version") if isinstance(state, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{file}: {METADATA_KEY}: expected format_version {FORMAT_VERSION}, got {version!r}")


def checked_layers(file: Path, state: Any, names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return alpha_t and activation by layer; empty for a plain LoRA. Of an :class:`AFALoraConfig` they are the same
    for all, which are called ``names``."""
    if not state:
        return {}
    _check_version(file, state)
    layers = state.get("layers")
    if layers is None and "alpha_t" in state:
        layers = dict.fromkeys(names, {key: state.get(key) for key in ("alpha_t", "activation")})
    if not isinstance(layers, dict):
        raise ValueError(f"{file}: {METADATA_KEY} has no layers")
    for name, layer in layers.items():
        if not isinstance(layer, dict) or layer.get("activation") not in ACTIVATIONS:
            raise ValueError(f"{file}: {METADATA_KEY} has no known activation for {name}: {layer!r}")
        try:
            checks.alpha_value(layer.get("alpha_t"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {METADATA_KEY}, {name}: {error}") from None
    return layers


def split(file: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return ``name -> (A, B)`` and the other tensors."""
    branches, other = {}, {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{file}: {key} is no PEFT name, expected it to start with {PREFIX}")
        if key.endswith((LORA_A, LORA_B)):
            name = key.removeprefix(PREFIX).removesuffix(LORA_A).removesuffix(LORA_B)
            pair = tuple(tensors.get(PREFIX + name + suffix) for suffix in (LORA_A, LORA_B))
            for suffix, half in zip((LORA_A, LORA_B), pair, strict=True):
                if half is None:
                    raise ValueError(f"{file}: {PREFIX}{name}{suffix} is missing")
                if half.dim() != 2 or half.dtype not in checks.FLOATING:
                    raise ValueError(f"{file}: {PREFIX}{name}{suffix} is no floating-point matrix")
            branches[name] = pair
        else:
            other[key] = tensor
    if not branches:
        raise ValueError(f"{file}: holds no LoRA tensors (names ending in {LORA_A})")
    return branches, other


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint: what :func:`read_config` and :func:`read_weights` read."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", METADATA_KEY: json.dumps(state, sort_keys=True)}
    with _replacing(folder / WEIGHTS_FILE) as temporary:
        load_safetensors().torch.save_file(tensors, temporary, metadata=metadata)
    with _replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / AFA_CONFIG_FILE).unlink(missing_ok=True)  # it described the adapter that was here


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary file that takes the place of ``file`` once it is complete and on disk."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def load_safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("checkpoints need the package safetensors: pip install safetensors") from error
    return safetensors
