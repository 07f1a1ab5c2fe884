// Executes the PTX that a compiler made for an NVIDIA GPU, on the CPU, and reports what hardware
// would leave undefined: races on shared and global memory, reads of memory or registers that
// nothing has written, accesses out of bounds or misaligned, barriers of diverged warps,
// asynchronous copies and products that are not waited for. An instruction that it does not know is
// an error. For tests.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// The PTX cannot be loaded: an unknown instruction, modifier or directive, or a malformed operand.
struct LoadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A kernel did what is undefined on hardware, or a launch asks for what the kernel does not take.
struct ExecutionError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Global memory that a launch may touch. Addresses are those of this process.
struct Allocation {
    uint64_t address;
    uint64_t bytes;
    bool writable;
    std::string name;
};

struct Parameter {
    std::string name;
    uint32_t offset, bytes, alignment;
};

struct KernelInfo {
    std::string name;
    std::vector<Parameter> parameters;
    uint32_t parameter_bytes;  // of the whole parameter space
    uint32_t static_shared_bytes;
    uint32_t required_threads;  // .reqntid; 0: not given
    uint32_t max_threads;       // .maxntid; 0: not given
};

struct Launch {
    std::string kernel;
    uint32_t grid[3] = {1, 1, 1};
    uint32_t block[3] = {1, 1, 1};
    std::vector<unsigned char> parameters;  // the parameter space, byte for byte
    uint32_t dynamic_shared_bytes = 0;
    std::vector<Allocation> allocations;
    uint64_t seed = 0;     // of the order of CTAs and of the interleaving of warps
    bool explain = false;  // fill Counters::effective and exact_waits, which takes time
    // Launched so that it may start before the kernel before it has ended: what it does to global
    // memory has to wait for griddepcontrol.wait.
    bool overlaps = false;
    // The cp.async of this PTX line fills up with other numbers than zeros; 0: none. Shows what
    // depends on the zeros.
    uint32_t unfilled_line = 0;
};

// Bytes that a launch moves between the lanes of its warps and an allocation. What several lanes of
// a warp read at once is moved once.
struct Traffic {
    uint64_t read = 0, written = 0;
};

// What a launch did, over all threads. An access of one lane counts once, by its bytes.
struct Counters {
    uint64_t instructions = 0;                               // per warp
    uint64_t global_loads[5] = {}, global_stores[5] = {};    // of 1, 2, 4, 8, 16 bytes
    uint64_t global_read_bytes = 0, global_write_bytes = 0;  // asynchronous copies not included
    uint64_t async_copies = 0, async_copy_bytes = 0;
    std::map<std::string, Traffic> traffic;  // by the names of the allocations, copies included
    // Pieces of 32 bytes, which is what a multiprocessor asks the L2 cache for.
    uint64_t read_sectors = 0, written_sectors = 0;
    uint64_t shared_read_bytes = 0, shared_write_bytes = 0;
    uint64_t bank_conflicts = 0;  // passes over shared memory beyond the fewest possible
    uint64_t matrix_loads = 0;    // ldmatrix, per warp
    uint64_t matrix_stores = 0;
    uint64_t multiply_adds = 0;        // mma, per warp
    uint64_t group_multiply_adds = 0;  // wgmma, per warp
    uint64_t block_barriers = 0;       // per CTA
    // PTX lines of the synchronizations that this launch could not do without, where it was asked
    // for: barriers that alone stand between two accesses of one place, waits and commits without
    // which a copy or a product would be in flight when its place is accessed, fences that alone
    // stand between a wgmma and what came before it: the write of an operand in shared memory, or
    // an access of its registers; and atomics, fences and barriers that alone order accesses of two
    // CTAs. Without any one of the others, the accesses would still be in order.
    std::set<uint32_t> effective;
    std::set<uint32_t> exact_waits;  // the same, of waits that could not wait for one group less
};

struct Program;

// PTX text, decoded. Immutable: launches of one module may run at the same time.
class Module {
  public:
    explicit Module(const std::string& text);
    ~Module();
    Module(Module&&) noexcept;
    Module& operator=(Module&&) noexcept;

    std::string target() const;  // "sm_80"
    std::vector<KernelInfo> kernels() const;
    // Runs all CTAs of a grid. Throws ExecutionError; memory may then be partly written.
    Counters launch(const Launch& launch) const;

  private:
    std::unique_ptr<Program> program_;
};

// The full names of all instructions that the machine knows, sorted.
std::vector<std::string> instruction_names();

}  // namespace ptx
