// dz = scale * phi'(z) * dh, and h = phi(z): by the reduce kernel from partial sums of dh, by the
// project_dy kernel from what it has of dh in registers, or, dz alone, by the x kernel for the rows
// that it is about to multiply.
#pragma once

#include "cuda/tile.cuh"

namespace afa {

template <typename T>
AFA_DEVICE uint32_t dz_pair(const SumRowsJob& job, float low_slope, float high_slope, Float2 dh) {
    return pack<T>(job.scale * low_slope * dh.x, job.scale * high_slope * dh.y);
}

// dz and h, where they are asked for, of columns col and col + 1 of a row that exists.
template <typename T>
AFA_DEVICE void store_dz_and_h(const SumRowsJob& job, int64_t row, int col, float alpha_t,
                               Float2 dh) {
    const Float2 z = unpack<T>(load_pair(static_cast<const T*>(job.z), row, job.r, col));
    const ValueSlope low = anneal_by_id(job.activation, z.x, alpha_t);
    const ValueSlope high = anneal_by_id(job.activation, z.y, alpha_t);
    const int64_t index = row * job.rank_class + col;
    if (job.dz)
        store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(job.dz) + index),
                     dz_pair<T>(job, low.slope, high.slope, dh));
    if (job.h)
        store_global(reinterpret_cast<uint32_t*>(static_cast<T*>(job.h) + index),
                     pack<T>(low.value, high.value));
}

// The same of the 16 rows of this warp, whose dh lies in accumulators of mma. It goes through
// shared memory, so that neighbouring lanes store neighbours.
template <typename T, int R>
AFA_DEVICE void finish_dh(float* shared_dh, const float (&dh)[R / 8][4], const SumRowsJob& job,
                          int64_t row0) {
    constexpr int kPitch = RowTile<R>::kDhPitch;
    float* rows = shared_dh + warp_index() * 16 * kPitch;
    float* own = rows + lane_index() / 4 * kPitch + lane_index() % 4 * 2;
    const float alpha_t = alpha_of(job.alpha_t);
    const int64_t first_row = row0 + warp_index() * 16;
    AFA_UNROLL
    for (int j = 0; j < R / 8; ++j) {
        store_shared(own + j * 8, Float2{dh[j][0], dh[j][1]});
        store_shared(own + 8 * kPitch + j * 8, Float2{dh[j][2], dh[j][3]});
    }
    warp_sync();
    AFA_ROLLED
    for (int i = lane_index(); i < 16 * R / 2; i += kWarpSize) {
        const int row = i / (R / 2), col = i % (R / 2) * 2;
        if (first_row + row < job.m)
            store_dz_and_h<T>(job, first_row + row, col, alpha_t,
                              load_shared<Float2>(rows + row * kPitch + col));
    }
}

// A tile of dz on its way from memory, two neighbouring elements in each thread. All partial sums
// are under way at once; they are added in the order of the reduce kernel.
template <typename T, int R, int kRows, int kThreads>
struct DzTile {
    Float2 part[kSumsAtOnce];
    uint32_t z;

    // A warp has every other one of eight rows: in shared memory these lie in different banks.
    AFA_DEVICE static int row() {
        return warp_index() / 2 * 8 + lane_index() / (R / 2) * 2 + warp_index() % 2;
    }
    AFA_DEVICE static int col() { return lane_index() % (R / 2) * 2; }

    // Begins to fetch rows [row0, row0 + kRows); those from row_end on become 0.
    AFA_DEVICE void load(const SumRowsJob& job, int64_t row0, int64_t row_end) {
        static_assert(R == 16 && kRows * R / 2 == kThreads);
        const bool valid = row0 + row() < row_end;
        const float* partial = job.partial + (row0 + row()) * R + col();
        AFA_UNROLL
        for (int i = 0; i < kSumsAtOnce; ++i, partial += job.m * R)
            part[i] = valid && i < job.count ? load_global(reinterpret_cast<const Float2*>(partial))
                                             : Float2{0.0f, 0.0f};
        z = valid ? load_pair(static_cast<const T*>(job.z), row0 + row(), job.r, col()) : 0u;
    }

    AFA_DEVICE void store(T* tile, const SumRowsJob& job, float alpha_t) const {
        Float2 dh{0.0f, 0.0f};
        AFA_UNROLL
        for (int i = 0; i < kSumsAtOnce; ++i) {
            dh.x += part[i].x;
            dh.y += part[i].y;
        }
        const Float2 pair = unpack<T>(z);
        float slope[2] = {pair.x, pair.y};
        AFA_ROLLED
        for (int i = 0; i < 2; ++i) {  // one copy of the activations
            const float low = anneal_by_id(job.activation, slope[0], alpha_t).slope;
            slope[0] = slope[1];
            slope[1] = low;
        }
        store_shared(tile + row() * pitch(R) + col(), dz_pair<T>(job, slope[0], slope[1], dh));
    }
};

}  // namespace afa
