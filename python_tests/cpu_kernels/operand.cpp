#include "cpu_kernels/operand.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace afa::cpu::test {

namespace {
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
double read(const void* p, Dtype dtype) {
    if (dtype == Dtype::f64)
        return *static_cast<const double*>(p);
    if (dtype == Dtype::f32)
        return *static_cast<const float*>(p);
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    if (dtype == Dtype::bf16) {
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
    const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 31)
        return mantissa ? static_cast<double>(kNan)
                        : sign * std::numeric_limits<double>::infinity();
    return sign *
           (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

void write(double value, void* p, Dtype dtype) {
    const float single = static_cast<float>(value);
    if (dtype == Dtype::f64) {
        *static_cast<double*>(p) = value;
    } else if (dtype == Dtype::f32) {
        *static_cast<float*>(p) = single;
    } else {
        uint32_t bits;
        std::memcpy(&bits, &single, 4);
        uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (dtype == Dtype::f16) {
            const int exponent = static_cast<int>((bits >> 23) & 255) - 112;
            half = std::isnan(single)
                       ? 0x7E00
                       : static_cast<uint16_t>(
                             ((bits >> 16) & 0x8000) |
                             (exponent <= 0 ? 0 : (exponent << 10) | ((bits >> 13) & 1023)));
        }
        std::memcpy(p, &half, 2);
    }
}

namespace {
std::mt19937_64 random_engine;
}

void seed_draws(uint64_t seed) { random_engine.seed(seed); }
int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_engine);
}
uint64_t bits() { return random_engine(); }
double normal() { return std::normal_distribution<double>()(random_engine); }

Operand operand(int64_t rows, int64_t cols, Dtype dtype, double scale, bool dense) {
    Operand made;
    made.rows = rows;
    made.cols = cols;
    const int64_t kind = dense ? 0 : draw(0, 3), step = kind == 2 ? draw(2, 3) : 1;
    made.matrix.dtype = dtype;
    made.matrix.row_stride = kind == 1 ? 1 : cols * step + (kind == 3 ? draw(1, 9) : 0);
    made.matrix.col_stride = kind == 1 ? rows : step;
    const int64_t count =
        (rows - 1) * made.matrix.row_stride + (cols - 1) * made.matrix.col_stride + 1;
    made.memory.resize(count * size_of(dtype));
    made.matrix.data = made.memory.data();
    for (int64_t i = 0; i < count; ++i)
        write(kNan, made.memory.data() + i * size_of(dtype), dtype);
    if (scale != 0.0)
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j)
                write(scale * normal(), made.at(i, j), dtype);
    return made;
}

int64_t differences(const Operand& part, const Operand& all, int64_t first) {
    int64_t found = 0;
    for (int64_t i = 0; i < part.rows; ++i)
        for (int64_t j = 0; j < part.cols; ++j)
            found +=
                std::memcmp(part.at(i, j), all.at(first + i, j), size_of(part.matrix.dtype)) != 0;
    return found;
}

}  // namespace afa::cpu::test
