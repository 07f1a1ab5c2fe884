"""Limits of GPUs, of programming guides and data sheets: the one place in Python for these numbers."""

from typing import NamedTuple

REGISTERS = 65536  # of a multiprocessor
RESIDENT_BLOCKS = 32  # on a multiprocessor
SCHEDULERS = 4  # of a multiprocessor, each of which issues at most one instruction per cycle
RESERVED_SHARED = 1024  # bytes that a resident block takes beside its own


class Card(NamedTuple):
    name: str
    multiprocessors: int
    shared_per_block: int  # bytes
    shared_per_multiprocessor: int
    resident_threads: int  # on a multiprocessor
    clock: float  # Hz, with boost

    @property
    def planned_for(self) -> tuple[int, int, int]:
        """What launch_plan asks of a device."""
        return self.multiprocessors, self.shared_per_block, self.shared_per_multiprocessor

    def blocks_per_multiprocessor(self, threads: int, registers: int, shared: int) -> int:
        """Return how many blocks are resident, of so many threads, registers per thread and bytes of shared memory."""
        allocated = max(8, -(-registers // 8) * 8)  # eight at a time
        return min(
            REGISTERS // (allocated * threads),
            self.shared_per_multiprocessor // (shared + RESERVED_SHARED),
            self.resident_threads // threads,
            RESIDENT_BLOCKS,
        )


CARDS = {
    "sm_80": Card("A100", 108, 163 << 10, 164 << 10, 2048, 1.410e9),
    "sm_90": Card("H100", 132, 227 << 10, 228 << 10, 2048, 1.755e9),
    "sm_100": Card("B200", 148, 227 << 10, 228 << 10, 2048, 1.850e9),
    "sm_120": Card("RTX 5090", 170, 99 << 10, 100 << 10, 1536, 2.407e9),
    "gfx942": Card("MI300X", 304, 64 << 10, 64 << 10, 2048, 2.100e9),
}
