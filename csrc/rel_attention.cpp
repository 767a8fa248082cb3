// Attention on the CPU, with the bias read from a table, forward and backward: one head of one sample after the
// other, in blocks of queries whose scores stay in a core's own cache. In float32, whatever the tensors are in.
// H heads, M queries and N keys of a sample, d head size, T rows of the table.
#include "products.h"
#include "scores.h"
#include "transpose.h"

namespace mdt_fast {
namespace {

constexpr int64_t kBlock = 64;   // queries whose scores are computed together
constexpr int64_t kPiece = 256;  // queries of a piece of work of the forward pass

int64_t whole_lanes(int64_t x) { return (x + kLanes - 1) / kLanes * kLanes; }

// Queries, keys or values, [B, H, rows, d] by strides, a head's numbers side by side.
class Heads {
 public:
  Heads(const char* name, const Tensor& tensor, int64_t H, int64_t d)
      : data_(static_cast<char*>(tensor.data_ptr())), dtype_(tensor.scalar_type()), d_(d) {
    STD_TORCH_CHECK(
        dtype_ == ScalarType::Float || dtype_ == ScalarType::BFloat16 || dtype_ == ScalarType::Half, name,
        ": expected float32, bfloat16 or float16");
    STD_TORCH_CHECK(
        tensor.dim() == 4 && tensor.size(1) == H && tensor.size(3) == d && (tensor.stride(3) == 1 || d == 1), name,
        ": expected [B, ", H, ", rows, ", d, "], the last side by side");
    entry_ = tensor.stride(0), head_ = tensor.stride(1), row_ = tensor.stride(2);
  }

  // Rows [first, first + count) of a sample's head, as float32, `to_row` apart.
  void read(const Span& span, int64_t h, int64_t first, int64_t count, float* to, int64_t to_row) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = place(span, h, first + i);
      float* row = to + i * to_row;
      if (dtype_ == ScalarType::Float) std::copy_n(reinterpret_cast<float*>(data_) + at, d_, row);
      else if (dtype_ == ScalarType::BFloat16) widen_bfloat16(reinterpret_cast<uint16_t*>(data_) + at, row, d_);
      else widen_half(reinterpret_cast<torch::headeronly::Half*>(data_) + at, row, d_);
    }
  }

  // Row i of a sample's head.
  void write(const Span& span, int64_t h, int64_t i, const float* row) const {
    const int64_t at = place(span, h, i);
    if (dtype_ == ScalarType::Float) std::copy_n(row, d_, reinterpret_cast<float*>(data_) + at);
    else if (dtype_ == ScalarType::BFloat16) narrow_bfloat16(row, reinterpret_cast<uint16_t*>(data_) + at, d_);
    else narrow_half(row, reinterpret_cast<torch::headeronly::Half*>(data_) + at, d_);
  }

 private:
  int64_t place(const Span& span, int64_t h, int64_t i) const {
    return span.entry * entry_ + h * head_ + (span.first + i) * row_;
  }

  char* data_;
  ScalarType dtype_;
  int64_t d_, entry_, head_, row_;
};

// Each sample's rows: all of an entry of the batch, or, by offsets, a part of its only one.
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
  for (int64_t b = 0; b + 1 < offsets->size(0); ++b) {
    STD_TORCH_CHECK(
        0 <= ends[b] && ends[b] <= ends[b + 1] && ends[b + 1] <= rows, name, ": expected 0, ascending, ", rows);
    spans.push_back({0, ends[b], ends[b + 1] - ends[b]});
  }
  return spans;
}

// log(sum(exp(score))) [H, all rows of all entries].
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

// What both passes are given.
struct Call {
  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& table, const Optional& q_places,
       const Optional& k_places, const Optional& q_offsets, const Optional& k_offsets, double scale, const Tensor& lse)
      : H(q.size(1)), d(q.size(3)), width(whole_lanes(d)), scale(float(scale)), q("q", q, H, d), k("k", k, H, d),
        v("v", v, H, d), queries(spans_of("q_offsets", q, q_offsets)), keys(spans_of("k_offsets", k, k_offsets)),
        sums(lse, q), bias(table, q_places, k_places, H, queries, keys) {
    STD_TORCH_CHECK(queries.size() == keys.size(), "k_offsets: expected as many samples as q_offsets");
    STD_TORCH_CHECK(v.size(0) == k.size(0) && v.size(2) == k.size(2), "v: expected as k");
    for (const Span& span : keys) longest = std::max(longest, span.length);
    row = whole_lanes(longest) + kLanes;  // no power of two: rows of a column then lie in different sets of the cache
  }

  int64_t H, d, width;  // width: d, filled up with zeros
  float scale;
  Heads q, k, v;
  std::vector<Span> queries, keys;
  Sums sums;
  Bias bias;
  int64_t longest = 0, row = 0;  // keys of a sample; from one row of scores to the next
};

