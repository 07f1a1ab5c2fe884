// A CUDA runtime whose device is the PTX machine. Linked in the place of cudart to the objects that
// a wheel is made of, so that what they launch, and how, is what runs. "Device memory" is memory of
// this process.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ptx/machine.h"

namespace ptx {

struct LaunchRecord {
    std::string kernel;  // mangled
    uint32_t grid[3], block[3], shared_bytes;
    Counters counters;
};

struct DeviceModel {
    int major = 8, minor = 0;
    int multiprocessors = 108;
    int shared_per_block = 163 * 1024, shared_per_multiprocessor = 164 * 1024;
};

struct RuntimeState {
    std::vector<DeviceModel> devices{DeviceModel{}};
    uint64_t seed = 0;  // of the next launch; each adds 1
    std::vector<LaunchRecord> launches;
    // Changes the PTX of a translation unit when it is loaded next.
    std::function<std::string(const std::string&)> edit;
};

RuntimeState& runtime_state();
// Loads every translation unit's PTX again at the next launch.
void forget_modules();
// All kernels that the program holds, mangled.
std::vector<std::string> kernel_names();

// The memory that a kernel of this project may touch, from its name and its arguments.
std::vector<Allocation> buffers_of(const std::string& mangled_name, const void* parameters);

}  // namespace ptx
