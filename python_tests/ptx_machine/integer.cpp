// Integer arithmetic, comparisons, shifts and bit fields.
#include <algorithm>
#include <type_traits>

#include "ptx_machine/forms.h"
#include "ptx_machine/map.h"

namespace ptx {
namespace {

using s32 = int32_t;
using u32 = uint32_t;
using s64 = int64_t;
using u64 = uint64_t;

// Results wrap around, of signed numbers too, which C++ leaves undefined.
template <typename T>
std::make_unsigned_t<T> bits_of(T a) {
    return static_cast<std::make_unsigned_t<T>>(a);
}
template <typename T>
T add(T a, T b) {
    return static_cast<T>(bits_of(a) + bits_of(b));
}
template <typename T>
T sub(T a, T b) {
    return static_cast<T>(bits_of(a) - bits_of(b));
}
template <typename T>
T mul_lo(T a, T b) {
    return static_cast<T>(bits_of(a) * bits_of(b));
}
template <typename T>
T mad_lo(T a, T b, T c) {
    return static_cast<T>(bits_of(a) * bits_of(b) + bits_of(c));
}
template <typename T>
T negate(T a) {
    return static_cast<T>(0 - bits_of(a));
}
template <typename T>
T bit_and(T a, T b) {
    return a & b;
}
template <typename T>
T bit_or(T a, T b) {
    return a | b;
}
template <typename T>
T bit_xor(T a, T b) {
    return a ^ b;
}
template <typename T>
T bit_not(T a) {
    return ~a;
}
template <typename T>
T minimum(T a, T b) {
    return a < b ? a : b;
}
template <typename T>
T maximum(T a, T b) {
    return a > b ? a : b;
}

u32 mul_hi_u32(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }
u64 mul_wide_u32(u32 a, u32 b) { return static_cast<u64>(a) * b; }
s64 mul_wide_s32(s32 a, s32 b) { return static_cast<s64>(a) * b; }
u32 mul_wide_u16(u32 a, u32 b) { return a * b; }
u64 mad_wide_u32(u32 a, u32 b, u64 c) { return static_cast<u64>(a) * b + c; }
u64 mad_wide_s32(s32 a, s32 b, u64 c) { return static_cast<u64>(static_cast<s64>(a) * b) + c; }

// Shift counts beyond the width clamp to it.
u32 shl_32(u32 a, u32 n) { return n > 31 ? 0 : a << n; }
u64 shl_64(u64 a, u32 n) { return n > 63 ? 0 : a << n; }
u32 shr_u32(u32 a, u32 n) { return n > 31 ? 0 : a >> n; }
u64 shr_u64(u64 a, u32 n) { return n > 63 ? 0 : a >> n; }
s32 shr_s32(s32 a, u32 n) { return a >> (n > 31 ? 31 : n); }
s64 shr_s64(s64 a, u32 n) { return a >> (n > 63 ? 63 : n); }

// The upper (left) or lower (right) word of {b, a} shifted.
u32 funnel_left(u32 a, u32 b, u32 n) {
    return static_cast<u32>((static_cast<u64>(b) << 32 | a) << (n & 31) >> 32);
}
u32 funnel_right(u32 a, u32 b, u32 n) {
    return static_cast<u32>((static_cast<u64>(b) << 32 | a) >> (n & 31));
}

u32 low(u32 a) { return a & 0xFFFF; }
u32 shl_16(u32 a, u32 n) { return n > 15 ? 0 : low(a << n); }
u32 shr_u16(u32 a, u32 n) { return n > 15 ? 0 : a >> n; }
u32 mul_lo_16(u32 a, u32 b) { return low(a * b); }
u32 add_16(u32 a, u32 b) { return low(a + b); }
u32 sub_16(u32 a, u32 b) { return low(a - b); }

// Bits [position, position + length) of a; bits of the field beyond the register are the sign.
u32 bfe_u32(u32 a, u32 b, u32 c) {
    const u32 position = b & 255, length = c & 255;
    if (position > 31 || length == 0)
        return 0;
    const u32 shifted = a >> position;
    return length > 31 ? shifted : shifted & ((1u << length) - 1);
}
s32 bfe_s32(s32 a, u32 b, u32 c) {
    const u32 position = b & 255, length = c & 255;
    if (length == 0)
        return 0;
    if (position > 31)
        return a >> 31;
    if (position + length > 31)
        return a >> position;
    return static_cast<s32>(static_cast<u32>(a) << (32 - position - length)) >> (32 - length);
}
// b with its bits [position, position + length) replaced by the low bits of a.
template <typename T>
T bfi(T a, T b, u32 c, u32 d) {
    constexpr u32 kBits = 8 * sizeof(T);
    const u32 position = c & 255, length = d & 255;
    if (position >= kBits || length == 0)
        return b;
    const T ones = length >= kBits ? ~T(0) : (T(1) << length) - 1;
    return (b & ~(ones << position)) | ((a & ones) << position);
}

// Bytes of {b, a} picked by the digits of c; bit 3 of a digit repeats the byte's sign instead.
u32 permute(u32 a, u32 b, u32 c) {
    const u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
        const u32 digit = c >> 4 * k & 15;
        u32 byte = static_cast<u32>(bytes >> 8 * (digit & 7)) & 255;
        if (digit & 8)
            byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * k;
    }
    return result;
}

template <typename T, bool kRemainder>
void divide(Warp& warp, const Instruction& i) {
    const T *a = warp.in<T>(i.op[1]), *b = warp.in<T>(i.op[2]);
    T result[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(warp.active >> lane & 1))
            continue;
        if (b[lane] == 0)
            throw Fault{lane, "divides by zero"};
        if (std::is_signed_v<T> && b[lane] == T(-1))
            result[lane] = kRemainder ? 0 : negate(a[lane]);
        else
            result[lane] = kRemainder ? a[lane] % b[lane] : a[lane] / b[lane];
    }
    warp.out(i.op[0], result);
}

