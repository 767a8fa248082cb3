// Attention's scores on the CPU, between its products: softmax with the bias read from a table, and its gradient.
// n samples, H heads, M queries, N keys, T rows of the table.
#include <cmath>

#include "rows.h"
#include "vectors.h"

namespace mdt_fast {
namespace {

constexpr int64_t kQueries = 64;  // of one piece of work: one sample's, of one head; does not depend on the threads

// Keys [key, key + length) whose places follow each other, from `place` on.
struct Run {
  int64_t key, place, length;
};

constexpr int64_t kLong = 8;  // keys of a run, on average, for runs to be quicker than places one by one

MDT_TARGETS void multiply(float* x, float factor, int64_t length) {
  for (int64_t i = 0; i < length; ++i) x[i] *= factor;
}

// x = scale * x + bias[place]
MDT_TARGETS void add_bias(
    float* __restrict x, float scale, const float* __restrict bias, const int32_t* __restrict places, int64_t length) {
  for (int64_t i = 0; i < length; ++i) x[i] = scale * x[i] + bias[places[i]];
}

MDT_TARGETS void add_bias(
    float* __restrict x, float scale, const float* __restrict bias, const Run* runs, int64_t count) {
  for (const Run* run = runs; run < runs + count; ++run)
    for (int64_t i = 0; i < run->length; ++i)
      x[run->key + i] = scale * x[run->key + i] + bias[run->place + i];
}

// dbias[place] += ds
void add_gradient(const float* __restrict ds, float* __restrict dbias, const int32_t* __restrict places, int64_t length) {
  for (int64_t i = 0; i < length; ++i) dbias[places[i]] += ds[i];
}

MDT_TARGETS void add_gradient(
    const float* __restrict ds, float* __restrict dbias, const Run* runs, int64_t count) {
  for (const Run* run = runs; run < runs + count; ++run)
    for (int64_t i = 0; i < run->length; ++i) dbias[run->place + i] += ds[run->key + i];
}

MDT_TARGETS float largest(const float* x, int64_t length) {
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = x[0];
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
#pragma GCC unroll 1  // or GCC makes 16 scalar comparisons of it
    for (int lane = 0; lane < kLanes; ++lane) {
      const float other = x[i + lane];
      lanes[lane] = lanes[lane] < other ? other : lanes[lane];
    }
  }
  for (; i < length; ++i) lanes[0] = lanes[0] < x[i] ? x[i] : lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) lanes[0] = lanes[0] < lanes[lane] ? lanes[lane] : lanes[0];
  return lanes[0];
}

MDT_TARGETS void exponentials(float* x, float less, int64_t length) {
  for (int64_t i = 0; i < length; ++i) x[i] = exponential(x[i] - less);
}

// dp becomes ds.
MDT_TARGETS void score_gradient(
    const float* __restrict p, float* __restrict dp, float delta, int64_t length) {
  for (int64_t i = 0; i < length; ++i) dp[i] = p[i] * (dp[i] - delta);
}

// The bias of each score: the row of the table at its query's place and its key's, added.
class Bias {
 public:
  Bias(const Optional& table, const Optional& q_places, const Optional& k_places, int64_t n, int64_t H, int64_t M,
       int64_t N)
      : N_(N) {
    STD_TORCH_CHECK(
        bool(table) == bool(q_places) && bool(table) == bool(k_places), "table, places: expected all or none");
    if (!table) return;
    STD_TORCH_CHECK(
        table->scalar_type() == ScalarType::Float && table->dim() == 2 && table->size(0) == H && table->is_contiguous(),
        "table: expected float32 [", H, ", T]");
    table_ = static_cast<const float*>(table->data_ptr());
    rows_ = table->size(1);
    queries_ = places("q_places", *q_places, n, M), keys_ = places("k_places", *k_places, n, N);
    STD_TORCH_CHECK(
        n * M * N == 0 || largest_of(queries_, M) + largest_of(keys_, N) < rows_, "places: expected rows of the table");
    for (const int32_t* keys : keys_) runs_.push_back(runs_of(keys, N));
  }

  int64_t rows() const { return rows_; }

  // x = scale * x + bias, the scores of query m of sample b, head h.
  void add(float* x, float scale, int64_t b, int64_t h, int64_t m) const {
    if (!table_) return multiply(x, scale, N_);
    const float* row = table_ + h * rows_ + queries_[b][m];
    if (runs_[b].empty()) add_bias(x, scale, row, keys_[b], N_);
    else add_bias(x, scale, row, runs_[b].data(), runs_[b].size());
  }

  // To the head's gradient of the table, from those of these scores.
  void add_gradient_of(const float* ds, float* dtable, int64_t b, int64_t m) const {
    float* row = dtable + queries_[b][m];
    if (runs_[b].empty()) add_gradient(ds, row, keys_[b], N_);
    else add_gradient(ds, row, runs_[b].data(), runs_[b].size());
  }

 private:
  using Places = std::vector<const int32_t*>;  // each sample's

