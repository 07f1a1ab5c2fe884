"""Integer instructions of the PTX machine, moves and shuffles, against Python's and numpy's integers."""

import numpy as np
import pytest

_ptx = pytest.importorskip("afa_kernels._ptx", reason="built with AFA_BUILD_PTX_MACHINE=1 only")

from ptx_helpers import COMPARISONS, bits, per_lane  # noqa: E402

U16, U32, U64, S32, S64 = np.uint16, np.uint32, np.uint64, np.int32, np.int64
RANDOM = np.random.default_rng(5)


def low(values, dtype):
    """Return Python integers as the bits of a type."""
    size = 8 * np.dtype(dtype).itemsize
    integer = np.dtype(f"u{size // 8}")
    return np.array([int(v) & ((1 << size) - 1) for v in values], dtype=integer).view(dtype)


def integers(function, result, *types):
    """Make a case whose truth is a function of Python integers, of which the low bits count."""

    def truth(*inputs):
        return low([function(*(int(v) for v in lane)) for lane in zip(*inputs, strict=True)], result)

    return truth, result, types


def field(a, position, length, width=32):
    """Return bits [position, position + length) of a number of unlimited width."""
    return (a >> position) & ((1 << length) - 1)


def inserted(width):
    def insert(a, b, c, d):
        position, length = c & 255, d & 255
        for k in range(length):
            if position + k < width:
                b = b & ~(1 << position + k) | (a >> k & 1) << position + k
        return b

    return insert


def extracted_signed(a, b, c):
    position, length = b & 255, c & 255
    if length == 0:
        return 0
    sign = a >> min(position + length - 1, 31) & 1
    return sum(((a >> position + k & 1) if k < length and position + k < 32 else sign) << k for k in range(32))


def quotient(a, b):
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permuted(a, b, c):
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = []
    for k in range(4):
        digit = c >> 4 * k & 15
        byte = pool[digit & 7]
        out.append((255 if byte & 128 else 0) if digit & 8 else byte)
    return int.from_bytes(bytes(out), "little")


