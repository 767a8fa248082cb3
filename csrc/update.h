// The update of one element by Adan and by AdamW. The CPU and CUDA share the formulas; each has its own loop.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MDT_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MDT_HOST_DEVICE inline __attribute__((always_inline))
#else
#define MDT_HOST_DEVICE inline
#endif

namespace mdt_fast {

// The settings of a step, the same for every parameter of the call.
struct Settings {
  Settings(double beta1, double beta2, double beta3, double eps, double weight_decay, double max_grad_norm,
           double clip_eps, bool no_prox)
      : beta1(beta1), beta2(beta2), beta3(beta3), eps(eps), weight_decay(weight_decay),
        max_grad_norm(max_grad_norm), clip_eps(clip_eps), no_prox(no_prox),
        log1(std::log(beta1)), log2(std::log(beta2)), log3(std::log(beta3)) {}

  double beta1, beta2, beta3, eps, weight_decay, max_grad_norm, clip_eps;
  bool no_prox;  // Adan: decay by a product before the step, as AdamW does, not by a quotient after it
  double log1, log2, log3;
};

// 1 - beta^k, from the logarithm of beta.
MDT_HOST_DEVICE double correction(double log_beta, double k) { return -expm1(k * log_beta); }

// The factors for the elements of one parameter, from the settings, its step count k, the learning rate and the norm.
struct Factors {
  float clip, beta1, beta2, beta3, lerp1, lerp2, lerp3, eps;
  float step_m, step_v, inv_root, shrink, grow;
  bool first;
};

// The factor that scales a gradient of this norm down to at most max_grad_norm.
MDT_HOST_DEVICE double clip_factor(const Settings& s, double norm) {
  if (!(s.max_grad_norm > 0)) return 1;
  const double factor = s.max_grad_norm / (norm + s.clip_eps);
  return factor < 1 ? factor : 1;
}

MDT_HOST_DEVICE Factors adan_factors(const Settings& s, double k, double lr, double norm) {
  Factors f;
  f.clip = float(clip_factor(s, norm));
  f.beta1 = float(s.beta1), f.beta2 = float(s.beta2), f.beta3 = float(s.beta3);
  f.lerp1 = float(1 - s.beta1), f.lerp2 = float(1 - s.beta2), f.lerp3 = float(1 - s.beta3);
  f.eps = float(s.eps);
  f.step_m = float(lr / correction(s.log1, k));
  f.step_v = float(lr * s.beta2 / correction(s.log2, k));
  f.inv_root = float(1 / sqrt(correction(s.log3, k)));
  f.shrink = s.no_prox ? float(1 - lr * s.weight_decay) : 1.0f;
  f.grow = s.no_prox ? 1.0f : float(1 / (1 + lr * s.weight_decay));
  f.first = k == 1;
  return f;
}

MDT_HOST_DEVICE Factors adamw_factors(const Settings& s, double k, double lr, double norm) {
  Factors f = {};
  f.clip = float(clip_factor(s, norm));
  f.beta1 = float(s.beta1), f.beta2 = float(s.beta2);
  f.lerp1 = float(1 - s.beta1), f.lerp2 = float(1 - s.beta2);
  f.eps = float(s.eps);
  f.step_m = float(lr / correction(s.log1, k));
  f.inv_root = float(1 / sqrt(correction(s.log2, k)));
  f.shrink = float(1 - lr * s.weight_decay);
  return f;
}

// Xie et al. 2022, Algorithm 1. `prev` is minus the clipped gradient of the previous step.
MDT_HOST_DEVICE void adan_update(
    const Factors& f, float grad, float& p, float& m, float& v, float& n, float& prev) {
  const float g = grad * f.clip;
  const float d = f.first ? 0.0f : g + prev;
  m += f.lerp1 * (g - m);
  v += f.lerp2 * (d - v);
  const float u = g + f.beta2 * d;
  n = f.beta3 * n + f.lerp3 * u * u;
  const float denom = sqrtf(n) * f.inv_root + f.eps;
  p = (p * f.shrink - (f.step_m * m + f.step_v * v) / denom) * f.grow;
  prev = -g;
}

// Loshchilov & Hutter 2019, in the form of torch.optim.AdamW.
MDT_HOST_DEVICE void adamw_update(const Factors& f, float grad, float& p, float& m, float& v) {
  const float g = grad * f.clip;
  m += f.lerp1 * (g - m);
  v = f.beta2 * v + f.lerp2 * g * g;
  p = p * f.shrink - f.step_m * m / (sqrtf(v) * f.inv_root + f.eps);
}

MDT_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

MDT_HOST_DEVICE float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Round to nearest, ties to even; NaN stays NaN.
MDT_HOST_DEVICE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Stochastic rounding, so that a moment whose change is below half a bfloat16 step still moves on average. The random
// bits are a hash of (seed, index), so every run gives the same result.
MDT_HOST_DEVICE uint16_t to_bfloat16_by_chance(float x, uint32_t seed, int64_t index) {
  uint32_t h = uint32_t(index) ^ uint32_t(index >> 32) * 0x9e3779b9u ^ seed;
  h ^= h >> 16, h *= 0x85ebca6bu, h ^= h >> 13, h *= 0xc2b2ae35u, h ^= h >> 16;
  const uint32_t bits = bits_of(x);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return finite ? uint16_t((bits + (h & 0xffff)) >> 16) : to_bfloat16(x);
}

// Differs between steps, the parameters of a call, and the moments of a parameter.
MDT_HOST_DEVICE uint32_t seed_of(double k, int64_t parameter, int moment) {
  return uint32_t(k) * 0x27d4eb2fu + uint32_t(parameter) * 0x165667b1u + uint32_t(moment) * 0x9e3779b9u;
}

}  // namespace mdt_fast
