// What follows from the sizes and types of a call before it runs: how it is cut into blocks and
// slabs, on how many threads it runs, and where its scratch lies.
//
// Rows come in blocks of E::kBlockRows, columns in slabs of E::kSlab, r is padded to rp.
#pragma once

#include "cpu/isa/operands.h"
#include "cpu/isa/scratch.h"
#include "cpu/isa/team.h"

namespace afa::cpu::AFA_ISA {

template <class E>
static inline int64_t slab_cols(int64_t length, int64_t slab) {
    return min_of<int64_t>(E::kSlab, length - slab * E::kSlab);
}

static inline Dropout dropout_of(const CommonParams& p) {
    if (p.dropout == 0)
        return {};
    return {p.dropout, static_cast<uint64_t>(*p.seed), ceil_div(p.k, kDropoutColumns)};
}
static inline float alpha_of(const CommonParams& p) {
    return p.alpha_t == nullptr ? 0.0f : *p.alpha_t;
}
static inline float inverse_keep_of(const CommonParams& p) {
    return kDropoutLevels / static_cast<float>(kDropoutLevels - p.dropout);
}

// A second thread costs more than it brings below this many multiply-adds.
constexpr int64_t kWorthThreads = 200000;

static inline int threads_for(const CommonParams& p) {
    return p.m * p.r * (p.k + p.n) < kWorthThreads ? 1 : p.threads;
}

template <class T, class E>
struct ForwardPlan {
    using Elem = typename E::Elem;

    explicit ForwardPlan(const ForwardParams& p)
        : threads(threads_for(p)), rp(round_up(p.r, E::kRankStep)),
          k_slabs(ceil_div(p.k, E::kSlab)), n_slabs(ceil_div(p.n, E::kSlab)),
          few_rows(p.m <= E::kBlockRows),
          block_rows(min_of(round_up(p.m, E::kRowStep), E::kBlockRows)), a_slab(rp * E::kSlab),
          b_slab(E::expand_rank(rp) * E::kSlab),
          streams(p.out.data != p.base.data && can_stream<T>(p.out, p.m, p.n)) {
        staged = layout.reserve<Elem>(threads * E::kBlockRows * staged_ld<E>());
        rows = layout.reserve<float>(threads * 2 * block_rows * rp);
        coefficients = layout.reserve<char>(threads * E::coefficient_bytes(block_rows, rp));
        a_panels = layout.reserve<Elem>((few_rows ? threads : k_slabs) * a_slab);
        b_panels = layout.reserve<Elem>((few_rows ? threads : n_slabs) * b_slab);
        partial = layout.reserve<float>(few_rows ? k_slabs * block_rows * rp : 0);
    }

    int threads;
    int64_t rp, k_slabs, n_slabs;
    bool few_rows;           // tasks are slabs of columns, not blocks of rows
    int64_t block_rows;      // of scratch: M or a block
    int64_t a_slab, b_slab;  // elements of a panel
    bool streams;            // y bypasses the cache

    Layout layout;
    Piece<Elem> staged;        // of each thread: [kBlockRows][staged_ld]
    Piece<float> rows;         // of each thread: z and h, [2][block_rows][rp]
    Piece<char> coefficients;  // of each thread: E::Coefficients of h
    Piece<Elem> a_panels;      // of each slab of K; with few rows one for each thread
    Piece<Elem> b_panels;      // of each slab of N; likewise
    Piece<float> partial;      // with few rows, sums of z of each slab of K: [slab][block_rows][rp]
};

// Blocks of rows that the backward takes through all its phases at once. Fewer at a high rank: the
// partial sums of dz take this many rows of r floats for each slab of N, and are to stay well below
// the panels.
static inline int64_t super_blocks_for(int64_t rp) { return rp <= 32 ? 4 : rp <= 64 ? 2 : 1; }

template <class T, class E>
struct BackwardPlan {
    using Elem = typename E::Elem;

