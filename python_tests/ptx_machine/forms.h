// The table of instructions: full name -> how its operands are read, and what executes it.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "ptx_machine/program.h"

namespace ptx {

// `operands` has one letter per operand, vectors in braces. Registers: upper case is written, lower
// case read (a register or a constant):
//   P p predicate, H h 16 bits, D d 32 bits, Q q 64 bits,
//   X x a register at least as wide as the instruction's type: place and Width,
//   _ ~ written, 32 and 16 bits, or the sink "_"
//   r a register of 32 bits that the executor checks and marks itself: place and number
// m: address [register or symbol + offset]: place, whether the register has 64 bits, offset
// n: integer in the text. b: label. s S: as d q, or a variable's address, s a special register too.
struct Form {
    Execute execute;
    const char* operands;
    Flow flow = Flow::next;
    uint32_t bytes = 0;  // of the type, for X and x
};

class Forms {
  public:
    void add(const std::string& name, const char* operands, Execute execute,
             Flow flow = Flow::next) {
        table_[name].push_back({execute, operands, flow, 0});
    }
    // For operands X and x.
    void add_sized(const std::string& name, const std::string& operands, uint32_t bytes,
                   Execute execute, Flow flow = Flow::next);
    // The forms of a name, which differ in their operands; null: unknown.
    const std::vector<Form>* find(const std::string& name) const {
        const auto found = table_.find(name);
        return found == table_.end() ? nullptr : &found->second;
    }
    std::vector<std::string> names() const;

  private:
    std::unordered_map<std::string, std::vector<Form>> table_;
};

constexpr uint32_t kSink = 0xFFFFFFFFu;  // place of a result that is dropped

const Forms& forms();

void add_integer_forms(Forms& forms);
void add_float_forms(Forms& forms);
void add_move_forms(Forms& forms);
void add_convert_forms(Forms& forms);
void add_memory_forms(Forms& forms);
void add_atomic_forms(Forms& forms);
void add_async_forms(Forms& forms);
void add_matrix_forms(Forms& forms);
void add_wgmma_forms(Forms& forms);
void add_control_forms(Forms& forms);

}  // namespace ptx
