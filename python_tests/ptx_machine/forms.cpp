#include "ptx_machine/forms.h"

#include <algorithm>

namespace ptx {

void Forms::add_sized(const std::string& name, const std::string& operands, uint32_t bytes,
                      Execute execute, Flow flow) {
    // The letters live as long as the table, which is for ever.
    static std::vector<std::unique_ptr<std::string>> kept;
    kept.push_back(std::make_unique<std::string>(operands));
    table_[name].push_back({execute, kept.back()->c_str(), flow, bytes});
}

std::vector<std::string> Forms::names() const {
    std::vector<std::string> all;
    for (const auto& entry : table_)
        all.push_back(entry.first);
    std::sort(all.begin(), all.end());
    return all;
}

const Forms& forms() {
    static const Forms table = [] {
        Forms t;
        add_integer_forms(t);
        add_float_forms(t);
        add_move_forms(t);
        add_convert_forms(t);
        add_memory_forms(t);
        add_atomic_forms(t);
        add_async_forms(t);
        add_matrix_forms(t);
        add_wgmma_forms(t);
        add_control_forms(t);
        return t;
    }();
    return table;
}

std::vector<std::string> instruction_names() { return forms().names(); }

}  // namespace ptx
