// Bias and GELU (tanh form) on the CPU, forward and backward: gelu(z) = z * sigmoid(2u).
#include "rows.h"
#include "vectors.h"

namespace mdt_fast {
namespace {

constexpr int64_t kStrip = 256;  // columns at a time, so that everything read and written fits into the L1 cache
constexpr float kSlope = 1.5957691216057308f;  // 2 sqrt(2/pi): 2u = kSlope * (z + 0.044715 z^3)
constexpr float kOfTwo = -1.4426950408889634f * kSlope;
constexpr float kFar = 9.0f;  // beyond kFar the sigmoid is 1 in float32, and beyond -kFar it is 0

inline float within_reach(float z) { return z > kFar ? kFar : z < -kFar ? -kFar : z; }

// sigmoid(2u) of z; `near` is z clamped to [-kFar, kFar].
inline float gate(float z, float near) {
  const float s = 1.0f / (1.0f + power_of_two(near * (kOfTwo + kOfTwo * 0.044715f * (near * near))));
  return z < -kFar ? 0.0f : s;
}

MDT_TARGETS void gelu(const float* __restrict x, const float* __restrict bias, float* __restrict out, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    const float z = x[i] + bias[i];
    out[i] = z * gate(z, within_reach(z));
  }
}

MDT_TARGETS void gelu_back(
    const float* __restrict x, const float* __restrict bias, const float* __restrict dout, float* __restrict dx,
    float* __restrict dbias, float* __restrict out, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    const float z = x[i] + bias[i], near = within_reach(z), s = gate(z, near);
    const float slope = kSlope + kSlope * 0.134145f * (near * near);
    const float dz = dout[i] * s * (1.0f + near * (1.0f - s) * slope);
    dx[i] = dz;
    dbias[i] += dz;
    out[i] = z * s;
  }
}

void bias_gelu_fwd(Tensor x, Tensor bias, Tensor out) {
  const int64_t R = x.size(0), F = x.size(1);
  const Rows xs("x", x, R, F), biases("bias", bias, 1, F), outs("out", out, R, F);
  torch::stable::parallel_for(0, R, kRows, [&](int64_t first, int64_t last) {
    Buffers of_bias(1, F), strips(2, kStrip);
    const float* bias_F = biases.read(0, of_bias[0]);
    for (int64_t i = first; i < last; ++i)
      for (int64_t f = 0; f < F; f += kStrip) {
        const int64_t length = std::min(kStrip, F - f);
        float* to = outs.write(i, f, strips[0]);
        gelu(xs.read(i, f, length, strips[1]), bias_F + f, to, length);
        outs.done(i, f, length, to);
      }
  });
}

void bias_gelu_bwd(Tensor x, Tensor bias, Tensor dout, Tensor dx, Tensor dbias, Optional out) {
  const int64_t R = x.size(0), F = x.size(1);
  const Rows xs("x", x, R, F), biases("bias", bias, 1, F), douts("dout", dout, R, F), dxs("dx", dx, R, F);
  const Rows dbiases("dbias", dbias, 1, F), outs("out", out, R, F);
  const auto chunks = chunks_of(R, R ? 1 : 0, Optional());
  std::vector<float> parts(chunks.size() * F);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    Buffers of_bias(1, F), strips(4, kStrip);
    const float* bias_F = biases.read(0, of_bias[0]);
    for (int64_t c = first; c < last; ++c)
      for (int64_t i = chunks[c].first; i < chunks[c].last; ++i)
        for (int64_t f = 0; f < F; f += kStrip) {
          const int64_t length = std::min(kStrip, F - f);
          float *to_dx = dxs.write(i, f, strips[0]), *to_out = outs ? outs.write(i, f, strips[1]) : strips[1];
          const float *of_x = xs.read(i, f, length, strips[2]), *of_dout = douts.read(i, f, length, strips[3]);
          gelu_back(of_x, bias_F + f, of_dout, to_dx, &parts[c * F + f], to_out, length);
          dxs.done(i, f, length, to_dx);
          if (outs) outs.done(i, f, length, to_out);
        }
  });
  add_parts(parts, chunks, dbiases, 1, F);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CPU, m) {
  m.impl("bias_gelu_fwd_cpu", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd_cpu", TORCH_BOX(&bias_gelu_bwd));
}

}  // namespace mdt_fast
