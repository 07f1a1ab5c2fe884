// A CUDA runtime and driver whose devices are the PTX machine. Linked in the place of cudart to the
// objects that a wheel is made of, so that what they launch, and how, is what runs. "Device memory"
// is memory of this process. It also plays what a test asks of it: an old driver, calls that fail,
// kernels whose faults come up late, several devices, streams that capture.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "ptx_machine/machine.h"

namespace ptx {

struct LaunchRecord {
    std::string kernel;  // mangled
    int device;
    uint32_t grid[3], block[3], shared_bytes;
    int granted,
        carveout;   // shared memory that the kernel may have, and its preferred share; 0, -1
    bool overlaps;  // it may start before the launch before it has ended
    Counters counters;
};

struct DeviceModel {
    int major, minor;
    int multiprocessors;
    int shared_per_block, shared_per_multiprocessor;
};

// A launch that a stream has captured.
struct CapturedLaunch {
    const void* function;
    int device;
    Launch launch;
};

struct Capture {
    bool running = false, invalidated = false;
    cudaStream_t stream = nullptr;
    std::vector<CapturedLaunch> launches;
};

// What a test asks of the runtime; all as on a machine where nothing is wrong.
struct Faults {
    bool driver_is_too_old = false;
    int driver_version = CUDART_VERSION, runtime_version = CUDART_VERSION;
    bool overlaps = true;  // false: no launch may start before the one before it has ended
    std::map<std::string, cudaError_t> calls;  // by the function of the runtime that fails
    // A kernel's fault comes up at the calls behind its launch, and stays, as on hardware.
    // Otherwise the launch itself reports it.
    bool asynchronous = false;
};

struct RuntimeState {
    // Launches are counted and do nothing, as fast as that goes: to time the code that launches.
    bool idle = false;
    int64_t idle_launches = 0;
    // From the compute-capability table of NVIDIA's programming guide: an A100 and an H100.
    std::vector<DeviceModel> devices{{8, 0, 108, 163 * 1024, 164 * 1024},
                                     {9, 0, 132, 227 * 1024, 228 * 1024}};
    // Most chunks of rows and most rows of a round in the host code's plans (cuda/host/plan.h).
    int chunk_limit = 0, round_limit = 0;
    uint64_t seed = 0;  // of the next launch; each adds 1
    // See ptx::Launch; the line is of one kernel.
    bool explain = false;
    std::string unfilled_kernel;
    uint32_t unfilled_line = 0;
    std::vector<LaunchRecord> launches;
    Faults faults;
    Capture capture;

    // What the calls left behind.
    std::map<std::string, int> calls;   // by function
    std::map<int, cudaError_t> sticky;  // by device
    std::set<int> contexts;             // devices that have one
    int selected = 0;                   // what cudaSetDevice was told
    int current = -1;                   // device of the driver's current context, -1: none
    cudaError_t last = cudaSuccess;
    std::string message;  // of the last launch that failed: what the machine found
    // Attributes by device and function: shared memory, and its preferred share of the cache.
    std::map<std::pair<int, const void*>, int> granted, carveouts;
};

RuntimeState& runtime_state();
// All faults and contexts are forgotten. Devices, granted memory, seed and launches stay.
void restart();
// Runs what a stream has captured, as a graph does, with the arguments of then.
cudaError_t replay(const std::vector<CapturedLaunch>& launches);

// The memory that a kernel of this project may touch, from its name and its arguments.
std::vector<Allocation> buffers_of(const std::string& mangled_name, const void* parameters);

// "cudaErrorInvalidValue" of an error, and the other way round. Throws for a name that is not in
// the list.
const char* error_name(cudaError_t error);
cudaError_t error_of(const std::string& name);

}  // namespace ptx
