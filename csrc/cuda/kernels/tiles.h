// Tile sizes by padded rank R, and the shared memory that a kernel needs: shared by the kernels and
// by plan.cpp.
//
// Rows of streamed tiles are 256 bytes or more where shared memory allows, the rank decides the
// rest. All kernels hold a ring of `stages` tiles, of which stages - 1 are under way.
#pragma once

#include "common/macros.h"

namespace afa {

constexpr int kWarpSize = 32;
constexpr int kPad = 8;     // elements between the rows of a tile in shared memory
constexpr int kVector = 8;  // elements of a 16-byte access
constexpr int kMaxStages = 5;
constexpr int kSmallThreads = 128;
constexpr int kAllRegisters = 255;  // that a thread may have
constexpr int kElementBytes = 2, kFloatBytes = 4;

AFA_HOST_DEVICE constexpr int pitch(int cols) { return cols + kPad; }
AFA_HOST_DEVICE constexpr int tile_elements(int rows, int cols) { return rows * pitch(cols); }

constexpr int kTileRows = 64;  // of the kernels with a block for each tile of rows

// Forward, expand and project kernels: each warp owns 16 rows. Each tile of rows reads A or B
// again: with R rows in a tile that is as many bytes as of x or dy.
template <int R>
struct RowTile {
    static constexpr int kRows = kTileRows;
    static constexpr int kDepth = R <= 32 ? 128 : 64;    // columns of x (or dy) per step
    static constexpr int kColumns = R <= 32 ? 128 : 64;  // columns of y per step
    static constexpr int kThreads = kRows / 16 * kWarpSize;
    static constexpr int kRegisters = 128;  // budget per thread, on every architecture
    static constexpr int kBlocks = 4;       // that it leaves room for
    static constexpr int kWide = tile_elements(kRows, kDepth);
    static constexpr int kNarrow = tile_elements(R, kDepth);
    static constexpr int kNarrowTransposed = tile_elements(kDepth, R);
    static constexpr int kB = tile_elements(kColumns, R);
    static constexpr int kZ = tile_elements(kRows, R);
    // The forward kernel reuses its rings: B in the one of x, z in the one of A.
    static_assert(kB <= kWide && kZ <= 2 * kNarrow && kColumns == kDepth);

    static constexpr int forward_bytes(int stages) {
        return stages * (kWide + kNarrow) * kElementBytes;
    }
    static constexpr int dy_project_bytes(int stages) {
        return stages * (kWide + kNarrowTransposed) * kElementBytes;
    }
    static constexpr int expand_bytes(int stages) { return (kZ + stages * kB) * kElementBytes; }
};

// The one-pass dy kernel (R <= 32): a slab is several tiles side by side, so that there are few
// partial sums of dh. Per warp 16 rows of dh, and a quarter of each tile's columns of dB.
template <int R>
struct DyTile {
    static constexpr int kRows = 64;
    static constexpr int kDepth = 128;  // columns of a tile
    static constexpr int kTiles = 4;    // of a slab
    static constexpr int kColumns = kTiles * kDepth;
    static constexpr int kWarps = kRows / 16;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kRegisters = R == 16 ? 168 : kAllRegisters, kBlocks = R == 16 ? 3 : 2;
    static constexpr int kSlice = kDepth / kWarps;
    static constexpr int kWide = tile_elements(kRows, kDepth);
    static constexpr int kB = tile_elements(kColumns, R);
    static constexpr int kH = tile_elements(kRows, R);
    static_assert(R <= 32);

    static constexpr int bytes(int stages) {
        return (stages * kWide + kB + 2 * kH) * kElementBytes;
    }
};

// The x kernel, and the dB kernel of R = 64: each warp owns a slice of columns.
template <int R>
struct OuterTile {
    static constexpr int kRows = R == 16 ? 32 : 64;
    static constexpr int kColumns = R == 16 ? 512 : R == 32 ? 256 : 128;
    static constexpr int kWarps = R == 16 ? 8 : 4;
    static constexpr int kThreads = kWarps * kWarpSize;
    static constexpr int kXRegisters = 248;
    static constexpr int kXBlocks = kThreads == 256 ? 1 : 2;
    static constexpr int kDbRegisters = 168, kDbBlocks = 3;
    static constexpr int kSlice = kColumns / kWarps;
    static constexpr int kWide = tile_elements(kRows, kColumns);
    static constexpr int kNarrow = tile_elements(kRows, R);
    static constexpr int kA = tile_elements(R, kColumns);
    static constexpr int kMaskPitch = kColumns / 16;

    static constexpr int db_bytes(int stages) { return stages * (kWide + kNarrow) * kElementBytes; }
    static constexpr int x_bytes(int stages) {
        return db_bytes(stages) + (kA + kRows * kMaskPitch) * kElementBytes;
    }
};

}  // namespace afa
