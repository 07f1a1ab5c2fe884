// PTX text as statements: what the parser gives and the decoder takes. No instruction is known
// here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

struct RawOperand {
    enum class Kind { word, number, address, vector };
    Kind kind = Kind::word;
    std::string text;    // word: register, symbol, label; address: its base, may be empty
    uint64_t value = 0;  // number: integer, or the bits of a float
    int64_t offset = 0;  // address: [text + offset]
    std::vector<RawOperand> parts;  // vector: {a, b}
};

struct SourceLine {
    uint32_t file = 0, line = 0;  // of .loc; file 0: unknown
};

struct RawInstruction {
    std::string name;   // "ld.global.v4.b32"
    std::string guard;  // predicate register; empty: none
    bool guard_negated = false;
    std::vector<RawOperand> operands;
    uint32_t line = 0;  // of the PTX text, from 1
    SourceLine source;
};

struct RawVariable {
    enum class Space { shared, local, global };
    Space space = Space::shared;
    std::string name;
    uint32_t alignment = 1, bytes = 0;
    bool dynamic = false;  // extern, without a size
    std::vector<unsigned char> initial;
};

struct RawRegister {
    std::string name;
    std::string type;  // "pred", "b32", "f64"
};

struct RawLabel {
    std::string name;
    size_t position;  // index of the next instruction
};

struct RawParameter {
    std::string name;
    uint32_t bytes, alignment;
};

struct RawKernel {
    std::string name;
    std::vector<RawParameter> parameters;
    std::vector<RawRegister> registers;
    std::vector<RawVariable> variables;
    std::vector<RawInstruction> instructions;
    std::vector<RawLabel> labels;
    uint32_t required_threads = 0, max_threads = 0;
};

struct RawModule {
    std::string target;
    std::vector<std::string> files;  // by number of .file
    std::vector<RawVariable> variables;
    std::vector<RawKernel> kernels;
};

// Throws LoadError with the line.
RawModule parse(const std::string& text);

// Bytes of a fundamental type such as "b32" or ".f16"; 0 if it is none.
uint32_t bytes_of_type(const std::string& type);

}  // namespace ptx
