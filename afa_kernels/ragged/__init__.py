"""Ragged calls: rows of x sorted by group, each group with its own A and B, weight, rank, alpha_t and scaling."""

from afa_kernels.ragged.functional import afa_linear_grouped, afa_lora_grouped

__all__ = ["afa_linear_grouped", "afa_lora_grouped"]