// d = low half of a * b, plus c; the carry is kept for the next instruction.
void mad_lo_set_carry(Warp& warp, const Instruction& i) {
    const u32 *a = warp.in<u32>(i.op[1]), *b = warp.in<u32>(i.op[2]), *c = warp.in<u32>(i.op[3]);
    u32 result[kLanes], carry = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        const u64 sum = static_cast<u64>(a[lane] * b[lane]) + c[lane];
        result[lane] = static_cast<u32>(sum);
        carry |= static_cast<u32>(sum >> 32) << lane;
    }
    warp.carry = (warp.carry & ~warp.active) | (carry & warp.active);
    warp.carry_defined |= warp.active;
    warp.out(i.op[0], result);
}

// d = high half of a * b, plus c and the carry.
void mad_hi_add_carry(Warp& warp, const Instruction& i) {
    const u32 *a = warp.in<u32>(i.op[1]), *b = warp.in<u32>(i.op[2]), *c = warp.in<u32>(i.op[3]);
    if (warp.active & ~warp.carry_defined)
        throw Fault{__builtin_ctz(warp.active & ~warp.carry_defined),
                    "reads the carry, which nothing has written"};
    u32 result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
        result[lane] = mul_hi_u32(a[lane], b[lane]) + c[lane] + (warp.carry >> lane & 1);
    warp.out(i.op[0], result);
}

template <typename T>
bool equal(T a, T b) {
    return a == b;
}
template <typename T>
bool unequal(T a, T b) {
    return a != b;
}
template <typename T>
bool less(T a, T b) {
    return a < b;
}
template <typename T>
bool less_equal(T a, T b) {
    return a <= b;
}
template <typename T>
bool greater(T a, T b) {
    return a > b;
}
template <typename T>
bool greater_equal(T a, T b) {
    return a >= b;
}

s32 extended(u32 a) { return static_cast<int16_t>(a); }
bool less_s16(u32 a, u32 b) { return extended(a) < extended(b); }
bool less_equal_s16(u32 a, u32 b) { return extended(a) <= extended(b); }
bool greater_s16(u32 a, u32 b) { return extended(a) > extended(b); }
bool greater_equal_s16(u32 a, u32 b) { return extended(a) >= extended(b); }

template <typename T>
void add_comparisons(Forms& f, const std::string& type, const char* operands) {
    f.add("setp.eq." + type, operands, map<equal<T>>);
    f.add("setp.ne." + type, operands, map<unequal<T>>);
    if (type[0] == 'b')
        return;
    f.add("setp.lt." + type, operands, map<less<T>>);
    f.add("setp.le." + type, operands, map<less_equal<T>>);
    f.add("setp.gt." + type, operands, map<greater<T>>);
    f.add("setp.ge." + type, operands, map<greater_equal<T>>);
}

template <typename T>
void add_bitwise(Forms& f, const std::string& type, const char* two, const char* one) {
    f.add("and." + type, two, map<bit_and<T>>);
    f.add("or." + type, two, map<bit_or<T>>);
    f.add("xor." + type, two, map<bit_xor<T>>);
    f.add("not." + type, one, map<bit_not<T>>);
}

template <int kOperation>
void combine_predicates(Warp& warp, const Instruction& i) {
    const uint32_t a = warp.predicate(i.op[1]);
    if constexpr (kOperation == 3) {
        warp.set_predicate(i.op[0], ~a);
    } else {
        const uint32_t b = warp.predicate(i.op[2]);
        warp.set_predicate(i.op[0], kOperation == 0   ? (a & b)
                                    : kOperation == 1 ? (a | b)
                                                      : (a ^ b));
    }
}

}  // namespace

