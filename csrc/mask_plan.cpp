// Choose the kept tokens on the CPU: the smallest numbers of each row, without sorting the row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "order.h"
#include "targets.h"

namespace mdt_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensPerTask = 4096;

struct Outputs {
  int64_t* keep;
  int64_t* mask;
  int64_t* restore;
  float* dropped;
};

MDT_TARGETS void make_keys(const float* noise, uint64_t* keys, int32_t length) {
  for (int32_t i = 0; i < length; ++i) keys[i] = uint64_t(ordered(noise[i])) << 32 | uint32_t(i);
}

MDT_TARGETS void mark(const uint64_t* keys, uint64_t last, int32_t* kept, int32_t length) {
  for (int32_t i = 0; i < length; ++i) kept[i] = keys[i] <= last;
}

// Write the plan of one row from its marks.
void compact(const int32_t* kept, int32_t length, int32_t len_keep, const Outputs& out) {
  int32_t k = 0;
  for (int32_t i = 0; i < length; ++i) {
    const int32_t m = i - k;
    if (kept[i]) out.keep[k] = i;
    else out.mask[m] = i;
    out.restore[i] = kept[i] ? k : len_keep + m;
    out.dropped[i] = kept[i] ? 0.0f : 1.0f;
    k += kept[i];
  }
}

// Ties go to the lower token index, which is the low half of the key.
void plan_row(const float* noise, int32_t length, int32_t len_keep, uint64_t* keys, int32_t* kept) {
  make_keys(noise, keys, length);
  if (len_keep == 0) return std::fill(kept, kept + length, 0);
  std::vector<uint64_t> order(keys, keys + length);
  std::nth_element(order.begin(), order.begin() + (len_keep - 1), order.end());
  mark(keys, order[len_keep - 1], kept, length);
}

void plan_row(const double* noise, int32_t length, int32_t len_keep, uint64_t* keys, int32_t* kept) {
  for (int32_t i = 0; i < length; ++i) keys[i] = ordered(noise[i]);
  std::vector<int32_t> order(length);
  for (int32_t i = 0; i < length; ++i) order[i] = i;
  std::nth_element(order.begin(), order.begin() + len_keep, order.end(), [&](int32_t a, int32_t b) {
    return keys[a] != keys[b] ? keys[a] < keys[b] : a < b;
  });
  std::fill(kept, kept + length, 0);
  for (int32_t j = 0; j < len_keep; ++j) kept[order[j]] = 1;
}

template <class Number>
void plan(const Number* noise, int64_t batch, int64_t length, int64_t len_keep, const Outputs& out) {
  const int64_t grain = std::max<int64_t>(1, kTokensPerTask / std::max<int64_t>(1, length));
  torch::stable::parallel_for(0, batch, grain, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> keys(length);
    std::vector<int32_t> kept(length);
    for (int64_t b = first; b < last; ++b) {
      plan_row(noise + b * length, int32_t(length), int32_t(len_keep), keys.data(), kept.data());
      compact(kept.data(), int32_t(length), int32_t(len_keep),
              {out.keep + b * len_keep, out.mask + b * (length - len_keep), out.restore + b * length,
               out.dropped + b * length});
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_plan(Tensor noise, int64_t len_keep) {
  STD_TORCH_CHECK(noise.dim() == 2 && noise.is_contiguous(), "noise: expected [batch, tokens], contiguous");
  const int64_t batch = noise.size(0), length = noise.size(1);
  STD_TORCH_CHECK(length <= INT32_MAX, "noise: ", length, " tokens, allowed are up to ", INT32_MAX);
  STD_TORCH_CHECK(
      0 <= len_keep && len_keep <= length, "len_keep: got ", len_keep, ", allowed are 0..", length);
  const auto make = [&](int64_t columns, ScalarType dtype) {
    return torch::stable::new_empty(noise, {batch, columns}, dtype);
  };
  Tensor keep = make(len_keep, ScalarType::Long), mask = make(length - len_keep, ScalarType::Long);
  Tensor restore = make(length, ScalarType::Long), dropped = make(length, ScalarType::Float);
  const Outputs out{
      static_cast<int64_t*>(keep.data_ptr()), static_cast<int64_t*>(mask.data_ptr()),
      static_cast<int64_t*>(restore.data_ptr()), static_cast<float*>(dropped.data_ptr())};
  if (noise.scalar_type() == ScalarType::Float) {
    plan(static_cast<const float*>(noise.data_ptr()), batch, length, len_keep, out);
  } else {
    STD_TORCH_CHECK(noise.scalar_type() == ScalarType::Double, "noise: expected float32 or float64");
    plan(static_cast<const double*>(noise.data_ptr()), batch, length, len_keep, out);
  }
  return {keep, mask, restore, dropped};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CPU, m) { m.impl("mask_plan", TORCH_BOX(&mask_plan)); }

}  // namespace mdt_fast
