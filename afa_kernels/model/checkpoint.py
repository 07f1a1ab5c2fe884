"""Adapter checkpoints: a stock PEFT LoRA checkpoint that also knows alpha_t and the activation.

``adapter_model.safetensors`` holds the tensors under PEFT's names; what PEFT has no word for
(alpha_t, activation, per layer) is in the metadata of that file, so that a save is one atomic
replacement and the two can never disagree. ``adapter_config.json`` is PEFT's and loads silently at
``alpha_t == 0``. Saved before that, it says so in the key ``afa_lora`` too, and stock PEFT, which would
compute another function, refuses it.
"""

import math
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afa_kernels.experts import ExpertBranch
from afa_kernels.experts.parameters import Target, as_matrices, find_parameters, from_matrices, names_in_peft, weight_of
from afa_kernels.experts.stack import check_whole
from afa_kernels.layers.branch import Branch, BranchOptions
from afa_kernels.layers.linear import AFALinear, why_unsupported
from afa_kernels.layers.quantized import weight_like
from afa_kernels.layers.stack import AdapterStack, AFALinearStack, adapters_in, check_name
from afa_kernels.model import peft_format as fmt
from afa_kernels.model.adapted import marked_modules, named_layers, named_stacks, named_trainable_modules
from afa_kernels.model.inject import add_to_experts, replace
from afa_kernels.model.targets import Candidate, check_no_peft, find_targets


