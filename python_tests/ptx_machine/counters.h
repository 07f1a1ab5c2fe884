// Counters of a launch as a Python dictionary.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ptx_machine/machine.h"

namespace ptx {

inline pybind11::dict counters_dict(const Counters& c) {
    pybind11::dict d, loads, stores;
    for (int k = 0; k < 5; ++k) {
        loads[pybind11::int_(1 << k)] = c.global_loads[k];
        stores[pybind11::int_(1 << k)] = c.global_stores[k];
    }
    d["global_loads"] = loads;
    d["global_stores"] = stores;
    pybind11::dict traffic;
    for (const auto& [name, moved] : c.traffic)
        traffic[pybind11::str(name)] = pybind11::make_tuple(moved.read, moved.written);
    d["traffic"] = traffic;
    d["read_sectors"] = c.read_sectors;
    d["written_sectors"] = c.written_sectors;
    d["instructions"] = c.instructions;
    d["global_read_bytes"] = c.global_read_bytes;
    d["global_write_bytes"] = c.global_write_bytes;
    d["async_copies"] = c.async_copies;
    d["async_copy_bytes"] = c.async_copy_bytes;
    d["shared_read_bytes"] = c.shared_read_bytes;
    d["shared_write_bytes"] = c.shared_write_bytes;
    d["bank_conflicts"] = c.bank_conflicts;
    d["matrix_loads"] = c.matrix_loads;
    d["matrix_stores"] = c.matrix_stores;
    d["multiply_adds"] = c.multiply_adds;
    d["group_multiply_adds"] = c.group_multiply_adds;
    d["block_barriers"] = c.block_barriers;
    d["effective"] = std::vector<uint32_t>(c.effective.begin(), c.effective.end());
    d["exact_waits"] = std::vector<uint32_t>(c.exact_waits.begin(), c.exact_waits.end());
    return d;
}

}  // namespace ptx
