// Attention on the CPU with a bias from a table, forward and backward: one head of one sample at a time, in blocks of
// queries whose scores stay in a core's private cache. Sums, softmax and the gradients of the scores are float32. The
// factors of products are float32 too, except for bfloat16 on processors that multiply it.
// H heads, M queries and N keys of a sample, d head size, T rows of the table.
#include "products.h"
#include "scores.h"
#include "transpose.h"

namespace mdt_fast {
namespace {

constexpr int64_t kBlock = 64;   // queries whose scores are computed together
constexpr int64_t kAhead = 8;    // rows to prefetch ahead of reading
constexpr int64_t kPiece = 256;  // queries per task of the forward pass

int64_t whole_lanes(int64_t x) { return (x + kLanes - 1) / kLanes * kLanes; }

// to[i] = the pair of one[i] and two[i], or of one[i] and zero.
MDT_TARGETS void interleave(const uint16_t* one, const uint16_t* two, Pair* to, int64_t length) {
  if (two)
    for (int64_t i = 0; i < length; ++i) to[i] = one[i] | uint32_t(two[i]) << 16;
  else
    for (int64_t i = 0; i < length; ++i) to[i] = one[i];
}

MDT_TARGETS void interleave(const float* one, const float* two, Pair* to, int64_t length) {
  if (two)
    for (int64_t i = 0; i < length; ++i) to[i] = to_bfloat16(one[i]) | uint32_t(to_bfloat16(two[i])) << 16;
  else
    for (int64_t i = 0; i < length; ++i) to[i] = to_bfloat16(one[i]);
}

// Queries, keys or values: strided [B, H, rows, d], contiguous along d.
class Heads {
 public:
  // Checks that the tensor has the sizes and the dtype of `like`.
  Heads(const char* name, const Tensor& tensor, const Tensor& like)
      : data_(static_cast<char*>(tensor.data_ptr())), dtype_(tensor.scalar_type()) {
    STD_TORCH_CHECK(
        dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half, name,
        ": expected float32, bfloat16 or float16");
    STD_TORCH_CHECK(
        tensor.dim() == 4 && like.dim() == 4 &&
            (tensor.stride(3) == 1 || tensor.size(3) == 1 || tensor.numel() == 0),
        name, ": expected [B, H, rows, d], the last side by side");
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(tensor.size(i) == like.size(i), name, ": expected ", like.size(i), " for size ", i);
    STD_TORCH_CHECK(dtype_ == like.scalar_type(), name, ": expected one dtype for all");
    d_ = tensor.size(3);
    entry_ = tensor.stride(0), head_ = tensor.stride(1), row_ = tensor.stride(2);
  }

  // Read rows [first, first + count) of a sample's head as float32, into rows of the stride `to_row`.
  void read(const Span& span, int64_t h, int64_t first, int64_t count, float* to, int64_t to_row) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = place(span, h, first + i);
      if (i + kAhead < count) fetch(place(span, h, first + i + kAhead));
      float* row = to + i * to_row;
      if (dtype_ == ScalarType::Float) std::copy_n(reinterpret_cast<float*>(data_) + at, d_, row);
      else if (dtype_ == ScalarType::BFloat16) widen_bfloat16(reinterpret_cast<uint16_t*>(data_) + at, row, d_);
      else widen_half(reinterpret_cast<torch::headeronly::Half*>(data_) + at, row, d_);
    }
  }

