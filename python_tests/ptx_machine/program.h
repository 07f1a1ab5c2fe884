// A decoded kernel: every instruction with its executor, and operands that are places in a warp's
// registers.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ptx_machine/machine.h"
#include "ptx_machine/syntax.h"

namespace ptx {

struct Warp;
struct Instruction;
using Execute = void (*)(Warp&, const Instruction&);

enum class Flow : uint8_t {
    next,        // to the following instruction
    branch,      // to `target` where the guard holds
    exit,        // ret
    collective,  // all lanes of the warp that are still there must be here together
    barrier      // the same, and the warp waits for the others of the CTA
};

struct Instruction {
    Execute execute = nullptr;
    const uint32_t* op = nullptr;     // in the order of the text: place of a register, or a literal
    const uint32_t* reads = nullptr;  // numbers of the registers that must have been written
    const uint32_t* writes = nullptr;
    uint16_t read_count = 0, write_count = 0;
    Flow flow = Flow::next;
    bool guarded = false, guard_negated = false;
    bool joins_halves = false;  // mov.b32 of two 16-bit registers
    uint32_t guard = 0;         // place of the predicate
    uint32_t guard_number = 0;  // its number
    uint32_t target = 0;
    uint32_t line = 0;
    SourceLine source;
};

enum class Width : uint32_t { predicate, bits16, bits32, bits64 };

// Values that a warp's registers start with: constants of the text, and special registers.
struct InitialRegister {
    enum class Kind { constant, tid_x, tid_y, tid_z, ctaid_x, ctaid_y, ctaid_z };
    Kind kind;
    uint32_t number, place;
    Width width;
    uint64_t value;
};

struct Kernel {
    KernelInfo info;
    std::vector<Instruction> code;
    std::vector<uint32_t> pool;  // what op, reads and writes point into
    std::vector<InitialRegister> initial;
    std::vector<std::string> register_names;  // by number
    uint32_t register_words = 0;              // 32-bit words of one warp's registers
    uint32_t local_bytes = 0;                 // per lane
};

struct Global {
    std::vector<unsigned char> storage;  // of the module's own .global arrays
    std::string name;
};

struct Program {
    std::string target;
    std::vector<std::string> files;
    std::vector<std::string> lines;  // of the text, for messages
    std::vector<std::unique_ptr<Global>> globals;
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
};

// Addresses of the first byte of shared and local memory in their own state space. Shared memory
// starts behind the kilobyte that CUDA reserves, aligned as swizzled tiles need it.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kLocalBase = 16;
// Where the windows of the generic address space are: no address of a process.
constexpr uint64_t kSharedWindow = 1ull << 60;
constexpr uint64_t kLocalWindow = 1ull << 61;

// decode.cpp
std::unique_ptr<Program> load(const std::string& text);

}  // namespace ptx
