"""The plugin that vLLM loads in each of its processes (entry point group ``vllm.general_plugins``).

vLLM computes a LoRA as two products: *shrink*, ``z = x @ A.T`` in float32, and *expand*, ``y += z @ (scaling * B).T``.
Between them, where sharded layers have exchanged z, is the place of the activation. The plugin puts it there, and reads
alpha_t and the activation of an adapter from the files that this package reads.

It fails closed. Stock vLLM refuses the configuration of an adapter at ``alpha_t > 0``, so an engine without the plugin
does not serve another function; an engine with it refuses what it cannot serve.
"""

import functools
import logging

from afa_kernels.vllm.annealed import Slots, branch_in

# From and below: the versions that the tests run.
SUPPORTED = "0.31", "0.33"
_log = logging.getLogger("vllm.afa_kernels")  # below vLLM's own logger, which shows it


def register() -> None:
    """Let this process serve adapters at ``alpha_t > 0``. A second call does nothing.

    Where vLLM's version is not one that it knows, or vLLM lacks what it patches, it changes nothing and says so.
    """
    try:
        from packaging.version import Version
        from vllm import __version__
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.model_manager import LoRAModelManager
        from vllm.lora.peft_helper import PEFTHelper

        lowest, below = map(Version, SUPPORTED)
        if not lowest <= Version(Version(__version__).base_version) < below:
            raise ImportError(f"it knows vLLM from {lowest} and below {below}, and this is {__version__}")
        wanted = {
            PEFTHelper: {"from_local_dir": _from_local_dir},
            LoRAModel: {"from_local_checkpoint": _from_local_checkpoint},
            LoRAModelManager: {
                "__init__": _init_manager,
                "_add_adapter": _add_adapter,
                "activate_adapter": _activate_adapter,
            },
        }
        stock = {owner: {name: owner.__dict__[name] for name in patches} for owner, patches in wanted.items()}
    except (ImportError, KeyError) as error:
        _log.warning("afa_kernels: adapters at alpha_t > 0 are refused: %s", error)
        return
    for owner, patches in wanted.items():
        for name, patch in patches.items():
            _replace(owner, name, stock[owner][name], patch)


def _replace(owner: type, name: str, stock, patch) -> None:
    is_classmethod = isinstance(stock, classmethod)
    function = stock.__func__ if is_classmethod else stock
    if getattr(function, "_of_afa_kernels", False):
        return

    @functools.wraps(function)
    def patched(self, *args, **kwargs):
        return patch(function, self, *args, **kwargs)

    patched._of_afa_kernels = True
    setattr(owner, name, classmethod(patched) if is_classmethod else patched)


def _from_local_dir(stock, cls, lora_path, *args, **kwargs):
    helper = stock(cls, lora_path, *args, **kwargs)
    found = branch_in(lora_path)
    helper.afa_branch = None
    if found is not None:
        helper.afa_branch, helper.bias = found
    return helper


def _from_local_checkpoint(stock, cls, *args, peft_helper, **kwargs):
    lora = stock(cls, *args, peft_helper=peft_helper, **kwargs)
    lora.afa_branch = _branch_of(peft_helper)
    return lora


def _init_manager(stock, manager, *args, **kwargs) -> None:
    stock(manager, *args, **kwargs)
    manager.afa_slots = Slots(manager.lora_slots, manager.device)
    for wrapper in manager.punica_wrapper_mapping.values():
        wrapper.add_expand = _annealed(wrapper, manager.afa_slots)


def _annealed(wrapper, slots: Slots):
    """Return ``add_expand`` of ``wrapper`` with the activation before it."""
    stock = wrapper.add_expand

    def add_expand(y, x, *args, **kwargs):
        """``x``: for each product that a layer packs, z of shape ``(tokens, r)``: a tuple, or one tensor."""
        rows = wrapper._token_lora_indices[: x[0].shape[0]]
        z = tuple(slots.apply(part, rows) for part in x) if isinstance(x, tuple) else slots.apply(x, rows)
        return stock(y, z, *args, **kwargs)

    return add_expand


def _add_adapter(stock, manager, lora) -> None:
    stock(manager, lora)
    if _branch_of(lora) is None:
        return
    reason = _why_not_served(manager, lora)
    if reason is not None:
        manager._registered_adapters.pop(lora.id, None)
        raise ValueError(
            f"afa_kernels: the adapter at alpha_t = {lora.afa_branch.alpha_t:g} cannot be served: {reason}"
        )


def _activate_adapter(stock, manager, lora_id, *args, **kwargs) -> bool:
    activated = stock(manager, lora_id, *args, **kwargs)
    if activated:
        branch = _branch_of(manager._registered_adapters[lora_id])
        manager.afa_slots.write(manager.lora_index_to_id.index(lora_id), branch)
    return activated


def _branch_of(loaded):
    return getattr(loaded, "afa_branch", None)  # vLLM makes adapters of its own, to warm up


def _why_not_served(manager, lora) -> str | None:
    """Return why vLLM would compute another function of an adapter with an activation, or None."""
    from vllm.lora.layers import FusedMoEWithLoRA, RowParallelLinearWithLoRA, RowParallelLinearWithShardedLoRA
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    for name, module in manager.modules.items():
        if manager._get_lora_layer_weights(lora, name) is None:
            continue
        if isinstance(module, FusedMoEWithLoRA):
            return f"{name} is a fused mixture of experts, whose kernels leave no place for an activation"
        if not isinstance(module, BaseLinearLayerWithLoRA):
            return f"{name} ({type(module).__name__}) is no linear layer, and only those have an activation"
        is_sharded = isinstance(module, RowParallelLinearWithShardedLoRA)
        if isinstance(module, RowParallelLinearWithLoRA) and not is_sharded and module.tp_size > 1:
            return (
                f"{name} is split along its input, and the activation of a part of a sum is not a part of the "
                "activation; start the engine with fully_sharded_loras=True (--fully-sharded-loras)"
            )
    return None
