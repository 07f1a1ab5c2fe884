// Conversions, moves and selections.
#include <algorithm>
#include <cmath>

#include "ptx_machine/forms.h"
#include "ptx_machine/half.h"
#include "ptx_machine/map.h"

namespace ptx {
namespace {

uint32_t identity_32(uint32_t a) { return a; }
uint64_t identity_64(uint64_t a) { return a; }

int64_t s64_of_s32(int32_t a) { return a; }
uint64_t u64_of_u32(uint32_t a) { return a; }
// The source may be a wider register, of which the low part counts.
int64_t s64_of_low_s32(uint64_t a) { return static_cast<int32_t>(a); }
uint64_t u64_of_low_u32(uint64_t a) { return static_cast<uint32_t>(a); }
uint32_t u32_of_u64(uint64_t a) { return static_cast<uint32_t>(a); }
uint32_t u16_of_u32(uint32_t a) { return a & 0xFFFF; }
int32_t s32_of_s16(uint32_t a) { return static_cast<int16_t>(a); }

float f32_of_f64(double a) { return static_cast<float>(a); }
double f64_of_s64(int64_t a) { return static_cast<double>(a); }
float f32_of_s32(int32_t a) { return static_cast<float>(a); }
float f32_of_u32(uint32_t a) { return static_cast<float>(a); }
// Saturates; NaN gives 0.
int32_t s32_of_f32(float a) {
    if (a != a)
        return 0;
    const double rounded = std::nearbyint(static_cast<double>(a));
    return static_cast<int32_t>(std::clamp(rounded, -2147483648.0, 2147483647.0));
}
// To [0, 1]; NaN gives 0.
float saturate(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }

uint32_t bf16_pair(float high, float low) { return float_to_bf16(high) << 16 | float_to_bf16(low); }
uint32_t f16_pair(float high, float low) { return float_to_f16(high) << 16 | float_to_f16(low); }

void move_predicate(Warp& warp, const Instruction& i) {
    warp.set_predicate(i.op[0], warp.predicate(i.op[1]));
}

template <typename T>
void select(Warp& warp, const Instruction& i) {
    const T *a = warp.in<T>(i.op[1]), *b = warp.in<T>(i.op[2]);
    const uint32_t which = warp.predicate(i.op[3]);
    T result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
        result[lane] = which >> lane & 1 ? a[lane] : b[lane];
    warp.out(i.op[0], result);
}

// mov between a register and the two halves of it; T holds the whole, a half is in 32 bits.
template <typename T, int kHalfBits>
void join(Warp& warp, const Instruction& i) {
    const uint32_t *low = warp.in<uint32_t>(i.op[1]), *high = warp.in<uint32_t>(i.op[2]);
    T result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
        result[lane] = static_cast<T>(high[lane]) << kHalfBits | low[lane];
    warp.out(i.op[0], result);
}

template <typename T, int kHalfBits>
void split(Warp& warp, const Instruction& i) {
    const T* whole = warp.in<T>(i.op[2]);
    uint32_t low[kLanes], high[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        low[lane] = static_cast<uint32_t>(whole[lane]);
        if (kHalfBits == 16)
            low[lane] &= 0xFFFF;
        high[lane] = static_cast<uint32_t>(whole[lane] >> kHalfBits);
    }
    if (i.op[0] != kSink)
        warp.out(i.op[0], low);
    if (i.op[1] != kSink)
        warp.out(i.op[1], high);
}

// Generic addresses: those of global memory are the same, the others are in windows.
template <uint64_t kWindow>
uint64_t to_generic(uint64_t a) {
    return kWindow + a;
}
template <uint64_t kWindow>
void from_generic(Warp& warp, const Instruction& i) {
    const uint64_t* a = warp.in<uint64_t>(i.op[1]);
    uint64_t result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        if ((warp.active >> lane & 1) && a[lane] - kWindow > 0xFFFFFFFFull)
            throw Fault{lane, "a generic address that is not of this state space"};
        result[lane] = a[lane] - kWindow;
    }
    warp.out(i.op[0], result);
}

}  // namespace

