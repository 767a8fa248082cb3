// Access rows of float32, bfloat16 or float16 as float32: in place, or through a buffer.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "targets.h"
#include "update.h"

namespace mdt_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kRows = 32;    // rows per chunk, the smallest task; it does not depend on the number of threads

MDT_TARGETS inline void widen_bfloat16(const uint16_t* from, float* to, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = from_bfloat16(from[i]);
}

MDT_TARGETS inline void narrow_bfloat16(const float* from, uint16_t* to, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = to_bfloat16(from[i]);
}

MDT_TARGETS inline void round_bfloat16(float* x, int64_t length) {
  for (int64_t i = 0; i < length; ++i) x[i] = from_bfloat16(to_bfloat16(x[i]));
}

inline void widen_half(const torch::headeronly::Half* from, float* to, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = float(from[i]);
}

inline void narrow_half(const float* from, torch::headeronly::Half* to, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = torch::headeronly::Half(from[i]);
}

// A contiguous tensor [rows, columns], or none. With `apart`, only its columns must be contiguous.
class Rows {
 public:
  Rows() = default;

  Rows(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, bool apart = false)
      : data_(static_cast<char*>(tensor.data_ptr())), dtype_(tensor.scalar_type()) {
    STD_TORCH_CHECK(
        dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half, name,
        ": expected float32, bfloat16 or float16");
    STD_TORCH_CHECK(
        tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, ": expected [", rows, ", ",
        columns, "]");
    STD_TORCH_CHECK(
        tensor.numel() == 0 || (apart ? tensor.stride(1) == 1 || columns == 1 : tensor.is_contiguous()), name,
        ": expected columns side by side");
    columns_ = columns;
    stride_ = rows > 1 ? tensor.stride(0) : columns;
  }

  Rows(const char* name, const Optional& tensor, int64_t rows, int64_t columns, bool apart = false) {
    if (tensor) *this = Rows(name, *tensor, rows, columns, apart);
  }

  explicit operator bool() const { return data_ != nullptr; }

  // Row i for reading: in place, or widened into `buffer`.
  const float* read(int64_t i, float* buffer) const { return read(i, 0, columns_, buffer); }

  // Where to write row i: in place, or in `buffer`. Call `done` afterwards.
  float* write(int64_t i, float* buffer) const { return write(i, 0, buffer); }

  void done(int64_t i, const float* buffer) const { done(i, 0, columns_, buffer); }

  // The same for columns [first, first + length) only.
  const float* read(int64_t i, int64_t first, int64_t length, float* buffer) const {
    if (dtype_ == ScalarType::Float) return reinterpret_cast<float*>(data_) + i * stride_ + first;
    const auto* row = reinterpret_cast<uint16_t*>(data_) + i * stride_ + first;
    if (dtype_ == ScalarType::BFloat16) widen_bfloat16(row, buffer, length);
    else widen_half(reinterpret_cast<const torch::headeronly::Half*>(row), buffer, length);
    return buffer;
  }

  float* write(int64_t i, int64_t first, float* buffer) const {
    return dtype_ == ScalarType::Float ? reinterpret_cast<float*>(data_) + i * stride_ + first : buffer;
  }

  void done(int64_t i, int64_t first, int64_t length, const float* buffer) const {
    if (dtype_ == ScalarType::Float) return;
    auto* row = reinterpret_cast<uint16_t*>(data_) + i * stride_ + first;
    if (dtype_ == ScalarType::BFloat16) narrow_bfloat16(buffer, row, length);
    else narrow_half(buffer, reinterpret_cast<torch::headeronly::Half*>(row), length);
  }

  // Round a row of floats to the tensor's dtype.
  void round(float* row) const {
    if (dtype_ == ScalarType::BFloat16) round_bfloat16(row, columns_);
    else if (dtype_ == ScalarType::Half)
      for (int64_t i = 0; i < columns_; ++i) row[i] = float(torch::headeronly::Half(row[i]));
  }

  bool is_float() const { return dtype_ == ScalarType::Float; }

 private:
  char* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t columns_ = 0, stride_ = 0;
};

// Rows [first, last) of sample `sample`.
struct Chunk {
  int64_t sample, first, last;
};

// The rows of every sample in chunks of at most kRows, in order. A sample without rows has no chunk.
inline std::vector<Chunk> chunks_of(int64_t rows, int64_t samples, const Optional& offsets) {
  std::vector<Chunk> chunks;
  const int32_t* ends = nullptr;
  if (offsets) {
    STD_TORCH_CHECK(
        offsets->scalar_type() == ScalarType::Int && offsets->dim() == 1 && offsets->size(0) == samples + 1 &&
            offsets->is_contiguous(),
        "offsets: expected int32 [", samples + 1, "]");
    ends = static_cast<const int32_t*>(offsets->data_ptr());
  } else {
    STD_TORCH_CHECK(samples ? rows % samples == 0 : rows == 0, "rows: ", rows, " of ", samples, " samples");
  }
  int64_t last = 0;
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t first = ends ? ends[b] : b * (rows / samples);
    const int64_t end = ends ? ends[b + 1] : first + rows / samples;
    STD_TORCH_CHECK(first == last && first <= end && end <= rows, "offsets: expected 0, ascending, ", rows);
    for (int64_t i = first; i < end; i += kRows) chunks.push_back({b, i, std::min(i + kRows, end)});
    last = end;
  }
  STD_TORCH_CHECK(last == rows, "offsets: expected to end at ", rows);
  return chunks;
}

// total[b] = the sum of the partial sums of sample b's chunks, in their order.
inline void add_parts(
    const std::vector<float>& parts, const std::vector<Chunk>& chunks, const Rows& total, int64_t samples, int64_t D) {
  std::vector<float> buffer(D);
  size_t c = 0;
  for (int64_t b = 0; b < samples; ++b) {
    float* sum = total.write(b, buffer.data());
    std::fill(sum, sum + D, 0.0f);
    for (; c < chunks.size() && chunks[c].sample == b; ++c)
      for (int64_t i = 0; i < D; ++i) sum[i] += parts[c * D + i];
    total.done(b, buffer.data());
  }
}

}  // namespace mdt_fast
