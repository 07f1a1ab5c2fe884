// One warp runs every primitive once, so that a device can be compared with the machine on which
// the tests execute PTX, and both with the layouts that the PTX ISA documents.
#pragma once

#include "cuda/kernels/tile.cuh"

namespace afa {

// Where each result lies in `out`.
constexpr int kCheckMatrices = 0, kCheckTransposed = 128, kCheckProduct = 256, kCheckPack = 384,
              kCheckUnpack = 416, kCheckCopy = 480;

template <typename T>
AFA_KERNEL(kWarpSize)
primitive_check_kernel(const PrimitiveCheckParams p) {
    follow_previous_kernel();
    constexpr int kPitch = pitch(16);
    SharedMemory shared;
    uint16_t* tile = shared.take<uint16_t>(tile_elements(32, 16));
    uint32_t* copied = shared.take<uint32_t>(4 * kWarpSize);
    const int lane = lane_index();
    const uint32_t* words = reinterpret_cast<const uint32_t*>(p.in);

    copy_async(tile + lane * kPitch, p.in + lane * 16, true);
    copy_async(tile + lane * kPitch + kVector, p.in + lane * 16 + kVector, true);
    copy_async(copied + 4 * lane, words + 4 * lane, lane % 3 != 0);
    copy_commit();
    copy_wait<0>();
    warp_sync();

    uint32_t a[4], b[4];
    load_matrices(a, tile + down_first<kPitch>());
    load_matrices_transposed(b, tile + 16 * kPitch + right_first<kPitch>());
    float c[4];
    AFA_UNROLL
    for (int i = 0; i < 4; ++i) {
        store_global(p.out + kCheckMatrices + 4 * lane + i, a[i]);
        store_global(p.out + kCheckTransposed + 4 * lane + i, b[i]);
        store_global(p.out + kCheckCopy + 4 * lane + i,
                     load_shared<uint32_t>(copied + 4 * lane + i));
        c[i] = load_global(p.values + 4 * lane + i);
    }
    multiply_add<T>(c, a, b[0], b[1]);
    AFA_UNROLL
    for (int i = 0; i < 4; ++i)
        store_global(reinterpret_cast<float*>(p.out) + kCheckProduct + 4 * lane + i, c[i]);
    store_global(p.out + kCheckPack + lane,
                 pack<T>(load_global(p.values + 2 * lane), load_global(p.values + 2 * lane + 1)));
    const Float2 pair = unpack<T>(load_global(words + lane));
    store_global(reinterpret_cast<float*>(p.out) + kCheckUnpack + 2 * lane, pair.x);
    store_global(reinterpret_cast<float*>(p.out) + kCheckUnpack + 2 * lane + 1, pair.y);
}

}  // namespace afa
