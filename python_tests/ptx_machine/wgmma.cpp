// wgmma: products of a warpgroup of four warps, of which each computes its 16 rows. Operands in
// shared memory are read when the instruction is issued, and recorded as being read until the wait;
// the accumulators may not be touched until then.
#include "ptx_machine/wgmma.h"

#include <algorithm>

#include "ptx_machine/forms.h"
#include "ptx_machine/matrix.h"

namespace ptx {
namespace {

constexpr uint32_t kUnit = 16;  // bytes that a swizzle keeps together

// A matrix descriptor of the PTX ISA: [rows, k] elements in shared memory.
struct Descriptor {
    explicit Descriptor(uint64_t bits)
        : start(static_cast<uint32_t>(bits & 0x3FFF) * 16),
          leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) * 16),
          stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) * 16) {
        const uint32_t mode = static_cast<uint32_t>(bits >> 62);
        width = mode == 0 ? 16 : mode == 1 ? 128 : mode == 2 ? 64 : 32;
        if (bits >> 49 & 7)
            throw Fault{-1, "base offsets of matrix descriptors are not known to the machine"};
    }

    // The 16 bytes with element (row, k), of which the first is a multiple of the elements in it.
    uint32_t unit(uint32_t row, uint32_t k, bool transposed, uint32_t element) const {
        uint32_t offset;
        if (!transposed && width == kUnit)  // k is contiguous
            offset = row % 8 * kUnit + row / 8 * stride + k * element / kUnit * leading;
        else if (!transposed)
            offset = row % 8 * width + row / 8 * stride + k * element;
        else if (width == kUnit)  // rows are contiguous
            offset = row * element / kUnit * stride + k % 8 * kUnit + k / 8 * leading;
        else
            offset = row * element % width + row * element / width * leading + k % 8 * width +
                     k / 8 * stride;
        const uint32_t address = start + offset;
        return address ^ ((address >> 7 & (width / kUnit - 1)) << 4);
    }

    uint32_t start, leading, stride;  // bytes
    uint32_t width;                   // of a swizzled row; 16: not swizzled
};

template <Element kElement>
constexpr uint32_t element_bytes() {
    return kElement == Element::tf32 ? 4 : 2;
}

template <Element kElement>
float element_at(const unsigned char* from, uint32_t index) {
    if constexpr (kElement == Element::tf32) {
        uint32_t bits;
        std::memcpy(&bits, from + 4 * index, 4);
        return tf32_to_float(bits);
    } else {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * index, 2);
        return to_float<kElement>(bits);
    }
}

// Calls put(row, k, value) for rows [first, first + rows) and all k.
template <Element kElement, typename Put>
void read_matrix(Warp& warp, const Descriptor& d, bool transposed, uint32_t first, uint32_t rows,
                 GroupReads& reads, Put&& put) {
    constexpr uint32_t kBytes = element_bytes<kElement>(), kPerUnit = kUnit / kBytes;
    constexpr uint32_t kK = depth_of(kElement);
    const uint32_t row_step = transposed ? kPerUnit : 1, k_step = transposed ? 1 : kPerUnit;
    for (uint32_t row = first; row < first + rows; row += row_step) {
        for (uint32_t k = 0; k < kK; k += k_step) {
            const uint32_t address = d.unit(row, k, transposed, kBytes);
            const unsigned char* from = warp.cta->shared.group_read(warp, address, kUnit);
            reads.units.push_back(address);
            for (uint32_t e = 0; e < kPerUnit; ++e)
                put(transposed ? row + e : row, transposed ? k : k + e,
                    element_at<kElement>(from, e));
        }
    }
}

// The PTX ISA demands a wgmma.fence before the first wgmma, and between a wgmma and what accessed
// its registers before, even if that was a read, or another wgmma that reads the same fragment.
// Only accumulators that go from one wgmma to the next of its shape need none.
void require_fence(Warp& warp, uint32_t number, const char* what) {
    const LastFence& fence = warp.register_fence;
    const uint32_t accessed_at = warp.state[number].accessed_at;
    if (fence.at == 0)
        throw Fault{-1, "no wgmma.fence comes before the first wgmma"};
    if (warp.cta->launch->explain && accessed_at >= fence.without(fence.line))
        warp.cta->needs.add(fence.line);
    if (accessed_at >= fence.at)
        throw Fault{-1, std::string(what) + " " + warp.kernel->register_names[number] +
                            " has been accessed since the last wgmma.fence"};
}

void note_access(Warp& warp, uint32_t number, uint32_t shape) {
    warp.product_access[number] = {warp.executed, shape};
    warp.state[number].accessed_at = warp.executed;
}

