"""What the PTX machine reports: each check has a planted fault that it must name, and a sound version that it must let
pass, under several schedules."""

import re

import numpy as np
import pytest

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with AFA_BUILD_PTX_MACHINE=1 only")

from ptx_helpers import HEADER, PLACES, kernel, launch  # noqa: E402

SEEDS = range(8)


def run(body: str, *, threads: int = 64, shared: int = 4096, words: int = 1024, writable: bool = True) -> np.ndarray:
    """Run a body with one array of ``words`` words, which starts as 0, 1, 2, ..."""
    text = kernel(PLACES + body, shared=shared, threads=threads)
    for seed in SEEDS:
        array = np.arange(words, dtype=np.uint32)
        launch(text, array, threads=threads, seed=seed, writable=writable)
    return array


COPY = "cp.async.cg.shared.global [%r4], [%rd9], 16, 16; cp.async.commit_group;"
COPY_NEXT = "cp.async.cg.shared.global [%r4+2048], [%rd9], 16; cp.async.commit_group;"
OTHERS = "xor.b32 %r5, %r4, 512;"  # the 16 bytes of the thread 32 further

SOUND = {
    "exchange between warps": "st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r5, [%r2];",
    "exchange in a warp": "st.shared.b32 [%r1], %r0; bar.warp.sync -1; ld.shared.b32 %r5, [%r3];",
    "own word without a barrier": "st.shared.b32 [%r1], %r0; ld.shared.b32 %r5, [%r1]; st.shared.b32 [%r1], %r5;",
    "overwritten after a barrier": "st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r5, [%r2]; bar.sync 0; "
    "st.shared.b32 [%r1], %r5;",
    "read by all": "st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r5, [tile]; ld.shared.b32 %r6, [tile+4];",
    "equal values from several threads": "mov.b32 %r5, 7; st.shared.b32 [tile], %r5;",
    "a half that nobody cares for": "cvt.u16.u32 %h1, %r0; mov.b32 %r5, {%h1, %h2}; mov.b32 {%h3, _}, %r5;",
    "halves of a word from two warps": "cvt.u16.u32 %h1, %r0; and.b32 %r5, %r0, 31; shr.u32 %r6, %r0, 5; "
    "mad.lo.u32 %r5, %r5, 4, %r9; mad.lo.u32 %r5, %r6, 2, %r5; st.shared.b16 [%r5], %h1; ld.shared.b16 %h2, [%r5];",
    "copy": COPY + "cp.async.wait_group 0; bar.sync 0;" + OTHERS + "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r5];",
    "copy of two groups": COPY + COPY_NEXT + "cp.async.wait_group 1; bar.sync 0;" + OTHERS
    + "ld.shared.b32 %r10, [%r5]; cp.async.wait_group 0;",
    "copy refilled after a barrier": COPY + "cp.async.wait_group 0; bar.sync 0;" + OTHERS
    + "ld.shared.b32 %r10, [%r5]; bar.sync 0;" + COPY + "cp.async.wait_group 0;",
    "copy of nothing from anywhere": "mov.b32 %r5, 0; mov.u64 %rd5, 16; cp.async.cg.shared.global [%r4], [%rd5], 16, "
    "%r5; cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r6, [%r4];",
    "last bytes": "mov.b32 %r5, 1; st.global.b32 [%rd0+4092], %r5; ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd0+4080];",
    "a warp returns before a barrier": "setp.gt.u32 %p1, %r0, 31; @%p1 ret; bar.sync 0;",
    "lanes branch and meet": "setp.gt.u32 %p1, %r0, 40; @%p1 bra high; mov.b32 %r5, 1; bra meet; high: mov.b32 %r5, 2; "
    "meet: bar.sync 0; shfl.sync.idx.b32 %r6, %r5, 0, 31, -1;",
    "register written on both sides": "setp.gt.u32 %p1, %r0, 40; @%p1 mov.b32 %r5, 1; @!%p1 mov.b32 %r5, 2; "
    "add.s32 %r6, %r5, 1;",
}  # fmt: skip
FAULTS = {
    "read without a barrier": (
        "st.shared.b32 [%r1], %r0; ld.shared.b32 %r5, [%r2];", "race: reads shared memory|nothing has written"
    ),
    "read without a warp barrier": (
        "st.shared.b32 [%r1], %r0; ld.shared.b32 %r5, [%r3];", "without bar.warp.sync between"
    ),
    "a warp barrier where the CTA's is needed": (
        "st.shared.b32 [%r1], %r0; bar.warp.sync -1; ld.shared.b32 %r5, [%r2];", "race: reads|nothing has written"
    ),
    "overwritten while another warp may read": (
        "st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r5, [%r2]; add.s32 %r5, %r5, 1; "
        "st.shared.b32 [%r1], %r5;",
        "race: (writes shared memory at offset .*has read|reads)",
    ),
    "overwritten while another lane may read": (
        "st.shared.b32 [%r1], %r0; bar.warp.sync -1; ld.shared.b32 %r5, [%r3]; add.s32 %r5, %r5, 8; "
        "st.shared.b32 [%r1], %r5;", "has read, without bar.warp.sync",
    ),
    "different values from several warps": (
        "shr.u32 %r5, %r0, 5; st.shared.b32 [tile], %r5;", "has written something else, without a barrier"
    ),
    "different values from several lanes": (
        "st.shared.b32 [tile], %r0;", "has written something else, without bar.warp.sync"
    ),
    "shared memory that nothing has written": ("ld.shared.b32 %r5, [%r1];", "which nothing has written"),
    "half a word that nothing has written": (
        "cvt.u16.u32 %h1, %r0; st.shared.b16 [%r1], %h1; ld.shared.b32 %r5, [%r1];", "which nothing has written"
    ),
    "copy read before it is waited for": (
        COPY + "ld.shared.b32 %r5, [%r4]; cp.async.wait_group 0;", "cp.async that has not been waited for"
    ),
    "copy waited for one group too few": (
        COPY + "cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r5, [%r4]; cp.async.wait_group 0;",
        "cp.async that has not been waited for",
    ),
    "copy not committed": (
        "cp.async.cg.shared.global [%r4], [%rd9], 16; cp.async.wait_group 0; ld.shared.b32 %r5, [%r4];",
        "cp.async that has not been waited for",
    ),
    "copy read by others without a barrier": (
        COPY + "cp.async.wait_group 0;" + OTHERS + "ld.shared.b32 %r10, [%r5];", "race: reads|not "
        "been waited for|nothing"
    ),
    "wait after the barrier": (
        COPY + "bar.sync 0; cp.async.wait_group 0;" + OTHERS + "ld.shared.b32 %r10, [%r5];",
        "race: reads|not been waited for",
    ),
    "copy refilled before the barrier": (
        COPY + "cp.async.wait_group 0; bar.sync 0;" + OTHERS + "ld.shared.b32 %r10, [%r5];" + COPY
        + "cp.async.wait_group 0;", "race: (writes|reads)|not been waited for",
    ),
    "store to the destination of a copy": (
        COPY + "st.shared.b32 [%r4], %r0; cp.async.wait_group 0;", "writes shared memory .* has not been waited for"
    ),
    "return with a copy under way": (COPY, "returns with a cp.async"),
    "copy of more than there is": (
        "mov.b32 %r5, 17; cp.async.cg.shared.global [%r4], [%rd9], 16, %r5;", "copies 17 of 16"
    ),
    "copy from a misaligned address": ("cp.async.cg.shared.global [%r4], [%rd9+4], 16;", "not a multiple"),
    "copy to a misaligned address": ("cp.async.cg.shared.global [%r4+4], [%rd9], 16;", "not a multiple"),
    "copy past the end": ("cp.async.cg.shared.global [%r4], [%rd9+3584], 16; cp.async.commit_group; "
        "cp.async.wait_group 0;",
                          "copies 16 bytes .* behind its end"),
    "copy of 8 bytes past level 1": ("cp.async.cg.shared.global [%r4], [%rd9], 8;", "cannot copy 8 bytes"),
    "load past the end": ("ld.global.b32 %r5, [%rd8+3844];", "loads 4 bytes .* outside every "
        "allocation.*'array 0', 4096"),
    "load before the start": ("ld.global.b32 %r5, [%rd8+-4];", "4 bytes before it"),
    "vector across the end": ("ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd0+4088];", "whose end the access crosses"),
    "store past the end": ("st.global.b32 [%rd8+4096], %r0;", "stores 4 bytes"),
    "misaligned load": ("ld.global.v2.b32 {%r5, %r6}, [%rd0+4];", "loads 8 bytes .*not a multiple"),
    "misaligned store": ("st.global.v4.b32 [%rd0+8], {%r0, %r0, %r0, %r0};", "stores 16 bytes .*not a multiple"),
    "misaligned shared access": ("st.shared.v2.b32 [%r9+4], {%r0, %r0};", "writes 8 bytes of shared .*not a multiple"),
    "shared memory past the end": ("st.shared.b32 [%r1+4000], %r0;", "at offset 4.*, of which the CTA has 4096"),
    "shared memory before the start": ("st.shared.b32 [%r1+-4], %r0;", "at offset -4"),
    "matrix past the end": (
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r4+4096];", "of which the CTA has 4096"
    ),
    "parameters past the end": ("mov.b64 %rd5, k_param_0; "
        "ld.param.u64 %rd6, [%rd5+8];", "bytes of the parameters at 8"),
    "two uninitialized halves": ("mov.b32 %r5, {%h1, %h2};", "lane 0: reads %h1, which nothing has written"),
    "uninitialized register": ("add.s32 %r5, %r6, 1;", "lane 0: reads %r6, which nothing has written"),
    "register of some lanes": (
        "setp.lt.u32 %p1, %r0, 40; @%p1 mov.b32 %r5, 1; add.s32 %r6, %r5, 1;", "lane 8: reads %r5, which nothing has"
    ),
    "uninitialized predicate": ("@%p7 bra out; out:", "reads %p7"),
    "uninitialized address": ("ld.global.b32 %r5, [%rd7];", "reads %rd7"),
    "uninitialized carry": ("madc.hi.u32 %r5, %r0, %r0, 0;", "reads the carry"),
    "division by zero": ("div.s32 %r5, 7, %r0;", "lane 0: divides by zero"),
    "barrier of some lanes": (
        "setp.gt.u32 %p1, %r0, 40; @%p1 bra out; bar.sync 0; "
        "out: add.s32 %r5, %r0, 1;", "returns while other lanes of its warp wait for it"
    ),
    "barrier skipped by predicate": ("setp.gt.u32 %p1, %r0, 40; @%p1 bar.sync 0;", "which this lane skips"),
    "lanes at different barriers": (
        "setp.gt.u32 %p1, %r0, 40; @%p1 bra high; bar.sync 0; bra out; high: bar.sync 0; out:", "has diverged"
    ),
    "warps at different barriers": (
        "setp.gt.u32 %p1, %r0, 31; @%p1 bra high; bar.sync 0; bra out; high: bar.sync 1; out:", "deadlock"
    ),
    "diverged shuffle": (
        "setp.gt.u32 %p1, %r0, 40; @%p1 bra out; shfl.sync.idx.b32 %r5, %r0, 0, 31, -1; bra out; out:",
        "returns while other lanes of its warp wait for it",
    ),
    "sum over some lanes": ("redux.sync.add.s32 %r5, %r0, 15;", "some lanes of the warp only"),
    "shuffle with some lanes": ("shfl.sync.idx.b32 %r5, %r0, 0, 31, 15;", "some lanes of the warp only"),
    "shuffle from a lane that has returned": (
        "setp.eq.u32 %p1, %r0, 5; @%p1 ret; shfl.sync.idx.b32 %r5, %r0, 5, 31, -1;", "lane 5, which has returned"
    ),
    "matrix of a warp without all lanes": (
        "setp.eq.u32 %p1, %r0, 5; @%p1 ret; mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r5, %r6, %r7, %r8}, "
        "{%r0, %r0, %r0, %r0}, {%r0, %r0}, {%r0, %r0, %r0, %r0};", "lane 5: .* has returned",
    ),
    "a generic address of another space": ("cvta.to.shared.u64 %rd5, %rd0;", "not of this state space"),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_sound(name):
    run(SOUND[name])


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name):
    body, message = FAULTS[name]
    with pytest.raises(_ptx.ExecutionError, match=message):
        run(body)


