"""Where a provider's memory comes from while it is timed.

The C library gives freed memory back to the system as soon as it is large enough, by rules that depend on what was
freed before. Whether a provider's result then costs page faults (2000 for 8 MB; as long as a small layer's whole
forward) depends on its predecessor, so that one code has two speeds.
"""

import ctypes

NAMES = ("keep", "system")
# Of mallopt(3), in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def use(name: str) -> str:
    """Make this process "keep" the memory that it frees, as the caching allocators of GPUs, jemalloc and tcmalloc do,
    or leave that to the "system". Return which of them holds: keeping needs glibc."""
    if name == "keep":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER):
            return "keep"
    return "system"
