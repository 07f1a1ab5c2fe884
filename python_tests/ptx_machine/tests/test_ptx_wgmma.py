"""wgmma of the PTX machine: matrices in shared memory as CuTe's canonical GMMA layouts place them, products against
float64, and the rules of the asynchronous proxy."""

import contextlib
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with AFA_BUILD_PTX_MACHINE=1 only")

from ptx_helpers import EXECUTED, changed, comments, kernel, launch, one_less  # noqa: E402

ELEMENTS = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}
MODES = {16: 0, 128: 1, 64: 2, 32: 3}  # bits 62 and 63 of a descriptor, by the bytes of a swizzled row
HALF = 32768  # bytes of shared memory for each matrix


def swizzled(address, width):
    """CuTe's Swizzle<log2(width / 16), 4, 3> on byte addresses."""
    return address ^ (address >> 7 & width // 16 - 1) << 4


def placement(rows: int, depth: int, size: int, width: int, mn_major: bool):
    """Return the byte address of each element (row, k) by CuTe's canonical layouts, and the leading and stride offset
    that a descriptor then holds. T is a unit of 16 bytes, W a swizzled row of ``width`` bytes."""
    t = 16 // size
    row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if not mn_major and width == 16:  # ((8, m), (T, 2)) : ((T, SBO), (1, LBO))
        leading, stride = 128, 128 * depth // t
        return row % 8 * 16 + row // 8 * stride + k % t * size + k // t * leading, leading, stride
    if not mn_major:  # Swizzle o ((8, m), (T, 2)) : ((W, SBO), (1, T))
        stride = 8 * width
        return swizzled(row % 8 * width + row // 8 * stride + k * size, width), 16, stride
    if width == 16:  # ((T, 1, m), (8, k)) : ((1, T, SBO), (T, LBO))
        stride, leading = 128, 128 * rows // t
        return row % t * size + row // t * stride + k % 8 * 16 + k // 8 * leading, leading, stride
    # Swizzle o ((T, W / T, m), (8, k)) : ((1, T, LBO), (W, SBO))
    per_row = width // size
    stride, leading = 8 * width, 8 * width * depth // 8
    address = row % per_row * size + row // per_row * leading + k % 8 * width + k // 8 * stride
    return swizzled(address, width), leading, stride


def image(values: torch.Tensor, address: np.ndarray) -> np.ndarray:
    memory = np.zeros(HALF, dtype=np.uint8)
    raw = values.contiguous().view(torch.uint8).numpy().reshape(*values.shape, -1)
    for byte in range(raw.shape[-1]):
        memory[address + byte] = raw[..., byte]
    return memory


def descriptor(base: str, leading: int, stride: int, width: int, result: str) -> str:
    constant = leading // 16 << 16 | stride // 16 << 32 | MODES[width] << 62
    return f"""bfe.u32 %r150, {base}, 4, 14; cvt.u64.u32 %rd80, %r150; or.b64 {result}, %rd80, {constant};"""


FILL = f"""
    mov.b32 %r100, tile;
    add.u32 %r101, %r100, {HALF};
    shl.b32 %r102, %r0, 4;
    mov.b32 %r103, 0;
loop:
    add.u32 %r104, %r102, %r100;
    add.u32 %r105, %r102, 0;
    cvt.u64.u32 %rd70, %r105;
    add.u64 %rd71, %rd0, %rd70;
    ld.global.v4.b32 {{%r106, %r107, %r108, %r109}}, [%rd71];
    st.shared.v4.b32 [%r104], {{%r106, %r107, %r108, %r109}};
    add.u32 %r102, %r102, 2048;
    setp.lt.u32 %p30, %r102, {2 * HALF};
    @%p30 bra loop;
"""
SYNC = "bar.sync 0; fence.proxy.async.shared::cta;"
FENCE = "wgmma.fence.sync.aligned;"
END = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def product(kind, columns, operands, add="%p1", tail=(0, 0), into="%c"):
    depth = 8 if kind == "tf32" else 16
    accumulators = "{" + ", ".join(f"{into}{i}" for i in range(columns // 2)) + "}"
    flags = "" if kind == "tf32" else "".join(f", {int(t)}" for t in tail)
    name = f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}"
    return f"{name} {accumulators}, {operands}, {add}, 1, 1{flags};"


def with_accumulators(columns: int, body: str) -> str:
    """Load the accumulators, run ``body``, store them: thread t of [128] has columns / 2 of them."""
    count = columns // 2
    load = f"mad.wide.u32 %rd60, %r0, {4 * count}, %rd1;"
    load += "".join(f"ld.global.f32 %c{i}, [%rd60+{4 * i}];" for i in range(count))
    store = "".join(f"st.global.f32 [%rd60+{4 * i}], %c{i};" for i in range(count))
    return load + body + store


def run(kind, columns, body, memory, accumulators, *more):
    text = kernel(FILL + with_accumulators(columns, body), parameters=2 + len(more), shared=2 * HALF, threads=128,
                  registers=f".reg .f32 %c<{columns // 2}>; .reg .b32 %a<4>;")  # fmt: skip
    return launch(text, memory, accumulators, *more, threads=128, seed=columns)


def matrix(fragments: np.ndarray, columns: int) -> np.ndarray:
    """Put accumulators [128, columns / 2] in their places: warp w has rows 16 w and on; of register i, row
    lane / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (lane % 4) + i % 2."""
    out = np.zeros((64, columns), dtype=np.float32)
    thread, i = np.meshgrid(np.arange(128), np.arange(columns // 2), indexing="ij")
    lane = thread % 32
    out[thread // 32 * 16 + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = fragments
    return out


def truncated(values, kind):
    if kind == "tf32":
        values = (values.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return values.double().numpy()


CASES = [
    (kind, columns, width, (mn_a, mn_b))
    for kind, columns, width in itertools.product(ELEMENTS, (8, 16, 32, 64, 128, 256), MODES)
    for mn_a, mn_b in ([(False, False)] if kind == "tf32" else itertools.product((False, True), repeat=2))
    if not mn_b or columns * 2 >= width
]


@pytest.mark.parametrize("kind, columns, width, mn", CASES)
def test_products_of_matrices_in_shared_memory(kind, columns, width, mn):
    torch.manual_seed(columns + width)
    depth, size = (8, 4) if kind == "tf32" else (16, 2)
    a, b = torch.randn(64, depth).to(ELEMENTS[kind]), torch.randn(columns, depth).to(ELEMENTS[kind])
    c = np.random.default_rng(1).standard_normal((128, columns // 2)).astype(np.float32)
    place_a, place_b = placement(64, depth, size, width, mn[0]), placement(columns, depth, size, width, mn[1])
    memory = np.concatenate([image(a, place_a[0]), image(b, place_b[0])])
    body = (
        SYNC + descriptor("%r100", *place_a[1:], width, "%rd90") + descriptor("%r101", *place_b[1:], width, "%rd91")
        + "setp.lt.u32 %p1, %r0, 1000;" + FENCE + product(kind, columns, "%rd90, %rd91", tail=mn) + END
    )  # fmt: skip
    before, result = matrix(c, columns), c.copy()
    counters = run(kind, columns, body, memory, result)
    expected = before + truncated(a, kind) @ truncated(b, kind).T
    np.testing.assert_allclose(matrix(result, columns), expected, rtol=1e-5, atol=1e-5)
    assert counters["group_multiply_adds"] == 4


@pytest.mark.parametrize("kind", ELEMENTS)
@pytest.mark.parametrize("columns", [8, 64])
def test_products_with_a_fragment_in_registers(kind, columns):
    torch.manual_seed(columns)
    depth, size = (8, 4) if kind == "tf32" else (16, 2)
    a, b = torch.randn(64, depth).to(ELEMENTS[kind]), torch.randn(columns, depth).to(ELEMENTS[kind])
    address, leading, stride = placement(columns, depth, size, 32, False)
    thread, i = np.meshgrid(np.arange(128), np.arange(4), indexing="ij")
    row, step = thread // 32 * 16 + thread % 32 // 4 + 8 * (i % 2), thread % 4
    if kind == "tf32":
        fragments = a[row, step + 4 * (i // 2)].contiguous().view(torch.int32).numpy()
    else:
        first = 2 * step + 8 * (i // 2)
        fragments = torch.stack([a[row, first], a[row, first + 1]], -1).view(torch.int32).numpy()[..., 0]
    load = "mad.wide.u32 %rd61, %r0, 16, %rd2; ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%rd61];"
    body = (
        SYNC + load + descriptor("%r101", leading, stride, 32, "%rd91")
        + FENCE + product(kind, columns, "{%a0, %a1, %a2, %a3}, %rd91", add="0", tail=(0,))
        + FENCE + product(kind, columns, "{%a0, %a1, %a2, %a3}, %rd91", add="1", tail=(0,)) + END
    )  # fmt: skip
    memory = np.concatenate([np.zeros(HALF, np.uint8), image(b, address)])
    result = np.full((128, columns // 2), np.nan, dtype=np.float32)
    run(kind, columns, body, memory, result, np.ascontiguousarray(fragments))
    expected = 2 * truncated(a, kind) @ truncated(b, kind).T
    np.testing.assert_allclose(matrix(result, columns), expected, rtol=1e-5, atol=1e-5)


# --- The rules of the asynchronous proxy: each is broken once, and reported ---

DESCRIPTORS = descriptor("%r100", 128, 256, 16, "%rd90") + descriptor("%r101", 128, 256, 16, "%rd91")
ISSUE = product("bf16", 16, "%rd90, %rd91", add="1")
SOUND = dict(
    sync="bar.sync 0;", proxy="fence.proxy.async.shared::cta;", fence=FENCE, issue=ISSUE,
    commit="wgmma.commit_group.sync.aligned;", between="", wait="wgmma.wait_group.sync.aligned 0;", after="",
)  # fmt: skip
IN_REGISTERS = product("bf16", 16, "{%r0, %r0, %r0, %r0}, %rd91", add="1", tail=(0,))
FEWER_COLUMNS, LESS_DEPTH = (product(kind, n, "%rd90, %rd91", add="1") for kind, n in (("bf16", 8), ("tf32", 16)))
UNTOUCHED = product("bf16", 16, "%rd90, %rd91", add="0", into="%f")  # its accumulators are
OF_THE_RESULT = product("bf16", 16, "{%c0, %c1, %c2, %c3}, %rd91", add="0", tail=(0,), into="%f")
READ = "mov.f32 %f0, %c1;"
REWRITE = "shl.b32 %r110, %r0, 4; add.u32 %r110, %r110, %r100; mov.b32 %r111, 0; st.shared.b32 [%r110], %r111;"
ALSO_SOUND = {
    "plain": {},
    "fenced by the writers": dict(sync="fence.proxy.async.shared::cta; bar.sync 0;", proxy=""),
    "a chain of one shape": dict(issue=ISSUE + ISSUE),
    "a chain that goes on behind the wait": dict(after=ISSUE + END),
    "a result is read, and a fence follows": dict(after=READ + FENCE + ISSUE + END),
    "another shape, then a fragment": dict(after=FENCE + FEWER_COLUMNS + END + FENCE + OF_THE_RESULT + END),
    "one fragment twice": dict(issue=IN_REGISTERS + FENCE + IN_REGISTERS),
    "two waits": dict(wait="wgmma.wait_group.sync.aligned 1;", after="wgmma.wait_group.sync.aligned 0;"),
    "overwritten after a barrier": dict(after="bar.sync 0; setp.eq.u32 %p5, %r0, 0; @%p5 st.shared.b32 [%r100], %r0;"),
}
BROKEN = {
    "a barrier is missing": (dict(sync=""), "without a barrier between|nothing has written"),
    "the proxy fence is missing": (dict(proxy=""), "without fence.proxy.async between"),
    "the proxy fence comes too early": (
        dict(sync="fence.proxy.async.shared::cta;" + REWRITE + "bar.sync 0;", proxy=""),
        "without fence.proxy.async between",
    ),
    "the register fence is missing": (dict(fence=""), "no wgmma.fence comes before the first"),
    "the fence before untouched registers is missing": (
        dict(fence="", issue=UNTOUCHED), "no wgmma.fence comes before the first",
    ),
    "an accumulator is written behind the fence": (
        dict(fence=FENCE + "mov.f32 %c1, 0f00000000;"), "accumulator %c1 has been accessed since",
    ),
    "an accumulator is read behind the fence": (dict(fence=FENCE + READ), "accumulator %c1 has been accessed since"),
    "a result is read and no fence follows": (
        dict(after=READ + ISSUE + END), "accumulator %c1 has been accessed since",
    ),
    "a result is read and a product that does not read it follows": (
        dict(after=READ + ISSUE.replace("1, 1, 1", "0, 1, 1") + END), "accumulator %c1 has been accessed since",
    ),
    "a product of fewer columns follows": (dict(after=FEWER_COLUMNS + END), "accumulator %c0 has been accessed since"),
    "a product of less depth follows": (dict(after=LESS_DEPTH + END), "accumulator %c0 has been accessed since"),
    "a fragment is read behind the fence": (
        dict(issue=IN_REGISTERS, fence=FENCE + "mov.u32 %r110, %r0;"), "fragment register %r0 has been accessed since",
    ),
    "two products read one fragment": (
        dict(issue=IN_REGISTERS + IN_REGISTERS), "fragment register %r0 has been accessed since",
    ),
    "a result becomes a fragment": (dict(after=OF_THE_RESULT + END), "fragment register %c0 has been accessed since"),
    "a fragment in flight becomes an accumulator": (
        dict(after=FENCE + OF_THE_RESULT + ISSUE + END), "accumulator %c0 is in use by another wgmma",
    ),
    "an accumulator is read before the wait": (dict(between="add.f32 %f0, %c0, %c0;"), "a wgmma that has not been"),
    "an accumulator is written before the wait": (dict(between="mov.f32 %c0, %c0;"), "a wgmma that has not been"),
    "a fragment is written before the wait": (
        dict(issue=IN_REGISTERS, between="mov.u32 %r0, 3;"),
        "has not been waited for",
    ),
    "the wait lets one group pass": (
        dict(wait="wgmma.wait_group.sync.aligned 1;", after="mov.f32 %f0, %c0;"), "has not been waited for",
    ),
    "shared memory is overwritten before the wait": (
        dict(between="bar.sync 0; setp.eq.u32 %p5, %r0, 0; @%p5 st.shared.b32 [%r100], %r0;"), "may still read",
    ),
    "it returns without the wait": (dict(wait="", after="ret;"), "returns with a wgmma"),
    "one warp stays out": (
        dict(fence=FENCE + "setp.gt.u32 %p5, %r0, 95; @%p5 bra out;", after="out:"),
        "different wgmma instructions",
    ),
    "the lanes do not agree": (
        dict(issue=product("bf16", 16, "%rd90, %rd91"), fence="setp.gt.u32 %p1, %r0, 9;" + FENCE),
        "do not agree",
    ),
    "an operand is negated": (dict(issue=ISSUE.replace("1, 1, 0, 0;", "-1, 1, 0, 0;")), "negated operand"),
}  # fmt: skip


def asynchronous(changes):
    parts = SOUND | changes
    body = "".join(parts[p] for p in ("sync", "proxy"))
    body += DESCRIPTORS + "".join(parts[p] for p in ("fence", "issue", "commit", "between", "wait", "after"))
    return kernel(FILL + with_accumulators(16, body), parameters=2, shared=2 * HALF, threads=128,
                  registers=".reg .f32 %c<8>; .reg .f32 %f<8>;")  # fmt: skip


def run_asynchronous(text, **options):
    memory = np.zeros(2 * HALF, np.uint8)
    for seed in range(3):
        counters = launch(text, memory, np.zeros((128, 8), np.float32), threads=128, seed=seed, **options)
    return counters


@pytest.mark.parametrize("name", ALSO_SOUND)
def test_sound_asynchronous_products(name):
    run_asynchronous(asynchronous(ALSO_SOUND[name]))


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_asynchronous_products(fault):
    changes, message = BROKEN[fault]
    with pytest.raises(_ptx.ExecutionError, match=message):
        run_asynchronous(asynchronous(changes))


COMMIT, NEXT = (f"\nwgmma.commit_group.sync.aligned; // {name}\n" for name in ("commit", "next"))
WAIT_GROUP = "\nwgmma.wait_group.sync.aligned {}; // {}\n"
WAIT, WAIT_BUT_ONE, AGAIN = (WAIT_GROUP.format(*of) for of in ((0, "wait"), (1, "wait"), (0, "again")))


@pytest.mark.parametrize(
    "changes, needed, exact",
    [
        (dict(after=""), ["commit", "wait"], ["wait"]),  # the accumulators are stored
        (dict(commit=COMMIT + ISSUE + NEXT), ["next", "wait"], ["wait"]),  # both groups in one
        (dict(commit=COMMIT + NEXT), ["wait"], []),  # the last group is empty
        (dict(after=AGAIN), ["commit"], []),  # either would do
        (dict(after="add.f32 %f0, %c0, %c0;" + AGAIN), ["commit", "wait"], ["wait"]),
        (dict(after="mov.f32 %c0, 0f00000000;" + AGAIN), ["commit", "wait"], ["wait"]),
        (dict(after="bar.sync 0; st.shared.b32 [%r100], 0;" + AGAIN), ["commit", "wait"], ["wait"]),
        (dict(after="bar.sync 0; ld.shared.b32 %r110, [%r100];" + AGAIN), ["commit"], []),  # the product reads it too
        (dict(after=FENCE + ISSUE + NEXT + AGAIN), ["next", "again"], ["again"]),  # the chain goes on
        (dict(after=FENCE + IN_REGISTERS + NEXT + AGAIN), ["next", "again"], ["again"]),
        (dict(after=FENCE + FEWER_COLUMNS + NEXT + AGAIN), ["commit", "wait", "next", "again"], ["wait", "again"]),
        (
            dict(issue=OF_THE_RESULT, after=FENCE + ISSUE + NEXT + AGAIN),
            ["commit", "wait", "next", "again"],
            ["wait", "again"],
        ),
        (dict(issue=IN_REGISTERS, after="mov.u32 %r0, %r0;" + AGAIN), ["commit", "wait"], ["wait"]),
        (dict(issue=IN_REGISTERS, after="mov.u32 %r110, %r0;" + AGAIN), ["commit"], []),
        (
            dict(
                issue=IN_REGISTERS, commit=COMMIT + ISSUE + NEXT, wait=WAIT_BUT_ONE, after="mov.u32 %r0, %r0;" + AGAIN
            ),
            ["commit", "next", "wait", "again"],
            ["wait", "again"],
        ),
    ],
)
def test_the_synchronizations_of_products_that_are_needed(changes, needed, exact):
    """They are reported where they are changed, and no others are."""
    text = asynchronous(dict(commit=COMMIT, wait=WAIT) | changes)
    counters = run_asynchronous(text, explain=True)
    marks = [mark for mark in comments(text.splitlines(), counters["effective"]) if mark]
    assert marks == needed and comments(text.splitlines(), counters["exact_waits"]) == exact
    changes = [(mark in needed, mark, lambda line: "") for mark in re.findall(r"// (\w+)", text)]
    changes += [(mark in exact, mark, one_less) for mark in re.findall(r"wait_group.*// (\w+)", text)]
    for is_fault, mark, change in changes:
        told = pytest.raises(_ptx.ExecutionError, match="that has not been waited for|another wgmma in flight")
        with told if is_fault else contextlib.nullcontext():
            run_asynchronous(changed(text, mark, change))


def check_needed_fences(fence: str, parts: dict, needed: list[str], message: str):
    """Of two fences, those that the machine calls needed are those without which it reports a fault."""
    marks = {mark: f"\n{fence} // {mark}\n" for mark in ("first", "second")}
    text = asynchronous({part: code.format(**marks) for part, code in parts.items()})
    effective = comments(text.splitlines(), run_asynchronous(text, explain=True)["effective"])
    assert [mark for mark in effective if mark] == needed
    for mark in re.findall(r"// (\w+)", text):
        told = pytest.raises(_ptx.ExecutionError, match=message)
        with told if mark in needed else contextlib.nullcontext():
            run_asynchronous(changed(text, mark, lambda line: ""))


@pytest.mark.parametrize(
    "between, issue, needed",
    [
        ("", ISSUE, []),  # either would do
        ("", UNTOUCHED, []),
        ("mov.f32 %c0, 0f3F800000;", ISSUE, ["second"]),
        ("mov.f32 %c0, 0f3F800000;", UNTOUCHED, []),
        (READ, ISSUE, ["second"]),
        ("mov.u32 %r110, %r0;", ISSUE, []),
        ("mov.u32 %r110, %r0;", IN_REGISTERS, ["second"]),
        ("ld.global.f32 %c0, [%rd60];", ISSUE, ["second"]),
        (ISSUE + "wgmma.commit_group.sync.aligned;", ISSUE, ["first"]),  # a chain goes on
        (ISSUE + END, ISSUE, ["first"]),
        (ISSUE + END + READ, ISSUE, ["first", "second"]),
        (ISSUE + END, FEWER_COLUMNS, ["first", "second"]),
        (ISSUE + END, OF_THE_RESULT, ["first", "second"]),
        (UNTOUCHED + END, ISSUE, ["first"]),
    ],
)
def test_the_fences_of_registers_that_are_needed(between, issue, needed):
    between, issue = (code.replace("{", "{{").replace("}", "}}") for code in (between, issue))
    parts = dict(fence="{first}" + between + "{second}", issue=issue)
    check_needed_fences(FENCE, parts, needed, "accessed since the last wgmma.fence|no wgmma.fence comes before")


@pytest.mark.parametrize(
    "sync, proxy, needed",
    [
        ("bar.sync 0;", "{first}", ["first"]),
        ("{first} bar.sync 0;", "", ["first"]),  # by the writers
        ("{first} bar.sync 0;", "{second}", []),  # either would do
        ("bar.sync 0;", "{first} {second}", []),
        ("{first}" + REWRITE + "bar.sync 0;", "{second}", ["second"]),
        ("{first}" + REWRITE + "{second} bar.sync 0;", "", ["second"]),
    ],
)
def test_the_fences_of_the_asynchronous_proxy_that_are_needed(sync, proxy, needed):
    parts = dict(sync=sync, proxy=proxy)
    check_needed_fences("fence.proxy.async.shared::cta;", parts, needed, "without fence.proxy.async between")


def test_no_instruction_is_untested(request):
    """Runs last of the files that test the machine, where one process runs all of them, as `make ptx-check` does."""
    names = ("atomics", "floats", "hazards", "instructions", "memory", "overlap", "wgmma")
    whole = {Path(__file__).with_name(f"test_ptx_{name}.py") for name in names}
    if not whole <= {item.path for item in request.session.items} or request.config.option.keyword:
        pytest.skip("some tests of the machine were left out")
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("the tests of the machine are spread over processes")
    assert set(_ptx.instruction_names()) - EXECUTED == set()
