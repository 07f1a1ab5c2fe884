// ldmatrix, stmatrix and mma: instructions of a whole warp, with the fragment layouts of the PTX
// ISA. With g = lane / 4 and q = lane % 4, a lane holds of an 8x8 matrix of 16-bit elements row g,
// columns 2q and 2q + 1 (transposed: column g, rows 2q and 2q + 1).
#include "ptx_machine/matrix.h"

#include <cmath>

#include "ptx_machine/forms.h"
#include "ptx_machine/half.h"

namespace ptx {
namespace {

struct Rows {
    uint32_t address[kLanes];
};

// Addresses of the rows that lanes 0 to 8 * kMatrices - 1 name, and the bank conflicts of them.
template <int kMatrices>
Rows rows_of(Warp& warp, const uint32_t* op) {
    Rows rows;
    for (int lane = 0; lane < 8 * kMatrices; ++lane) {
        const uint64_t base =
            op[1] ? warp.in<uint64_t>(op[0])[lane] : warp.in<uint32_t>(op[0])[lane];
        const uint64_t address =
            base + static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(op[2])));
        if (address > 0xFFFFFFFFull)
            throw Fault{lane, "the address of shared memory has more than 32 bits"};
        rows.address[lane] = static_cast<uint32_t>(address);
    }
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
        int per_slot[8] = {}, worst = 1;
        for (int i = 0; i < 8; ++i) {
            const uint32_t address = rows.address[8 * matrix + i];
            bool repeated = false;  // the same address is read once for all
            for (int j = 0; j < i; ++j)
                repeated |= rows.address[8 * matrix + j] == address;
            int& slot = per_slot[address / 16 % 8];
            slot += !repeated;
            worst = slot > worst ? slot : worst;
        }
        warp.cta->counters.bank_conflicts += static_cast<uint64_t>(worst - 1);
    }
    return rows;
}

template <int kMatrices, bool kTransposed>
void load_matrix(Warp& warp, const Instruction& i) {
    require_whole_warp(warp);
    const Rows rows = rows_of<kMatrices>(warp, i.op + kMatrices);
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row) {
            const int lane = 8 * matrix + row;
            std::memcpy(element[row], warp.cta->shared.read(warp, lane, rows.address[lane], 16),
                        16);
        }
        uint32_t result[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, q = lane % 4;
            const uint32_t low = kTransposed ? element[2 * q][g] : element[g][2 * q];
            const uint32_t high = kTransposed ? element[2 * q + 1][g] : element[g][2 * q + 1];
            result[lane] = high << 16 | low;
        }
        warp.out(i.op[matrix], result);
    }
    ++warp.cta->counters.matrix_loads;
    warp.cta->counters.shared_read_bytes += 128 * kMatrices;
}

template <int kMatrices, bool kTransposed>
void store_matrix(Warp& warp, const Instruction& i) {
    require_whole_warp(warp);
    const Rows rows = rows_of<kMatrices>(warp, i.op);
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
        const uint32_t* from = warp.in<uint32_t>(i.op[3 + matrix]);
        uint16_t element[8][8];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, q = lane % 4;
            (kTransposed ? element[2 * q][g] : element[g][2 * q]) =
                static_cast<uint16_t>(from[lane]);
            (kTransposed ? element[2 * q + 1][g] : element[g][2 * q + 1]) =
                static_cast<uint16_t>(from[lane] >> 16);
        }
        for (int row = 0; row < 8; ++row) {
            const int lane = 8 * matrix + row;
            warp.cta->shared.write(warp, lane, rows.address[lane], 16,
                                   reinterpret_cast<const unsigned char*>(element[row]));
        }
    }
    ++warp.cta->counters.matrix_stores;
    warp.cta->counters.shared_write_bytes += 128 * kMatrices;
}

// c (16 x 8) += a (16 x kK) b (kK x 8). Of a, register i holds row g + 8 (i % 2), and of 16-bit
// elements columns 2q + 8 (i / 2) and the next, of tf32 column q + 4 (i / 2). Of b, register i
// holds column g and the same places of k. Of c, row g + 8 (i / 2) and column 2q + i % 2.
template <Element kElement>
void multiply_add(Warp& warp, const Instruction& i) {
    require_whole_warp(warp);
    constexpr int kK = depth_of(kElement);
    const uint32_t* op = i.op;
    const uint32_t a_places[4] = {op[4], op[5], op[6], op[7]};
    float a[16][kK], b[kK][8], sum[16][8];
    read_fragment_a<kElement>(warp, a_places, a);
    for (int half = 0; half < 2; ++half) {
        const uint32_t* from = warp.in<uint32_t>(op[8 + half]);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, q = lane % 4;
            if constexpr (kElement == Element::tf32) {
                b[q + 4 * half][g] = tf32_to_float(from[lane]);
            } else {
                b[2 * q + 8 * half][g] = to_float<kElement>(from[lane] & 0xFFFF);
                b[2 * q + 8 * half + 1][g] = to_float<kElement>(from[lane] >> 16);
            }
        }
    }
    for (int k = 0; k < 4; ++k) {
        const float* from = warp.in<float>(op[10 + k]);
        for (int lane = 0; lane < kLanes; ++lane)
            sum[lane / 4 + 8 * (k / 2)][2 * (lane % 4) + k % 2] = from[lane];
    }
    accumulate<kK, 8>(a, b, sum);
    for (int k = 0; k < 4; ++k) {
        float result[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
            result[lane] = sum[lane / 4 + 8 * (k / 2)][2 * (lane % 4) + k % 2];
        warp.out(op[k], result);
    }
    ++warp.cta->counters.multiply_adds;
}

template <int kMatrices, bool kTransposed>
void add_matrices(Forms& f) {
    const std::string name = "matrix.sync.aligned.m8n8.x" + std::to_string(kMatrices) +
                             (kTransposed ? ".trans" : "") + ".shared.b16";
    static const char* loads[] = {"", "Dm", "{DD}m", "", "{DDDD}m"};
    static const char* stores[] = {"", "md", "m{dd}", "", "m{dddd}"};
    f.add("ld" + name, loads[kMatrices], load_matrix<kMatrices, kTransposed>, Flow::collective);
    f.add("st" + name, stores[kMatrices], store_matrix<kMatrices, kTransposed>, Flow::collective);
}

}  // namespace

void add_matrix_forms(Forms& f) {
    add_matrices<1, false>(f);
    add_matrices<2, false>(f);
    add_matrices<4, false>(f);
    add_matrices<1, true>(f);
    add_matrices<2, true>(f);
    add_matrices<4, true>(f);
    const char* operands = "{DDDD}{dddd}{dd}{dddd}";
    f.add("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", operands,
          multiply_add<Element::bf16>, Flow::collective);
    f.add("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", operands, multiply_add<Element::f16>,
          Flow::collective);
    f.add("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", operands,
          multiply_add<Element::tf32>, Flow::collective);
}

}  // namespace ptx
