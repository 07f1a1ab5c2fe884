// Operands of random problems. Each is an allocation of its exact size, so that one element too far
// is an error for the sanitizer, and the gaps between strided elements hold NaN.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/cpu.h"

namespace afa::cpu::test {

int64_t size_of(Dtype dtype);
double read(const void* p, Dtype dtype);
// Rounds towards zero in 16 bits, which is exact enough for inputs.
void write(double value, void* p, Dtype dtype);

struct Operand {
    std::vector<char> memory;
    Matrix matrix;
    int64_t rows = 0, cols = 0;

    char* at(int64_t i, int64_t j) const {
        return static_cast<char*>(matrix.data) +
               (i * matrix.row_stride + j * matrix.col_stride) * size_of(matrix.dtype);
    }
    double get(int64_t i, int64_t j) const { return read(at(i, j), matrix.dtype); }
};

// All random numbers come from one engine.
void seed_draws(uint64_t seed);
int64_t draw(int64_t low, int64_t high);  // both included
uint64_t bits();
double normal();

// Dense, transposed, or with gaps; filled with scale * normal, or with NaN if scale is 0.
Operand operand(int64_t rows, int64_t cols, Dtype dtype, double scale, bool dense = false);

// Elements of `part` that differ from those of `all` from row `first` on.
int64_t differences(const Operand& part, const Operand& all, int64_t first);

}  // namespace afa::cpu::test
