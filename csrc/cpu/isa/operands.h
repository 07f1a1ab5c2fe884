// Brings operands of any dtype and strides into the formats that the products read: factors A and B
// into panels; rows of x and dY, where they cannot be read as they lie, into a staged copy, to
// which dropout is applied.
#pragma once

#include <type_traits>

#include "common/philox.h"
#include "cpu/isa/wide.h"

namespace afa::cpu::AFA_ISA {

template <class T>
static inline T* element(const Matrix& matrix, int64_t row, int64_t col) {
    return static_cast<T*>(matrix.data) + row * matrix.row_stride + col * matrix.col_stride;
}

// Calls f with a null pointer of the element type.
template <class F>
static inline void with_dtype(Dtype dtype, F&& f) {
    switch (dtype) {
    case Dtype::f32:
        return f(static_cast<float*>(nullptr));
    case Dtype::bf16:
        return f(static_cast<bf16*>(nullptr));
    case Dtype::f16:
        return f(static_cast<f16*>(nullptr));
    case Dtype::f64:
        return f(static_cast<double*>(nullptr));
    }
}

// --- panels --------------------------------------------------------------------------------------

// `count` neighbouring elements, rounded to T, as floats.
template <class T>
static inline void read_run(const double* src, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i)
        out[i] = round_to<T>(to_float(src[i]));
}
template <class T, class Src>
static inline void read_run(const Src* src, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int lanes = static_cast<int>(min_of<int64_t>(kLanes, count - i));
        Vec v = lanes == kLanes ? load(src + i) : load_first(src + i, lanes);
        if constexpr (sizeof(T) < sizeof(float)) {
            T narrow[kLanes];
            store(narrow, v);
            v = load(narrow);
        }
        if (lanes == kLanes)
            store(out + i, v);
        else
            store_first(out + i, v, lanes);
    }
}

// out[c][i] = in[i][c] for 4 rows i and `count` (a multiple of 4) columns c.
static inline void transpose4(const float* in, int64_t ld_in, int64_t count, float* out,
                              int64_t ld_out) {
    for (int64_t c = 0; c < count; c += 4) {
#if defined(__SSE2__)
        __m128 row0 = _mm_loadu_ps(in + c), row1 = _mm_loadu_ps(in + ld_in + c);
        __m128 row2 = _mm_loadu_ps(in + 2 * ld_in + c), row3 = _mm_loadu_ps(in + 3 * ld_in + c);
        _MM_TRANSPOSE4_PS(row0, row1, row2, row3);
        _mm_storeu_ps(out + c * ld_out, row0);
        _mm_storeu_ps(out + (c + 1) * ld_out, row1);
        _mm_storeu_ps(out + (c + 2) * ld_out, row2);
        _mm_storeu_ps(out + (c + 3) * ld_out, row3);
#else
        for (int i = 0; i < 4; ++i)
            for (int e = 0; e < 4; ++e)
                out[(c + e) * ld_out + i] = in[i * ld_in + c + e];
#endif
    }
}

// One tile of P, rounded to T: rp rows of kTile floats, zero beyond r rows and `cols` columns.
// P[j][l] is at p + j * stride_j + l * stride_l.
template <class T, class Src>
static void read_tile(const Src* p, int64_t stride_j, int64_t stride_l, int64_t r, int64_t rp,
                      int cols, float* tile) {
    constexpr int kTile = Wide::kTile;
    if (stride_l == 1 || stride_j != 1) {
        for (int64_t j = 0; j < rp; ++j) {
            float* row = tile + j * kTile;
            const int count = j < r ? cols : 0;
            if (stride_l == 1 && count > 0)
                read_run<T>(p + j * stride_j, count, row);
            else
                for (int c = 0; c < count; ++c)
                    row[c] = round_to<T>(to_float(p[j * stride_j + c * stride_l]));
            for (int c = count; c < kTile; ++c)
                row[c] = 0.0f;
        }
        return;
    }
    float runs[4 * kMaxRank];
    int c = 0;
    if constexpr (std::is_same_v<Src, float> && std::is_same_v<T, float>)
        for (; r == rp && c + 4 <= cols; c += 4)
            transpose4(p + c * stride_l, stride_l, rp, tile + c, kTile);
    for (; c < kTile; c += 4) {
        for (int i = 0; i < 4; ++i) {
            float* run = runs + i * rp;
            const int64_t count = c + i < cols ? r : 0;
            if (count > 0)
                read_run<T>(p + (c + i) * stride_l, count, run);
            for (int64_t j = count; j < rp; ++j)
                run[j] = 0.0f;
        }
        transpose4(runs, rp, rp, tile + c, kTile);
    }
}

// Packs the slab of P that starts at column `col` into `rows` of its panel: P is the matrix p, or
// its transpose. A panel that is not wanted is null.
template <class T, class E>
static void pack_slab(const Matrix& p, bool transposed, int64_t col, int64_t cols, int64_t r,
                      PanelRows rows, typename E::Elem* dot_panel, typename E::Elem* expand_panel) {
    const int64_t stride_j = transposed ? p.col_stride : p.row_stride;
    const int64_t stride_l = transposed ? p.row_stride : p.col_stride;
    with_dtype(p.dtype, [&](auto* type) {
        using Src = std::remove_pointer_t<decltype(type)>;
        const Src* data = static_cast<const Src*>(p.data) + col * stride_l;
        if constexpr (E::kOnePanel) {
            typename E::Elem* panel = dot_panel != nullptr ? dot_panel : expand_panel;
            for (int64_t c = 0; c < cols; c += E::kTile)
                read_tile<T>(data + c * stride_l, stride_j, stride_l, r, rows.count,
                             static_cast<int>(min_of<int64_t>(E::kTile, cols - c)),
                             panel + c * rows.of + rows.first * E::kTile);
        } else {
            E::pack(data, stride_j, stride_l, r, rows, cols, dot_panel, expand_panel);
        }
    });
}

