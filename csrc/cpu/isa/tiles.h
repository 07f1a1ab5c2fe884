// The three products on AMX tiles of bfloat16: 16 x 16 sums += (16 x 32) (32 x 16), in float32.
//
// One instruction does what 128 vdpbf16ps do, so most of the time goes into moving operands. x and
// dY are left operands as they lie in memory, and right operands after the interleaving of two
// rows; the sums leave the tile registers through a buffer in the L1 cache.
#pragma once

#include "cpu/isa/amx.h"
#include "cpu/isa/engine.h"
#include "cpu/isa/pairs.h"

#if AFA_ISA_LEVEL >= 4

namespace afa::cpu::AFA_ISA {

struct Tiles {
    using Elem = bf16;
    static constexpr int kTile = kVectors * kLanes;
    static constexpr int kSlab = 512;
    static constexpr bool kOnePanel = false;
    static constexpr int64_t kBlockRows = 64;
    static constexpr int64_t kRowStep = kTileRows;
    static constexpr int64_t kExpandRows = kTileRows;
    static constexpr int64_t kRankStep = 16;
    static constexpr bool kHasDotInPlace = false;
    using Scope = TileScope;

    static constexpr int64_t kDepth = 32;                  // contracted by one instruction
    static constexpr int kUnit = 2 * kLanes;               // columns that `expand` writes at a time
    static constexpr int64_t kTileElements = 16 * kDepth;  // of a left or right tile
    static constexpr int64_t kRightStride = kTileBytes;    // of the tiles of a panel

    // The product with P contracts over r, whole tiles of it.
    static int64_t expand_rank(int64_t rp) { return round_up(rp, kDepth); }

    // One slab of P as right tiles of 16 x 32 elements. For dot a tile is kDepth columns of 16 rows
    // of P, [pair of columns][row][2]; for expand 16 columns of kDepth rows, [pair of
    // rows][column][2].
    template <class Src>
    static void pack(const Src* p, int64_t stride_j, int64_t stride_l, int64_t r, PanelRows rows,
                     int64_t cols, Elem* dot, Elem* expand) {
        const int64_t padded = round_up(cols, kTile), depth = expand_rank(rows.of);
        const auto put = [](const PairBlock<Src>& block, int64_t count, Elem* out) {
            __m512i pairs[16];
            by_pairs(block, pairs);
            for (int64_t i = 0; i < count; ++i)
                _mm512_storeu_si512(out + i * kDepth, pairs[i]);
        };
        for (int64_t j = 0; j < rows.count && dot != nullptr; j += 16)
            for (int64_t c = 0; c < padded; c += kDepth)
                put({p + j * stride_j + c * stride_l, stride_l, stride_j, part_of(cols, c, kDepth),
                     part_of(r, j, 16)},
                    16, dot + c * rows.of + (rows.first + j) * kDepth);
        // The last factor fills the panel up to its depth; another one ends where the next begins,
        // which may be in the middle of a tile.
        const bool last = rows.first + rows.count == rows.of;
        const int64_t end = last ? depth - rows.first : rows.count;
        for (int64_t j = 0; j < end && expand != nullptr; j += kDepth)
            for (int64_t c = 0; c < padded; c += 16)
                put({p + j * stride_j + c * stride_l, stride_j, stride_l, part_of(r, j, kDepth),
                     part_of(cols, c, 16)},
                    min_of<int64_t>(16, (end - j) / 2), expand + c * depth + (rows.first + j) * 16);
    }

