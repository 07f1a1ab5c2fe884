"""Memory and matrix instructions of the PTX machine: loads and stores of every type, and the fragments of ldmatrix,
stmatrix, mma and wgmma against the layouts that the PTX ISA publishes, written down here as CuTe gives them."""

import numpy as np
import pytest
import torch

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with AFA_BUILD_PTX_MACHINE=1 only")

from ptx_helpers import EXECUTED, HEADER, kernel, launch, layout, per_lane  # noqa: E402

RANDOM = np.random.default_rng(6)
TYPES = {"b16": 2, "u16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8}
VECTORS = [(t, v) for t in TYPES for v in (1, 2, 4) if TYPES[t] * v <= 16]


def registers(kind: str, count: int, first: int = 20) -> str:
    letter = {2: "%h", 4: "%r", 8: "%rd"}[TYPES[kind]]
    names = [f"{letter}{first + i}" for i in range(count)]
    return names[0] if count == 1 else "{" + ", ".join(names) + "}"


@pytest.mark.parametrize("kind, vector", VECTORS)
def test_loads_of_parameters(kind, vector):
    size = TYPES[kind] * vector
    dots = f".v{vector}.{kind}" if vector > 1 else f".{kind}"
    values = registers(kind, vector)
    body = f"mov.b64 %rd50, p; ld.param{dots} {values}, [%rd50+16]; st.global{dots} [%rd0], {values};"
    text = kernel(body).replace("k(", "k(.param .align 16 .b8 p[32], ")
    out, data = np.zeros(size, np.uint8), RANDOM.integers(0, 256, 32, dtype=np.uint8)
    parameters = data.tobytes() + np.uint64(out.ctypes.data).tobytes()
    EXECUTED.add(f"ld.param{dots}")
    _ptx.Module(text).launch("k", (1, 1, 1), (32, 1, 1), parameters, 0, [(out.ctypes.data, size, True, "out")])
    np.testing.assert_array_equal(out, data[16 : 16 + size])


@pytest.mark.parametrize("count", [2, 4])
def test_loads_of_bytes_of_parameters(count):
    """Flags that lie side by side."""
    values = registers("u16", count)
    body = f"mov.b64 %rd50, p; ld.param.v{count}.u8 {values}, [%rd50+4]; st.global.v{count}.u16 [%rd0], {values};"
    text = kernel(body).replace("k(", "k(.param .align 4 .b8 p[8], ")
    out, data = np.zeros(count, np.uint16), RANDOM.integers(0, 256, 8, dtype=np.uint8)
    parameters = data.tobytes() + np.uint64(out.ctypes.data).tobytes()
    EXECUTED.add(f"ld.param.v{count}.u8")
    _ptx.Module(text).launch("k", (1, 1, 1), (32, 1, 1), parameters, 0, [(out.ctypes.data, 2 * count, True, "out")])
    np.testing.assert_array_equal(out, data[4 : 4 + count])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies_of_some_bytes(size):
    """Of 32 copies, number i takes i % (size + 1) bytes and fills the rest with zeros."""
    data, out = RANDOM.integers(1, 256, (32, size), dtype=np.uint8), np.zeros((2, 32, size), dtype=np.uint8)
    values = {4: "%r20", 8: "{%r20, %r21}", 16: "{%r20, %r21, %r22, %r23}"}[size]
    dots = {4: ".b32", 8: ".v2.b32", 16: ".v4.b32"}[size]
    body = f"""
    mad.wide.u32 %rd50, %r0, {size}, %rd0;
    mad.wide.u32 %rd51, %r0, {size}, %rd1;
    mov.b32 %r50, tile;
    mad.lo.u32 %r51, %r0, {size}, %r50;
    rem.u32 %r52, %r0, {size + 1};
    cp.async.ca.shared.global [%r51 + 0], [%rd50 + 0], {size:#x}, %r52;
    cp.async.ca.shared.global [%r51 + {32 * size}], [%rd50 + 0], {size};
    cp.async.commit_group;
    cp.async.wait_group 0;
    bra.uni copied;
    trap_here: st.global.b32 [%rd1+-4], %r0;
    copied: ld.shared{dots} {values}, [%r51];
    st.global{dots} [%rd51], {values};
    ld.shared{dots} {values}, [%r51+{32 * size}];
    st.global{dots} [%rd51+{32 * size}], {values};
    """
    counters = launch(kernel(body, parameters=2, shared=64 * size), data, out)
    wanted = np.arange(32) % (size + 1)
    np.testing.assert_array_equal(out[0], np.where(np.arange(size) < wanted[:, None], data, 0))
    np.testing.assert_array_equal(out[1], data)
    assert counters["async_copies"] == 64 and counters["async_copy_bytes"] == wanted.sum() + 32 * size


@pytest.mark.parametrize("kind, vector", VECTORS)
def test_loads_and_stores(kind, vector):
    size = TYPES[kind] * vector
    dots = f".v{vector}.{kind}" if vector > 1 else f".{kind}"
    data = RANDOM.integers(0, 256, (32, size), dtype=np.uint8)
    out = np.zeros((3, 32, size), dtype=np.uint8)
    values = registers(kind, vector)
    body = f"""
    mad.wide.u32 %rd50, %r0, {size}, %rd0;
    mad.wide.u32 %rd51, %r0, {size}, %rd1;
    ld.global{dots} {values}, [%rd50];
    st.global{dots} [%rd51], {values};
    ld.global.nc{dots} {values}, [%rd50+0];
    st.global{dots} [%rd51+{32 * size}], {values};
    mov.b32 %r50, tile;
    mad.lo.u32 %r51, %r0, {size}, %r50;
    sub.u32 %r52, %r51, {size};
    st.shared{dots} [%r51], {values};
    bar.warp.sync -1;
    xor.b32 %r53, %r0, 5;
    mad.lo.u32 %r51, %r53, {size}, %r50;
    ld.shared{dots} {values}, [%r51];
    st.global{dots} [%rd51+{64 * size}], {values};
    """
    counters = launch(kernel(body, parameters=2, shared=32 * size), data, out)
    np.testing.assert_array_equal(out[0], data)
    np.testing.assert_array_equal(out[1], data)
    np.testing.assert_array_equal(out[2], data[np.arange(32) ^ 5])
    assert counters["global_loads"][size] == 64 and counters["global_stores"][size] == 96
    assert counters["shared_read_bytes"] == counters["shared_write_bytes"] == 32 * size


def test_registers_wider_than_the_type():
    body = """
    ld.global.s32 %rd20, [%rd0];
    ld.global.u16 %r20, [%rd0];
    st.global.u64 [%rd1], %rd20;
    st.global.u32 [%rd1+8], %r20;
    st.global.u16 [%rd1+12], %rd20;
    """
    data, out = np.array([-5], dtype=np.int32), np.zeros(16, dtype=np.uint8)
    one = "setp.ne.s32 %p1, %r0, 0; @%p1 bra done;" + body + "done:"
    launch(kernel(one, parameters=2), data, out)
    assert out[:8].view(np.int64)[0] == -5
    assert out[8:12].view(np.uint32)[0] == 0xFFFB and out[12:14].view(np.uint16)[0] == 0xFFFB


def test_parameters_keep_their_offsets():
    text = (
        HEADER
        + """
.visible .entry k(.param .u32 a, .param .align 8 .b8 s[24], .param .f32 f, .param .u64 .ptr .global .align 1 out)
{
    .reg .b16 %h<3>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.u64 %rd0, [out];
    ld.param.u32 %r0, [a];
    mov.b64 %rd1, s;
    ld.param.v2.u32 {%r1, %r2}, [%rd1+8];
    ld.param.u64 %rd2, [s+16];
    ld.param.f32 %r3, [f];
    ld.param.u8 %h1, [s+1];
    cvt.u32.u16 %r4, %h1;
    ld.param.s32 %rd3, [a];
    st.global.v4.b32 [%rd0], {%r0, %r1, %r2, %r3};
    st.global.v2.b64 [%rd0+16], {%rd2, %rd3};
    st.global.b32 [%rd0+32], %r4;
    ret;
}"""
    )
    module = _ptx.Module(text)
    offsets = {p["name"]: (p["offset"], p["bytes"]) for p in module.kernels()["k"]["parameters"]}
    assert offsets == {"a": (0, 4), "s": (8, 24), "f": (32, 4), "out": (40, 8)}
    out = np.zeros(9, dtype=np.uint32)
    parameters = bytearray(48)
    parameters[0:4] = np.int32(-7).tobytes()
    parameters[8:32] = bytes(range(100, 124))
    parameters[32:36] = np.float32(1.5).tobytes()
    parameters[40:48] = np.uint64(out.ctypes.data).tobytes()
    EXECUTED.add("ld.param.u8")
    module.launch("k", (1, 1, 1), (1, 1, 1), bytes(parameters), 0, [(out.ctypes.data, 36, True, "out")])
    words = np.frombuffer(bytes(range(108, 124)), dtype=np.uint32)
    assert out[0] == 2**32 - 7 and list(out[1:3]) == list(words[:2]) and out[3:4].view(np.float32)[0] == 1.5
    assert list(out[4:6]) == list(words[2:]) and out[6:8].view(np.int64)[0] == -7 and out[8] == 101


def test_local_memory_is_each_lanes_own():
    body = """
    .local .align 4 .b8 depot[16];
    mov.u64 %rd20, depot;
    cvta.local.u64 %rd21, %rd20;
    cvta.to.local.u64 %rd22, %rd21;
    st.local.u32 [%rd22+4], %r0;
    mov.b32 %r20, depot;
    add.u32 %r21, %r0, 100;
    st.local.b32 [%r20+8], %r21;
    ld.local.b32 %r22, [%rd20+4];
    ld.local.u32 %r23, [%r20+8];
    mad.wide.u32 %rd23, %r0, 8, %rd0;
    st.global.v2.b32 [%rd23], {%r22, %r23};
    """
    out = np.zeros((32, 2), dtype=np.uint32)
    launch(kernel(body), out)
    np.testing.assert_array_equal(out, np.arange(32)[:, None] + [0, 100])


def test_generic_addresses_of_shared_memory():
    body = """
    mov.u64 %rd20, tile;
    cvta.shared.u64 %rd21, %rd20;
    mad.wide.u32 %rd21, %r0, 4, %rd21;
    cvta.to.shared.u64 %rd22, %rd21;
    st.shared.u32 [%rd22], %r0;
    ld.shared.u32 %r20, [%rd22];
    mad.wide.u32 %rd23, %r0, 4, %rd0;
    st.global.u32 [%rd23], %r20;
    """
    out = np.zeros(32, dtype=np.uint32)
    launch(kernel(body, shared=128), out)
    np.testing.assert_array_equal(out, np.arange(32))


def test_initialized_global_arrays():
    table = ".global .align 4 .b8 table[8] = {1, 2, 3, 4, 255, 0, 0, 1};\n"
    body = """
    mov.u64 %rd20, table;
    ld.global.nc.b32 %r20, [%rd20+4];
    ld.global.b32 %r21, [table];
    mad.wide.u32 %rd21, %r0, 8, %rd0;
    st.global.v2.b32 [%rd21], {%r20, %r21};
    """
    out = np.zeros((32, 2), dtype=np.uint32)
    launch(kernel(body).replace(HEADER, HEADER + table), out)
    assert (out == [0x010000FF, 0x04030201]).all()


# --- Fragments ---


# CuTe's SM80_16x8x16 and SM80_16x8x8 (tf32): (thread, value) -> column-major offset in A, B (N x K) and C.
A16 = layout((4, 8, 2, 2, 2), (32, 1, 16, 8, 128)).reshape(8, 32).T
B16 = layout((4, 8, 2, 2), (16, 1, 8, 64)).reshape(4, 32).T
A8 = layout((4, 8, 2, 2), (16, 1, 8, 64)).reshape(4, 32).T
B8 = layout((4, 8, 2), (8, 1, 32)).reshape(2, 32).T
C = layout((4, 8, 2, 2), (32, 1, 16, 8)).reshape(4, 32).T
ELEMENTS = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def words(values: torch.Tensor) -> np.ndarray:
    """Return elements as 32-bit words, the first element low."""
    return values.contiguous().view(torch.int32).numpy().view(np.uint32)


def truncated(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what a tensor core sees of its operands."""
    if kind != "tf32":
        return values.double()
    return (values.view(torch.int32) & ~0x1FFF).view(torch.float32).double()


@pytest.mark.parametrize("kind", ELEMENTS)
def test_multiply_add_matches_the_documented_fragments(kind):
    depth, a_map, b_map = (8, A8, B8) if kind == "tf32" else (16, A16, B16)
    torch.manual_seed(1)
    a, b = torch.randn(16, depth).to(ELEMENTS[kind]), torch.randn(8, depth).to(ELEMENTS[kind])
    c = torch.randn(16, 8)
    fragments = [words(a.T.reshape(-1)[torch.from_numpy(a_map)]), words(b.T.reshape(-1)[torch.from_numpy(b_map)]),
                 words(c.T.reshape(-1)[torch.from_numpy(C)])]  # fmt: skip
    inputs = [np.ascontiguousarray(f[:, i]) for f in fragments for i in range(f.shape[1])]
    code = (
        f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{{{{{d0}}, {{d1}}, {{d2}}, {{d3}}}}}}, "
        "{{{a0}, {a1}, {a2}, {a3}}}, {{{a4}, {a5}}}, {{{a6}, {a7}, {a8}, {a9}}}"
    )
    got = per_lane(code + ";", inputs, [np.float32] * 4)
    expected = c.double() + truncated(a, kind) @ truncated(b, kind).T
    result = torch.zeros(16 * 8, dtype=torch.float64)
    result[torch.from_numpy(C).reshape(-1)] = torch.from_numpy(np.stack(got, 1).reshape(-1)).double()
    torch.testing.assert_close(result.view(8, 16).T, expected, rtol=1e-6, atol=1e-5)


def test_sums_of_multiply_add_are_float32_in_the_order_of_k():
    a, b, c = np.zeros(32, np.uint32), np.zeros(32, np.uint32), np.zeros(32, np.float32)
    one = 0x3C003C00  # f16: (1, 1)
    code = ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{d0}, {d1}, {d2}, {d3}}}, {{{a0}, {a0}, {a0}, {a0}}}, "
            "{{{a1}, {a1}}}, {{{a2}, {a2}, {a2}, {a2}}};")  # fmt: skip
    a[:], b[:], c[:] = one, one, 2**24
    first = per_lane(code, [a, b, c], [np.float32] * 4)
    assert (np.stack(first) == 2**24).all()  # each 1 is lost, one after the other


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrix_loads_and_stores(count, transposed):
    trans = ".trans" if transposed else ""
    data = RANDOM.integers(0, 65536, (count, 8, 8), dtype=np.uint16)
    loaded, stored = np.zeros((count, 32), np.uint32), np.zeros_like(data)
    regs = registers("b32", count, 60)
    name = f"matrix.sync.aligned.m8n8.x{count}{trans}.shared.b16"
    rows = 8 * count
    body = f"""
    mov.b32 %r50, tile;
    rem.u32 %r51, %r0, {rows};
    mad.lo.u32 %r52, %r51, 16, %r50;
    mad.wide.u32 %rd50, %r51, 16, %rd0;
    setp.lt.u32 %p1, %r0, {rows};
    @%p1 ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd50];
    @%p1 st.shared.v4.b32 [%r52], {{%r30, %r31, %r32, %r33}};
    bar.sync 0;
    ld{name} {regs}, [%r52+0];
    """
    for i in range(count):
        body += f"mad.wide.u32 %rd51, %r0, 4, %rd1; st.global.b32 [%rd51+{128 * i}], %r{60 + i};\n"
    body += f"""
    st{name} [%r52+{128 * count}], {regs};
    bar.sync 0;
    mad.wide.u32 %rd52, %r51, 16, %rd2;
    @%p1 ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r52+{128 * count}];
    @%p1 st.global.v4.b32 [%rd52], {{%r30, %r31, %r32, %r33}};
    """
    counters = launch(kernel(body, parameters=3, shared=256 * count), data, loaded, stored)
    np.testing.assert_array_equal(stored, data)
    # CuTe's SM75_U32x1_LDSM: thread t holds elements 2t and 2t + 1 of the rows; transposed, rows 2q and 2q + 1 of
    # column g.
    lanes = np.arange(32)
    matrices = data.transpose(0, 2, 1) if transposed else data
    pairs = matrices.reshape(count, 32, 2).astype(np.uint32)
    np.testing.assert_array_equal(loaded, pairs[:, lanes, 0] | pairs[:, lanes, 1] << 16)
    assert counters["matrix_loads"] == counters["matrix_stores"] == 1 and counters["bank_conflicts"] == 0


@pytest.mark.parametrize("pitch, conflicts", [(16, 0), (32, 4), (64, 12), (128, 28), (80, 0), (144, 0)])
def test_bank_conflicts_of_matrix_loads(pitch, conflicts):
    body = f"""
    mov.b32 %r50, tile;
    mad.lo.u32 %r51, %r0, {pitch}, %r50;
    mov.b32 %r52, 0;
    st.shared.v4.b32 [%r51], {{%r52, %r52, %r52, %r52}};
    bar.warp.sync -1;
    """
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r60, %r61, %r62, %r63}, [%r51];"
    before = launch(kernel(body, parameters=0, shared=32 * pitch))["bank_conflicts"]
    after = launch(kernel(body + load, parameters=0, shared=32 * pitch))["bank_conflicts"]
    assert after - before == conflicts


@pytest.mark.parametrize(
    "stride, size, conflicts",
    [(4, 4, 0), (8, 4, 1), (128, 4, 31), (0, 4, 0), (8, 8, 0), (16, 8, 2), (16, 16, 0), (32, 16, 4)],
)
def test_bank_conflicts_of_plain_accesses(stride, size, conflicts):
    kind = {4: "b32 [%r51], %r52", 8: "v2.b32 [%r51], {%r52, %r52}", 16: "v4.b32 [%r51], {%r52, %r52, %r52, %r52}"}[
        size
    ]
    body = f"mov.b32 %r50, tile; mad.lo.u32 %r51, %r0, {stride}, %r50; mov.b32 %r52, 0; st.shared.{kind};"
    assert launch(kernel(body, parameters=0, shared=4096))["bank_conflicts"] == conflicts
