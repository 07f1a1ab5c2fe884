"""Rollouts from vLLM of adapters at ``alpha_t > 0``, which no merged weight equals.

vLLM finds :func:`afa_kernels.vllm.plugin.register` by itself, as an entry point; :func:`save_rollout` writes what it
then serves; :mod:`afa_kernels.vllm.trl` has TRL's GRPO trainer on top of both.
"""

from afa_kernels.vllm.rollout import Rollout, save_rollout

__all__ = ["Rollout", "save_rollout"]
