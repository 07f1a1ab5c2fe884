// Random problems for the CPU kernels; built with sanitizers by -DAFA_SANITIZE=ON.
//
//   driver [instruction set] [problems] [first seed]
//
// Without an instruction set the best one. Exit status: 0 all right, 1 a failure, 77 the machine or
// the build lacks the instruction set, or AFA_CPU_ISA names a lesser one.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "cpu/cpu.h"
#include "cpu_kernels/checks.h"

namespace {

constexpr int kFailed = 1, kSkipped = 77;

afa::cpu::Isa isa_of(const std::string& name) {
    for (const afa::cpu::Isa isa : afa::cpu::kIsas)
        if (name == afa::cpu::isa_name(isa))
            return isa;
    throw std::invalid_argument("no instruction set is called '" + name + "'");
}

// Makes `name` the instruction set in use, which is read once and later than this.
void choose(const std::string& name) {
    const char* cap = std::getenv("AFA_CPU_ISA");
    if (cap != nullptr && *cap != '\0' && isa_of(cap) < isa_of(name))
        throw afa::cpu::MissingIsa("AFA_CPU_ISA=" + std::string(cap) + " excludes " + name);
    setenv("AFA_CPU_ISA", isa_name(isa_of(name)), 1);
}

int run(uint64_t problems, uint64_t first) {
    const char* isa = afa::cpu::isa_name(afa::cpu::selected_isa());
    int failures = 0;
    for (uint64_t seed = first; seed < first + problems; ++seed) {
        failures += afa::cpu::test::check_problem(seed);
        if (seed % 16 == 0)  // it takes as long as these many of the others
            failures += afa::cpu::test::check_rows(seed);
        if (seed % 4 == 0)
            failures += afa::cpu::test::check_by_owner(seed);
    }
    std::printf("%s: %llu problems, %d failures\n", isa, static_cast<unsigned long long>(problems),
                failures);
    return failures ? kFailed : 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        if (argc > 1)
            choose(argv[1]);
        return run(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 200,
                   argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
    } catch (const afa::cpu::MissingIsa& missing) {
        std::fprintf(stderr, "skipped: %s\n", missing.what());
        return kSkipped;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "failed: %s\n", error.what());
        return kFailed;
    }
}
