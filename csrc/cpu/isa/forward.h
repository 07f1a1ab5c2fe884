// y = base + scaling * phi(dropout(x) A^T) B^T in one pass over x and one over y.
//
// Many rows: a task is a block of rows, from x to y, with z and h in the caches. Few rows: tasks
// are slabs of columns, first of A (partial sums of z), then of B. Both add the partial sums of z
// in the order of the slabs of A: same bits.
#pragma once

#include "cpu/isa/operands.h"
#include "cpu/isa/phi.h"
#include "cpu/isa/team.h"

namespace afa::cpu::AFA_ISA {

template <class T, class E>
class Forward {
    using Elem = typename E::Elem;

  public:
    explicit Forward(const ForwardParams& params)
        : p(params), r4(round_up(p.r, kGroup)), k_slabs(ceil_div(p.k, E::kSlab)),
          n_slabs(ceil_div(p.n, E::kSlab)), few_rows(p.m <= kBlockRows), alpha_t(*p.alpha_t) {
        if (p.dropout > 0)
            dropout = {p.dropout, static_cast<uint64_t>(*p.seed), ceil_div(p.k, kDropoutColumns)};
        inverse_keep = kDropoutLevels / static_cast<float>(kDropoutLevels - p.dropout);
        block_rows = min_of(p.m, kBlockRows);
        threads = p.m * p.r * (p.k + p.n) < kWorthThreads ? 1 : p.threads;
        slab_elements = r4 * E::kSlab;
        streams = p.out.data != p.base.data && can_stream<T>(p.out, p.m, p.n);

        staged = scratch.reserve(threads * kBlockRows * staged_ld<E>() * sizeof(Elem));
        tile = scratch.reserve(threads * r4 * E::kTile * sizeof(float));
        rows = scratch.reserve(threads * 2 * block_rows * r4 * sizeof(float));
        coefficients = scratch.reserve(threads * E::coefficient_bytes(block_rows, r4));
        panels = scratch.reserve((few_rows ? threads : k_slabs + n_slabs) * slab_elements *
                                 sizeof(Elem));
        partial = scratch.reserve(few_rows ? k_slabs * p.m * r4 * sizeof(float) : 0);
        scratch.allocate();
    }

    void run() {
        if (p.out.data != p.base.data && p.out.col_stride == 1 && p.out.row_stride == p.n)
            advise_huge_pages(p.out.data, p.m * p.n * static_cast<int64_t>(sizeof(T)));
        run_team(threads, 2, [&](Team team) {
            if (few_rows)
                by_slabs(team);
            else
                by_rows(team);
            if (streams)
                stream_fence();
        });
    }

  private:
    void by_rows(Team& team) {
        float* tile_memory = tile_of(team);
        team.share(k_slabs + n_slabs, [&](int64_t i) {
            if (i < k_slabs)
                pack_a(i, tile_memory, panel(i));
            else
                pack_b(i - k_slabs, tile_memory, panel(i));
        });
        team.barrier();
        float* z = rows_of(team);
        team.share(ceil_div(p.m, kBlockRows), [&](int64_t block) {
            const int64_t row = block * kBlockRows, count = min_of(kBlockRows, p.m - row);
            memset(z, 0, count * r4 * sizeof(float));
            for (int64_t slab = 0; slab < k_slabs; ++slab)
                dot_slab(team, slab, row, count, panel(slab), z);
            const Coefficients<E> h = activate(team, row, count, z, true);
            for (int64_t slab = 0; slab < n_slabs; ++slab)
                expand_slab(slab, row, count, h, panel(k_slabs + slab));
        });
    }

    void by_slabs(Team& team) {
        float* tile_memory = tile_of(team);
        float* sums = scratch.get<float>(partial);
        Elem* local = panel(team.id());
        team.share(k_slabs, [&](int64_t slab) {
            float* z = sums + slab * p.m * r4;
            memset(z, 0, p.m * r4 * sizeof(float));
            pack_a(slab, tile_memory, local);
            dot_slab(team, slab, 0, p.m, local, z);
        });
        team.barrier();
        float* z = rows_of(team);
        memcpy(z, sums, p.m * r4 * sizeof(float));
        for (int64_t slab = 1; slab < k_slabs; ++slab)
            for (int64_t i = 0; i < p.m * r4; ++i)
                z[i] += sums[slab * p.m * r4 + i];
        const Coefficients<E> h = activate(team, 0, p.m, z, team.id() == 0);
        team.share(n_slabs, [&](int64_t slab) {
            pack_b(slab, tile_memory, local);
            expand_slab(slab, 0, p.m, h, local);
        });
    }