@pytest.mark.parametrize("name", FAULTS)
def test_every_schedule_reports_the_fault(name):
    text = kernel(PLACES + FAULTS[name][0], shared=4096, threads=64)
    for seed in range(20):
        with pytest.raises(_ptx.ExecutionError):
            launch(text, np.arange(1024, dtype=np.uint32), threads=64, seed=seed)


def test_store_to_memory_that_is_read_only():
    with pytest.raises(_ptx.ExecutionError, match="stores to 'array 0', which is read only"):
        run("st.global.b32 [%rd8], %r0;", writable=False)


def test_a_message_says_where():
    text = kernel(
        PLACES + "\n.loc 1 77 3\nadd.s32 %r5, %r0, 1;\nld.global.b32 %r5, [%rd8+4096];\n", threads=64, shared=64
    )
    text += '.file 1 "/somewhere/source.cuh"\n'
    line = text.splitlines().index("ld.global.b32 %r5, [%rd8+4096];") + 1
    with pytest.raises(_ptx.ExecutionError) as caught:
        launch(text, np.zeros(1024, np.uint32), threads=64, grid=2)
    message = str(caught.value)
    assert message.startswith(f"PTX line {line}, source.cuh:77, kernel k, CTA (")
    assert ", lane 0: loads 4 bytes" in message and "ld.global.b32 %r5, [%rd8+4096];" in message


