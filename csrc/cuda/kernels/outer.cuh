// Sums of outer products over rows: dB = dy^T h and dA = dz^T x, in accumulators of mma.
#pragma once

#include "cuda/kernels/tile.cuh"

namespace afa {

template <int kCount, int kOthers>
AFA_DEVICE void zero(float (&acc)[kCount][kOthers][4]) {
    AFA_UNROLL
    for (int i = 0; i < kCount; ++i)
        AFA_UNROLL
    for (int j = 0; j < kOthers; ++j)
        acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
}

// acc[i][j] += (16 columns i of `left`)^T times (8 columns j of `right`), summed over kRows rows of
// both tiles.
template <typename T, int kRows, int kLeft, int kRight, int kLeftPitch, int kRightPitch>
AFA_DEVICE void add_outer(float (&acc)[kLeft / 16][kRight / 8][4], const T* left, const T* right) {
    AFA_UNROLL
    for (int k = 0; k < kRows; k += 16) {
        uint32_t b[kRight / 16][4];
        AFA_UNROLL
        for (int j = 0; j < kRight / 16; ++j)
            load_matrices_transposed(b[j],
                                     right + k * kRightPitch + j * 16 + down_first<kRightPitch>());
        AFA_UNROLL
        for (int i = 0; i < kLeft / 16; ++i) {
            uint32_t a[4];
            load_matrices_transposed(a, left + k * kLeftPitch + i * 16 + right_first<kLeftPitch>());
            AFA_UNROLL
            for (int j = 0; j < kRight / 16; ++j) {
                multiply_add<T>(acc[i][2 * j], a, b[j][0], b[j][1]);
                multiply_add<T>(acc[i][2 * j + 1], a, b[j][2], b[j][3]);
            }
        }
    }
}

// Stores the accumulators of add_outer into rows [row0, ...) and columns [col0, ...) of a float
// matrix, or adds them to it.
template <int kLeft, int kRight>
AFA_DEVICE void store_outer(float* matrix, const float (&acc)[kLeft / 16][kRight / 8][4],
                            int64_t row0, int64_t rows, int col0, int cols, bool adds) {
    const int col = col0 + lane_index() % 4 * 2;
    AFA_UNROLL
    for (int i = 0; i < kLeft / 16; ++i) {
        AFA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int64_t row = row0 + i * 16 + lane_index() / 4 + half * 8;
            AFA_UNROLL
            for (int j = 0; j < kRight / 8; ++j)
                if (row < rows && col + j * 8 < cols) {
                    Float2* out = reinterpret_cast<Float2*>(matrix + row * cols + col + j * 8);
                    const Float2 old = adds ? load_global(out) : Float2{0.0f, 0.0f};
                    store_global(
                        out, Float2{old.x + acc[i][j][2 * half], old.y + acc[i][j][2 * half + 1]});
                }
        }
    }
}

}  // namespace afa
