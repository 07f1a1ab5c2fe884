"""A Triton kernel of loads that wait for each other: each lane follows a permutation through memory."""

import torch
import triton
import triton.language as tl

_LANES = 32  # of one warp
_WARPS = 8  # on a multiprocessor: enough to keep the memory busy, too few to fill its queues


@triton.jit
def _chase_kernel(chain_ptr, end_ptr, steps, LANES: tl.constexpr):
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    place = lanes
    for _ in range(steps):
        place = tl.load(chain_ptr + place)
    tl.store(end_ptr + lanes, place)


def chase(chain: torch.Tensor, steps: int, multiprocessors: int) -> torch.Tensor:
    """Return where each lane is after ``steps`` loads from ``chain``, a permutation in int32."""
    programs = _WARPS * multiprocessors
    end = torch.empty(programs * _LANES, dtype=torch.int32, device=chain.device)
    _chase_kernel[(programs,)](chain, end, steps, LANES=_LANES, num_warps=1)
    return end