  // The same for bfloat16, without conversion.
  void read(const Span& span, int64_t h, int64_t first, int64_t count, Pair* to, int64_t to_row) const {
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) fetch(place(span, h, first + i + kAhead));
      std::copy_n(
          reinterpret_cast<uint16_t*>(data_) + place(span, h, first + i), d_,
          reinterpret_cast<uint16_t*>(to + i * to_row));
    }
  }

  // Write row i of a sample's head.
  void write(const Span& span, int64_t h, int64_t i, const float* row) const {
    const int64_t at = place(span, h, i);
    if (dtype_ == ScalarType::Float) std::copy_n(row, d_, reinterpret_cast<float*>(data_) + at);
    else if (dtype_ == ScalarType::BFloat16) narrow_bfloat16(row, reinterpret_cast<uint16_t*>(data_) + at, d_);
    else narrow_half(row, reinterpret_cast<torch::headeronly::Half*>(data_) + at, d_);
  }

 private:
  // Prefetch a row while other rows are read: the hardware prefetcher does not foresee rows that are apart.
  void fetch(int64_t at) const {
    const int64_t bytes = dtype_ == ScalarType::Float ? 4 : 2;
    for (int64_t byte = 0; byte < d_ * bytes; byte += int64_t(kAlignment)) prefetch(data_ + at * bytes + byte);
  }

  int64_t place(const Span& span, int64_t h, int64_t i) const {
    return span.entry * entry_ + h * head_ + (span.first + i) * row_;
  }

  char* data_;
  ScalarType dtype_;
  int64_t d_ = 0, entry_ = 0, head_ = 0, row_ = 0;
};

// The rows of each sample: a whole entry of the batch, or, with offsets (cu_seqlens), a part of its only entry.
std::vector<Span> spans_of(const char* name, const Tensor& x, const Optional& offsets) {
  std::vector<Span> spans;
  const int64_t rows = x.size(2);
  if (!offsets) {
    for (int64_t b = 0; b < x.size(0); ++b) spans.push_back({b, 0, rows});
    return spans;
  }
  STD_TORCH_CHECK(
      offsets->scalar_type() == ScalarType::Int && offsets->dim() == 1 && offsets->size(0) > 0 &&
          offsets->is_contiguous() && x.size(0) == 1,
      name, ": expected int32 [B + 1], of a batch of one");
  const auto* ends = static_cast<const int32_t*>(offsets->data_ptr());
  const int64_t samples = offsets->size(0) - 1;
  // Every row must belong to a sample; rows of no sample would stay unwritten.
  STD_TORCH_CHECK(ends[0] == 0 && ends[samples] == rows, name, ": expected 0, ascending, ", rows);
  for (int64_t b = 0; b < samples; ++b) {
    STD_TORCH_CHECK(ends[b] <= ends[b + 1] && ends[b + 1] <= rows, name, ": expected 0, ascending, ", rows);
    spans.push_back({0, ends[b], ends[b + 1] - ends[b]});
  }
  return spans;
}

// log(sum(exp(score))): [H, all rows of all entries].
class Sums {
 public:
  Sums(const Tensor& lse, const Tensor& q) : entry_rows_(q.size(2)), rows_(q.size(0) * q.size(2)) {
    STD_TORCH_CHECK(
        lse.scalar_type() == ScalarType::Float && lse.dim() == 2 && lse.size(0) == q.size(1) && lse.size(1) == rows_ &&
            lse.is_contiguous(),
        "lse: expected float32 [", q.size(1), ", ", rows_, "]");
    data_ = static_cast<float*>(lse.data_ptr());
  }
  float& at(const Span& span, int64_t h, int64_t m) const {
    return data_[h * rows_ + span.entry * entry_rows_ + span.first + m];
  }

 private:
  float* data_;
  int64_t entry_rows_, rows_;
};

// Storage formats for the factors of products. Rows of heads serve as a left factor as they were read, and as a right
// factor once transposed; where the reduction runs over the rows, they are `stacked`. Scores come row by row in float32
// and are kept as a left factor, as they are or transposed (`turned`).
struct Floats {
  using Number = float;
  static constexpr int64_t kTogether = 1;

  static const float* stacked(const float* rows, int64_t, int64_t, float*) { return rows; }
  static void keep(float*, int64_t, int64_t, int64_t, float*) {}
  static void keep_turned(float*, int64_t, int64_t, int64_t, int64_t, float*) {}
  static Matrix<float> kept(const float* scores, int64_t row, const float*) { return {scores, row, 1}; }
  static Matrix<float> kept_turned(const float* scores, int64_t row, const float*) { return {scores, 1, row}; }
};