// --- dropout -------------------------------------------------------------------------------------

struct Dropout {
    int threshold = 0;  // of 256; 0: none
    uint64_t seed = 0;
    int64_t calls_per_row = 0;
    int64_t first_row = 0;  // of the mask, which row 0 has
};

constexpr int kMaxSlab = 512;

// The mask bytes of the columns from 16 * group on of a row, 16 * groups of them, kMaxSlab at most.
static void dropout_run(const Dropout& d, int64_t row, int64_t group, int64_t groups,
                        uint8_t* bytes) {
    constexpr int kCalls = kMaxSlab / kDropoutColumns;
    uint32_t words[kCalls][4];
    const uint64_t counter =
        static_cast<uint64_t>(d.first_row + row) * static_cast<uint64_t>(d.calls_per_row) +
        static_cast<uint64_t>(group);
    for (int64_t i = 0; i < groups; ++i) {
        const Philox4 call = philox4x32_10(d.seed, counter + static_cast<uint64_t>(i));
        for (int w = 0; w < 4; ++w)
            words[i][w] = call.word[w];
    }
    for (int64_t i = 0; i < groups; ++i)
        for (int w = 0; w < 4; ++w)
            for (int byte = 0; byte < 4; ++byte)
                bytes[i * 16 + w * 4 + byte] = static_cast<uint8_t>(words[i][w] >> (8 * byte));
}

// Zeros the dropped elements of rows [row, row + rows) and columns [col, col + cols) within a slab;
// `col` is a multiple of 16.
template <class T>
static void drop(const Dropout& d, int64_t row, int64_t rows, int64_t col, int64_t cols, T* block,
                 int64_t ld) {
    uint8_t bytes[kMaxSlab];
    const T nothing{};
    for (int64_t m = 0; m < rows; ++m) {
        dropout_run(d, row + m, col / kDropoutColumns, ceil_div(cols, kDropoutColumns), bytes);
        T* values = block + m * ld;
        for (int64_t c = 0; c < cols; ++c)
            values[c] = bytes[c] < d.threshold ? nothing : values[c];
    }
}

// --- staged rows ---------------------------------------------------------------------------------

// A block of rows as the products read it: the matrix itself, or a staged copy.
template <class E>
struct Block {
    const typename E::Elem* data;
    int64_t ld;
};

// The distance of staged rows: a slab and one cache line, so that they do not all fall into one set
// of the cache.
template <class E>
static constexpr int64_t staged_ld() {
    return E::kSlab + 64 / static_cast<int64_t>(sizeof(typename E::Elem));
}

// How many rows ahead rows are prefetched: the hardware prefetcher does not follow from the end of
// one row to the beginning of the next.
constexpr int64_t kRowsAhead = 4;

// Whether a block can be read where it lies: whole tiles of it, dense along the rows, and no
// dropout. E::outer converts what it reads, the other products need Elem in memory.
template <class E>
static inline bool lies_ready(const Matrix& x, int64_t rows, int64_t cols, const Dropout& dropout) {
    return x.col_stride == 1 && cols % E::kTile == 0 && rows % E::kRowStep == 0 &&
           dropout.threshold == 0;
}

template <class E, class T>
static Block<E> stage(const Matrix& x, int64_t row, int64_t rows, int64_t col, int64_t cols,
                      const Dropout& dropout, typename E::Elem* memory) {
    using Elem = typename E::Elem;
    const T* src = element<T>(x, row, col);
    const int64_t padded = round_up(cols, E::kTile);
    if constexpr (sizeof(T) == sizeof(Elem))
        if (lies_ready<E>(x, rows, cols, dropout))
            return {reinterpret_cast<const Elem*>(src), x.row_stride};
    const int64_t ld = staged_ld<E>();
    for (int64_t m = 0; m < rows; ++m) {
        const T* from = src + m * x.row_stride;
        Elem* to = memory + m * ld;
        int64_t c = 0;
        if (x.col_stride == 1) {
            const T* next = from + kRowsAhead * x.row_stride;
            for (int64_t line = 0; line < cols; line += 64 / static_cast<int64_t>(sizeof(T)))
                __builtin_prefetch(next + line);
            if constexpr (sizeof(T) == sizeof(Elem)) {
                memcpy(to, from, cols * sizeof(T));
                c = cols;
            } else {
                for (; c + kLanes <= cols; c += kLanes)
                    store(to + c, load(from + c));
                for (; c < cols; ++c)
                    from_float(to_float(from[c]), to + c);
            }
        } else {
            for (; c < cols; ++c)
                from_float(to_float(from[c * x.col_stride]), to + c);
        }
        for (; c < padded; ++c)
            to[c] = Elem{};
    }
    if (dropout.threshold > 0)
        drop(dropout, row, rows, col, cols, memory, ld);
    for (int64_t m = rows; m < round_up(rows, E::kRowStep); ++m)
        memset(memory + m * ld, 0, padded * sizeof(Elem));
    return {memory, ld};
}

}  // namespace afa::cpu::AFA_ISA
