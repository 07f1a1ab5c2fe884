"""Atomics and fences on the PTX machine, and what they order among the CTAs of a launch: the CTA that arrives last may
read what all others have stored, and every omission in that pattern is reported."""

import contextlib
import re

import numpy as np
import pytest

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with AFA_BUILD_PTX_MACHINE=1 only")

from ptx_helpers import changed, comments, kernel, launch  # noqa: E402

THREADS, CTAS = 64, 5
SEEDS = range(8)

# %rd10: this thread's word of its CTA's partial results, %rd11: its word of the result. %r10: its value.
PLACES = f"""
    mov.u32 %r11, %ctaid.x;
    mad.lo.u32 %r10, %r11, {THREADS}, %r0;
    mad.wide.u32 %rd10, %r10, 4, %rd0;
    mad.wide.u32 %rd11, %r0, 4, %rd2;
    setp.ne.u32 %p1, %r0, 0;
"""
STORE = "st.global.b32 [%rd10], %r10;"
BARRIER = "bar.sync 0;"
TICKET = "atom.acq_rel.gpu.global.add.u32 %r12, [%rd1], 1;"
# The sum over CTAs of what the thread %r14 of each has stored.
SUM = f"""
    mad.wide.u32 %rd12, %r14, 4, %rd0;
    mov.b32 %r15, 0;
    mov.b32 %r16, 0;
    next: ld.global.b32 %r17, [%rd12];
    add.u32 %r15, %r15, %r17;
    add.s64 %rd12, %rd12, {4 * THREADS};
    add.u32 %r16, %r16, 1;
    setp.lt.u32 %p3, %r16, {CTAS};
    @%p3 bra next;
    st.global.b32 [%rd11], %r15;
"""
RESET = "@%p1 bra done; mov.b32 %r18, 0; st.global.b32 [%rd1], %r18;"


def ticket(before=STORE + BARRIER, take=TICKET, after=BARRIER, rest=SUM + RESET, thread="xor.b32 %r14, %r0, 32;"):
    """Return a kernel of which thread 0 takes a ticket and tells the others; the last CTA goes on to ``rest``."""
    body = f"""{PLACES} {before}
    @%p1 bra taken; {take} st.shared.b32 [tile], %r12; taken: {after}
    ld.shared.b32 %r13, [tile]; setp.ne.u32 %p2, %r13, {CTAS - 1}; @%p2 bra done;
    {thread} {rest} done:"""
    return kernel(body, parameters=3, shared=16, threads=THREADS)


def ticket_of_warps(before, of_warp_0=TICKET, of_warp_1=TICKET, after="bar.warp.sync -1;", other=1):
    """Return a kernel whose warps take tickets of their own, so that no barrier of the CTA is needed, and then read
    what the thread ``other`` away has stored."""
    body = f"""{PLACES} {before}
    and.b32 %r20, %r0, 31; setp.ne.u32 %p4, %r20, 0; setp.lt.u32 %p5, %r0, 32;
    mov.b32 %r12, 0; @%p4 bra taken; @%p5 bra warp_0;
    add.s64 %rd1, %rd1, 4; {of_warp_1} bra taken; warp_0: {of_warp_0} taken: {after}
    shfl.sync.idx.b32 %r13, %r12, 0, 31, -1; setp.ne.u32 %p2, %r13, {CTAS - 1}; @%p2 bra done;
    xor.b32 %r14, %r0, {other}; {SUM} done:"""
    return kernel(body, parameters=3, threads=THREADS)


def launched(text: str, seed: int, **options) -> tuple[np.ndarray, dict]:
    """Return the sums that the last CTA has made, and what was counted."""
    partial, words = np.zeros(CTAS * THREADS, np.uint32), np.zeros(CTAS + 2, np.uint32)
    result = np.zeros(THREADS, np.uint32)
    counters = launch(text, partial, words, result, threads=THREADS, grid=CTAS, seed=seed, **options)
    return result, counters


def run(text: str, seed: int) -> np.ndarray:
    return launched(text, seed)[0]


def sums(other: int) -> np.ndarray:
    return CTAS * (np.arange(THREADS) ^ other) + THREADS * sum(range(CTAS))


RELAXED, ACQUIRE, RELEASE = (TICKET.replace("acq_rel", order) for order in ("relaxed", "acquire", "release"))
FENCE = "fence.acq_rel.gpu;"
# Ticket number i acquires what number i - 1 has released, and releases for number i + 1, each to a word of its own.
CHAIN = RELAXED + (
    "mad.wide.u32 %rd13, %r12, 4, %rd1; atom.acquire.gpu.global.add.u32 %r19, [%rd13+4], 0; "
    "red.release.gpu.global.add.u32 [%rd13+8], 0;"
)
WARP_BARRIER = "bar.warp.sync -1;"

