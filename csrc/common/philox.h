// Philox4x32-10 (Salmon et al., SC 2011) and the dropout mask made from it:
// afa_kernels/operator/dropout.py states the contract.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace afa {

constexpr int kDropoutColumns = 16;  // columns served by one Philox call, one byte each
constexpr int kDropoutLevels = 256;

struct Philox4 {
    uint32_t word[4];
};

AFA_HOST_DEVICE Philox4 philox4x32_10(uint64_t seed, uint64_t counter) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0,
             c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The mask bytes of the 16 columns from 16 * group on of `row`. A row has K columns and
// calls_per_row = ceil(K / 16) groups.
AFA_HOST_DEVICE Philox4 dropout_bytes(uint64_t seed, int64_t row, int64_t calls_per_row,
                                      int64_t group) {
    return philox4x32_10(seed, static_cast<uint64_t>(row) * static_cast<uint64_t>(calls_per_row) +
                                   static_cast<uint64_t>(group));
}

// Whether column `j` (0..15) of the group is kept; `threshold` of 256 values are dropped.
AFA_HOST_DEVICE bool dropout_keeps(const Philox4& bytes, int j, int threshold) {
    return static_cast<int>((bytes.word[j >> 2] >> (8 * (j & 3))) & 0xFFu) >= threshold;
}

}  // namespace afa