    // rows: [row][expand_rank], whole tiles of rows; columns: [row of P][kBlockRows].
    static int64_t coefficient_bytes(int64_t rows, int64_t rp) {
        return (round_up(rows, kTileRows) * expand_rank(rp) + rp * kBlockRows) *
               static_cast<int64_t>(sizeof(bf16));
    }
    static Coefficients<Tiles> view_coefficients(const float*, int64_t rows, int64_t rp,
                                                 void* memory) {
        const bf16* by_rows = static_cast<const bf16*>(memory);
        return {by_rows, by_rows + round_up(rows, kTileRows) * expand_rank(rp)};
    }
    static Coefficients<Tiles> pack_coefficients(const float* h, int64_t rows, int64_t rp,
                                                 void* memory) {
        const Coefficients<Tiles> view = view_coefficients(h, rows, rp, memory);
        bf16* by_rows = const_cast<bf16*>(view.rows);
        bf16* by_columns = const_cast<bf16*>(view.columns);
        const int64_t depth = expand_rank(rp);
        for (int64_t m = 0; m < round_up(rows, kTileRows); ++m)
            for (int64_t j = 0; j < depth; j += kLanes)
                store(by_rows + m * depth + j, m < rows && j < rp ? load(h + m * rp + j) : zero());
        for (int64_t m = 0; m < round_up(rows, kDepth); m += kLanes)
            for (int64_t j = 0; j < rp; j += 16) {
                __m512i lanes[16];
                for (int i = 0; i < 16; ++i)
                    lanes[i] =
                        _mm512_castps_si512(m + i < rows ? load(h + (m + i) * rp + j) : zero());
                transpose(lanes);
                for (int i = 0; i < 16; ++i)
                    store(by_columns + (j + i) * kBlockRows + m, _mm512_castsi512_ps(lanes[i]));
            }
        return view;
    }

    static void dot(const bf16* x, int64_t ldx, int64_t rows, const Elem* panel, int64_t rp,
                    int64_t tiles, float* z, int64_t ldz) {
        const int64_t chunks = tiles * (kTile / kDepth), step = rp * kDepth;
        rows = round_up(rows, kTileRows);
        int64_t j = 0;
        for (; j + 32 <= rp; j += 32) {
            int64_t m = 0;
            for (; m + 32 <= rows; m += 32)
                dot_tiles<2, 2>(x + m * ldx, ldx, panel + j * kDepth, step, chunks, z + m * ldz + j,
                                ldz);
            if (m < rows)
                dot_tiles<1, 2>(x + m * ldx, ldx, panel + j * kDepth, step, chunks, z + m * ldz + j,
                                ldz);
        }
        if (j == rp)
            return;
        int64_t m = 0;
        for (; m + 64 <= rows; m += 64)
            dot_tiles<4, 1>(x + m * ldx, ldx, panel + j * kDepth, step, chunks, z + m * ldz + j,
                            ldz);
        for (; m < rows; m += 16)
            dot_tiles<1, 1>(x + m * ldx, ldx, panel + j * kDepth, step, chunks, z + m * ldz + j,
                            ldz);
    }

    // Units of 16 rows by kDepth columns, along the rows, so that the prefetchers can follow. Three
    // units are under way, none of which waits for another: while vector instructions write unit u,
    // the sums of unit u + 1 leave the tile registers, and those of unit u + 2 are computed.
    template <class T>
    static void expand(const Coefficients<Tiles>& h, int64_t rows, int64_t rp, int64_t,
                       const Elem* panel, const Target<T>& target, int64_t cols) {
        alignas(64) float buffers[2][kTileRows * kUnit];
        const int64_t depth = expand_rank(rp), across = ceil_div(cols, kUnit);
        const int64_t count = across * ceil_div(rows, kTileRows);
        const auto multiply = [&](int64_t u, auto pair) {
            if (u < count)
                expand_unit<pair>(h.rows + u / across * kTileRows * depth, depth,
                                  panel + u % across * kUnit * depth, u % across == 0);
        };
        const auto drain = [&](auto pair) {
            tile_store<2 * pair>(buffers[pair], kUnit * sizeof(float));
            tile_store<2 * pair + 1>(buffers[pair] + kLanes, kUnit * sizeof(float));
        };
        multiply(0, Index<0>{});
        drain(Index<0>{});
        multiply(1, Index<1>{});
        for (int64_t u = 0; u < count; u += 2)
            each<2>([&](auto pair) {
                drain(Index<1 - pair>{});
                multiply(u + pair + 2, pair);
                const int64_t row = (u + pair) / across * kTileRows,
                              col = (u + pair) % across * kUnit;
                if (u + pair < count)
                    write_unit(target, row, min_of<int64_t>(kTileRows, rows - row), col,
                               static_cast<int>(min_of<int64_t>(kUnit, cols - col)), buffers[pair]);
            });
    }

