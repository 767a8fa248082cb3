// Operations on rows of attention scores: the bias from a table, the softmax, and their gradients. H heads, M queries
// and N keys of a sample, T rows of the table.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"
#include "vectors.h"

namespace mdt_fast {

// One sample's queries or keys: rows [first, first + length) of an entry of the batch.
struct Span {
  int64_t entry, first, length;
};

// Keys [key, key + length) with consecutive places from `place` on.
struct Run {
  int64_t key, place, length;
};

constexpr int64_t kLong = 8;  // average keys per run from which runs are faster than single places

MDT_TARGETS inline void multiply(float* x, float factor, int64_t length) {
  for (int64_t i = 0; i < length; ++i) x[i] *= factor;
}

// x = scale * x + bias[place]
MDT_TARGETS inline void add_bias(
    float* __restrict x, float scale, const float* __restrict bias, const int32_t* __restrict places, int64_t length) {
  for (int64_t i = 0; i < length; ++i) x[i] = scale * x[i] + bias[places[i]];
}

MDT_TARGETS inline void add_bias(
    float* __restrict x, float scale, const float* __restrict bias, const Run* runs, int64_t count) {
  for (const Run* run = runs; run < runs + count; ++run)
    for (int64_t i = 0; i < run->length; ++i)
      x[run->key + i] = scale * x[run->key + i] + bias[run->place + i];
}

// dbias[place] += ds
inline void add_gradient(
    const float* __restrict ds, float* __restrict dbias, const int32_t* __restrict places, int64_t length) {
  for (int64_t i = 0; i < length; ++i) dbias[places[i]] += ds[i];
}

MDT_TARGETS inline void add_gradient(
    const float* __restrict ds, float* __restrict dbias, const Run* runs, int64_t count) {
  for (const Run* run = runs; run < runs + count; ++run)
    for (int64_t i = 0; i < run->length; ++i) dbias[run->place + i] += ds[run->key + i];
}

MDT_TARGETS inline float largest(const float* x, int64_t length) {
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = x[0];
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
#pragma GCC unroll 1  // otherwise GCC emits 16 scalar comparisons
    for (int lane = 0; lane < kLanes; ++lane) {
      const float other = x[i + lane];
      lanes[lane] = lanes[lane] < other ? other : lanes[lane];
    }
  }
  for (; i < length; ++i) lanes[0] = lanes[0] < x[i] ? x[i] : lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) lanes[0] = lanes[0] < lanes[lane] ? lanes[lane] : lanes[0];
  return lanes[0];
}

MDT_TARGETS inline void exponentials(float* x, float less, int64_t length) {
  for (int64_t i = 0; i < length; ++i) x[i] = exponential(x[i] - less);
}

// Turn dp into ds in place. All p of a row share the rounding error of the logarithm they were computed with, so their
// sum is not exactly 1. Dividing by that sum makes the sum of ds 0; otherwise terms that should cancel in sums over ds
// would not.
MDT_TARGETS inline void score_gradient(const float* __restrict p, float* __restrict dp, int64_t length) {
  const float delta = dot(p, dp, length) / sum(p, length);
  for (int64_t i = 0; i < length; ++i) dp[i] = p[i] * (dp[i] - delta);
}

// The bias of each score. The sum of its query's and its key's place is its row of the table, counted backwards from
// the last one. Adjacent keys thus read adjacent numbers of a head's reversed table, which the constructor builds.
class Bias {
 public:
  Bias(const Optional& table, const Optional& q_places, const Optional& k_places, int64_t H,
       const std::vector<Span>& queries, const std::vector<Span>& keys) {
    STD_TORCH_CHECK(
        bool(table) == bool(q_places) && bool(table) == bool(k_places), "table, places: expected all or none");
    STD_TORCH_CHECK(queries.size() == keys.size(), "k_offsets: expected as many samples as q_offsets");
    if (!table) return;
    STD_TORCH_CHECK(
        table->scalar_type() == ScalarType::Float && table->dim() == 2 && table->size(1) == H && table->is_contiguous(),
        "table: expected float32 [T, ", H, "]");
    rows_ = table->size(0);
    const float* row = static_cast<const float*>(table->data_ptr());
    table_.resize(H * rows_);
    for (int64_t t = 0; t < rows_; ++t, row += H)
      for (int64_t h = 0; h < H; ++h) table_[at(t, h)] = row[h];
    queries_ = places_of("q_places", *q_places, queries), keys_ = places_of("k_places", *k_places, keys);
    for (size_t b = 0; b < keys.size(); ++b) {
      STD_TORCH_CHECK(
          largest_of(queries_[b], queries[b].length) + largest_of(keys_[b], keys[b].length) < rows_,
          "places: expected rows of the table");
      runs_.push_back(runs_of(keys_[b], keys[b].length));
    }
  }

  int64_t rows() const { return rows_; }

  // The index of row t of head h in the table of all heads.
  int64_t at(int64_t t, int64_t h) const { return h * rows_ + rows_ - 1 - t; }

  // x = scale * x + bias, the scores [N] of query m of sample b, head h.
  void add(float* x, float scale, int64_t b, int64_t h, int64_t m, int64_t N) const {
    if (!rows_) return multiply(x, scale, N);
    const float* row = table_.data() + h * rows_ + queries_[b][m];
    if (runs_[b].empty()) add_bias(x, scale, row, keys_[b], N);
    else add_bias(x, scale, row, runs_[b].data(), runs_[b].size());
  }

  // Add the gradients of these scores to the head's gradient of the table.
  void add_gradient_of(const float* ds, float* dtable, int64_t b, int64_t m, int64_t N) const {
    float* row = dtable + queries_[b][m];
    if (runs_[b].empty()) add_gradient(ds, row, keys_[b], N);
    else add_gradient(ds, row, runs_[b].data(), runs_[b].size());
  }

 private:
  using Places = std::vector<const int32_t*>;  // one pointer per sample

  static Places places_of(const char* name, const Tensor& tensor, const std::vector<Span>& spans) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Int && tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) < 2),
        name, ": expected int32 [B, rows]");
    Places places;
    for (const Span& span : spans) {
      STD_TORCH_CHECK(
          span.entry < tensor.size(0) && span.first + span.length <= tensor.size(1), name,
          ": expected one for each row");
      places.push_back(static_cast<const int32_t*>(tensor.data_ptr()) + span.entry * tensor.stride(0) + span.first);
    }
    return places;
  }

  static int64_t largest_of(const int32_t* places, int64_t length) {
    if (!length) return 0;
    const auto [low, high] = std::minmax_element(places, places + length);
    STD_TORCH_CHECK(*low >= 0, "places: expected no negative ones");
    return *high;
  }

  static std::vector<Run> runs_of(const int32_t* places, int64_t N) {
    std::vector<Run> runs;
    for (int64_t i = 0; i < N; ++i)
      if (i && places[i] == places[i - 1] + 1) ++runs.back().length;
      else runs.push_back({i, places[i], 1});
    return int64_t(runs.size()) * kLong > N ? std::vector<Run>() : runs;
  }

  int64_t rows_ = 0;
  std::vector<float> table_;  // [H, T], with the last row first
  Places queries_, keys_;
  std::vector<std::vector<Run>> runs_;
};

}  // namespace mdt_fast