def save_adapter(model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None) -> None:
    """Write the adapter of ``model``, or the one of that name in its stacks, to the folder ``path``: PEFT's LoRA
    checkpoint and alpha_t.

    Modules that train in full (``inject(..., trainable=)``) are saved as PEFT's
    ``modules_to_save``. Each file is written beside its place and moved there, so an interrupted
    save leaves the file that was there before. Sharded parameters (DTensors of FSDP2 or tensor
    parallelism) are gathered: every process has to call this then, and the first one writes. If it
    cannot, the others raise too.

    Warns:
        UserWarning: ``alpha_t`` is not 0, so stock PEFT, which would compute another function, refuses this
            checkpoint; the message adds where nothing has annealed it yet.

    Raises:
        ValueError: the model has no AFA layer, or something trains that such a checkpoint cannot
            hold.
        OSError: the folder or a file cannot be written.
        RuntimeError: parameters are sharded, and process 0 could not write the files; the message says why.
    """
    _check_adapter(model, adapter)
    layers = dict(named_layers(model, adapter))
    if not layers:
        known = adapters_in([stack for _, stack in named_stacks(model)])
        if known:
            raise ValueError(f"adapter: the model has no adapter {adapter!r}; it has {', '.join(known)}")
        raise ValueError(f"model: expected AFA layers, found none in {type(model).__name__}")
    if any(name == "" or (isinstance(layer, ExpertBranch) and "." not in name) for name, layer in layers.items()):
        raise ValueError(
            f"model: expected a model that contains AFA layers, got an {type(model).__name__}, which has no name"
        )
    trained = dict(named_trainable_modules(model))
    of_experts = [name for name, layer in layers.items() if isinstance(layer, ExpertBranch)]
    in_peft = names_in_peft(model, of_experts)
    tensors, sharded = {}, False
    for name, layer in layers.items():
        sharded = sharded or _is_sharded(layer.lora_a) or _is_sharded(layer.lora_b)
        pair = _whole(layer.lora_a), _whole(layer.lora_b)
        a, b = as_matrices(*pair) if name in in_peft else pair
        prefix = fmt.PREFIX + in_peft.get(name, name)
        tensors |= {prefix + fmt.LORA_A: a, prefix + fmt.LORA_B: b}
    for name, module in trained.items():
        for key, value in _tensors_of(module).items():
            sharded = sharded or _is_sharded(value)
            tensors[f"{fmt.PREFIX}{name}.{key}"] = _whole(value)
    tensors = {key: t.to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    if not sharded:
        _write(model, path, layers, list(trained), tensors)
        return
    failure: list[str | None] = [None]
    try:
        if torch.distributed.get_rank() == 0:
            _write(model, path, layers, list(trained), tensors)
    except BaseException as error:
        failure = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        torch.distributed.broadcast_object_list(failure)  # the others wait here until the files are written
    if failure[0] is not None:
        raise RuntimeError(f"{path}: process 0 could not save the adapter: {failure[0]}")


def _write(
    model: nn.Module,
    path: str | os.PathLike[str],
    layers: dict[str, Branch],
    trained: list[str],
    tensors: dict[str, Tensor],
) -> None:
    """Write the checkpoint of :func:`save_adapter`, whose warning it gives."""
    state = {
        "format_version": fmt.FORMAT_VERSION,
        "layers": {n: {"alpha_t": m.alpha_t, "activation": m.activation} for n, m in layers.items()},
    }
    config = fmt.peft_config(model, layers, trained)
    largest = max(layer.alpha_t for layer in layers.values())
    if largest != 0.0:
        fresh = all(layer.is_fresh for layer in layers.values())
        warnings.warn(
            f"{path}: saved at alpha_t = {largest:g}: the branches are not linear yet, so stock PEFT refuses this "
            "checkpoint; anneal to alpha_t = 0 before shipping it"
            + (". Nothing has annealed it yet: a training takes AnnealSchedule or a callback" if fresh else ""),
            stacklevel=3,
        )
        config = fmt.unfinished(config, state, largest)
    fmt.write(Path(path), config, tensors, state)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], adapter: str | None = None) -> nn.Module:
    """Load a checkpoint of :func:`save_adapter` or of stock PEFT's LoRA into ``model``; return it.

    A model without AFA layers is injected as the checkpoint describes. Layers take their alpha_t
    from the checkpoint; that of an ordinary LoRA is 0. Everything is
    checked before the first write. Sharded parameters take their own part of the file, without
    communication.

    Args:
        adapter: load it as the adapter of this name into the stacks of the model. A new name becomes another adapter
            of the layers that the checkpoint has; a model without AFA layers gets stacks.

    Raises:
        ValueError: a file is missing, truncated or foreign, or it does not fit the model: other
            layers, shapes, ranks, scaling or activation. The message names the file and the key;
            the model is unchanged.
    """
    checkpoint = _Checkpoint(Path(path), model)
    _check_adapter(model, adapter)
    layers, stacks = dict(named_layers(model, adapter)), dict(named_stacks(model))
    if layers:
        checkpoint.check_layers(layers)
    elif stacks:
        checkpoint.check_stacks(stacks)
    else:
        check_no_peft(model)
        checkpoint.check_bases(dict(model.named_modules()), adapter)
        checkpoint.targets(model, ())
    trained = checkpoint.trained_modules(model)
    if not layers:
        if stacks:
            checkpoint.add_to(stacks, adapter)
        else:
            checkpoint.inject(model, list(trained), adapter)
        layers = dict(named_layers(model, adapter))
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = checkpoint.branches[name]
            _assign(layer.lora_a, a)
            _assign(layer.lora_b, b)
            layer.write_alpha_t(checkpoint.alpha_t(name))
        for values in trained.values():
            for parameter, value in values:
                _assign(parameter, value)
    return model


def _check_adapter(model: nn.Module, adapter: str | None) -> None:
    """Raise unless the layers of ``model`` fit a name of an adapter, or none."""
    stacks = [stack for _, stack in named_stacks(model)]
    if adapter is None and stacks:
        raise ValueError(f"adapter: the model has {', '.join(adapters_in(stacks))}; expected the name of one")
    if adapter is not None:
        check_name(adapter)
        if not stacks and any(named_layers(model)):
            raise ValueError(f"adapter: the layers of the model have one adapter, without a name; got {adapter!r}")