struct Pairs {
  using Number = Pair;
  static constexpr int64_t kTogether = 2;

  // Two rows at a time, interleaved number by number.
  static const Pair* stacked(const Pair* rows, int64_t count, int64_t depth, Pair* to) {
    for (int64_t i = 0; i < count; i += 2) {
      const auto* one = reinterpret_cast<const uint16_t*>(rows + i * depth);
      interleave(one, i + 1 < count ? one + 2 * depth : nullptr, to + i * depth, 2 * depth);
    }
    return to;
  }
  static void keep(float* scores, int64_t m, int64_t N, int64_t row, Pair* to) {
    scores[m * row + N] = 0.0f;  // the partner of the last number if N is odd
    narrow_bfloat16(scores + m * row, reinterpret_cast<uint16_t*>(to + m * (row / 2)), N + 1);
  }
  static void keep_turned(float* scores, int64_t m, int64_t count, int64_t N, int64_t row, Pair* to) {
    const float* last = scores + m * row;
    if (m % 2) interleave(last - row, last, to + m / 2 * row, N);
    else if (m + 1 == count) interleave(last, nullptr, to + m / 2 * row, N);
  }
  static Matrix<Pair> kept(const float*, int64_t row, const Pair* to) { return {to, row / 2, 1}; }
  static Matrix<Pair> kept_turned(const float*, int64_t row, const Pair* to) { return {to, 1, row}; }
};

void across_from(const float* rows, int64_t depth, float* to, int64_t to_row, int64_t count) {
  transpose(rows, depth, to, to_row, count, depth);
}

void across_from(const Pair* rows, int64_t depth, Pair* to, int64_t to_row, int64_t count) {
  transpose(reinterpret_cast<const float*>(rows), depth, reinterpret_cast<float*>(to), to_row, count, depth);
}

// The arguments of both passes.
struct Call {
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& table, const Optional& q_places,
       const Optional& k_places, const Optional& q_offsets, const Optional& k_offsets, double scale, const Tensor& lse)
      : H(q.size(1)), width(whole_lanes(q.size(3))), scale(float(scale)), q("q", q, q), k("k", k, k),
        v("v", v, k), queries(spans_of("q_offsets", q, q_offsets)), keys(spans_of("k_offsets", k, k_offsets)),
        sums(lse, q), bias(table, q_places, k_places, H, queries, keys),
        in_pairs(q.scalar_type() == ScalarType::BFloat16 && multiplies_pairs()) {
    STD_TORCH_CHECK(
        k.size(1) == H && k.size(3) == q.size(3) && k.scalar_type() == q.scalar_type(), "k: expected heads as of q");
    for (const Span& span : keys) longest = std::max(longest, span.length);
    row = whole_lanes(longest) + kLanes;  // no power of two, so that a column's rows fall into different cache sets
  }

  int64_t H, width;  // width: the head size, padded with zeros
  float scale;
  Heads q, k, v;
  std::vector<Span> queries, keys;
  Sums sums;
  Bias bias;
  bool in_pairs;
  int64_t longest = 0, row = 0;  // most keys of a sample; the row stride of the scores
};

// Buffers of one thread.
template <class Format>
class Blocks {
 public:
  using Number = typename Format::Number;

  Blocks(int count, int64_t size) : buffers_(count, size) {}
  Number* operator[](int i) { return reinterpret_cast<Number*>(buffers_[i]); }

 private:
  Buffers buffers_;
};

int64_t numbers(int64_t length, int64_t together) { return (length + together - 1) / together; }

