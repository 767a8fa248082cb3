// Adan, AdamW and the sum of squares on the CPU: one pass, in chunks that stay in the L1 cache.
#include <cmath>

#include "lists.h"
#include "targets.h"

namespace mdt_fast {
namespace {

constexpr int64_t kChunk = 1024;        // elements: nine float32 streams of a chunk fit in 48 KiB
constexpr int64_t kChunksPerTask = 32;  // grain size: the smallest task of a thread

struct Chunk {
  int64_t parameter, begin, end;
};

// Cut all tensors into chunks. The cut does not depend on the number of threads, so neither do the bits.
template <class Size>
std::vector<Chunk> cut(int64_t count, const Size& size) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t begin = 0; begin < size(i); begin += kChunk)
      chunks.push_back({i, begin, std::min(begin + kChunk, size(i))});
  return chunks;
}

MDT_TARGETS void widen(const uint16_t* from, float* to, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = from_bfloat16(from[i]);
}

MDT_TARGETS void narrow(const float* from, uint16_t* to, int64_t length) {
  for (int64_t i = 0; i < length; ++i) to[i] = to_bfloat16(from[i]);
}

MDT_TARGETS void narrow_by_chance(
    const float* from, uint16_t* to, int64_t length, uint32_t seed, int64_t begin) {
  for (int64_t i = 0; i < length; ++i) to[i] = to_bfloat16_by_chance(from[i], seed, begin + i);
}

MDT_TARGETS void adan_chunk(
    const Factors& given, const float* __restrict g, float* __restrict p, float* __restrict m,
    float* __restrict v, float* __restrict n, float* __restrict prev, int64_t length) {
  const Factors f = given;
  for (int64_t i = 0; i < length; ++i) adan_update(f, g[i], p[i], m[i], v[i], n[i], prev[i]);
}

MDT_TARGETS void adamw_chunk(
    const Factors& given, const float* __restrict g, float* __restrict p, float* __restrict m,
    float* __restrict v, int64_t length) {
  const Factors f = given;
  for (int64_t i = 0; i < length; ++i) adamw_update(f, g[i], p[i], m[i], v[i]);
}

MDT_TARGETS void ema_chunk(const float* __restrict p, float* __restrict ema, float weight, int64_t length) {
  for (int64_t i = 0; i < length; ++i) ema[i] += weight * (p[i] - ema[i]);
}

MDT_TARGETS double sumsq_chunk(const float* g, int64_t length) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= length; i += 8)
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += double(g[i + lane]) * g[i + lane];
  for (; i < length; ++i) lanes[0] += double(g[i]) * g[i];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// A chunk of a float32 tensor in place; that of a bfloat16 tensor is widened into `buffer`.
float* chunk_of(const void* tensor, bool half, int64_t begin, int64_t length, float* buffer) {
  if (!half) return static_cast<float*>(const_cast<void*>(tensor)) + begin;
  widen(static_cast<const uint16_t*>(tensor) + begin, buffer, length);
  return buffer;
}

template <class FactorsOf, class Update>
void run(const Lists& lists, const Settings& settings, double lr, double norm, const FactorsOf& factors_of,
         const Update& update) {
  if (!std::isfinite(norm)) return;
  for (float* step : lists.steps) *step += 1;
  std::vector<Factors> factors;
  for (const Pointers& parameter : lists.parameters)
    factors.push_back(factors_of(settings, *parameter.step, lr, norm));
  const auto chunks = cut(lists.parameters.size(), [&](int64_t i) { return lists.parameters[i].numel; });

  torch::stable::parallel_for(0, chunks.size(), kChunksPerTask, [&](int64_t first, int64_t last) {
    float buffers[5][kChunk];
    for (int64_t c = first; c < last; ++c) {
      const auto [i, begin, end] = chunks[c];
      const Pointers& parameter = lists.parameters[i];
      const int64_t length = end - begin;
      float* p = parameter.p + begin;
      float* moments[4] = {};
      for (int j = 0; j < lists.moments; ++j)
        moments[j] = chunk_of(parameter.moments[j], lists.moments_bfloat16, begin, length, buffers[j]);
      update(
          factors[i], chunk_of(parameter.grad, lists.grads_bfloat16, begin, length, buffers[4]), p, moments, length);
      for (int j = 0; lists.moments_bfloat16 && j < lists.moments; ++j)
        narrow_by_chance(
            moments[j], static_cast<uint16_t*>(parameter.moments[j]) + begin, length,
            seed_of(*parameter.step, i, j), begin);
      if (parameter.half) narrow(p, parameter.half + begin, length);
      for (size_t e = 0; e < lists.ema_weights.size(); ++e)
        ema_chunk(p, lists.emas[e * lists.parameters.size() + i] + begin, lists.ema_weights[e], length);
    }
  });
}

