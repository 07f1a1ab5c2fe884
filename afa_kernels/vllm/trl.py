"""TRL's GRPOTrainer, where vLLM generates from the adapter as it is.

TRL merges the adapter into the weights that it sends to vLLM, which is possible at ``alpha_t = 0`` only. Here the base
model stays as vLLM has loaded it, and each optimizer step gives the engine the next version of the adapter.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
import trl
from accelerate.utils import broadcast_object_list
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

from afa_kernels.callbacks.trainer import SERVES_ADAPTERS
from afa_kernels.vllm.rollout import Rollout, save_rollout

_GAP = "sampling/sampling_logp_difference/mean"  # as TRL logs it
_COMPUTES_IN = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The ranks that vLLM makes room for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class GRPOTrainer(trl.GRPOTrainer):
    """:class:`trl.GRPOTrainer`, where ``use_vllm=True`` generates from a PEFT model's adapter at any alpha_t.

    With ``vllm_mode="server"`` start the server so that it takes adapters, and sees ``rollout_dir`` under the same
    path: ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-lora --max-lora-rank R
    --logprobs-mode processed_logprobs``.

    TRL logs how far the log-probabilities of the sampled tokens lie apart between vLLM and the model that trains:
    ``sampling/sampling_logp_difference/mean`` and ``/max``.

    Args:
        model, args, **others: as in :class:`trl.GRPOTrainer`. ``model`` is a PEFT model, or ``peft_config`` makes one.
        rollout_dir: folder of the versions of the adapter, of which two are kept; by default ``rollouts`` in
            ``args.output_dir``.
        max_logprob_gap: the mean of that difference, in nats, above which training stops: vLLM then generates from
            another policy than the one that trains. What rounding alone makes is far below (docs/vllm.md).

    Raises:
        ValueError: the arguments ask for something that an engine with adapters does not do.
        RuntimeError: (when it trains) the difference is above the bound, or the server does not take the adapter.
    """

    def __init__(self, model, *positional, rollout_dir=None, max_logprob_gap: float = 0.1, **others):
        construct = functools.partial(super().__init__, model, *positional, **others)
        args = others.get("args") or (positional[1] if len(positional) > 1 else None)
        self._max_logprob_gap = max_logprob_gap
        if not getattr(args, "use_vllm", False):
            construct()
            return
        if args.vllm_enable_sleep_mode:
            raise ValueError(
                "vllm_enable_sleep_mode: TRL puts vLLM to sleep without its weights and sends them again, and here "
                "the base model is loaded once; expected False"
            )
        if not args.vllm_importance_sampling_correction:
            raise ValueError(
                "vllm_importance_sampling_correction: expected True, because it measures how far vLLM and the model "
                "lie apart, on which max_logprob_gap is checked"
            )
        setattr(args, SERVES_ADAPTERS, True)
        folder = os.path.join(args.output_dir, "rollouts") if rollout_dir is None else os.fspath(rollout_dir)
        with _replaced(grpo_trainer, "VLLMGeneration", functools.partial(AdapterGeneration, rollout_dir=folder)):
            construct()

    def _generate_and_score_completions(self, inputs) -> dict[str, Any]:
        scored = super()._generate_and_score_completions(inputs)
        gaps = self._metrics["train" if self.model.training else "eval"][_GAP]
        if gaps and not gaps[-1] <= self._max_logprob_gap:
            raise RuntimeError(
                f"max_logprob_gap: in step {self.state.global_step} vLLM's log-probabilities are {gaps[-1]:.4g} nats "
                f"from the model's in the mean, more than {self._max_logprob_gap:g}: it generates from another policy. "
                "Either its adapter is not the one that trains (is the plugin of afa_kernels loaded there?), or its "
                "kernels and dtypes differ more than this bound allows"
            )
        return scored


class AdapterGeneration(vllm_generation.VLLMGeneration):
    """TRL's generation with vLLM, which hands over adapters in the place of weights."""

    def __init__(self, *args: Any, rollout_dir: str, **kwargs: Any):
        self._rollout_dir = rollout_dir
        self._served: Rollout | None = None
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        config = getattr(model, "peft_config", None)
        if not config:
            raise ValueError(
                "model: expected a PEFT model or peft_config=AFALoraConfig(...); without an adapter use trl.GRPOTrainer"
            )
        largest = max(max([c.r, *c.rank_pattern.values()]) for c in config.values())
        room = next((rank for rank in _RANKS if rank >= largest), None)
        if room is None:
            raise ValueError(f"r: vLLM serves adapters up to rank {_RANKS[-1]}, got {largest}")
        engine = functools.partial(
            vllm_generation.LLM,
            # As the trainer computes; vLLM would take 16 bits where the files of a model have 32.
            dtype=_COMPUTES_IN.get(self.accelerator.mixed_precision, model.dtype),
            enable_lora=True,
            max_loras=1,
            max_lora_rank=room,
            fully_sharded_loras=self.tensor_parallel_size > 1,
        )
        # A server takes adapters as files: there are no weights to send to it.
        client = vllm_generation.VLLMClient
        with (
            _replaced(vllm_generation, "LLM", engine),
            _replaced(client, "init_communicator", lambda *_args, **_kwargs: None),
        ):
            super()._init_vllm()

    def sync_weights(self) -> None:
        """Give the engine the adapter as it stands now."""
        rollouts = [None]
        if self.accelerator.is_main_process:
            rollouts = [save_rollout(self.accelerator.unwrap_model(self.model), self._rollout_dir)]
        broadcast_object_list(rollouts, from_process=0)
        (rollout,) = rollouts
        if self.mode == "colocate":
            engine = self.llm
            engine.generate = functools.partial(type(engine).generate, engine, lora_request=rollout.request())
        elif self.accelerator.is_main_process:
            self._post("load", rollout, lora_path=str(rollout.path))
            self.vllm_client.model = rollout.name
            if self._served is not None:
                self._post("unload", self._served)
        self._served = rollout

    def _post(self, what: str, rollout: Rollout, **body: str) -> None:
        client = self.vllm_client
        url = f"{client.base_url}/v1/{what}_lora_adapter"
        response = client.session.post(url, json={"lora_name": rollout.name, **body})
        if not response.ok:
            raise RuntimeError(f"{url}: {response.status_code}: {response.text}; see afa_kernels.vllm.trl.GRPOTrainer")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``owner`` have another attribute while TRL, which has no argument for it, reads it."""
    stock = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)