  static Places places(const char* name, const Tensor& tensor, int64_t n, int64_t length) {
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Int && tensor.dim() == 2 && tensor.size(0) == n &&
            tensor.size(1) == length && (tensor.stride(1) == 1 || length < 2),
        name, ": expected int32 [", n, ", ", length, "]");
    Places places;
    for (int64_t b = 0; b < n; ++b)
      places.push_back(static_cast<const int32_t*>(tensor.data_ptr()) + b * tensor.stride(0));
    return places;
  }

  static int64_t largest_of(const Places& places, int64_t length) {
    int64_t largest = 0;
    for (const int32_t* of_sample : places) {
      const auto [low, high] = std::minmax_element(of_sample, of_sample + length);
      STD_TORCH_CHECK(*low >= 0, "places: expected no negative ones");
      largest = std::max<int64_t>(largest, *high);
    }
    return largest;
  }

  static std::vector<Run> runs_of(const int32_t* places, int64_t N) {
    std::vector<Run> runs;
    for (int64_t i = 0; i < N; ++i)
      if (i && places[i] == places[i - 1] + 1) ++runs.back().length;
      else runs.push_back({i, places[i], 1});
    return int64_t(runs.size()) * kLong > N ? std::vector<Run>() : runs;
  }

  int64_t N_, rows_ = 0;
  const float* table_ = nullptr;
  Places queries_, keys_;
  std::vector<std::vector<Run>> runs_;
};

// log(sum(exp(score))) [n, H, M] by strides.
class Sums {
 public:
  explicit Sums(const Tensor& lse) {
    STD_TORCH_CHECK(
        lse.scalar_type() == ScalarType::Float && lse.dim() == 3 && (lse.stride(2) == 1 || lse.size(2) < 2),
        "lse: expected float32 [n, H, M]");
    data_ = static_cast<float*>(lse.data_ptr());
    sample_ = lse.stride(0), head_ = lse.stride(1);
  }
  float& at(int64_t b, int64_t h, int64_t m) const { return data_[b * sample_ + h * head_ + m]; }

 private:
  float* data_;
  int64_t sample_, head_;
};

// Row i as float32, to be changed: where it lies, or in `buffer`; then `done`.
float* in_place(const Rows& rows, int64_t i, float* buffer) {
  rows.read(i, buffer);
  return rows.write(i, buffer);
}

// fn(piece, b, h, first, last) for queries [first, last) of sample b and head h.
template <class Function>
void for_pieces(int64_t first, int64_t last, int64_t H, int64_t M, Function fn) {
  const int64_t pieces = (M + kQueries - 1) / kQueries;
  for (int64_t i = first; i < last; ++i) {
    const int64_t query = i % pieces * kQueries;
    fn(i, i / pieces / H, i / pieces % H, query, std::min(query + kQueries, M));
  }
}

void attention_softmax(
    Tensor scores, Optional table, Optional q_places, Optional k_places, double scale, Tensor lse) {
  const Sums sums(lse);
  const int64_t n = lse.size(0), H = lse.size(1), M = lse.size(2), N = scores.size(1);
  STD_TORCH_CHECK(N > 0, "scores: expected keys");
  const Rows rows("scores", scores, n * H * M, N);
  const Bias bias(table, q_places, k_places, n, H, M, N);
  torch::stable::parallel_for(0, n * H * ((M + kQueries - 1) / kQueries), 1, [&](int64_t begin, int64_t end) {
    Buffers buffer(1, N);
    for_pieces(begin, end, H, M, [&](int64_t, int64_t b, int64_t h, int64_t first, int64_t last) {
      for (int64_t m = first; m < last; ++m) {
        const int64_t i = (b * H + h) * M + m;
        float* x = in_place(rows, i, buffer[0]);
        bias.add(x, float(scale), b, h, m);
        const float most = largest(x, N);
        exponentials(x, most, N);
        const float total = sum(x, N);
        multiply(x, 1.0f / total, N);
        rows.done(i, x);
        sums.at(b, h, m) = most + std::log(total);
      }
    });
  });
}

void attention_softmax_bwd(
    Tensor scores, Tensor dp, Optional table, Optional q_places, Optional k_places, double scale, Tensor lse,
    Optional dtable) {
  const Sums sums(lse);
  const int64_t n = lse.size(0), H = lse.size(1), M = lse.size(2), N = scores.size(1);
  const Rows rows("scores", scores, n * H * M, N), grads("dp", dp, n * H * M, N);
  const Bias bias(table, q_places, k_places, n, H, M, N);
  const int64_t T = dtable ? bias.rows() : 0, pieces = n * H * ((M + kQueries - 1) / kQueries);
  float* total = nullptr;
  if (dtable) {
    STD_TORCH_CHECK(
        table && dtable->scalar_type() == ScalarType::Float && dtable->dim() == 2 && dtable->size(0) == H &&
            dtable->size(1) == T && dtable->is_contiguous(),
        "dtable: expected as the table");
    total = static_cast<float*>(dtable->data_ptr());
  }
  std::vector<float> parts(pieces * T);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    Buffers buffer(2, N);
    for_pieces(begin, end, H, M, [&](int64_t piece, int64_t b, int64_t h, int64_t first, int64_t last) {
      for (int64_t m = first; m < last; ++m) {
        const int64_t i = (b * H + h) * M + m;
        float *p = in_place(rows, i, buffer[0]), *ds = in_place(grads, i, buffer[1]);
        bias.add(p, float(scale), b, h, m);
        exponentials(p, sums.at(b, h, m), N);
        score_gradient(p, ds, dot(p, ds, N), N);
        if (total) bias.add_gradient_of(ds, &parts[piece * T], b, m);
        rows.done(i, p);
        grads.done(i, ds);
      }
    });
  });
  if (!total) return;
  for_pieces(0, pieces, H, M, [&](int64_t piece, int64_t, int64_t h, int64_t, int64_t) {
    for (int64_t t = 0; t < T; ++t) total[h * T + t] += parts[piece * T + t];
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CPU, m) {
  m.impl("attention_softmax_cpu", TORCH_BOX(&attention_softmax));
  m.impl("attention_softmax_bwd_cpu", TORCH_BOX(&attention_softmax_bwd));
}

}  // namespace mdt_fast
