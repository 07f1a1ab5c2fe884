"""What the PTX machine tells of a launch beyond its results: bytes by allocation, the synchronizations it needs."""

import re

import numpy as np
import pytest

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with AFA_BUILD_PTX_MACHINE=1 only")

from ptx_helpers import PLACES, changed, comments, kernel, one_less  # noqa: E402

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


def needed(body: str, which: str = "effective") -> list[str]:
    """Return the synchronizations that a body needs, by the comment behind each; the same in every schedule."""
    found = set()
    for seed in range(6):
        counters, lines = counted(body, seed=seed, explain=True)
        found.add(tuple(comments(lines, counters[which])))
    assert len(found) == 1
    return list(found.pop())


STORE, LOAD, LOAD_NEXT = "st.shared.b32 [%r1], %r0;", "ld.shared.b32 %r5, [%r2];", "ld.shared.b32 %r5, [%r3];"
OTHER = "st.shared.b32 [%r1], %r9;"
BARRIER = "\nbar.sync 0; // {}\n"
FIRST, SECOND = BARRIER.format("first"), BARRIER.format("second")
COMMIT = "\ncp.async.commit_group; // {}\n"
COPY = "cp.async.cg.shared.global [%r4], [%rd9], 16;" + COMMIT.format("commit")
NEXT = "cp.async.cg.shared.global [%r4+2048], [%rd9], 16;" + COMMIT.format("next")
EMPTY = COMMIT.format("empty")
WAIT, WAIT_BUT_ONE = "\ncp.async.wait_group 0; // wait\n", "\ncp.async.wait_group 1; // wait\n"
AGAIN = "\ncp.async.wait_group 0; // again\n"
READ, OTHER_PLACE = "ld.shared.b32 %r5, [%r4];", "add.u32 %r4, %r4, 1024;"
LOOP = "mov.b32 %r6, 0;\nloop: {} add.u32 %r6, %r6, 1; setp.lt.u32 %p1, %r6, 3;\n@%p1 bra loop;\n"

NEEDED = [  # a body, what it needs, and those of its waits that could not wait for one group less
    (STORE + FIRST + LOAD, ["first"], []),
    (STORE + FIRST + LOAD_NEXT, ["first"], []),  # lanes of one warp need it as well
    (STORE + FIRST + SECOND + LOAD, [], []),  # either would do
    (STORE + FIRST + "ld.shared.b32 %r5, [%r1];", [], []),  # a thread's own word
    (STORE + FIRST + LOAD + SECOND + OTHER, ["first", "second"], []),  # what was read is overwritten
    (STORE + FIRST + LOAD + SECOND + "ld.shared.b32 %r6, [%r2];", ["first"], []),
    ("mov.b32 %r5, 7; st.shared.b32 [tile], %r5;" + FIRST + "st.shared.b32 [tile], %r5;", [], []),  # equal values
    (FIRST, [], []),
    (COPY + WAIT + FIRST + LOAD, ["commit", "wait", "first"], ["wait"]),
    (COPY + WAIT + AGAIN + FIRST + LOAD, ["commit", "first"], []),  # either would do
    (COPY + WAIT + FIRST + LOAD + AGAIN, ["commit", "wait", "first"], ["wait"]),
    (EMPTY + COPY + WAIT, ["commit", "wait"], ["wait"]),
    (COPY + EMPTY + WAIT, ["wait"], []),  # the group may join the empty one, or all but that one be waited for
    (COPY + EMPTY + WAIT_BUT_ONE + READ + AGAIN, ["commit", "empty", "wait"], ["wait"]),  # the empty one counts
    (COPY + NEXT + WAIT, ["next", "wait"], ["wait"]),  # both groups in one
    (COPY + NEXT + WAIT_BUT_ONE + READ + AGAIN, ["commit", "next", "wait", "again"], ["wait", "again"]),
    (COPY + NEXT + WAIT_BUT_ONE + AGAIN + READ, ["next", "again"], ["again"]),
    (LOOP.format(COPY + WAIT), ["commit", "wait"], ["wait"]),  # the place is filled again
    (LOOP.format(OTHER_PLACE + COPY + WAIT_BUT_ONE) + AGAIN, ["commit", "again"], ["again"]),
]  # fmt: skip


@pytest.mark.parametrize("body, expected, exact", NEEDED)
def test_the_synchronizations_that_are_needed(body, expected, exact):
    assert needed(body) == expected
    assert needed(body, "exact_waits") == exact


@pytest.mark.parametrize("body, expected, exact", NEEDED)
def test_a_change_of_what_is_needed_is_reported_and_of_nothing_else(body, expected, exact):
    for mark in re.findall(r"// (\w+)", body):
        assert is_reported(changed(body, mark, lambda line: "")) == (mark in expected), mark
    for mark in re.findall(r"wait_group.*// (\w+)", body):
        assert is_reported(changed(body, mark, one_less)) == (mark in exact), mark


def is_reported(body: str) -> bool:
    """Return whether every schedule reports a fault; a sound body, none."""
    reported = []
    for seed in range(6):
        try:
            counted(body, seed=seed)
            reported.append(False)
        except _ptx.ExecutionError:
            reported.append(True)
    assert len(set(reported)) == 1
    return reported[0]


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
