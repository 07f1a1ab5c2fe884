"""The plugin for axolotl: ``plugins: [afa_kernels.axolotl.AFAPlugin]`` in a configuration with ``adapter: lora`` or
``adapter: qlora``.

axolotl imports this module, and this module imports axolotl; nothing else of the package does.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig, add_activation
from afa_kernels.peft.config import own_fields

# axolotl's own kernels for LoRA compute the branch where its layers would be called. It switches them on by itself,
# except where they are off in the configuration.
_FUSED_LORA = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_REFUSED = {
    **dict.fromkeys(_FUSED_LORA, "the fused kernel computes a LoRA without an activation"),
    **dict.fromkeys(("use_scattermoe", "use_sonicmoe"), "it computes the adapters of experts without an activation"),
    "relora": "the branch is merged during the training, which is possible at alpha_t = 0 only",
}


class AFAArgs(BaseModel):
    """What the plugin adds to axolotl's configuration: the block ``afa``, with those fields of
    :class:`afa_kernels.peft.AFALoraConfig` that PEFT's ``LoraConfig`` has not."""

    afa: dict[str, Any] = {}


class AFAPlugin(BasePlugin):
    """Gives axolotl's LoRA adapters an activation, and anneals it over the training."""

    def get_input_args(self) -> str:
        return f"{__name__}.{AFAArgs.__name__}"

    def register(self, cfg) -> None:
        """Check the configuration, before the model is loaded, and switch axolotl's kernels for LoRA off.

        Raises:
            TypeError, ValueError: a key does not fit the plugin.
        """
        if cfg.get("adapter") not in ("lora", "qlora"):
            raise ValueError(f"adapter: AFAPlugin expects 'lora' or 'qlora', got {cfg.get('adapter')!r}")
        for key, reason in _REFUSED.items():
            if cfg.get(key):
                raise ValueError(f"{key}: not possible with AFAPlugin: {reason}")
        options = cfg.get("afa") or {}
        unknown = sorted(set(options) - own_fields())
        if unknown:
            raise ValueError(f"afa: expected keys among {', '.join(sorted(own_fields()))}, got {', '.join(unknown)}")
        AFALoraConfig(**options)
        for key in _FUSED_LORA:
            cfg[key] = False

    def post_lora_load(self, cfg, model) -> None:
        # An adapter that is loaded for inference or to be merged stays what it is.
        if not model.peft_config[model.active_adapter].inference_mode:
            add_activation(model, **(cfg.afa or {}))

    def post_trainer_create(self, cfg, trainer) -> None:
        AnnealCallback().attach(trainer)  # before the callbacks of trackers, which then see alpha_t