REFUSED = {
    "sqrt.approx.f32 %r5, %r0;": "sqrt.approx.f32: the instruction is not known",
    "add.sat.s32 %r5, %r0, %r0;": "add.sat.s32: the instruction is not known",
    "ld.volatile.global.b32 %r5, [%rd0];": "not known",
    "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%r5, %r6, %r7, %r8}, {%r0, %r0, %r0, %r0}, {%r0, %r0}, "
    "{%r0, %r0, %r0, %r0};": "not known",
    "add.s32 %r5, %r0;": "operands of the form oo are not known",
    "add.s32 %r5, %rd0, 1;": "'%rd0' has not the width",
    "add.s32 %r5, %r999, 1;": "'%r999' is not a register",
    "mov.u32 %r5, %clock;": "'%clock' is not a register",
    "bra nowhere;": "label 'nowhere' is not defined",
    "ld.global.v2.b32 {%r5, %r6, %r7}, [%rd0];": "operands of the form {ooo}o are not known",
    "ld.global.b64 %r5, [%rd0];": "'%r5' is narrower than the type",
    "cp.async.wait_group %r0;": "a constant is expected",
    ".maxnreg 5;": "directive '.maxnreg' is not known here",
    "add.s32 %r5, 0q1, 2;": "number '0q1' is not understood",
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_is_not_known_is_refused_with_its_line(code):
    text = kernel("\n" + code + "\n")
    line = next(i for i, text_line in enumerate(text.splitlines(), 1) if code in text_line)
    with pytest.raises(_ptx.LoadError) as caught:
        _ptx.Module(text)
    assert REFUSED[code] in str(caught.value)
    assert f"PTX line {line}" in str(caught.value)


def test_launches_are_checked():
    module = _ptx.Module(kernel("add.s32 %r5, %r0, 1;", threads=64))
    pointer = np.uint64(0).tobytes()
    module.launch("k", (1, 1, 1), (64, 1, 1), pointer)
    for arguments, message in [
        (("other", (1, 1, 1), (64, 1, 1), pointer), "no kernel other"),
        (("k", (1, 1, 1), (64, 1, 1), b""), "takes 8 bytes of parameters, got 0"),
        (("k", (0, 1, 1), (64, 1, 1), pointer), "with a 0"),
        (("k", (1, 65536, 1), (64, 1, 1), pointer), "65535"),
        (("k", (1, 1, 1), (32, 1, 1), pointer), "takes 64 threads per block, got 32"),
        (("k", (1, 1, 1), (64, 1, 1), pointer, 1 << 20), "227 KiB"),
    ]:
        with pytest.raises(_ptx.ExecutionError, match=message):
            module.launch(*arguments)


# --- Schedules and divergence ---


def test_schedules_differ_between_seeds_and_repeat_for_one():
    text = kernel("shr.u32 %r5, %r0, 5; mad.lo.s32 %r5, %r5, 7, 1; st.global.b32 [%rd0], %r5;", threads=256)
    last = []
    for seed in range(24):
        array = np.zeros(1, np.uint32)
        launch(text, array, threads=256, seed=seed)
        last.append(int(array[0]))
        launch(text, array, threads=256, seed=seed)
        assert array[0] == last[-1]
    assert len(set(last)) > 3


def test_ctas_run_in_an_order_of_the_seed():
    """The second that runs is the first to store where another one has."""
    text = kernel("mov.u32 %r5, %ctaid.x; st.global.b32 [%rd0], %r5;", threads=32)

    def second(seed: int) -> str:
        with pytest.raises(_ptx.ExecutionError) as caught:
            launch(text, np.zeros(1, dtype=np.uint32), threads=32, grid=16, seed=seed)
        return re.search(r"CTA \(\d+", str(caught.value))[0]

    found = [second(seed) for seed in SEEDS]
    assert len(set(found)) > 2 and found == [second(seed) for seed in SEEDS]


def test_loops_of_different_lengths_per_lane():
    body = """
    mov.b32 %r5, 0; mov.b32 %r6, 0;
    loop: add.s32 %r6, %r6, %r5; and.b32 %r7, %r5, 1; setp.eq.s32 %p2, %r7, 0; @%p2 bra even;
    add.s32 %r6, %r6, 100; bra next;
    even: add.s32 %r6, %r6, 1;
    next: add.s32 %r5, %r5, 1; setp.le.u32 %p1, %r5, %r0; @%p1 bra loop;
    shfl.sync.idx.b32 %r8, %r6, 31, 31, -1;
    st.global.b32 [%rd8], %r6; st.global.b32 [%rd8+256], %r8;
    """
    got = run(body)
    expected = [sum(i + (100 if i % 2 else 1) for i in range(t + 1)) for t in range(64)]
    np.testing.assert_array_equal(got[:64], expected)
    np.testing.assert_array_equal(got[64:128], [expected[31]] * 32 + [expected[63]] * 32)


def test_lanes_that_return_early():
    body = "setp.lt.u32 %p1, %r0, 13; @%p1 ret; add.s32 %r5, %r0, 500; st.global.b32 [%rd8], %r5; bar.sync 0;"
    got = run(body)
    np.testing.assert_array_equal(got[:13], np.arange(13))
    np.testing.assert_array_equal(got[13:64], np.arange(13, 64) + 500)


def test_threads_of_a_block_in_three_dimensions():
    text = (
        HEADER
        + """
.visible .entry k(.param .u64 out)
{
    .reg .b32 %r<20>; .reg .b64 %rd<4>;
    ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z;
    mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mov.u32 %r5, %ctaid.z;
    mad.lo.s32 %r6, %r2, 3, %r1; mad.lo.s32 %r6, %r6, 5, %r0;
    mad.lo.s32 %r7, %r5, 2, %r4; mad.lo.s32 %r7, %r7, 3, %r3;
    mad.lo.s32 %r8, %r7, 30, %r6;
    mad.lo.s32 %r9, %r7, 1000, %r6;
    mad.wide.u32 %rd1, %r8, 4, %rd0;
    st.global.u32 [%rd1], %r9;
    ret;
}"""
    )
    out = np.zeros(30 * 12, np.uint32)
    parameters = np.uint64(out.ctypes.data).tobytes()
    _ptx.Module(text).launch("k", (3, 2, 2), (5, 3, 2), parameters, 0, [(out.ctypes.data, out.nbytes, True, "out")])
    np.testing.assert_array_equal(out, (np.arange(12)[:, None] * 1000 + np.arange(30)).reshape(-1))


def test_errors_leave_the_module_usable():
    module = _ptx.Module(kernel(PLACES + FAULTS["load past the end"][0], threads=64, shared=64))
    for words, fails in ((1024, True), (2048, False), (1024, True)):
        array = np.zeros(words, np.uint32)
        arguments = ("k", (1, 1, 1), (64, 1, 1), np.uint64(array.ctypes.data).tobytes(), 0)
        allocations = [(array.ctypes.data, array.nbytes, True, "array")]
        if fails:
            with pytest.raises(_ptx.ExecutionError):
                module.launch(*arguments, allocations)
        else:
            module.launch(*arguments, allocations)


def test_a_kernel_that_does_not_end():
    with pytest.raises(_ptx.ExecutionError, match="does not end"):
        launch(kernel("again: bra again;", parameters=0))


OF_ALL, OWN = "[%rd0]", "[%rd3]"  # one word for all CTAs, and the first of each


@pytest.mark.parametrize(
    "body, message",
    [
        ("st.global.b32 {own}, %r0; ld.global.b32 %r5, {own};", None),
        ("ld.global.b32 %r5, {all}; st.global.b32 {own}, %r5;", None),
        ("st.global.b32 {all}, 7;", "stores to 'array 0' at byte 0, which the CTA with number . has written"),
        ("ld.global.b32 %r5, {all}; st.global.b32 {all}, %r5;", "race: (stores to|loads from) 'array 0' at byte 0"),
        (
            "setp.eq.u32 %p1, %r7, 1; @%p1 st.global.b16 [%rd0+2], %h1; ld.global.b32 %r5, {all};",
            "race: (stores|loads)",
        ),
    ],
)
def test_what_one_cta_writes_no_other_one_touches(body, message):
    """Equal values are no excuse: nothing orders the CTAs of a launch."""
    places = "mov.u32 %r7, %ctaid.x; mad.wide.u32 %rd3, %r7, 4, %rd0; add.s64 %rd3, %rd3, 64; mov.b16 %h1, 3;"
    text = kernel(places + body.format(all=OF_ALL, own=OWN), threads=32)
    for seed in SEEDS:
        if message is None:
            launch(text, np.arange(64, dtype=np.uint32), threads=32, grid=3, seed=seed)
            continue
        with pytest.raises(_ptx.ExecutionError, match=message):
            launch(text, np.arange(64, dtype=np.uint32), threads=32, grid=3, seed=seed)