INTEGERS = {
    "add.s32": integers(lambda a, b: a + b, U32, S32, S32),
    "add.u32": integers(lambda a, b: a + b, U32, U32, U32),
    "sub.s32": integers(lambda a, b: a - b, U32, S32, S32),
    "sub.u32": integers(lambda a, b: a - b, U32, U32, U32),
    "mul.lo.s32": integers(lambda a, b: a * b, U32, S32, S32),
    "mul.lo.u32": integers(lambda a, b: a * b, U32, U32, U32),
    "mul.hi.u32": integers(lambda a, b: a * b >> 32, U32, U32, U32),
    "mad.lo.s32": integers(lambda a, b, c: a * b + c, U32, S32, S32, S32),
    "mad.lo.u32": integers(lambda a, b, c: a * b + c, U32, U32, U32, U32),
    "add.s64": integers(lambda a, b: a + b, U64, S64, S64),
    "add.u64": integers(lambda a, b: a + b, U64, U64, U64),
    "sub.s64": integers(lambda a, b: a - b, U64, S64, S64),
    "sub.u64": integers(lambda a, b: a - b, U64, U64, U64),
    "mul.lo.s64": integers(lambda a, b: a * b, U64, S64, S64),
    "mul.lo.u64": integers(lambda a, b: a * b, U64, U64, U64),
    "mad.lo.s64": integers(lambda a, b, c: a * b + c, U64, S64, S64, S64),
    "mad.lo.u64": integers(lambda a, b, c: a * b + c, U64, U64, U64, U64),
    "add.s16": integers(lambda a, b: a + b, U16, U16, U16),
    "add.u16": integers(lambda a, b: a + b, U16, U16, U16),
    "sub.s16": integers(lambda a, b: a - b, U16, U16, U16),
    "sub.u16": integers(lambda a, b: a - b, U16, U16, U16),
    "mul.lo.s16": integers(lambda a, b: a * b, U16, U16, U16),
    "mul.lo.u16": integers(lambda a, b: a * b, U16, U16, U16),
    "mul.wide.u16": integers(lambda a, b: a * b, U32, U16, U16),
    "mul.wide.u32": integers(lambda a, b: a * b, U64, U32, U32),
    "mul.wide.s32": integers(lambda a, b: a * b, U64, S32, S32),
    "mad.wide.u32": integers(lambda a, b, c: a * b + c, U64, U32, U32, U64),
    "mad.wide.s32": integers(lambda a, b, c: a * b + c, U64, S32, S32, S64),
    "neg.s32": integers(lambda a: -a, U32, S32),
    "neg.s64": integers(lambda a: -a, U64, S64),
    "min.s32": integers(min, U32, S32, S32),
    "min.u32": integers(min, U32, U32, U32),
    "min.s64": integers(min, U64, S64, S64),
    "max.s32": integers(max, U32, S32, S32),
    "max.u32": integers(max, U32, U32, U32),
    "max.s64": integers(max, U64, S64, S64),
    "and.b16": integers(lambda a, b: a & b, U16, U16, U16),
    "or.b16": integers(lambda a, b: a | b, U16, U16, U16),
    "xor.b16": integers(lambda a, b: a ^ b, U16, U16, U16),
    "and.b32": integers(lambda a, b: a & b, U32, U32, U32),
    "or.b32": integers(lambda a, b: a | b, U32, U32, U32),
    "xor.b32": integers(lambda a, b: a ^ b, U32, U32, U32),
    "not.b32": integers(lambda a: ~a, U32, U32),
    "and.b64": integers(lambda a, b: a & b, U64, U64, U64),
    "or.b64": integers(lambda a, b: a | b, U64, U64, U64),
    "xor.b64": integers(lambda a, b: a ^ b, U64, U64, U64),
    "not.b64": integers(lambda a: ~a, U64, U64),
    "shl.b16": integers(lambda a, n: a << n, U16, U16, U32),
    "shl.b32": integers(lambda a, n: a << n, U32, U32, U32),
    "shl.b64": integers(lambda a, n: a << n, U64, U64, U32),
    "shr.u16": integers(lambda a, n: a >> n, U16, U16, U32),
    "shr.u32": integers(lambda a, n: a >> n, U32, U32, U32),
    "shr.b32": integers(lambda a, n: a >> n, U32, U32, U32),
    "shr.s32": integers(lambda a, n: a >> n, U32, S32, U32),
    "shr.u64": integers(lambda a, n: a >> n, U64, U64, U32),
    "shr.b64": integers(lambda a, n: a >> n, U64, U64, U32),
    "shr.s64": integers(lambda a, n: a >> n, U64, S64, U32),
    "shf.l.wrap.b32": integers(lambda a, b, n: ((b << 32 | a) << (n & 31)) >> 32, U32, U32, U32, U32),
    "shf.r.wrap.b32": integers(lambda a, b, n: (b << 32 | a) >> (n & 31), U32, U32, U32, U32),
    "bfe.u32": integers(lambda a, b, c: field(a, b & 255, c & 255), U32, U32, U32, U32),
    "bfe.s32": integers(extracted_signed, U32, U32, U32, U32),
    "bfi.b32": integers(inserted(32), U32, U32, U32, U32, U32),
    "bfi.b64": integers(inserted(64), U64, U64, U64, U32, U32),
    "prmt.b32": integers(permuted, U32, U32, U32, U32),
    "div.s32": integers(quotient, U32, S32, S32),
    "div.u32": integers(quotient, U32, U32, U32),
    "div.s64": integers(quotient, U64, S64, S64),
    "div.u64": integers(quotient, U64, U64, U64),
    "rem.s32": integers(lambda a, b: a - b * quotient(a, b), U32, S32, S32),
    "rem.u32": integers(lambda a, b: a - b * quotient(a, b), U32, U32, U32),
    "cvt.s64.s32": integers(lambda a: a, U64, S32),
    "cvt.u64.u32": integers(lambda a: a, U64, U32),
    "cvt.u32.u64": integers(lambda a: a, U32, U64),
    "cvt.u16.u32": integers(lambda a: a, U16, U32),
    "cvt.u32.u16": integers(lambda a: a, U32, U16),
    "cvt.s32.s16": integers(lambda a: a, U32, np.int16),
    "mov.b16": integers(lambda a: a, U16, U16),
    "mov.u16": integers(lambda a: a, U16, U16),
    "mov.s16": integers(lambda a: a, U16, U16),
    "mov.b32": integers(lambda a: a, U32, U32),
    "mov.u32": integers(lambda a: a, U32, U32),
    "mov.s32": integers(lambda a: a, U32, U32),
    "mov.f32": integers(lambda a: a, U32, U32),
    "mov.b64": integers(lambda a: a, U64, U64),
    "mov.u64": integers(lambda a: a, U64, U64),
    "mov.s64": integers(lambda a: a, U64, U64),
    "mov.f64": integers(lambda a: a, U64, U64),
    "cvta.to.global.u64": integers(lambda a: a, U64, U64),
    "cvta.global.u64": integers(lambda a: a, U64, U64),
}
# Operands that count bits, by position: mostly small, so that results are not all 0.
SMALL = {"shl": (1,), "shr": (1,), "bfe": (1, 2), "bfi": (2, 3)}
NOT_ZERO = {"div": (1,), "rem": (1,)}


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_instruction(name):
    truth, result, types = INTEGERS[name]
    for _ in range(4):
        inputs = [bits(t) for t in types]
        for position in SMALL.get(name.split(".")[0], ()):
            few = RANDOM.integers(0, 40, 32).astype(types[position])
            inputs[position] = np.where(RANDOM.random(32) < 0.8, few, inputs[position] & 255).astype(types[position])
        for position in NOT_ZERO.get(name.split(".")[0], ()):
            inputs[position][inputs[position] == 0] = 3
        operands = ", ".join(f"{{a{i}}}" for i in range(len(inputs)))
        (got,) = per_lane(f"{name} {{d0}}, {operands};", inputs, [result])
        np.testing.assert_array_equal(got, truth(*inputs))


