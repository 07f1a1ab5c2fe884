// Where the registers of a kernel lie in a warp's storage: 32 lanes side by side, a predicate's in
// one word.
#pragma once

#include <string>
#include <unordered_map>

#include "ptx_machine/program.h"

namespace ptx {

struct Register {
    uint32_t number, place;
    Width width;
};

class RegisterLayout {
  public:
    explicit RegisterLayout(Kernel& kernel) : kernel_(kernel) {}

    void declare(const std::string& name, const std::string& type);
    // A register that holds a constant from the start; equal ones are the same.
    Register constant(uint64_t value, Width width);
    // %tid.x and its like; false: `name` is none of them.
    bool special(const std::string& name, Register& result);
    // Throws LoadError where the name or the width is wrong.
    Register known(const std::string& name) const;
    Register known(const std::string& name, Width width) const;

  private:
    Register create(const std::string& name, Width width);

    Kernel& kernel_;
    std::unordered_map<std::string, Register> by_name_;
    uint32_t next_predicate_ = 0, predicates_left_ = 0;
};

}  // namespace ptx