double number(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? *static_cast<double*>(tensor.data_ptr())
                                                    : *static_cast<float*>(tensor.data_ptr());
}

Tensor grad_sumsq(Tensors grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one tensor");
  for (const Tensor& grad : grads)
    STD_TORCH_CHECK(
        grad.scalar_type() == ScalarType::Float || is_bfloat16(grad), "grads: expected float32 or bfloat16");
  const auto chunks = cut(grads.size(), [&](int64_t i) { return grads[i].numel(); });
  std::vector<double> parts(chunks.size());
  torch::stable::parallel_for(0, chunks.size(), kChunksPerTask, [&](int64_t first, int64_t last) {
    float buffer[kChunk];
    for (int64_t c = first; c < last; ++c) {
      const auto [i, begin, end] = chunks[c];
      parts[c] = sumsq_chunk(
          chunk_of(grads[i].data_ptr(), is_bfloat16(grads[i]), begin, end - begin, buffer), end - begin);
    }
  });
  Tensor sum = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
  double total = 0;
  for (double part : parts) total += part;
  *static_cast<double*>(sum.data_ptr()) = total;
  return sum;
}

void adan_step(
    Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_diff, Tensors exp_avg_sq, Tensors neg_pre_grad,
    Tensors masters, Tensors emas, Tensors steps, Tensor lr, Tensor grad_norm, double beta1, double beta2,
    double beta3, double eps, double weight_decay, bool no_prox, double max_grad_norm, double clip_eps,
    std::vector<double> ema_decays) {
  const Lists lists = make_lists(
      params, grads, {exp_avg, exp_avg_diff, exp_avg_sq, neg_pre_grad}, masters, emas, steps, lr, grad_norm,
      ema_decays);
  const Settings settings{beta1, beta2, beta3, eps, weight_decay, max_grad_norm, clip_eps, no_prox};
  run(lists, settings, number(lr), number(grad_norm),
      [](const Settings& s, double k, double rate, double norm) { return adan_factors(s, k, rate, norm); },
      [](const Factors& f, const float* g, float* p, float** moments, int64_t length) {
        adan_chunk(f, g, p, moments[0], moments[1], moments[2], moments[3], length);
      });
}

void adamw_step(
    Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors masters, Tensors emas,
    Tensors steps, Tensor lr, Tensor grad_norm, double beta1, double beta2, double eps, double weight_decay,
    double max_grad_norm, double clip_eps, std::vector<double> ema_decays) {
  const Lists lists =
      make_lists(params, grads, {exp_avg, exp_avg_sq}, masters, emas, steps, lr, grad_norm, ema_decays);
  const Settings settings{beta1, beta2, 0, eps, weight_decay, max_grad_norm, clip_eps, false};
  run(lists, settings, number(lr), number(grad_norm),
      [](const Settings& s, double k, double rate, double norm) { return adamw_factors(s, k, rate, norm); },
      [](const Factors& f, const float* g, float* p, float** moments, int64_t length) {
        adamw_chunk(f, g, p, moments[0], moments[1], length);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CPU, m) {
  m.impl("grad_sumsq", TORCH_BOX(&grad_sumsq));
  m.impl("adan_step", TORCH_BOX(&adan_step));
  m.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace mdt_fast
