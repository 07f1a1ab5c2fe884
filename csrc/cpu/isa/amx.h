// The AMX instructions that the engine of tiles.h needs, or the same in plain loops.
//
// A tile register holds 16 rows of 64 bytes. The instructions are inline assembly and not the
// compiler's intrinsics, which take the number of a register as a token, not as a template
// argument. AFA_EMULATE_BF16 puts loops in their place, so that a machine without AMX runs the
// engine and the sanitizers see what it reads and writes.
#pragma once

#include "cpu/isa/vec.h"

#if AFA_ISA_LEVEL >= 4

namespace afa::cpu::AFA_ISA {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row

#if defined(AFA_EMULATE_BF16)

struct TileRegister {
    alignas(64) char bytes[kTileRows * kTileBytes];
};
static thread_local TileRegister tile_registers[8];

struct TileScope {};

template <int kTmm>
static inline void tile_zero() {
    memset(tile_registers[kTmm].bytes, 0, sizeof(TileRegister));
}
template <int kTmm>
static inline void tile_load(const void* rows, int64_t stride) {
    for (int i = 0; i < kTileRows; ++i)
        memcpy(tile_registers[kTmm].bytes + i * kTileBytes,
               static_cast<const char*>(rows) + i * stride, kTileBytes);
}
template <int kTmm>
static inline void tile_store(void* rows, int64_t stride) {
    for (int i = 0; i < kTileRows; ++i)
        memcpy(static_cast<char*>(rows) + i * stride, tile_registers[kTmm].bytes + i * kTileBytes,
               kTileBytes);
}
template <int kSum, int kLeft, int kRight>
static inline void tile_dot() {
    float sums[16][16];
    bf16 left[16][32], right[16][32];
    memcpy(sums, tile_registers[kSum].bytes, sizeof(sums));
    memcpy(left, tile_registers[kLeft].bytes, sizeof(left));
    memcpy(right, tile_registers[kRight].bytes, sizeof(right));
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 32; ++k)
            for (int n = 0; n < 16; ++n)
                sums[m][n] += to_float(left[m][k]) * to_float(right[k / 2][2 * n + k % 2]);
    memcpy(tile_registers[kSum].bytes, sums, sizeof(sums));
}

#else

// All eight registers in full size, from here to the end of the scope; released so that a context
// switch need not save them.
struct TileScope {
    TileScope() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) {
            config.row_bytes[i] = kTileBytes;
            config.rows[i] = kTileRows;
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

template <int kTmm>
static inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTmm));
}
template <int kTmm>
static inline void tile_load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTmm) : "memory");
}
template <int kTmm>
static inline void tile_store(void* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTmm) : "memory");
}
// sum (16 x 16 floats) += left (16 x 32 bfloat16) right (16 pairs of rows x 16 columns)
template <int kSum, int kLeft, int kRight>
static inline void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

#endif

}  // namespace afa::cpu::AFA_ISA

#endif
