// Warp collectives of the emulator: ldmatrix and mma, with the fragment layouts of the PTX ISA, and
// 16-bit conversions.
#include <cmath>
#include <cstring>

#include "emulator/block.h"

namespace simt {
namespace {

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float magnitude;
    if (exponent == 31)
        magnitude = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        magnitude = std::ldexp(static_cast<float>(fraction), -24);
    else
        magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
}

struct HalfTable {
    float value[65536];
    HalfTable() {
        for (int bits = 0; bits < 65536; ++bits)
            value[bits] = half_to_float(static_cast<uint16_t>(bits));
    }
};

uint16_t float_to_half(float value) {
    const uint16_t sign = static_cast<uint16_t>(bits_of(value) >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (std::isnan(value))
        return 0x7FFF;
    if (magnitude == 0.0f)
        return sign;
    if (magnitude >= 65520.0f)  // rounds to 2^16
        return sign | 0x7C00;
    int exponent;
    std::frexp(magnitude, &exponent);
    // The spacing of halves around the value; below 2^-14 it stays that of the subnormals.
    const int ulp = (exponent < -13 ? -13 : exponent) - 11;
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -ulp)));
    // `steps` units of `ulp`: a carry into the next exponent comes out right, since the encoding is
    // monotonic.
    return sign | static_cast<uint16_t>(steps + (ulp + 24) * 1024);
}

uint16_t float_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if (std::isnan(value))
        return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void run_load_matrices(Warp& warp, bool transposed) {
    ++counts.matrix_loads;
    for (int phase = 0; phase < 4; ++phase) {
        const unsigned char* rows[8];
        int per_slot[8] = {};
        for (int i = 0; i < 8; ++i) {
            rows[i] = static_cast<const unsigned char*>(warp.lane[phase * 8 + i].row);
            bool repeated = false;  // the same address is read once for all
            for (int j = 0; j < i; ++j)
                repeated |= rows[j] == rows[i];
            per_slot[reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8] += !repeated;
        }
        int worst = 1;
        for (int slot = 0; slot < 8; ++slot)
            worst = per_slot[slot] > worst ? per_slot[slot] : worst;
        counts.bank_conflicts += static_cast<uint64_t>(worst - 1);
        for (int lane = 0; lane < kWarp; ++lane) {
            uint16_t pair[2];
            for (int j = 0; j < 2; ++j) {
                const int row = transposed ? lane % 4 * 2 + j : lane / 4;
                const int col = transposed ? lane / 4 : lane % 4 * 2 + j;
                std::memcpy(&pair[j], rows[row] + 2 * col, 2);
            }
            warp.lane[lane].matrices[phase] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
        }
    }
}

// Fragments: with g = lane / 4 and q = lane % 4, a[i] holds row g + 8 * (i % 2), columns 2q + 8 *
// (i / 2) and the next; b[i] rows 2q + 8i and the next of column g; c[i] row g + 8 * (i / 2),
// column 2q + i % 2.
void run_multiply_add(Warp& warp) {
    ++counts.multiply_adds;
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const LaneOperands& from = warp.lane[lane];
        const int g = lane / 4, q = lane % 4;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i)
                a[g + 8 * (i % 2)][2 * q + 8 * (i / 2) + half] =
                    to_float(static_cast<uint16_t>(from.a[i] >> 16 * half), from.format);
            for (int i = 0; i < 2; ++i)
                b[2 * q + 8 * i + half][g] =
                    to_float(static_cast<uint16_t>(from.b[i] >> 16 * half), from.format);
        }
    }
    float sum[16][8];
    for (int row = 0; row < 16; ++row)
        for (int col = 0; col < 8; ++col)
            sum[row][col] = warp.lane[row % 8 * 4 + col / 2].c[row / 8 * 2 + col % 2];
    for (int k = 0; k < 16; ++k)
        for (int row = 0; row < 16; ++row)
            for (int col = 0; col < 8; ++col)
                sum[row][col] += a[row][k] * b[k][col];
    for (int row = 0; row < 16; ++row)
        for (int col = 0; col < 8; ++col)
            warp.lane[row % 8 * 4 + col / 2].c[row / 8 * 2 + col % 2] = sum[row][col];
}

}  // namespace

float to_float(uint16_t bits, Format format) {
    static const HalfTable halves;
    return format == Format::bf16 ? float_of(static_cast<uint32_t>(bits) << 16)
                                  : halves.value[bits];
}

uint16_t from_float(float value, Format format) {
    return format == Format::bf16 ? float_to_bf16(value) : float_to_half(value);
}

void run_collective(Warp& warp) {
    switch (warp.collective) {
    case Collective::load_matrices:
    case Collective::load_matrices_transposed:
        return run_load_matrices(warp, warp.collective == Collective::load_matrices_transposed);
    case Collective::multiply_add:
        return run_multiply_add(warp);
    case Collective::warp_sync:
        ++warp.generation;
        return;
    case Collective::none:
        return;
    }
}

void load_matrices(uint32_t (&m)[4], const void* row, bool transposed, Site site) {
    check_shared(row, 16, site);
    sanitizer_read(row, 16);
    LaneOperands operands{};
    operands.matrices = m;
    operands.row = row;
    collect(transposed ? Collective::load_matrices_transposed : Collective::load_matrices, operands,
            site);
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Format format,
                  Site site) {
    LaneOperands operands{};
    operands.c = c;
    operands.a = a;
    operands.b[0] = b0;
    operands.b[1] = b1;
    operands.format = format;
    collect(Collective::multiply_add, operands, site);
}

}  // namespace simt