template <class Format>
void forward(const Call& call, const Heads& out) {
  struct Piece {
    int64_t b, h, first, last;
  };
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < int64_t(call.queries.size()); ++b)
    for (int64_t h = 0; h < call.H; ++h)
      for (int64_t m = 0; m < call.queries[b].length; m += kPiece)
        pieces.push_back({b, h, m, std::min(m + kPiece, call.queries[b].length)});
  constexpr int64_t kTogether = Format::kTogether;
  const int64_t row = call.row, width = call.width, depth = width / kTogether;
  torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    Blocks<Format> of_keys(4, row * depth), of_queries(1, kBlock * depth), of_scores(1, kBlock * row);
    Buffers scores(1, kBlock * row), results(1, kBlock * width);
    auto *rows = of_keys[0], *across = of_keys[1], *values = of_keys[2], *q = of_queries[0];
    float *s = scores[0], *result = results[0];
    for (int64_t i = begin; i < end; ++i) {
      const auto& [b, h, piece_first, piece_last] = pieces[i];
      const Span &of_q = call.queries[b], &of_k = call.keys[b];
      const int64_t N = of_k.length;
      call.k.read(of_k, h, 0, N, rows, depth);
      across_from(rows, depth, across, row, N);
      call.v.read(of_k, h, 0, N, rows, depth);
      const auto* stacked = Format::stacked(rows, N, depth, values);
      for (int64_t first = piece_first; first < piece_last; first += kBlock) {
        const int64_t count = std::min(kBlock, piece_last - first);
        call.q.read(of_q, h, first, count, q, depth);
        product({q, depth, 1}, across, row, s, row, count, whole_lanes(N), depth, false);
        for (int64_t m = 0; m < count && N; ++m) {
          float* x = s + m * row;
          call.bias.add(x, call.scale, b, h, first + m, N);
          const float most = largest(x, N);
          exponentials(x, most, N);
          const float total = sum(x, N);
          multiply(x, 1.0f / total, N);
          call.sums.at(of_q, h, first + m) = most + std::log(total);
          Format::keep(s, m, N, row, of_scores[0]);
        }
        const auto p = Format::kept(s, row, of_scores[0]);
        product(p, stacked, width, result, width, count, width, numbers(N, kTogether), false);
        for (int64_t m = 0; m < count; ++m) out.write(of_q, h, first + m, result + m * width);
      }
    }
  });
}

struct Gradients {
  Heads q, k, v;
  float* table;  // [T, H], which is added to; null for none
};