template <int kColumns, int kK>
void take_accumulators(Warp& warp, const uint32_t* op, bool read, GroupReads& reads) {
    constexpr uint32_t kShape = kColumns << 8 | kK;
    for (int k = 0; k < kColumns / 2; ++k) {
        const uint32_t number = op[2 * k + 1];
        RegisterState& state = warp.state[number];
        const ProductAccess& last = warp.product_access[number];
        // A chain of products of one shape goes on whether the last one has ended or not.
        if (last.shape != kShape || last.at != state.accessed_at) {
            const std::string& name = warp.kernel->register_names[number];
            if (warp.pinned[number])
                throw Fault{-1, "accumulator " + name + " is in use by another wgmma in flight"};
            if (read && state.defined != kAllLanes)
                throw Fault{__builtin_ctz(~state.defined),
                            "reads " + name + ", which nothing has written"};
            require_fence(warp, number, "accumulator");
            if (!warp.result_of.empty()) {
                warp.cta->needs.touch(warp.result_of[number]);
                warp.cta->needs.touch(warp.fragment_of[number]);
            }
        }
        state.defined = 0;
        ++warp.pinned[number];
        note_access(warp, number, kShape);
        reads.accumulators.push_back(number);
    }
}

// Operands: {accumulators}, A (four registers, or a descriptor), descriptor of B, whether to add to
// the accumulators, signs of A and B (, whether A is transposed), (whether B is).
template <Element kElement, int kColumns, bool kRegistersA>
void multiply_add(Warp& warp, const Instruction& i) {
    require_whole_warp(warp);
    constexpr int kK = depth_of(kElement), kCount = kColumns / 2;
    constexpr bool kCanTranspose = kElement != Element::tf32;
    const uint32_t *c = i.op, *a = c + 2 * kCount, *rest = a + (kRegistersA ? 8 : 1);
    const uint32_t add = warp.predicate(rest[1]);
    if (add != 0 && add != kAllLanes)
        throw Fault{-1, "the lanes do not agree on whether to add to the accumulators"};
    if (rest[2] != 1 || rest[3] != 1)
        throw Fault{-1, "a negated operand is not known to the machine"};
    const bool transposed_a = kCanTranspose && !kRegistersA && rest[4];
    const bool transposed_b = kCanTranspose && rest[kRegistersA ? 4 : 5];
    GroupReads reads;
    reads.group = warp.group_commits;
    float fragment[16][kK];
    const uint32_t first = 16 * static_cast<uint32_t>(warp.index % 4);
    if constexpr (kRegistersA) {
        const uint32_t places[4] = {a[0], a[2], a[4], a[6]};
        for (int k = 0; k < 4; ++k) {
            const uint32_t number = a[2 * k + 1];
            if (!warp.result_of.empty())
                warp.cta->needs.touch(warp.result_of[number]);
            if (warp.state[number].defined != kAllLanes)
                throw Fault{-1, "reads " + warp.kernel->register_names[number] +
                                    ", which nothing has written or a wgmma in flight will write"};
            if (warp.product_access[number].at != warp.executed)  // not by this one already
                require_fence(warp, number, "fragment register");
            ++warp.pinned[number];
            note_access(warp, number, 0);
            reads.fragments.push_back(number);
        }
        read_fragment_a<kElement>(warp, places, fragment);
    } else {
        const uint64_t* bits = warp.in<uint64_t>(a[0]);
        read_matrix<kElement>(
            warp, Descriptor(bits[0]), transposed_a, first, 16, reads,
            [&](uint32_t row, uint32_t k, float value) { fragment[row - first][k] = value; });
    }
    float b[kK][kColumns];
    read_matrix<kElement>(warp, Descriptor(warp.in<uint64_t>(rest[0])[0]), transposed_b, 0,
                          kColumns, reads,
                          [&](uint32_t row, uint32_t k, float value) { b[k][row] = value; });
    take_accumulators<kColumns, kK>(warp, c, add != 0, reads);
    float sum[16][kColumns] = {};
    for (int k = 0; k < kCount && add; ++k) {
        const float* from = warp.in<float>(c[2 * k]);
        for (int lane = 0; lane < kLanes; ++lane)
            sum[lane / 4 + 8 * (k / 2 % 2)][k / 4 * 8 + 2 * (lane % 4) + k % 2] = from[lane];
    }
    accumulate<kK, kColumns>(fragment, b, sum);
    for (int k = 0; k < kCount; ++k) {
        float result[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
            result[lane] = sum[lane / 4 + 8 * (k / 2 % 2)][k / 4 * 8 + 2 * (lane % 4) + k % 2];
        warp.out(c[2 * k], result);
    }
    warp.group_reads.push_back(std::move(reads));
    warp.group_history = warp.group_history * 1099511628211ull + i.line;
    ++warp.cta->counters.group_multiply_adds;
}

void fence(Warp& warp, const Instruction& i) { warp.register_fence.set(warp.executed, i.line); }

void commit(Warp& warp, const Instruction& i) {
    ++warp.group_commits;
    if (warp.cta->launch->explain)
        warp.product_groups.commits.push_back(i.line);
}

// Who touches a register of the product, or writes to shared memory that it reads, needs its end.
void mark_end(Warp& warp, const GroupReads& reads, Groups::Wait wait) {
    const uint32_t operation = warp.cta->needs.end(warp.product_groups, reads.group, wait);
    warp.ended_products.push_back({operation, reads.group, -1});
    for (uint32_t unit : reads.units)
        warp.cta->shared.mark_group_read(unit, kUnit, operation);
    for (uint32_t number : reads.fragments)
        warp.fragment_of[number] = operation;
    for (uint32_t number : reads.accumulators)
        warp.result_of[number] = operation;
}

void wait(Warp& warp, const Instruction& i) {
    auto& all = warp.group_reads;
    auto& ended = warp.ended_products;
    const Groups::Wait here{i.line, i.op[0]};
    ended.erase(std::remove_if(ended.begin(), ended.end(),
                               [&](const Ended& e) {
                                   return !warp.cta->needs.is_late(e.operation, warp.product_groups,
                                                                   e.group, here);
                               }),
                ended.end());
    const auto done = [&](const GroupReads& r) { return r.group + i.op[0] < warp.group_commits; };
    for (const GroupReads& reads : all) {
        if (!done(reads))
            continue;
        if (warp.cta->launch->explain)
            mark_end(warp, reads, here);
        for (uint32_t unit : reads.units)
            warp.cta->shared.release_group_read(warp, unit, kUnit);
        for (uint32_t number : reads.fragments)
            --warp.pinned[number];
        for (uint32_t number : reads.accumulators)
            if (--warp.pinned[number] == 0)
                warp.state[number].defined = kAllLanes;
    }
    all.erase(std::remove_if(all.begin(), all.end(), done), all.end());
}

void fence_proxy(Warp& warp, const Instruction& i) {
    warp.segment = warp.cta->shared.new_segment(warp.index);
    warp.proxy_fence.set(warp.segment, i.line);
}

template <Element kElement, int kColumns>
void add_shape(Forms& f, const std::string& type) {
    const std::string name = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(kColumns) + "k" +
                             std::to_string(depth_of(kElement)) + ".f32." + type + "." + type;
    const std::string accumulators = "{" + std::string(kColumns / 2, 'r') + "}";
    const bool can_transpose = kElement != Element::tf32;
    f.add_sized(name, accumulators + "qqpnn" + (can_transpose ? "nn" : ""), 4,
                multiply_add<kElement, kColumns, false>, Flow::collective);
    f.add_sized(name, accumulators + "{rrrr}qpnn" + (can_transpose ? "n" : ""), 4,
                multiply_add<kElement, kColumns, true>, Flow::collective);
}

template <Element kElement>
void add_shapes(Forms& f, const std::string& type) {
    add_shape<kElement, 8>(f, type);
    add_shape<kElement, 16>(f, type);
    add_shape<kElement, 32>(f, type);
    add_shape<kElement, 64>(f, type);
    add_shape<kElement, 128>(f, type);
    add_shape<kElement, 256>(f, type);
}

}  // namespace

void check_warpgroups(const Cta& cta) {
    for (const Warp& warp : cta.warps) {
        const size_t first = static_cast<size_t>(warp.index) / 4 * 4;
        if (warp.group_history != cta.warps[first].group_history)
            throw Fault{-1, "warps " + std::to_string(first) + " and " +
                                std::to_string(warp.index) +
                                " of one warpgroup have executed different wgmma instructions"};
        if (warp.group_history && cta.warps.size() % 4)
            throw Fault{-1, "wgmma in a CTA whose warps are not groups of four"};
    }
}

void add_wgmma_forms(Forms& f) {
    add_shapes<Element::bf16>(f, "bf16");
    add_shapes<Element::f16>(f, "f16");
    add_shapes<Element::tf32>(f, "tf32");
    f.add("wgmma.fence.sync.aligned", "", fence, Flow::collective);
    f.add("wgmma.commit_group.sync.aligned", "", commit, Flow::collective);
    f.add("wgmma.wait_group.sync.aligned", "n", wait, Flow::collective);
    f.add("fence.proxy.async.shared::cta", "", fence_proxy);
}

}  // namespace ptx
