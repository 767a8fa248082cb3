// Single-threaded products of matrices that fit into a core's private cache, for the blocks of attention.
#pragma once

#include <cstdint>

namespace mdt_fast {

// Two bfloat16 numbers, the first in the low half.
using Pair = uint32_t;

// A strided matrix: `row` is the stride between rows, `column` that between columns.
template <class Number>
struct Matrix {
  const Number* data;
  int64_t row, column;
};

// C [M, N] = A [M, K] B [K, N], or C += A B with `add`. The rows of B have the stride `b_row` and those of C `c_row`;
// their columns are contiguous. N is a multiple of kLanes. On every processor, each number of C is summed in the order
// of K.
void product(
    Matrix<float> a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K, bool add);

// The same for bfloat16 in pairs along the reduction; K counts the pairs. Call it only if `multiplies_pairs()`.
void product(
    Matrix<Pair> a, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K, bool add);

bool multiplies_pairs();

}  // namespace mdt_fast
