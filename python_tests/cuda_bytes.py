"""The bytes that a call of the CUDA kernels moves, counted by what executes them."""

from collections.abc import Callable

_BYTES = ("global_read_bytes", "global_write_bytes", "async_copy_bytes")


def moved(name: str, call: Callable[[str], object]) -> int:
    """Return the bytes between global memory and the blocks in a call of a backend."""
    if name == "cuda_ptx":
        from afa_kernels import _cuda_on_ptx

        _cuda_on_ptx.take_launches()
        call(name)
        launches = _cuda_on_ptx.take_launches()
    else:
        from afa_kernels import _emulator

        _emulator.reset_counters()
        call(name)
        launches = [_emulator.counters()]
    return sum(launch[counter] for launch in launches for counter in _BYTES)