    static void outer(const Coefficients<Tiles>& h, int64_t rows, int64_t rp, const Elem* x,
                      int64_t ldx, int64_t cols, const Sums& sums, Elem* packed, const Elem*) {
        for (int64_t c = 0; c < cols; c += kTile) {
            pack_outer(x + c, ldx, rows, packed);
            for (int64_t half = 0; half < kTile; half += kDepth) {
                const Elem* right =
                    packed + half / kDepth * (kBlockRows / kDepth) * 2 * kTileElements;
                float* out = sums.data + c / kTile * sums.tile + half;
                int64_t j = 0;
                for (; j + 32 <= rp; j += 32)
                    outer_tiles<2>(h.columns + j * kBlockRows, rows, right, out + j * sums.row,
                                   sums.row);
                if (j < rp)
                    outer_tiles<1>(h.columns + j * kBlockRows, rows, right, out + j * sums.row,
                                   sums.row);
            }
        }
    }

    static void finish_sums(const Sums& sums, int64_t rp, int64_t cols) {
        for_each_row<Tiles>(sums, rp, cols, sort_columns);
    }

  private:
    // kRows x kRanks tiles of sums. Tile registers: sums in 0 to 3, left operands in 4 and 5, right
    // operands in 6 and 7.
    template <int kRows, int kRanks>
    static void dot_tiles(const bf16* x, int64_t ldx, const Elem* panel, int64_t step,
                          int64_t chunks, float* z, int64_t ldz) {
        static_assert(kRows * kRanks <= 4 && kRanks <= 2);
        const int64_t x_stride = ldx * static_cast<int64_t>(sizeof(bf16));
        each<kRows * kRanks>([&](auto s) { tile_zero<s>(); });
        for (int64_t c = 0; c < chunks; ++c, x += kDepth, panel += step) {
            each<kRanks>(
                [&](auto j) { tile_load<6 + j>(panel + j * kTileElements, kRightStride); });
            each<kRows>([&](auto i) {
                tile_load<4 + i % 2>(x + i * 16 * ldx, x_stride);
                each<kRanks>([&](auto j) { tile_dot<i * kRanks + j, 4 + i % 2, 6 + j>(); });
            });
        }
        // A slab of columns is summed for itself: with few rows the slabs have threads of their
        // own, and the bits are the same.
        alignas(64) float sums[16 * kLanes];
        each<kRows * kRanks>([&](auto s) {
            tile_store<s>(sums, kTileBytes);
            float* out = z + s / kRanks * 16 * ldz + s % kRanks * 16;
            for (int i = 0; i < 16; ++i)
                store(out + i * ldz, load(out + i * ldz) + load(sums + i * kLanes));
        });
    }

    // Registers 2 kPair and 2 kPair + 1 = h P for 16 rows and kUnit columns. Register 4 keeps the
    // rows of h as long as they are one tile.
    template <int kPair>
    static void expand_unit(const bf16* h, int64_t depth, const Elem* panel, bool new_rows) {
        tile_zero<2 * kPair>();
        tile_zero<2 * kPair + 1>();
        for (int64_t j = 0; j < depth; j += kDepth) {
            if (new_rows || depth > kDepth)
                tile_load<4>(h + j, depth * static_cast<int64_t>(sizeof(bf16)));
            tile_load<6>(panel + j * 16, kRightStride);
            tile_dot<2 * kPair, 4, 6>();
            tile_load<7>(panel + (depth + j) * 16, kRightStride);
            tile_dot<2 * kPair + 1, 4, 7>();
        }
    }

