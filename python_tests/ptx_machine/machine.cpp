#include "ptx_machine/machine.h"

#include "ptx_machine/state.h"

namespace ptx {

Module::Module(const std::string& text) : program_(load(text)) {}
Module::~Module() = default;
Module::Module(Module&&) noexcept = default;
Module& Module::operator=(Module&&) noexcept = default;

std::string Module::target() const { return program_->target; }

std::vector<KernelInfo> Module::kernels() const {
    std::vector<KernelInfo> all;
    for (const auto& entry : program_->kernels)
        all.push_back(entry.second->info);
    return all;
}

Counters Module::launch(const Launch& launch) const {
    const auto found = program_->kernels.find(launch.kernel);
    if (found == program_->kernels.end())
        throw ExecutionError("the module has no kernel " + launch.kernel);
    const KernelInfo& info = found->second->info;
    const auto fail = [&](const std::string& what) {
        throw ExecutionError("launch of " + launch.kernel + ": " + what);
    };
    if (launch.parameters.size() != info.parameter_bytes)
        fail("takes " + std::to_string(info.parameter_bytes) + " bytes of parameters, got " +
             std::to_string(launch.parameters.size()));
    uint64_t threads = 1;
    for (int k = 0; k < 3; ++k) {
        if (launch.grid[k] == 0 || launch.block[k] == 0)
            fail("a grid or block with a 0");
        if (k > 0 && launch.grid[k] > 65535)
            fail("a grid of more than 65535 in y or z");
        threads *= launch.block[k];
    }
    if (threads > 1024)
        fail("a block of more than 1024 threads");
    if (info.required_threads && threads != info.required_threads)
        fail("takes " + std::to_string(info.required_threads) + " threads per block, got " +
             std::to_string(threads));
    if (info.max_threads && threads > info.max_threads)
        fail("takes at most " + std::to_string(info.max_threads) + " threads per block, got " +
             std::to_string(threads));
    if (launch.dynamic_shared_bytes > 227 * 1024)
        fail("more than 227 KiB of shared memory");
    return run(*program_, *found->second, launch);
}

}  // namespace ptx
