// Transpose blocks in the cache, and whole matrices.
#pragma once

#include <cstdint>

namespace mdt_fast {

// `to` [columns, rows] = `from` [rows, columns] transposed, with the row strides `to_row` and `from_row`.
void transpose(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns);
void transpose(const uint16_t* from, int64_t from_row, uint16_t* to, int64_t to_row, int64_t rows, int64_t columns);

}  // namespace mdt_fast