class _Checkpoint:
    """The content of a checkpoint, checked in itself, and the checks of a model against it."""

    def __init__(self, folder: Path, model: nn.Module):
        self._config_file = folder / fmt.CONFIG_FILE
        self._weights_file = folder / fmt.WEIGHTS_FILE
        self._config, state_in_config = fmt.read_config(self._config_file)
        tensors, state = fmt.read_weights(self._weights_file)
        self.branches, self._other = fmt.split(self._weights_file, tensors)
        self._experts = self._parameters(model)
        in_config = fmt.checked_layers(self._config_file, state_in_config, self.branches)
        self._state = fmt.checked_layers(self._weights_file, state) or in_config
        for name, (a, _) in self.branches.items():
            r, rank = self._of(name, "rank_pattern", "r"), a.shape[-2]
            if r != rank:
                raise ValueError(f"{self._config_file}: r is {r} for {name}, the tensors have rank {rank}")
        for names, what in (
            (self._state.keys() - self.branches.keys(), "is in the metadata and has no tensors"),
            (self.branches.keys() - self._state.keys(), "is missing in the metadata"),
        ):
            if self._state and names:
                raise self._misfit(fmt.PREFIX + min(names), what)
        for name, layer in self._state.items():
            alpha_t = in_config.get(name, {}).get("alpha_t", 0.0)
            fmt.check_agreement(self._config_file, alpha_t, self._weights_file, [layer["alpha_t"]])

    def _parameters(self, model: nn.Module) -> dict[str, Target]:
        """Return the fused parameters that the configuration targets; their branches get their names and shapes."""
        try:
            targets = find_parameters(model, self._config.get("target_parameters") or ())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._config_file}: {error}") from None
        in_peft = names_in_peft(model, [target.name for target in targets])
        for name, experts, parameter in targets:
            a, b = self.branches.pop(in_peft[name], (None, None))
            if a is None:
                raise self._misfit(fmt.PREFIX + in_peft[name] + fmt.LORA_A, "is missing")
            count = weight_of(experts, parameter).shape[0]
            if a.shape[0] % count or b.shape[1] % count:
                shapes = f"have {a.shape[0]} rows and {b.shape[1]} columns, the model has {count} experts"
                raise self._misfit(fmt.PREFIX + in_peft[name], shapes)
            self.branches[name] = from_matrices(a, b, count)
        return {target.name: target for target in targets}

    def alpha_t(self, name: str) -> float:
        return self._state.get(name, {}).get("alpha_t", 0.0)

    def _of(self, name: str, pattern: str, default: str) -> Any:
        """Return an entry that may differ from layer to layer, matched as PEFT does."""
        for key, value in (self._config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return self._config[default]

    def _arguments(self, name: str) -> dict[str, Any]:
        return {
            "r": self.branches[name][0].shape[-2],
            "lora_alpha": self._of(name, "alpha_pattern", "lora_alpha"),
            "activation": self._state.get(name, {}).get("activation", "silu"),
            "dropout": self._config.get("lora_dropout") or 0.0,
            "use_rslora": bool(self._config.get("use_rslora")),
        }

    def _misfit(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self._weights_file}: {key} {what}")

    def _check_shapes(self, name: str, *weight: int) -> None:
        """Check the shapes of a branch beside a weight of the shape (N, K) or (E, N, K)."""
        *experts, out_features, in_features = weight
        a, b = self.branches[name]
        r = a.shape[-2]
        for suffix, tensor, wanted in (
            (fmt.LORA_A, a, (*experts, r, in_features)),
            (fmt.LORA_B, b, (*experts, out_features, r)),
        ):
            if tuple(tensor.shape) != wanted:
                shapes = f"has shape {tuple(tensor.shape)}, the model needs {wanted}"
                raise self._misfit(fmt.PREFIX + name + suffix, shapes)

    def check_layers(self, layers: dict[str, Branch]) -> None:
        """Check an injected model."""
        for names, what in (
            (layers.keys() - self.branches.keys(), "is missing, the model has that layer"),
            (self.branches.keys() - layers.keys(), "belongs to no AFA layer of the model"),
        ):
            if names:
                raise self._misfit(fmt.PREFIX + min(names) + fmt.LORA_A, what)
        for name, layer in layers.items():
            if layer.merged:
                raise ValueError(f"model: {name} is merged; unmerge(model) before loading")
            self._check_shapes(name, *layer.lora_b.shape[:-1], layer.in_features)
            arguments = self._arguments(name)
            if not self._state:
                arguments["activation"] = layer.activation  # PEFT knows none
            arguments["scaling"] = self._options(name).scaling
            for argument in ("r", "scaling", "activation"):
                saved, own = arguments[argument], getattr(layer, argument)
                same = math.isclose(saved, own) if argument == "scaling" else saved == own
                if not same:
                    what = f"was saved with {argument}={saved!r}, the model's layer has {own!r}"
                    raise self._misfit(fmt.PREFIX + name, what)

    def check_stacks(self, stacks: dict[str, AdapterStack]) -> None:
        """Check the stacks that are to get an adapter."""
        missing = self.branches.keys() - stacks.keys()
        if missing:
            raise self._cannot_be_loaded(min(missing), "no such layer in the model has a stack")
        self.check_bases({name: getattr(stack, "base_layer", None) for name, stack in stacks.items()}, None)

    def check_bases(self, modules: dict[str, nn.Module], adapter: str | None) -> None:
        """Check the modules, by their names in the model, that are to get an adapter."""
        for name in self.branches:
            if name in self._experts:
                _, experts, parameter = self._experts[name]
                if adapter is not None:
                    check_whole(experts)
                self._check_shapes(name, *weight_of(experts, parameter).shape)
            else:
                module = modules.get(name)
                reason = "no such layer in the model" if module is None else why_unsupported(module)
                if reason is not None:
                    raise self._cannot_be_loaded(name, reason)
                self._check_shapes(name, *weight_like(module).shape)
            self._options(name)

    def _cannot_be_loaded(self, name: str, reason: str) -> ValueError:
        return self._misfit(fmt.PREFIX + name + fmt.LORA_A, f"cannot be loaded: {reason}")

    def _options(self, name: str) -> BranchOptions:
        try:
            return BranchOptions(**self._arguments(name))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._config_file}: {name}: {error}") from None

    def targets(self, model: nn.Module, trained: Iterable[str]) -> list[Candidate]:
        names = "|".join(re.escape(name) for name in self.branches.keys() - self._experts.keys())
        if not names:
            return []
        try:
            return find_targets(model, names, (), list(trained))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._config_file}: {error}") from None

    def inject(self, model: nn.Module, trained: Iterable[str], adapter: str | None) -> None:
        def make(name: str, module: nn.Module) -> nn.Module:
            arguments = self._arguments(name)
            return AFALinear(module, **arguments) if adapter is None else AFALinearStack(module, {adapter: arguments})

        replace(model, self.targets(model, trained), list(trained), make)
        for name, target in self._experts.items():
            arguments = self._arguments(name)
            add_to_experts(model, target, {adapter: arguments} if adapter else arguments, stack=adapter is not None)

    def add_to(self, stacks: dict[str, AdapterStack], adapter: str) -> None:
        for name in self.branches:
            stacks[name].add_adapter(adapter, **self._arguments(name))

    def trained_modules(self, model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Return the modules saved in full: name -> pairs (tensor of the model, its new value)."""
        wanted = tuple(self._config.get("modules_to_save") or ())
        modules = dict(model.named_modules())
        names = [n for n in modules if any(n == w or n.endswith(f".{w}") for w in wanted)]
        names = [n for n in names if not _is_inside(n, names)]
        for name in marked_modules(model):
            if name not in names and not _is_inside(name, names):
                what = f"modules_to_save lacks {name}, which the model trains in full"
                raise ValueError(f"{self._config_file}: {what}")
        for name in self.branches:
            if _is_inside(name, names):
                raise ValueError(f"{self._config_file}: {name} is inside one of modules_to_save")
        rest = dict(self._other)
        found = {}
        for name in names:
            found[name] = []
            for key, own in _tensors_of(modules[name]).items():
                full = f"{fmt.PREFIX}{name}.{key}"
                value = rest.pop(full, None)
                if value is None:
                    raise self._misfit(full, "is missing")
                if value.shape != own.shape:
                    shapes = f"has shape {tuple(value.shape)}, the model needs {tuple(own.shape)}"
                    raise self._misfit(full, shapes)
                found[name].append((own, value))
        if rest:
            raise self._misfit(min(rest), "belongs to nothing in the model or its configuration")
        return found


def _is_sharded(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")  # a DTensor, without importing torch.distributed.tensor


def _whole(t: Tensor) -> Tensor:
    t = t.detach()
    return t.full_tensor() if _is_sharded(t) else t


def _assign(parameter: Tensor, value: Tensor) -> None:
    if _is_sharded(parameter):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh
        value = value.to(parameter.device, parameter.dtype)
        whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = whole.redistribute(placements=parameter.placements)
    parameter.copy_(value)


def _is_inside(name: str, others: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