    // Columns [col, col + cols) of one unit: base + sums.
    template <class T>
    static void write_unit(const Target<T>& t, int64_t row, int64_t rows, int64_t col, int cols,
                           const float* sums) {
        T* out = t.out + row * t.out_row + col * t.out_col;
        const T* base = t.base == nullptr ? nullptr : t.base + row * t.base_row + col * t.base_col;
        const bool whole = cols == kUnit && t.out_col == 1 && (base == nullptr || t.base_col == 1);
        if (!whole)
            write_part(t, out, base, rows, cols, sums);
        else if (t.streams)
            write_whole<true>(t, out, base, rows, sums);
        else
            write_whole<false>(t, out, base, rows, sums);
    }
    template <bool kStreams, class T>
    static inline __attribute__((always_inline)) void
    write_whole(const Target<T>& t, T* out, const T* base, int64_t rows, const float* sums) {
        const int64_t out_row = t.out_row, base_row = t.base_row;
        for (int64_t m = 0; m < rows; ++m, sums += kUnit, out += out_row) {
            Vec low = load(sums), high = load(sums + kLanes);
            if (base != nullptr) {
                __builtin_prefetch(base + kUnit, 1);
                low = low + load(base);
                high = high + load(base + kLanes);
                base += base_row;
            }
            if (kStreams)
                stream2(out, low, high);
            else
                store2(out, low, high);
        }
    }
    template <class T>
    static void write_part(const Target<T>& t, T* out, const T* base, int64_t rows, int cols,
                           const float* sums) {
        for (int64_t m = 0; m < rows; ++m, sums += kUnit)
            for (int c = 0; c < cols; ++c) {
                const float value = base == nullptr
                                        ? sums[c]
                                        : sums[c] + to_float(base[m * t.base_row + c * t.base_col]);
                from_float(value, out + m * t.out_row + c * t.out_col);
            }
    }

    // One tile of columns as pairs of rows: [kDepth columns][kDepth rows][half][pair of
    // rows][column of the half][2]. Unpacking puts every other four columns into one half;
    // finish_sums undoes that.
    static void pack_outer(const Elem* x, int64_t ldx, int64_t rows, Elem* packed) {
        const int64_t chunks = ceil_div(rows, kDepth);
        for (int64_t m = 0; m < chunks * kDepth; m += 2)
            for (int64_t c = 0; c < kTile; c += kDepth) {
                const __m512i row0 =
                    m < rows ? _mm512_loadu_si512(x + m * ldx + c) : _mm512_setzero_si512();
                const __m512i row1 = m + 1 < rows ? _mm512_loadu_si512(x + (m + 1) * ldx + c)
                                                  : _mm512_setzero_si512();
                Elem* out = packed +
                            (c / kDepth * (kBlockRows / kDepth) + m / kDepth) * 2 * kTileElements +
                            m % kDepth * 16;
                _mm512_storeu_si512(out, _mm512_unpacklo_epi16(row0, row1));
                _mm512_storeu_si512(out + kTileElements, _mm512_unpackhi_epi16(row0, row1));
            }
    }

    template <int kRanks>
    static void outer_tiles(const bf16* columns, int64_t rows, const Elem* packed, float* sums,
                            int64_t ld_sums) {
        const int64_t stride = ld_sums * static_cast<int64_t>(sizeof(float));
        each<2 * kRanks>(
            [&](auto s) { tile_load<s>(sums + s / 2 * 16 * ld_sums + s % 2 * 16, stride); });
        for (int64_t m = 0; m < rows; m += kDepth, packed += 2 * kTileElements) {
            tile_load<6>(packed, kRightStride);
            tile_load<7>(packed + kTileElements, kRightStride);
            each<kRanks>([&](auto i) {
                tile_load<4 + i>(columns + i * 16 * kBlockRows + m, kBlockRows * sizeof(bf16));
                tile_dot<2 * i, 4 + i, 6>();
                tile_dot<2 * i + 1, 4 + i, 7>();
            });
        }
        each<2 * kRanks>(
            [&](auto s) { tile_store<s>(sums + s / 2 * 16 * ld_sums + s % 2 * 16, stride); });
    }

    template <int kIndex>
    struct Index {
        constexpr operator int() const { return kIndex; }
    };
    // f(Index<0>), ..., f(Index<kCount - 1>): the number of a register is part of an instruction.
    template <int kCount, class F>
    static inline __attribute__((always_inline)) void each(F&& f) {
        if constexpr (kCount > 0) {
            each<kCount - 1>(f);
            f(Index<kCount - 1>{});
        }
    }
};

}  // namespace afa::cpu::AFA_ISA

#endif
