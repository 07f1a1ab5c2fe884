#include "ptx_machine/registers.h"

#include "ptx_machine/state.h"

namespace ptx {
namespace {

Width width_of_type(const std::string& type, const std::string& name) {
    if (type == "pred")
        return Width::predicate;
    switch (bytes_of_type(type)) {
    case 2:
        return Width::bits16;
    case 4:
        return Width::bits32;
    case 8:
        return Width::bits64;
    }
    throw LoadError("register " + name + ": type '" + type + "' is not known");
}

}  // namespace

void RegisterLayout::declare(const std::string& name, const std::string& type) {
    by_name_[name] = create(name, width_of_type(type, name));
}

Register RegisterLayout::create(const std::string& name, Width width) {
    Register r{static_cast<uint32_t>(kernel_.register_names.size()), 0, width};
    kernel_.register_names.push_back(name.substr(0, name.find('@')));
    if (width == Width::predicate) {
        if (predicates_left_ == 0) {
            next_predicate_ = kernel_.register_words;
            kernel_.register_words += kLanes;
            predicates_left_ = kLanes;
        }
        r.place = next_predicate_++;
        --predicates_left_;
    } else {
        r.place = kernel_.register_words;
        kernel_.register_words += width == Width::bits64 ? 2 * kLanes : kLanes;
    }
    return r;
}

Register RegisterLayout::constant(uint64_t value, Width width) {
    if (width == Width::predicate)
        value = value ? kAllLanes : 0;
    else if (width == Width::bits16)
        value &= 0xFFFF;
    else if (width == Width::bits32)
        value &= 0xFFFFFFFF;
    const std::string key = std::to_string(static_cast<int>(width)) + ":" + std::to_string(value);
    const auto found = by_name_.find(key);
    if (found != by_name_.end())
        return found->second;
    const Register r = create("constant " + std::to_string(value), width);
    kernel_.initial.push_back({InitialRegister::Kind::constant, r.number, r.place, width, value});
    return by_name_[key] = r;
}

bool RegisterLayout::special(const std::string& name, Register& result) {
    using Kind = InitialRegister::Kind;
    static const std::pair<const char*, Kind> table[] = {
        {"%tid.x", Kind::tid_x},     {"%tid.y", Kind::tid_y},     {"%tid.z", Kind::tid_z},
        {"%ctaid.x", Kind::ctaid_x}, {"%ctaid.y", Kind::ctaid_y}, {"%ctaid.z", Kind::ctaid_z},
    };
    for (const auto& [text, kind] : table) {
        if (name != text)
            continue;
        const auto found = by_name_.find(name);
        if (found == by_name_.end()) {
            result = by_name_[name] = create(name, Width::bits32);
            kernel_.initial.push_back({kind, result.number, result.place, Width::bits32, 0});
        } else {
            result = found->second;
        }
        return true;
    }
    return false;
}

Register RegisterLayout::known(const std::string& name) const {
    const auto found = by_name_.find(name);
    if (found == by_name_.end())
        throw LoadError("'" + name + "' is not a register");
    return found->second;
}

Register RegisterLayout::known(const std::string& name, Width width) const {
    const Register r = known(name);
    if (r.width != width)
        throw LoadError("'" + name + "' has not the width of the operand");
    return r;
}

}  // namespace ptx