SOUND = {
    "acquire and release in one": ticket(),
    "as Triton writes it": ticket(take="atom.global.gpu.acq_rel.add.u32 %r12, [%rd1], 1;"),
    "for the system": ticket(take=TICKET.replace(".gpu", ".sys")),
    "for the device where nothing is said": ticket(take=TICKET.replace(".gpu", "")),
    "incremented, and back at zero": ticket(
        take=f"atom.acq_rel.gpu.global.inc.u32 %r12, [%rd1], {CTAS - 1};", rest=SUM
    ),
    "fences around a relaxed atomic": ticket(take=FENCE + RELAXED + FENCE),
    "fences as nvcc writes them": ticket(take="membar.gl; atom.global.add.u32 %r12, [%rd1], 1; fence.sc.gpu;"),
    "a fence before an atomic that acquires": ticket(take=FENCE + ACQUIRE),
    "a fence behind an atomic that releases": ticket(take=RELEASE + FENCE),
    "released by a reduction": ticket(take="red.release.gpu.global.add.u32 [%rd1], 0;" + ACQUIRE),
    "passed on from word to word": ticket(take=CHAIN),
    "reset by a thread that has read the counter": ticket(rest=RESET),
}  # fmt: skip

UNORDERED = "which the CTA with number . has written, without a release and an acquire between"
LOAD, COUNTER = f"race: loads from 'array 0' at byte .*, {UNORDERED}", f"on 'array 1' at byte 0, {UNORDERED}"
FAULTS = {
    "no barrier before the ticket": (ticket(before=STORE), LOAD),
    "a barrier of the warp before the ticket": (ticket(before=STORE + WARP_BARRIER), LOAD),
    "stored behind the ticket": (ticket(before="", after=STORE + BARRIER), LOAD),
    "stored behind the barrier": (ticket(before="", after=BARRIER + STORE), LOAD),
    "relaxed": (ticket(take=RELAXED), LOAD),
    "relaxed where nothing is said": (ticket(take="atom.global.add.u32 %r12, [%rd1], 1;"), LOAD),
    "released only": (ticket(take=RELEASE), LOAD),
    "acquired only": (ticket(take=ACQUIRE), LOAD),
    "no fence before": (ticket(take=RELAXED + FENCE), LOAD),
    "no fence behind": (ticket(take=FENCE + RELAXED), LOAD),
    "a fence before the barrier": (ticket(before=STORE + FENCE + BARRIER, take=RELAXED + FENCE), LOAD),
    "a fence of the CTA": (ticket(take="membar.cta;" + RELAXED + FENCE), LOAD),
    "fences of another thread": (
        ticket(before=STORE + BARRIER + "@!%p1 bra mine;" + FENCE + "mine:", take=RELAXED,
               after="@!%p1 bra mine2;" + FENCE + "mine2:" + BARRIER), LOAD
    ),
    "an atomic of the CTA": (
        ticket(take=TICKET.replace(".gpu", ".cta")), f"race: stores to 'array 1' at byte 0, {UNORDERED}"
    ),
    "released to another word": (ticket(take="red.release.gpu.global.add.u32 [%rd1+4], 1;" + ACQUIRE), LOAD),
    "acquired from another word": (
        ticket(take=RELEASE + "atom.acquire.gpu.global.add.u32 %r19, [%rd1+4], 0;"), LOAD
    ),
    "not passed on": (ticket(take=CHAIN.replace("acquire", "relaxed")), LOAD),
    "a load of the counter": (
        ticket(take="ld.global.b32 %r12, [%rd1];" + TICKET), "race: (loads from|an atomic on) 'array 1' at byte 0"
    ),
    "reset by every CTA": (ticket(take=TICKET + "st.global.b32 [%rd1], 0;"), COUNTER),
    "reset by a thread that knows nothing": (
        ticket(take=TICKET, after="@!%p1 bra read; st.global.b32 [%rd1], 0; read:" + BARRIER),
        "race: (stores to|an atomic on) 'array 1' at byte 0",
    ),
    "no barrier of the warp before the ticket": (ticket_of_warps(STORE), LOAD),
    "no barrier of the warp behind the ticket": (ticket_of_warps(STORE + WARP_BARRIER, after=""), LOAD),
    "a ticket of one warp, results read by both": (ticket_of_warps(STORE + BARRIER, of_warp_1=RELAXED), LOAD),
    "loads through the cache that is not coherent": (
        ticket(rest=SUM.replace("ld.global.b32", "ld.global.nc.b32")),
        "loads from 'array 0' at byte .* with .nc, which this launch has written",
    ),
    "stores to what was loaded through that cache": (
        ticket(before="ld.global.nc.b32 %r9, [%rd10];" + STORE + BARRIER),
        "stores to 'array 0' at byte .*, which this launch has loaded with .nc",
    ),
    "stores to what another CTA has loaded": (
        ticket(before="ld.global.b32 %r9, [%rd0];" + BARRIER, rest="st.global.b32 [%rd0], %r0;"),
        "race: stores to 'array 0' at byte 0, which the CTA with number . has read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_the_last_cta_reads_what_all_have_stored(name):
    for seed in SEEDS:
        result = run(SOUND[name], seed)
        if SUM in SOUND[name]:
            np.testing.assert_array_equal(result, sums(32))


@pytest.mark.parametrize("before, other", [(STORE + WARP_BARRIER, 1), (STORE + BARRIER, 32)])
def test_warps_with_tickets_of_their_own(before, other):
    for seed in SEEDS:
        np.testing.assert_array_equal(run(ticket_of_warps(before, other=other), seed), sums(other))


@pytest.mark.parametrize("name", FAULTS)
def test_every_schedule_reports_the_omission(name):
    text, message = FAULTS[name]
    for seed in range(20):
        with pytest.raises(_ptx.ExecutionError, match=message):
            run(text, seed)


def marked(instruction: str, mark: str) -> str:
    return f"\n{instruction} // {mark}\n"


STORED, AGAIN, TAKEN = (marked(BARRIER, mark) for mark in ("stored", "again", "taken"))


@pytest.mark.parametrize(
    "text, needed",
    [
        (ticket(STORE + STORED, marked(TICKET, "ticket"), TAKEN), ["stored", "ticket", "taken"]),
        (ticket(STORE + STORED + AGAIN, marked(TICKET, "ticket"), TAKEN), ["ticket", "taken"]),  # either would do
        (
            ticket(STORE + STORED, marked(FENCE, "before") + RELAXED + marked(FENCE, "behind"), TAKEN),
            ["stored", "before", "behind", "taken"],
        ),
        (
            ticket(STORE + STORED, marked(FENCE, "before") + marked(ACQUIRE, "ticket"), TAKEN),
            ["stored", "before", "ticket", "taken"],
        ),
        (  # released by either
            ticket(
                STORE + STORED, marked(FENCE, "before") + marked(RELEASE, "ticket") + marked(FENCE, "behind"), TAKEN
            ),
            ["stored", "behind", "taken"],
        ),
        (
            ticket(STORE + STORED, marked(TICKET, "ticket") + marked(FENCE, "behind"), TAKEN),
            ["stored", "ticket", "taken"],
        ),
    ],
)
def test_what_the_order_of_two_ctas_needs(text, needed):
    """It is reported where it is removed, and nothing else is."""
    for seed in SEEDS:
        assert comments(text.splitlines(), launched(text, seed, explain=True)[1]["effective"]) == needed
        for mark in re.findall(r"// (\w+)", text):
            with pytest.raises(_ptx.ExecutionError) if mark in needed else contextlib.nullcontext():
                launched(changed(text, mark, without_order), seed)


def without_order(line: str) -> str:
    return re.sub("acq_rel|acquire|release", "relaxed", line) if "atom" in line else ""


# --- What atomics do

OPERATIONS = {  # of the old value and two operands
    "add.u32": lambda old, b, c: old + b & 0xFFFFFFFF,
    "inc.u32": lambda old, b, c: 0 if old >= b else old + 1,
    "exch.b32": lambda old, b, c: b,
    "cas.b32": lambda old, b, c: c if old == b else old,
}
SCOPES = ("", ".cta", ".gpu", ".sys")


def spellings(base: str, order: str, scope: str, operation: str) -> set[str]:
    return {f"{base}{order}{scope}.global.{operation}", f"{base}.global{scope}{order}.{operation}"}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("order", ["", ".relaxed", ".acquire", ".release", ".acq_rel"])
def test_atomics(operation, order):
    """32 threads on one word, one after the other, and each on its own word."""
    c = ", 70" if operation == "cas.b32" else ""
    one, own = [40 if operation == "cas.b32" else 2**32 - 30], np.arange(24, 56, dtype=np.uint32)
    for _ in range(32):
        one.append(OPERATIONS[operation](one[-1], 40, 70))
    reduction = operation in ("add.u32", "inc.u32") and order in ("", ".relaxed", ".release")
    for scope in SCOPES:
        for atomic in spellings("atom", order, scope, operation):
            body = f"""mad.wide.u32 %rd10, %r0, 4, %rd1; mad.wide.u32 %rd11, %r0, 4, %rd2;
            {atomic} %r10, [%rd0], 40{c}; {atomic} _, [%rd10], 40{c}; st.global.b32 [%rd11], %r10;"""
            word, words, old = np.array(one[:1], dtype=np.uint32), own.copy(), np.zeros(32, np.uint32)
            traffic = launch(kernel(body, parameters=3), word, words, old)["traffic"]
            assert word[0] == one[-1] and sorted(old) == sorted(one[:-1])
            np.testing.assert_array_equal(words, [OPERATIONS[operation](int(o), 40, 70) for o in own])
            assert traffic["array 0"] == (4, 4) and traffic["array 1"] == (128, 128)
        for atomic in spellings("red", order, scope, operation) if reduction else ():
            word = np.array(one[:1], dtype=np.uint32)
            assert launch(kernel(f"{atomic} [%rd0], 40;"), word)["traffic"]["array 0"] == (0, 4)
            assert word[0] == one[-1]


def test_some_lanes():
    body = "setp.gt.u32 %p1, %r0, 12; mov.b32 %r10, 7; @%p1 atom.global.add.u32 %r10, [%rd0], 1; "
    words = np.zeros(33, dtype=np.uint32)
    launch(kernel(body + "mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.b32 [%rd10+4], %r10;"), words)
    np.testing.assert_array_equal(words, [19, *[7] * 13, *range(19)])


@pytest.mark.parametrize("fence", ["fence.acq_rel", "fence.sc", "membar"])
def test_fences(fence):
    """Of the device or more, they order CTAs; of a CTA, they do not."""
    for scope, orders in [("cta", False), ("gl" if fence == "membar" else "gpu", True), ("sys", True)]:
        text = ticket(take=f"{fence}.{scope};" + RELAXED + f"{fence}.{scope};")
        if orders:
            np.testing.assert_array_equal(run(text, 0), sums(32))
        else:
            with pytest.raises(_ptx.ExecutionError, match=LOAD):
                run(text, 0)


@pytest.mark.parametrize(
    "body, message",
    [
        ("atom.global.add.u32 %r1, [%rd0+128], 1;", "updates 4 bytes .* outside every allocation"),
        ("red.global.add.u32 [%rd0+2], 1;", "updates 4 bytes at an address of 'array 0' that is not a multiple"),
        ("atom.global.add.u32 %r1, [%rd0], %r2;", "reads %r2, which nothing has written"),
    ],
)
def test_atomics_in_the_wrong_place(body, message):
    with pytest.raises(_ptx.ExecutionError, match=message):
        launch(kernel(body), np.zeros(32, np.uint32))


@pytest.mark.parametrize("operation, reads", [("atom.global.add.u32 %r1,", 1), ("red.global.add.u32", 0)])
def test_what_atomics_move(operation, reads):
    counters = launch(kernel(f"{operation} [%rd0], 1;"), np.zeros(32, np.uint32))
    assert counters["global_write_bytes"] == 4 * 32 and counters["global_read_bytes"] == 4 * 32 * reads


def test_atomics_on_memory_that_is_read_only_or_of_the_kernel_before():
    text = kernel("red.global.add.u32 [%rd0], 1;")
    with pytest.raises(_ptx.ExecutionError, match="stores to 'array 0', which is read only"):
        launch(text, np.zeros(32, np.uint32), writable=False)
    with pytest.raises(_ptx.ExecutionError, match="race: an atomic on 'array 0' at byte 0 without griddepcontrol.wait"):
        launch(text, np.zeros(32, np.uint32), overlaps=True)


@pytest.mark.parametrize("name", ["red.acquire.gpu.global.add.u32", "atom.acq_rel.cluster.global.add.u32"])
def test_orders_and_scopes_that_are_not_known(name):
    operands = "[%rd0], 1" if name.startswith("red") else "%r1, [%rd0], 1"
    with pytest.raises(_ptx.LoadError, match=re.escape(f"{name}: the instruction is not known")):
        _ptx.Module(kernel(f"{name} {operands};"))