def test_multiplication_with_carry():
    a, b, c, d = (bits(U32) for _ in range(4))
    low_word, high_word = per_lane(
        "mad.lo.cc.u32 {d0}, {a0}, {a1}, {a2}; madc.hi.u32 {d1}, {a0}, {a1}, {a3};", [a, b, c, d], [U32, U32]
    )
    for lane in range(32):
        product = int(a[lane]) * int(b[lane])
        sum_low = (product & 0xFFFFFFFF) + int(c[lane])
        assert low_word[lane] == sum_low & 0xFFFFFFFF
        assert high_word[lane] == ((product >> 32) + int(d[lane]) + (sum_low >> 32)) & 0xFFFFFFFF


COMPARED = {"s16": np.int16, "u16": U16, "b16": U16, "s32": S32, "u32": U32, "b32": U32, "s64": S64, "u64": U64,
            "b64": U64}  # fmt: skip


@pytest.mark.parametrize("kind", COMPARED)
@pytest.mark.parametrize("name", COMPARISONS)
def test_integer_comparison(name, kind):
    if kind[0] == "b" and name not in ("eq", "ne"):
        assert f"setp.{name}.{kind}" not in _ptx.instruction_names()
        return
    a, b = bits(COMPARED[kind]), bits(COMPARED[kind])
    b[:12] = a[:12]
    (got,) = per_lane(f"setp.{name}.{kind} {{d0}}, {{a0}}, {{a1}};", [a, b], [bool])
    np.testing.assert_array_equal(got, COMPARISONS[name](a, b))


