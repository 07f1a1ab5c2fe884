// Random problems for the CPU kernels; built with sanitizers by -DAFA_SANITIZE=ON.
//
//   driver [problems] [first seed]      the instruction set is that of AFA_CPU_ISA
//
// Exit status: 0 all right, 1 a failure, 77 the machine or the build lacks the instruction set.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "cpu/cpu.h"
#include "cpu/tests/checks.h"

namespace {

constexpr int kFailed = 1, kSkipped = 77;

int run(uint64_t problems, uint64_t first) {
    const char* isa = afa::cpu::isa_name(afa::cpu::selected_isa());
    int failures = 0;
    for (uint64_t seed = first; seed < first + problems; ++seed) {
        failures += afa::cpu::test::check_problem(seed);
        if (seed % 4 == 0)
            failures += afa::cpu::test::check_rows(seed);
    }
    std::printf("%s: %llu problems, %d failures\n", isa, static_cast<unsigned long long>(problems),
                failures);
    return failures ? kFailed : 0;
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t problems = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 200;
    const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    try {
        return run(problems, first);
    } catch (const afa::cpu::MissingIsa& missing) {
        std::fprintf(stderr, "skipped: %s\n", missing.what());
        return kSkipped;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "failed: %s\n", error.what());
        return kFailed;
    }
}
