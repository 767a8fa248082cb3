// Vectors of floats: sums in an order that is the same on every processor, exp, and buffers.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "targets.h"

namespace mdt_fast {

constexpr int kLanes = 16;  // partial sums of a reduction: the floats of an AVX-512 register
constexpr size_t kAlignment = 64;

MDT_TARGETS inline float sum(const float* x, int64_t length) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
  for (; i < length; ++i) lanes[0] += x[i];
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

MDT_TARGETS inline float dot(const float* x, const float* y, int64_t length) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * y[i + lane];
  for (; i < length; ++i) lanes[0] += x[i] * y[i];
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

template <class To, class From>
inline To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// exp(x) to 2 units in the last place, in a form that compilers vectorise. Below -87 it is exp(-87) = 1.6e-38; above
// 88.4 it is infinity.
inline float exponential(float x) {
  x = x > 88.8f ? 88.8f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits<float>((bits<uint32_t>(shifted) + (127u - 0x4B400000u)) << 23);
}

#if defined(__GNUC__)
inline void prefetch(const void* at) { __builtin_prefetch(at); }
#else
inline void prefetch(const void*) {}
#endif

// 2^x to 2 units in the last place, for x from -126 to 126; cheaper than `exponential`.
inline float power_of_two(float x) {
  const float shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
  float p = 1.3264727e-3f;
  p = p * r + 9.6715127e-3f;
  p = p * r + 5.5507337e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314698e-1f;
  p = p * r + 1.0f;
  return p * bits<float>((bits<uint32_t>(shifted) + (127u - 0x4B400000u)) << 23);
}

// Aligned buffers of D floats for one thread.
class Buffers {
 public:
  Buffers(int count, int64_t D) : size_((D + kLanes - 1) / kLanes * kLanes), floats_((count + 1) * size_ + kLanes) {}
  float* operator[](int i) {
    const auto start = reinterpret_cast<uintptr_t>(floats_.data());
    return floats_.data() + (kAlignment - start % kAlignment) % kAlignment / sizeof(float) + i * size_;
  }

 private:
  int64_t size_;
  std::vector<float> floats_;
};

}  // namespace mdt_fast