void add_move_forms(Forms& f) {
    for (const char* type : {"b32", "u32", "s32", "f32"})
        f.add(std::string("mov.") + type, "Ds", map<identity_32>);
    for (const char* type : {"b64", "u64", "s64", "f64"})
        f.add(std::string("mov.") + type, "QS", map<identity_64>);
    for (const char* type : {"b16", "u16", "s16"})
        f.add(std::string("mov.") + type, "Hh", map<identity_32>);
    f.add("mov.pred", "Pp", move_predicate);
    f.add("mov.b32", "D{hh}", join<uint32_t, 16>);
    f.add("mov.b32", "{~~}d", split<uint32_t, 16>);
    f.add("mov.b64", "Q{dd}", join<uint64_t, 32>);
    f.add("mov.b64", "{__}q", split<uint64_t, 32>);

    for (const char* type : {"b16", "u16", "s16"})
        f.add(std::string("selp.") + type, "Hhhp", select<uint32_t>);
    for (const char* type : {"b32", "u32", "s32", "f32"})
        f.add(std::string("selp.") + type, "Dddp", select<uint32_t>);
    for (const char* type : {"b64", "u64", "s64"})
        f.add(std::string("selp.") + type, "Qqqp", select<uint64_t>);

    f.add("cvta.to.global.u64", "Qq", map<identity_64>);
    f.add("cvta.global.u64", "QS", map<identity_64>);
    f.add("cvta.shared.u64", "QS", map<to_generic<kSharedWindow>>);
    f.add("cvta.to.shared.u64", "Qq", from_generic<kSharedWindow>);
    f.add("cvta.local.u64", "QS", map<to_generic<kLocalWindow>>);
    f.add("cvta.to.local.u64", "Qq", from_generic<kLocalWindow>);
}

void add_convert_forms(Forms& f) {
    f.add("cvt.s64.s32", "Qd", map<s64_of_s32>);
    f.add("cvt.u64.u32", "Qd", map<u64_of_u32>);
    f.add("cvt.s64.s32", "Qq", map<s64_of_low_s32>);
    f.add("cvt.u64.u32", "Qq", map<u64_of_low_u32>);
    f.add("cvt.u32.u64", "Dq", map<u32_of_u64>);
    f.add("cvt.u16.u32", "Hd", map<u16_of_u32>);
    f.add("cvt.u32.u16", "Dh", map<identity_32>);
    f.add("cvt.s32.s16", "Dh", map<s32_of_s16>);
    f.add("cvt.rn.f32.f64", "Dq", map<f32_of_f64>);
    f.add("cvt.rn.f64.s64", "Qq", map<f64_of_s64>);
    f.add("cvt.rn.f32.s32", "Dd", map<f32_of_s32>);
    f.add("cvt.rn.f32.u32", "Dd", map<f32_of_u32>);
    f.add("cvt.rni.s32.f32", "Dd", map<s32_of_f32>);
    f.add("cvt.rni.ftz.s32.f32", "Dd", map<s32_of_f32>);  // a subnormal rounds to 0 either way
    f.add("cvt.sat.f32.f32", "Dd", map<saturate>);
    f.add("cvt.f32.bf16", "Dh", map<bf16_to_float>);
    f.add("cvt.f32.f16", "Dh", map<f16_to_float>);
    f.add("cvt.rn.bf16.f32", "Hd", map<float_to_bf16>);
    f.add("cvt.rn.f16.f32", "Hd", map<float_to_f16>);
    f.add("cvt.rn.bf16x2.f32", "Ddd", map<bf16_pair>);
    f.add("cvt.rn.f16x2.f32", "Ddd", map<f16_pair>);
}

}  // namespace ptx
