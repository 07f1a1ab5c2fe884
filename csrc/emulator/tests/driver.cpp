// Runs forward and backward on the emulator over fixed and random shapes and schedules, and
// compares with the truth.
//
//   driver [--cases N] [--seed S]
//
// Every case runs under two schedules, whose outputs must agree bit for bit. Exit status: 0 all
// right, 1 otherwise. Built plain and with sanitizers; a sanitizer ends the process itself.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/activation.h"
#include "emulator/device.h"
#include "emulator/simt.h"
#include "emulator/tests/problem.h"

#if defined(SIMT_ASAN)
// A fake stack per fiber costs most of the time and finds nothing here.
extern "C" const char* __asan_default_options() { return "detect_stack_use_after_return=0"; }
#endif

namespace {

using afa::DType;
using afa::kActivationCount;
using afa::Shape;
using afa::test::Options;
using afa::test::Problem;

struct Case {
    Shape shape;
    Options options;
};

// One case per path through the kernels; random ones follow.
std::vector<Case> fixed_cases() {
    std::vector<Case> cases;
    const auto add = [&](Shape shape, auto change) {
        Case c{shape, {}};
        change(c.options);
        cases.push_back(c);
    };
    const auto nothing = [](Options&) {};
    add({1, 8, 8, 1}, nothing);         // one row, one vector, one rank
    add({130, 264, 136, 16}, nothing);  // one pass, operands read in place, three tiles of rows
    add({70, 712, 520, 16}, nothing);   // split forward, two slabs of dy, more tiles than stages
    add({70, 712, 72, 24}, [](Options& o) { o.threshold = 77, o.recompute_z = true; });
    add({200, 264, 520, 32}, [](Options& o) { o.float_weights = o.bias = true; });
    add({90, 392, 200, 20}, [](Options& o) { o.float_weights = o.strided = true; });
    add({100, 392, 200, 64}, [](Options& o) { o.threshold = 128, o.strided = true; });
    add({70, 136, 456, 60},
        [](Options& o) { o.in_place = o.float_weights = o.recompute_z = true; });
    add({140, 200, 136, 64}, [](Options& o) { o.threshold = 30; });
    // dh by its segments.
    add({330, 136, 520, 64}, nothing);
    add({170, 264, 520, 50}, [](Options& o) { o.float_weights = true; });
    add({40, 264, 72, 50}, [](Options& o) { o.strided = o.in_place = true; });
    add({90, 136, 136, 7}, [](Options& o) { o.need_dx = false; });
    add({90, 136, 136, 13}, [](Options& o) { o.need_da = false, o.threshold = 60; });
    add({90, 136, 136, 8}, [](Options& o) { o.need_db = false; });
    add({90, 136, 136, 40}, [](Options& o) { o.need_dx = o.need_da = false; });
    // Layers that share x: two and three, full ranks and others; the last one in one pass.
    add({130, 136, {{264, 16}, {72, 16}, {72, 16}}}, nothing);
    add({70, 712, {{8, 3}, {584, 17}, {136, 16}}},
        [](Options& o) { o.float_weights = o.recompute_z = true; });
    add({70, 264, {{136, 5}, {264, 8}}}, [](Options& o) { o.strided = o.float_weights = true; });
    add({330, 72, {{72, 16}, {72, 8}, {136, 32}}},
        [](Options& o) { o.round_limit = 128, o.in_place = true; });
    add({90, 136, {{72, 16}, {136, 13}}}, [](Options& o) { o.need_dx = o.need_db = false; });
    // More tiles of rows in a chunk than there are stages in any ring.
    for (const int rank : {16, 32, 64})
        add({330, 72, 72, rank},
            [&](Options& o) { o.chunk_limit = 1, o.threshold = rank == 32 ? 0 : 90; });
    // Three rounds with one chunk each.
    for (const int rank : {16, 64})
        add({330, 72, 72, rank}, [](Options& o) { o.chunk_limit = 1, o.round_limit = 128; });
    // Three rounds of rows, the last one shorter, with two chunks each.
    for (const int rank : {16, 32, 64})
        add({650, 72, 136, rank}, [&](Options& o) {
            o.round_limit = 256, o.threshold = rank == 64 ? 0 : 90, o.recompute_z = rank != 32;
        });
    // More tiles of x, dy and y for a block than there are stages: in a segment, and in one pass.
    add({20, 4104, 72, 16}, nothing);
    add({20, 4104, 4104, 64}, nothing);
    add({6100, 648, 648, 16}, nothing);
    return cases;
}

Case random_case(std::mt19937_64& random) {
    const auto below = [&](int bound) { return static_cast<int>(random() % bound); };
    const int ranks[] = {1, 8, 16, 17, 32, 33, 64};
    Case c{{1 + below(150), 8 * (1 + below(40)), 8 * (1 + below(80)), ranks[below(7)]}, {}};
    c.options.float_weights = below(2);
    c.options.bias = below(3) == 0;
    c.options.in_place = !c.options.bias && below(2);
    c.options.strided = below(2);
    c.options.recompute_z = below(2);
    c.options.chunk_limit = below(2);
    c.options.round_limit = below(3) == 0 ? 128 : 0;
    c.options.threshold = below(2) ? 1 + below(200) : 0;
    return c;
}

const char* kDrivers[] = {"random", "warp_priority"};

// Small GPUs have other ring depths; the bits must not depend on it.
const afa::DeviceLimits kDevices[] = {{132, 227 * 1024, 228 * 1024}, {2, 99 * 1024, 100 * 1024}};

bool run_case(const Case& c, uint64_t seed) {
    const DType dtype = seed % 2 ? DType::fp16 : DType::bf16;
    Problem problem(c.shape, dtype, static_cast<int>(seed % kActivationCount), c.options, seed);
    std::vector<uint8_t> first;
    for (int i = 0; i < 2; ++i) {
        simt::set_options({static_cast<simt::Schedule>(i), seed});
        afa::set_emulated_device(kDevices[i]);
        std::string wrong;
        try {
            wrong = problem.run();
        } catch (const std::exception& error) {
            wrong = error.what();
        }
        if (wrong.empty() && i == 1 && problem.outputs() != first)
            wrong = "two schedules and devices give different bits";
        if (!wrong.empty()) {
            std::printf("FAILED %s, schedule %s, seed %llu: %s\n", problem.name().c_str(),
                        kDrivers[i], static_cast<unsigned long long>(seed), wrong.c_str());
            return false;
        }
        first = problem.outputs();
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    int wanted = 40;
    uint64_t seed = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!std::strcmp(argv[i], "--cases"))
            wanted = std::atoi(argv[i + 1]);
        else if (!std::strcmp(argv[i], "--seed"))
            seed = std::strtoull(argv[i + 1], nullptr, 10);
    }
    std::vector<Case> cases = fixed_cases();
    std::mt19937_64 random(seed);
    while (static_cast<int>(cases.size()) < wanted)
        cases.push_back(random_case(random));
    for (size_t i = 0; i < cases.size(); ++i)
        if (!run_case(cases[i], seed + i))
            return 1;
    std::printf("emulator: %zu cases under 2 schedules agree with the truth\n", cases.size());
    return 0;
}
