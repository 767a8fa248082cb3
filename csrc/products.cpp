#include "products.h"

#include "targets.h"
#include "vectors.h"

#ifdef MDT_WIDTHS
#include <immintrin.h>
#endif

namespace mdt_fast {
namespace {

template <class Number>
using Product = void (*)(
    Matrix<Number>, const Number*, int64_t, float*, int64_t, int64_t, int64_t, int64_t, bool);

#ifdef MDT_AVX512
#pragma GCC push_options
#pragma GCC target("avx512f")
namespace avx512 {
using Number = float;
using Vector = __m512;
using Factor = __m512;
constexpr int kWidth = 16, kTileRows = 6, kTileVectors = 4;  // 24 sums, 4 vectors of B, 1 of A: 29 of 32 registers
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, Vector v) { _mm512_storeu_ps(x, v); }
inline Factor fill(float x) { return _mm512_set1_ps(x); }
inline Vector multiply_add(Factor a, Factor b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#include "tiles.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bf16")
namespace avx512_pairs {
using Number = Pair;
using Factor = __m512bh;
using avx512::kTileRows, avx512::kTileVectors, avx512::kWidth, avx512::Vector;  // the sums are float32, too
using avx512::load, avx512::store, avx512::zero;
inline Factor load(const Pair* x) { return (Factor)_mm512_loadu_si512(x); }
inline Factor fill(Pair x) { return (Factor)_mm512_set1_epi32(x); }
inline Vector multiply_add(Factor a, Factor b, Vector c) { return _mm512_dpbf16_ps(c, a, b); }
#include "tiles.h"
}  // namespace avx512_pairs
#pragma GCC pop_options
#endif

#ifdef MDT_WIDTHS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
using Number = float;
using Vector = __m256;
using Factor = __m256;
constexpr int kWidth = 8, kTileRows = 6, kTileVectors = 2;  // 12 sums, 2 vectors of B, 1 of A: 15 of 16 registers
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* x, Vector v) { _mm256_storeu_ps(x, v); }
inline Factor fill(float x) { return _mm256_set1_ps(x); }
inline Vector multiply_add(Factor a, Factor b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#include "tiles.h"
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace any {
// Whole rows of C at a time; the compiler vectorises them as far as it can.
void tiles(
    Matrix<float> a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K,
    bool add) {
  for (int64_t m = 0; m < M; ++m) {
    float* __restrict row = c + m * c_row;
    for (int64_t n = 0; n < N && !add; ++n) row[n] = 0.0f;
    for (int64_t k = 0; k < K; ++k) {
      const float of_a = a.data[m * a.row + k * a.column];
      const float* __restrict of_b = b + k * b_row;
      for (int64_t n = 0; n < N; ++n) row[n] += of_a * of_b[n];
    }
  }
}
}  // namespace any

Product<float> chosen() {
#ifdef MDT_AVX512
  if (__builtin_cpu_supports("avx512f")) return avx512::tiles;
#endif
#ifdef MDT_WIDTHS
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::tiles;
#endif
  return any::tiles;
}

Product<Pair> chosen_for_pairs() {
#ifdef MDT_AVX512
#ifndef MDT_ALWAYS_PAIRS  // set by a test
  if (__builtin_cpu_is("intel")) return nullptr;  // there, float32 products are as fast per cycle
#endif
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16")) return avx512_pairs::tiles;
#endif
  return nullptr;
}

const Product<float> of_floats = chosen();
const Product<Pair> of_pairs = chosen_for_pairs();

}  // namespace

void product(
    Matrix<float> a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K,
    bool add) {
  of_floats(a, b, b_row, c, c_row, M, N, K, add);
}

void product(
    Matrix<Pair> a, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K, bool add) {
  of_pairs(a, b, b_row, c, c_row, M, N, K, add);
}

bool multiplies_pairs() { return of_pairs != nullptr; }

}  // namespace mdt_fast