    void pack_a(int64_t slab, float* tile_memory, Elem* out) {
        pack_slab<T, E>(p.a, false, slab * E::kSlab, slab_cols(p.k, slab), p.r, r4, tile_memory,
                        out, nullptr);
    }
    void pack_b(int64_t slab, float* tile_memory, Elem* out) {
        pack_slab<T, E>(p.b, true, slab * E::kSlab, slab_cols(p.n, slab), p.r, r4, tile_memory,
                        nullptr, out);
    }

    void dot_slab(Team& team, int64_t slab, int64_t row, int64_t count, const Elem* packed,
                  float* z) {
        const int64_t cols = slab_cols(p.k, slab);
        Elem* memory = scratch.get<Elem>(staged) + team.id() * kBlockRows * staged_ld<E>();
        const Block<E> x = stage<E, T>(p.x, row, count, slab * E::kSlab, cols, dropout, memory);
        dot<E>(x.data, x.ld, count, packed, r4, ceil_div(cols, E::kTile), z, r4);
    }

    // Rounds z, stores it if wanted, and returns h; both are rows of r4 with zeros beyond r.
    Coefficients<E> activate(Team& team, int64_t row, int64_t count, float* z, bool store_z) {
        for (int64_t i = 0; i < count * r4; ++i)
            z[i] = round_to<T>(dropout.threshold > 0 ? inverse_keep * z[i] : z[i]);
        if (store_z && p.z.data != nullptr)
            for (int64_t m = 0; m < count; ++m)
                for (int64_t j = 0; j < p.r; ++j)
                    from_float(z[m * r4 + j], element<T>(p.z, row + m, j));
        float* h = z + block_rows * r4;
        phi(p.activation, z, count * r4, alpha_t, h, nullptr);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t j = p.r; j < r4; ++j)
                h[m * r4 + j] = 0.0f;
        char* memory =
            scratch.get<char>(coefficients) + team.id() * E::coefficient_bytes(block_rows, r4);
        return E::pack_coefficients(h, count, r4, memory);
    }

    void expand_slab(int64_t slab, int64_t row, int64_t count, const Coefficients<E>& h,
                     const Elem* packed) {
        const int64_t first = slab * E::kSlab, cols = slab_cols(p.n, slab);
        const T* base = p.base.data == nullptr ? nullptr : element<T>(p.base, row, first);
        const Target<T> target{element<T>(p.out, row, first),
                               p.out.row_stride,
                               p.out.col_stride,
                               base,
                               p.base.row_stride,
                               p.base.col_stride,
                               p.scaling,
                               streams};
        for (int64_t c = 0; c < cols; c += E::kTile)
            expand<E>(h, 0, count, r4, p.r, packed + c * r4, target, 0, c,
                      static_cast<int>(min_of<int64_t>(E::kTile, cols - c)));
    }

    static int64_t slab_cols(int64_t length, int64_t slab) {
        return min_of<int64_t>(E::kSlab, length - slab * E::kSlab);
    }
    Elem* panel(int64_t i) { return scratch.get<Elem>(panels) + i * slab_elements; }
    float* tile_of(Team& team) { return scratch.get<float>(tile) + team.id() * r4 * E::kTile; }
    float* rows_of(Team& team) {
        return scratch.get<float>(rows) + team.id() * 2 * block_rows * r4;
    }

    const ForwardParams& p;
    int64_t r4, k_slabs, n_slabs;
    bool few_rows;
    float alpha_t;
    Dropout dropout;
    float inverse_keep;
    int64_t block_rows;
    int threads;
    int64_t slab_elements;
    bool streams;
    Scratch scratch;
    int64_t staged, tile, rows, coefficients, panels, partial;
};

}  // namespace afa::cpu::AFA_ISA