void attention_fwd(
    Tensor q, Tensor k, Tensor v, Optional table, Optional q_places, Optional k_places, Optional q_offsets,
    Optional k_offsets, double scale, Tensor out, Tensor lse) {
  const Call call(q, k, v, table, q_places, k_places, q_offsets, k_offsets, scale, lse);
  const Heads outs("out", out, call.H, call.d);
  struct Piece {
    int64_t b, h, first, last;
  };
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < int64_t(call.queries.size()); ++b)
    for (int64_t h = 0; h < call.H; ++h)
      for (int64_t m = 0; m < call.queries[b].length; m += kPiece)
        pieces.push_back({b, h, m, std::min(m + kPiece, call.queries[b].length)});
  const int64_t width = call.width, row = call.row;
  torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t end) {
    Buffers of_keys(3, row * width), of_queries(2, kBlock * width), scores(1, kBlock * row);
    float *keys = of_keys[0], *across = of_keys[1], *values = of_keys[2], *s = scores[0];
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      const int64_t b = piece.b, h = piece.h;
      const Span &of_q = call.queries[b], &of_k = call.keys[b];
      const int64_t N = of_k.length;
      call.k.read(of_k, h, 0, N, keys, width);
      call.v.read(of_k, h, 0, N, values, width);
      transpose(keys, width, across, row, whole_lanes(N), width);
      for (int64_t first = piece.first; first < piece.last; first += kBlock) {
        const int64_t count = std::min(kBlock, piece.last - first);
        call.q.read(of_q, h, first, count, of_queries[0], width);
        product({of_queries[0], width, 1}, across, row, s, row, count, whole_lanes(N), width, false);
        for (int64_t m = 0; m < count && N; ++m) {
          float* x = s + m * row;
          call.bias.add(x, call.scale, b, h, first + m, N);
          const float most = largest(x, N);
          exponentials(x, most, N);
          const float total = sum(x, N);
          multiply(x, 1.0f / total, N);
          call.sums.at(of_q, h, first + m) = most + std::log(total);
        }
        product({s, row, 1}, values, width, of_queries[1], width, count, width, N, false);
        for (int64_t m = 0; m < count; ++m) outs.write(of_q, h, first + m, of_queries[1] + m * width);
      }
    }
  });
}

void attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Optional table, Optional q_places, Optional k_places,
    Optional q_offsets, Optional k_offsets, double scale, Tensor lse, Tensor dq, Tensor dk, Tensor dv,
    Optional dtable) {
  const Call call(q, k, v, table, q_places, k_places, q_offsets, k_offsets, scale, lse);
  const int64_t H = call.H, d = call.d, width = call.width, row = call.row, T = dtable ? call.bias.rows() : 0;
  const Heads douts("dout", dout, H, d), dqs("dq", dq, H, d), dks("dk", dk, H, d), dvs("dv", dv, H, d);
  STD_TORCH_CHECK(
      !dtable || (table && dtable->scalar_type() == ScalarType::Float && dtable->dim() == 2 && dtable->size(0) == H &&
                  dtable->size(1) == T && dtable->is_contiguous()),
      "dtable: expected as the table");
  const int64_t pieces = call.queries.size() * H;
  std::vector<float> parts(pieces * T);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    Buffers of_keys(5, row * width), of_queries(3, kBlock * width), scores(2, kBlock * row);
    float *keys = of_keys[0], *keys_across = of_keys[1], *values_across = of_keys[2];
    float *of_dk = of_keys[3], *of_dv = of_keys[4];
    float *of_q = of_queries[0], *of_dout = of_queries[1], *of_dq = of_queries[2], *p = scores[0], *ds = scores[1];
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / H, h = piece % H;
      const Span &queries = call.queries[b], &of_sample = call.keys[b];
      const int64_t N = of_sample.length, lanes = whole_lanes(N);
      call.v.read(of_sample, h, 0, N, keys, width);
      transpose(keys, width, values_across, row, lanes, width);
      call.k.read(of_sample, h, 0, N, keys, width);
      transpose(keys, width, keys_across, row, lanes, width);
      std::fill_n(of_dk, N * width, 0.0f);
      std::fill_n(of_dv, N * width, 0.0f);
      for (int64_t first = 0; first < queries.length; first += kBlock) {
        const int64_t count = std::min(kBlock, queries.length - first);
        call.q.read(queries, h, first, count, of_q, width);
        douts.read(queries, h, first, count, of_dout, width);
        product({of_q, width, 1}, keys_across, row, p, row, count, lanes, width, false);
        product({of_dout, width, 1}, values_across, row, ds, row, count, lanes, width, false);
        for (int64_t m = 0; m < count; ++m) {
          float *of_p = p + m * row, *of_ds = ds + m * row;
          call.bias.add(of_p, call.scale, b, h, first + m, N);
          exponentials(of_p, call.sums.at(queries, h, first + m), N);
          score_gradient(of_p, of_ds, dot(of_p, of_ds, N), N);
          if (dtable) call.bias.add_gradient_of(of_ds, &parts[piece * T], b, first + m, N);
        }
        product({p, 1, row}, of_dout, width, of_dv, width, N, width, count, true);
        product({ds, 1, row}, of_q, width, of_dk, width, N, width, count, true);
        product({ds, row, 1}, keys, width, of_dq, width, count, width, N, false);
        multiply(of_dq, call.scale, count * width);
        for (int64_t m = 0; m < count; ++m) dqs.write(queries, h, first + m, of_dq + m * width);
      }
      multiply(of_dk, call.scale, N * width);
      for (int64_t n = 0; n < N; ++n) {
        dks.write(of_sample, h, n, of_dk + n * width);
        dvs.write(of_sample, h, n, of_dv + n * width);
      }
    }
  });
  if (!dtable) return;
  auto* total = static_cast<float*>(dtable->data_ptr());
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t t = 0; t < T; ++t) total[piece % H * T + t] += parts[piece * T + t];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CPU, m) {
  m.impl("rel_attention_fwd_cpu", TORCH_BOX(&attention_fwd));
  m.impl("rel_attention_bwd_cpu", TORCH_BOX(&attention_bwd));
}

}  // namespace mdt_fast