def test_selections_and_predicates():
    a, b, c = bits(U32), bits(U32), bits(U32)
    for kind, dtype in (("b16", U16), ("u16", U16), ("s16", U16), ("b32", U32), ("u32", U32), ("s32", U32),
                        ("f32", U32), ("b64", U64), ("u64", U64), ("s64", U64)):  # fmt: skip
        x, y = bits(dtype), bits(dtype)
        (got,) = per_lane(f"setp.lt.u32 %p9, {{a2}}, {{a3}}; selp.{kind} {{d0}}, {{a0}}, {{a1}}, %p9;",
                          [x, y, a, b], [dtype])  # fmt: skip
        np.testing.assert_array_equal(got, np.where(a < b, x, y))
    code = """setp.lt.u32 %p8, {a0}, {a1}; setp.lt.u32 %p9, {a1}, {a2};
        and.pred {d0}, %p8, %p9; or.pred {d1}, %p8, %p9; xor.pred {d2}, %p8, %p9; not.pred {d3}, %p8;
        mov.pred {d4}, %p8; mov.pred {d5}, -1; mov.pred {d6}, 0;"""
    got = per_lane(code, [a, b, c], [bool] * 7)
    p, q = a < b, b < c
    for result, expected in zip(got, [p & q, p | q, p ^ q, ~p, p, p | True, p & False], strict=True):
        np.testing.assert_array_equal(result, expected)


def test_halves_of_registers():
    word, wide = bits(U32), bits(U64)
    code = """mov.b32 {{%h30, %h31}}, {a0}; mov.b32 {d0}, {{%h31, %h30}}; mov.b32 {{_, %h32}}, {a0}; mov.b16 {d3}, %h32;
        mov.b64 {{%r50, %r51}}, {a1}; mov.b64 {d1}, {{%r51, %r50}}; mov.b64 {{_, %r52}}, {a1}; mov.b32 {d2}, %r52;"""
    swapped, wide_swapped, high, high_half = per_lane(code, [word, wide], [U32, U64, U32, U16])
    np.testing.assert_array_equal(swapped, word >> 16 | word << 16)
    np.testing.assert_array_equal(wide_swapped, wide >> U64(32) | wide << U64(32))
    np.testing.assert_array_equal(high, (wide >> U64(32)).astype(U32))
    np.testing.assert_array_equal(high_half, (word >> 16).astype(U16))


def test_narrow_part_of_a_wide_register():
    wide = bits(U64)
    signed, unsigned = per_lane("cvt.s64.s32 {d0}, {a0}; cvt.u64.u32 {d1}, {a0};", [wide], [S64, U64])
    np.testing.assert_array_equal(signed, wide.astype(U32).view(S32).astype(S64))
    np.testing.assert_array_equal(unsigned, wide & U64(0xFFFFFFFF))


def test_results_of_inactive_lanes_are_kept():
    a, b = bits(U32), bits(U32)
    (got,) = per_lane("mov.b32 {d0}, {a0}; setp.lt.u32 %p9, {a0}, {a1}; @%p9 add.s32 {d0}, {a0}, {a1};", [a, b], [U32])
    np.testing.assert_array_equal(got, np.where(a < b, a + b, a))
    (got,) = per_lane("mov.b32 {d0}, {a0}; setp.lt.u32 %p9, {a0}, {a1}; @!%p9 mov.b32 {d0}, 7;", [a, b], [U32])
    np.testing.assert_array_equal(got, np.where(a < b, a, 7))


def test_shuffle():
    a, source = bits(U32), RANDOM.integers(0, 64, 32).astype(U32)
    for control, segment in ((31, 32), (31 | 24 << 8, 8), (31 | 16 << 8, 16)):
        (got,) = per_lane(f"shfl.sync.idx.b32 {{d0}}, {{a0}}, {{a1}}, {control}, -1;", [a, source], [U32])
        lanes = np.arange(32)
        expected = a[lanes // segment * segment + source % segment]
        np.testing.assert_array_equal(got, expected)


def test_sum_over_lanes():
    a = bits(U32)
    (got,) = per_lane("redux.sync.add.s32 {d0}, {a0}, -1;", [a], [U32])
    np.testing.assert_array_equal(got, np.full(32, a.sum(dtype=U32)))
