"""What the PTX machine tells of a launch beyond its results: bytes by allocation, the synchronizations it needs."""

import numpy as np
import pytest

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with the emulator only (AFA_BUILD_EMULATOR=1)")

from ptx_helpers import PLACES, kernel  # noqa: E402

THREADS = 64


def counted(body: str, *arrays: np.ndarray, seed: int = 0, **options):
    """Run a body of 64 threads; return what was counted and the lines of the text."""
    text = kernel(PLACES + body, parameters=max(len(arrays), 1), shared=4096, threads=THREADS)
    arrays = arrays or (np.arange(1024, dtype=np.uint32),)
    parameters = np.array([a.ctypes.data for a in arrays], dtype=np.uint64).tobytes()
    allocations = [(a.ctypes.data, a.nbytes, True, f"array {i}") for i, a in enumerate(arrays)]
    module = _ptx.Module(text)
    counters = module.launch("k", (1, 1, 1), (THREADS, 1, 1), parameters, 0, allocations, seed, **options)
    return counters, text.splitlines()


def needed(body: str) -> list[str]:
    """Return the synchronizations that a body needs, by the comment behind each; the same in every schedule."""
    found = set()
    for seed in range(6):
        counters, lines = counted(body, seed=seed, explain=True)
        found.add(tuple(lines[line - 1].partition("//")[2].strip() for line in counters["effective"]))
    assert len(found) == 1
    return list(found.pop())


STORE, LOAD, LOAD_NEXT = "st.shared.b32 [%r1], %r0;", "ld.shared.b32 %r5, [%r2];", "ld.shared.b32 %r5, [%r3];"
OTHER = "st.shared.b32 [%r1], %r9;"
BARRIER = "\nbar.sync 0; // {}\n"
FIRST, SECOND = BARRIER.format("first"), BARRIER.format("second")
COPY = "cp.async.cg.shared.global [%r4], [%rd9], 16;\ncp.async.commit_group; // commit\n"
WAIT, WAIT_AGAIN = "\ncp.async.wait_group 0; // wait\n", "\ncp.async.wait_group 0; // again\n"


@pytest.mark.parametrize(
    "body, expected",
    [
        (STORE + FIRST + LOAD, ["first"]),
        (STORE + FIRST + LOAD_NEXT, ["first"]),  # lanes of one warp need it as well
        (STORE + FIRST + SECOND + LOAD, []),  # either would do
        (STORE + FIRST + "ld.shared.b32 %r5, [%r1];", []),  # a thread's own word
        (STORE + FIRST + LOAD + SECOND + OTHER, ["first", "second"]),  # what was read is overwritten
        (STORE + FIRST + LOAD + SECOND + "ld.shared.b32 %r6, [%r2];", ["first"]),
        ("mov.b32 %r5, 7; st.shared.b32 [tile], %r5;" + FIRST + "st.shared.b32 [tile], %r5;", []),  # equal values
        (FIRST, []),
        (COPY + WAIT + FIRST + LOAD, ["commit", "wait", "first"]),
        (COPY + WAIT + WAIT_AGAIN + FIRST + LOAD, ["commit", "first"]),  # either would do
        (COPY + WAIT + FIRST + LOAD + WAIT_AGAIN, ["commit", "wait", "first"]),
        ("\ncp.async.commit_group; // empty\n" + COPY + WAIT, ["commit", "wait"]),
    ],
)
def test_the_synchronizations_that_are_needed(body, expected):
    assert needed(body) == expected


@pytest.mark.parametrize(
    "body", [STORE + FIRST + LOAD, STORE + FIRST + LOAD + SECOND + OTHER, COPY + WAIT + FIRST + LOAD]
)
def test_without_what_is_needed_the_machine_reports_a_fault(body):
    for mark in needed(body):
        gone = "\n".join(line for line in body.splitlines() if not line.endswith(f"// {mark}"))
        for seed in range(6):
            with pytest.raises(_ptx.ExecutionError):
                counted(gone, seed=seed)


def test_bytes_by_allocation_count_once_per_warp():
    x, y = np.zeros(1024, dtype=np.uint32), np.zeros(64, dtype=np.uint32)
    body = """
        ld.global.b32 %r10, [%rd0];            // one word, by two warps
        ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%rd9];
        mad.wide.u32 %rd10, %r0, 4, %rd1;
        st.global.b32 [%rd10], %r10;
    """
    counters, _ = counted(body, x, y)
    assert counters["traffic"] == {"array 0": (2 * 4 + 64 * 16, 0), "array 1": (0, 64 * 4)}
    assert counters["global_loads"] == {1: 0, 2: 0, 4: 64, 8: 0, 16: 64}
    assert counters["read_sectors"] == 2 + 64 * 16 // 32 + (x.ctypes.data % 32 != 0) * 2
    assert counters["written_sectors"] == 64 * 4 // 32 + (y.ctypes.data % 32 != 0) * 2


def test_bytes_of_asynchronous_copies_are_those_that_are_read():
    body = "setp.lt.u32 %p1, %r0, 5; selp.b32 %r5, 16, 6, %p1; cp.async.cg.shared.global [%r4], [%rd9], 16, %r5;"
    counters, _ = counted(body + "cp.async.commit_group; cp.async.wait_group 0;")
    assert counters["traffic"] == {"array 0": (5 * 16 + 59 * 6, 0)}


def test_a_line_that_leaves_copies_unfilled_shows_who_reads_the_zeros():
    x = np.full(1024, 7, dtype=np.uint32)
    body = "mov.b32 %r5, 8;\ncp.async.cg.shared.global [%r4], [%rd9], 16, %r5;\ncp.async.commit_group;\n" + (
        "cp.async.wait_group 0; ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4]; st.global.b32 [%rd9], %r12;"
    )
    _, lines = counted(body, x)
    assert (x[:256:4] == 0).all()
    line = next(number for number, text in enumerate(lines, 1) if "cp.async.cg" in text)
    counted(body, x, unfilled_line=line)
    assert (x[:256:4] == 0x3F3F3F3F).all()