    explicit BackwardPlan(const BackwardParams& p)
        : threads(threads_for(p)), rp(round_up(p.r, E::kRankStep)),
          k_slabs(ceil_div(p.k, E::kSlab)), n_slabs(ceil_div(p.n, E::kSlab)),
          need_dx(p.dx.data != nullptr), need_da(p.da.data != nullptr),
          need_db(p.db.data != nullptr), need_dz(need_dx || need_da),
          recompute_z(p.z.data == nullptr), super_rows(super_blocks_for(rp) * E::kBlockRows),
          own_slabs(n_slabs > threads ? part_of_team(n_slabs, 0, threads).end : 1),
          panel_elements(rp * E::kSlab), expand_elements(E::expand_rank(rp) * E::kSlab),
          super_elements(super_rows * rp),
          da_in_place(p.da.dtype == Dtype::f32 && rp == p.r && p.k % E::kTile == 0),
          db_in_place(p.db.dtype == Dtype::f32 && rp == p.r && p.n % E::kTile == 0),
          streams(need_dx && p.dropout == 0 && !p.accumulate_dx && can_stream<T>(p.dx, p.m, p.k)) {
        staged = layout.reserve<Elem>(threads * E::kBlockRows * staged_ld<E>());
        outer_tiles = layout.reserve<Elem>(threads * 2 * E::kBlockRows * E::kTile);
        db_tile = layout.reserve<float>(threads * rp * E::kTile);

        h = layout.reserve<float>(super_elements);
        slope = layout.reserve<float>(need_dz ? super_elements : 0);
        dz = layout.reserve<float>(need_dz ? super_elements : 0);
        const int64_t packed = super_blocks_for(rp) * E::coefficient_bytes(E::kBlockRows, rp);
        h_packed = layout.reserve<char>(packed);
        dz_packed = layout.reserve<char>(packed);
        dz_sums = layout.reserve<float>((need_dz ? 1 + n_slabs - own_slabs : 1) * super_elements);
        z = dz_sums;
        dots = layout.reserve<float>(need_dz ? E::kBlockRows * rp : 0);

        b_panels = layout.reserve<Elem>(need_dz ? n_slabs * panel_elements : 0);
        need_a_dot = recompute_z || (E::kOnePanel && need_dx);
        a_dot = layout.reserve<Elem>(need_a_dot ? k_slabs * panel_elements : 0);
        a_expand =
            E::kOnePanel ? a_dot : layout.reserve<Elem>(need_dx ? k_slabs * expand_elements : 0);
        da_sums = layout.reserve<float>(need_da && !da_in_place ? k_slabs * panel_elements : 0);
        db_sums = layout.reserve<float>(need_db && !db_in_place ? n_slabs * panel_elements : 0);
    }

    int threads;
    int64_t rp, k_slabs, n_slabs;
    bool need_dx, need_da, need_db, need_dz, recompute_z;
    int64_t super_rows;                       // rows that go through all phases at once
    int64_t own_slabs;                        // of N, in the run of the first thread
    int64_t panel_elements, expand_elements;  // of a panel for dot or outer, for expand
    int64_t super_elements;                   // of super_rows rows of rp
    bool da_in_place, db_in_place;            // the sums of dA or dB lie where the result goes
    // dX bypasses the cache. Not with dropout, which reads dX again to drop elements.
    bool streams;
    bool need_a_dot;

    Layout layout;
    Piece<Elem> staged;       // of each thread: [kBlockRows][staged_ld]
    Piece<Elem> outer_tiles;  // of each thread: [2][kBlockRows][kTile]
    Piece<float> db_tile;     // of each thread: [kTile][rp], a tile of dB's sums transposed

    Piece<float> h, slope, dz;        // [super_rows][rp]
    Piece<char> h_packed, dz_packed;  // of each block: E::Coefficients
    Piece<float> dz_sums;             // dY B: the first thread's run, then slab by slab of N, each
                                      // [super_rows][rp]
    Piece<float> z;                   // [super_rows][rp]; done with when dz_sums begin
    Piece<float> dots;                // [kBlockRows][rp], one slab's part of the first thread's run

    Piece<Elem> b_panels, a_dot, a_expand;  // of each slab
    Piece<float> da_sums, db_sums;          // of each slab: [tile][rp][kTile]
};

}  // namespace afa::cpu::AFA_ISA
