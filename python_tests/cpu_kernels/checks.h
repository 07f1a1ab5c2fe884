// The checks of the CPU kernels. Each makes a random problem from its seed, prints what is wrong,
// and returns the number of failures.
#pragma once

#include <cstdint>

namespace afa::cpu::test {

// Forward and backward of one or several members against double loops: random shapes, dtypes,
// strides, dropout, threads and subset of gradients.
int check_problem(uint64_t seed);

// A row of y, z and dX has the same bits whatever rows stand around it and wherever it stands; one
// of y and z whatever other members are in the call.
int check_rows(uint64_t seed);

// Rows by owner: random owners, ranks and rows of no owner give the bits of calls of each owner.
int check_by_owner(uint64_t seed);

}  // namespace afa::cpu::test
