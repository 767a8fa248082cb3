// Products of matrices that fit into a core's own cache, by one thread; of blocks of attention.
#pragma once

#include <cstdint>

namespace mdt_fast {

// Two bfloat16 numbers, the first in the low half.
using Pair = uint32_t;

// Numbers whose rows are `row` apart, columns `column`.
template <class Number>
struct Matrix {
  const Number* data;
  int64_t row, column;
};

// C [M, N] = A [M, K] B [K, N], or with `add` C += A B. Rows of B are `b_row` apart, those of C `c_row`; columns lie
// side by side. N is a multiple of kLanes. Every number of C is summed in the order of K, whatever the processor.
void product(
    Matrix<float> a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K, bool add);

// The same of bfloat16 in pairs along K, of which there are K; only where `multiplies_pairs`.
void product(
    Matrix<Pair> a, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K, bool add);

bool multiplies_pairs();

}  // namespace mdt_fast
