#include "transpose.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "targets.h"
#include "vectors.h"

namespace mdt_fast {
namespace {

constexpr int64_t kStrip = 64;  // rows per task: at least one cache line of each row of the result

#if defined(__GNUC__) && !defined(__clang__)
using Lanes = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using Numbers = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(sizeof(uint32_t))));
using Halves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(sizeof(uint16_t))));

inline void load(Lanes& lanes, const float* x) { lanes = *reinterpret_cast<const Numbers*>(x); }
inline void load(Lanes& lanes, const uint16_t* x) {
  lanes = __builtin_convertvector(*reinterpret_cast<const Halves*>(x), Lanes);
}
inline void store(float* x, const Lanes& lanes) { *reinterpret_cast<Numbers*>(x) = lanes; }
inline void store(uint16_t* x, const Lanes& lanes) {
  *reinterpret_cast<Halves*>(x) = __builtin_convertvector(lanes, Halves);
}

// A block of kLanes rows and columns: interleave rows r and r + 8 (a perfect shuffle), four times.
template <class T>
__attribute__((always_inline)) inline void block(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr Lanes kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Lanes kHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Lanes x[kLanes], y[kLanes];
  for (int r = 0; r < kLanes; ++r) load(x[r], from + r * from_row);
  for (int round = 0; round < 4; ++round) {
    for (int r = 0; r < kLanes / 2; ++r) {
      y[2 * r] = __builtin_shuffle(x[r], x[r + kLanes / 2], kLow);
      y[2 * r + 1] = __builtin_shuffle(x[r], x[r + kLanes / 2], kHigh);
    }
    for (int r = 0; r < kLanes; ++r) x[r] = y[r];
  }
  for (int r = 0; r < kLanes; ++r) store(to + r * to_row, x[r]);
}
#else
template <class T>
inline void block(const T* from, int64_t from_row, T* to, int64_t to_row) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) to[j * to_row + i] = from[i * from_row + j];
}
#endif

template <class T>
__attribute__((always_inline)) inline void all_blocks(
    const T* from, int64_t from_row, T* to, int64_t to_row, int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) {
      if (i + kLanes <= rows && j + kLanes <= columns) {
        block(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
        continue;
      }
      for (int64_t r = i; r < std::min(i + kLanes, rows); ++r)
        for (int64_t c = j; c < std::min(j + kLanes, columns); ++c) to[c * to_row + r] = from[r * from_row + c];
    }
}

}  // namespace

MDT_TARGETS void transpose(
    const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
  all_blocks(from, from_row, to, to_row, rows, columns);
}

MDT_TARGETS void transpose(
    const uint16_t* from, int64_t from_row, uint16_t* to, int64_t to_row, int64_t rows, int64_t columns) {
  all_blocks(from, from_row, to, to_row, rows, columns);
}

namespace {

using torch::stable::Tensor;

template <class T>
void in_strips(const Tensor& x, const Tensor& out) {
  const int64_t rows = x.size(0), columns = x.size(1);
  const T* from = static_cast<const T*>(x.data_ptr());
  T* to = static_cast<T*>(out.data_ptr());
  torch::stable::parallel_for(0, (rows + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kStrip; i < std::min(end * kStrip, rows); i += kStrip)
      transpose(from + i * columns, columns, to + i, rows, std::min(kStrip, rows - i), columns);
  });
}

void transposed(Tensor x, Tensor out) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x: expected a contiguous matrix");
  STD_TORCH_CHECK(
      out.dim() == 2 && out.size(0) == x.size(1) && out.size(1) == x.size(0) && out.is_contiguous() &&
          out.scalar_type() == x.scalar_type(),
      "out: expected [", x.size(1), ", ", x.size(0), "] in the dtype of x");
  if (x.scalar_type() == ScalarType::Float) return in_strips<float>(x, out);
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
      "x: expected float32, bfloat16 or float16");
  in_strips<uint16_t>(x, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CPU, m) { m.impl("transposed_cpu", TORCH_BOX(&transposed)); }

}  // namespace mdt_fast