template <class Format>
void backward(const Call& call, const Heads& douts, const Gradients& gradients) {
  constexpr int64_t kTogether = Format::kTogether;
  const int64_t H = call.H, row = call.row, width = call.width, depth = width / kTogether;
  const int64_t T = gradients.table ? call.bias.rows() : 0, pieces = call.queries.size() * H;
  std::vector<float> parts(pieces * T);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    Blocks<Format> of_keys(4, row * depth), of_queries(4, kBlock * depth), of_scores(3, kBlock * row);
    Buffers scores(2, kBlock * row), sums(2, row * width), results(1, kBlock * width);
    auto *rows = of_keys[0], *k_across = of_keys[1], *v_across = of_keys[2], *q = of_queries[0], *dout = of_queries[1];
    float *p = scores[0], *ds = scores[1], *dk = sums[0], *dv = sums[1], *dq = results[0];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / H, h = piece % H;
      const Span &of_q = call.queries[b], &of_k = call.keys[b];
      const int64_t N = of_k.length;
      call.v.read(of_k, h, 0, N, rows, depth);
      across_from(rows, depth, v_across, row, N);
      call.k.read(of_k, h, 0, N, rows, depth);
      across_from(rows, depth, k_across, row, N);
      const auto* k = Format::stacked(rows, N, depth, of_keys[3]);
      std::fill_n(dk, N * width, 0.0f);
      std::fill_n(dv, N * width, 0.0f);
      for (int64_t first = 0; first < of_q.length; first += kBlock) {
        const int64_t count = std::min(kBlock, of_q.length - first), counted = numbers(count, kTogether);
        call.q.read(of_q, h, first, count, q, depth);
        douts.read(of_q, h, first, count, dout, depth);
        product({q, depth, 1}, k_across, row, p, row, count, whole_lanes(N), depth, false);
        product({dout, depth, 1}, v_across, row, ds, row, count, whole_lanes(N), depth, false);
        for (int64_t m = 0; m < count; ++m) {
          float *of_p = p + m * row, *of_ds = ds + m * row;
          call.bias.add(of_p, call.scale, b, h, first + m, N);
          exponentials(of_p, call.sums.at(of_q, h, first + m), N);
          score_gradient(of_p, of_ds, N);
          if (T) call.bias.add_gradient_of(of_ds, &parts[piece * T], b, first + m, N);
          Format::keep_turned(p, m, count, N, row, of_scores[0]);
          Format::keep_turned(ds, m, count, N, row, of_scores[1]);
          Format::keep(ds, m, N, row, of_scores[2]);
        }
        const auto* dout_stacked = Format::stacked(dout, count, depth, of_queries[2]);
        const auto* q_stacked = Format::stacked(q, count, depth, of_queries[3]);
        product(Format::kept_turned(p, row, of_scores[0]), dout_stacked, width, dv, width, N, width, counted, true);
        product(Format::kept_turned(ds, row, of_scores[1]), q_stacked, width, dk, width, N, width, counted, true);
        product(Format::kept(ds, row, of_scores[2]), k, width, dq, width, count, width, numbers(N, kTogether), false);
        multiply(dq, call.scale, count * width);
        for (int64_t m = 0; m < count; ++m) gradients.q.write(of_q, h, first + m, dq + m * width);
      }
      multiply(dk, call.scale, N * width);
      for (int64_t n = 0; n < N; ++n) {
        gradients.k.write(of_k, h, n, dk + n * width);
        gradients.v.write(of_k, h, n, dv + n * width);
      }
    }
  });
  for (int64_t first = 0; first < pieces * T; first += H * T)  // one sample at a time, in order
    for (int64_t t = 0; t < T; ++t)
      for (int64_t h = 0; h < H; ++h) gradients.table[t * H + h] += parts[first + call.bias.at(t, h)];
}

void rel_attention_fwd(
    Tensor q, Tensor k, Tensor v, Optional table, Optional q_places, Optional k_places, Optional q_offsets,
    Optional k_offsets, double scale, Tensor out, Tensor lse) {
  const Call call(q, k, v, table, q_places, k_places, q_offsets, k_offsets, scale, lse);
  const Heads outs("out", out, q);
  if (call.in_pairs) forward<Pairs>(call, outs);
  else forward<Floats>(call, outs);
}

void rel_attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Optional table, Optional q_places, Optional k_places,
    Optional q_offsets, Optional k_offsets, double scale, Tensor lse, Tensor dq, Tensor dk, Tensor dv,
    Optional dtable) {
  const Call call(q, k, v, table, q_places, k_places, q_offsets, k_offsets, scale, lse);
  STD_TORCH_CHECK(
      !dtable || (table && dtable->scalar_type() == ScalarType::Float && dtable->dim() == 2 &&
                  dtable->size(0) == table->size(0) && dtable->size(1) == call.H && dtable->is_contiguous()),
      "dtable: expected as the table");
  const Heads douts("dout", dout, q);
  const Gradients gradients{
      {"dq", dq, q}, {"dk", dk, k}, {"dv", dv, k}, dtable ? static_cast<float*>(dtable->data_ptr()) : nullptr};
  if (call.in_pairs) backward<Pairs>(call, douts, gradients);
  else backward<Floats>(call, douts, gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CPU, m) {
  m.impl("rel_attention_fwd_cpu", TORCH_BOX(&rel_attention_fwd));
  m.impl("rel_attention_bwd_cpu", TORCH_BOX(&rel_attention_bwd));
}

}  // namespace mdt_fast