void add_integer_forms(Forms& f) {
    for (const char* type : {"s32", "u32"}) {
        const std::string t = type;
        f.add("add." + t, "Ddd", map<add<u32>>);
        f.add("sub." + t, "Ddd", map<sub<u32>>);
        f.add("mul.lo." + t, "Ddd", map<mul_lo<u32>>);
        f.add("mad.lo." + t, "Dddd", map<mad_lo<u32>>);
    }
    for (const char* type : {"s64", "u64"}) {
        const std::string t = type;
        f.add("add." + t, "Qqq", map<add<u64>>);
        f.add("sub." + t, "Qqq", map<sub<u64>>);
        f.add("mul.lo." + t, "Qqq", map<mul_lo<u64>>);
        f.add("mad.lo." + t, "Qqqq", map<mad_lo<u64>>);
    }
    for (const char* type : {"s16", "u16"}) {
        const std::string t = type;
        f.add("add." + t, "Hhh", map<add_16>);
        f.add("sub." + t, "Hhh", map<sub_16>);
        f.add("mul.lo." + t, "Hhh", map<mul_lo_16>);
    }
    f.add("mad.lo.cc.u32", "Dddd", mad_lo_set_carry);
    f.add("madc.hi.u32", "Dddd", mad_hi_add_carry);
    f.add("mul.hi.u32", "Ddd", map<mul_hi_u32>);
    f.add("mul.wide.u32", "Qdd", map<mul_wide_u32>);
    f.add("mul.wide.s32", "Qdd", map<mul_wide_s32>);
    f.add("mul.wide.u16", "Dhh", map<mul_wide_u16>);
    f.add("mad.wide.u32", "Qddq", map<mad_wide_u32>);
    f.add("mad.wide.s32", "Qddq", map<mad_wide_s32>);
    f.add("neg.s32", "Dd", map<negate<u32>>);
    f.add("neg.s64", "Qq", map<negate<u64>>);
    f.add("min.s32", "Ddd", map<minimum<s32>>);
    f.add("min.u32", "Ddd", map<minimum<u32>>);
    f.add("min.s64", "Qqq", map<minimum<s64>>);
    f.add("max.s32", "Ddd", map<maximum<s32>>);
    f.add("max.u32", "Ddd", map<maximum<u32>>);
    f.add("max.s64", "Qqq", map<maximum<s64>>);
    f.add("div.s32", "Ddd", divide<s32, false>);
    f.add("div.u32", "Ddd", divide<u32, false>);
    f.add("div.s64", "Qqq", divide<s64, false>);
    f.add("div.u64", "Qqq", divide<u64, false>);
    f.add("rem.s32", "Ddd", divide<s32, true>);
    f.add("rem.u32", "Ddd", divide<u32, true>);

    add_bitwise<u32>(f, "b32", "Ddd", "Dd");
    add_bitwise<u64>(f, "b64", "Qqq", "Qq");
    f.add("and.b16", "Hhh", map<bit_and<u32>>);
    f.add("or.b16", "Hhh", map<bit_or<u32>>);
    f.add("xor.b16", "Hhh", map<bit_xor<u32>>);
    f.add("shl.b16", "Hhd", map<shl_16>);
    f.add("shr.u16", "Hhd", map<shr_u16>);
    f.add("shl.b32", "Ddd", map<shl_32>);
    f.add("shr.u32", "Ddd", map<shr_u32>);
    f.add("shr.b32", "Ddd", map<shr_u32>);
    f.add("shr.s32", "Ddd", map<shr_s32>);
    f.add("shl.b64", "Qqd", map<shl_64>);
    f.add("shr.u64", "Qqd", map<shr_u64>);
    f.add("shr.b64", "Qqd", map<shr_u64>);
    f.add("shr.s64", "Qqd", map<shr_s64>);
    f.add("shf.l.wrap.b32", "Dddd", map<funnel_left>);
    f.add("shf.r.wrap.b32", "Dddd", map<funnel_right>);
    f.add("bfe.u32", "Dddd", map<bfe_u32>);
    f.add("bfe.s32", "Dddd", map<bfe_s32>);
    f.add("bfi.b32", "Ddddd", map<bfi<u32>>);
    f.add("bfi.b64", "Qqqdd", map<bfi<u64>>);
    f.add("prmt.b32", "Dddd", map<permute>);

    f.add("and.pred", "Ppp", combine_predicates<0>);
    f.add("or.pred", "Ppp", combine_predicates<1>);
    f.add("xor.pred", "Ppp", combine_predicates<2>);
    f.add("not.pred", "Pp", combine_predicates<3>);

    add_comparisons<s32>(f, "s32", "Pdd");
    add_comparisons<u32>(f, "u32", "Pdd");
    add_comparisons<u32>(f, "b32", "Pdd");
    add_comparisons<s64>(f, "s64", "Pqq");
    add_comparisons<u64>(f, "u64", "Pqq");
    add_comparisons<u64>(f, "b64", "Pqq");
    add_comparisons<u32>(f, "u16", "Phh");
    add_comparisons<u32>(f, "b16", "Phh");
    f.add("setp.eq.s16", "Phh", map<equal<u32>>);
    f.add("setp.ne.s16", "Phh", map<unequal<u32>>);
    f.add("setp.lt.s16", "Phh", map<less_s16>);
    f.add("setp.le.s16", "Phh", map<less_equal_s16>);
    f.add("setp.gt.s16", "Phh", map<greater_s16>);
    f.add("setp.ge.s16", "Phh", map<greater_equal_s16>);
}

}  // namespace ptx
