// Adan, AdamW and the sum of squares on CUDA: hundreds of tensors in one launch, everything read once and written
// once, without synchronisation. The table of pointers is passed in the kernel arguments (32 KB since CUDA 12.1), so
// a step can be captured in a CUDA graph as it is.
#include "cuda.h"
#include "lists.h"

namespace mdt_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;            // numbers per access of a thread: 128 bits of float32
constexpr int64_t kChunk = 16384;     // numbers per block
constexpr int kWords = 3900;          // of the table; with the other arguments it stays below 32,764 bytes
constexpr uint64_t kUnaligned = 1ull << 63;

// `count` records of `width` words. The last two words of a record are its number of elements and the number of
// chunks in the records before it. The top bit of the latter says that some pointer is not aligned to a vector.
struct Table {
  uint64_t words[kWords];
  int count, width;
};

// The first words of an optimiser step's record; the moments and averages follow from kMoments on.
enum Word { kParam, kGrad, kStep, kHalf, kMoments };

struct Forms {
  bool grads_bfloat16, moments_bfloat16;
  int emas;
};

__device__ __forceinline__ uint64_t first_chunk(const Table& table, int record) {
  return table.words[record * table.width + table.width - 1] & ~kUnaligned;
}

// The record that holds this chunk: the last record that starts at or before it.
__device__ __forceinline__ int find(const Table& table, uint64_t chunk) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_chunk(table, middle) <= chunk) low = middle;
    else high = middle - 1;
  }
  return low;
}

template <int V>
__device__ __forceinline__ void load(const void* from, bool half, int64_t i, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = half ? from_bfloat16(static_cast<const uint16_t*>(from)[i]) : static_cast<const float*>(from)[i];
  } else if (half) {
    const uint2 pair = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + i);
    x[0] = from_bfloat16(pair.x & 0xffff), x[1] = from_bfloat16(pair.x >> 16);
    x[2] = from_bfloat16(pair.y & 0xffff), x[3] = from_bfloat16(pair.y >> 16);
  } else {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(from) + i);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  }
}

template <int V>
__device__ __forceinline__ void store(float* to, int64_t i, const float (&x)[V]) {
  if constexpr (V == 1) to[i] = x[0];
  else *reinterpret_cast<float4*>(to + i) = make_float4(x[0], x[1], x[2], x[3]);
}

template <int V>
__device__ __forceinline__ void store(uint16_t* to, int64_t i, const uint16_t (&x)[V]) {
  if constexpr (V == 1) to[i] = x[0];
  else *reinterpret_cast<uint2*>(to + i) = make_uint2(x[0] | uint32_t(x[1]) << 16, x[2] | uint32_t(x[3]) << 16);
}

template <int V>
__device__ __forceinline__ void store_moment(
    uint64_t to, bool half, int64_t i, const float (&x)[V], uint32_t seed) {
  if (!half) return store(reinterpret_cast<float*>(to), i, x);
  uint16_t rounded[V];
#pragma unroll
  for (int j = 0; j < V; ++j) rounded[j] = to_bfloat16_by_chance(x[j], seed, i + j);
  store(reinterpret_cast<uint16_t*>(to), i, rounded);
}

template <bool kAdan, int V>
__device__ __forceinline__ void update(
    const uint64_t* words, const Forms& forms, const float* weights, const Factors& f, uint32_t step,
    int parameter, int64_t i) {
  constexpr int kCount = kAdan ? 4 : 2;
  float p[V], g[V], moments[kCount][V];
  load(reinterpret_cast<const void*>(words[kParam]), false, i, p);
  load(reinterpret_cast<const void*>(words[kGrad]), forms.grads_bfloat16, i, g);
#pragma unroll
  for (int m = 0; m < kCount; ++m)
    load(reinterpret_cast<const void*>(words[kMoments + m]), forms.moments_bfloat16, i, moments[m]);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if constexpr (kAdan) adan_update(f, g[j], p[j], moments[0][j], moments[1][j], moments[2][j], moments[3][j]);
    else adamw_update(f, g[j], p[j], moments[0][j], moments[1][j]);
  }
  store(reinterpret_cast<float*>(words[kParam]), i, p);
#pragma unroll
  for (int m = 0; m < kCount; ++m)
    store_moment(words[kMoments + m], forms.moments_bfloat16, i, moments[m], seed_of(step, parameter, m));
  if (words[kHalf]) {
    uint16_t half[V];
#pragma unroll
    for (int j = 0; j < V; ++j) half[j] = to_bfloat16(p[j]);
    store(reinterpret_cast<uint16_t*>(words[kHalf]), i, half);
  }
  for (int e = 0; e < forms.emas; ++e) {
    float ema[V];
    load(reinterpret_cast<const void*>(words[kMoments + kCount + e]), false, i, ema);
#pragma unroll
    for (int j = 0; j < V; ++j) ema[j] += weights[e] * (p[j] - ema[j]);
    store(reinterpret_cast<float*>(words[kMoments + kCount + e]), i, ema);
  }
}

constexpr int kMostEmas = 64;

struct Weights {
  float of[kMostEmas];
};

template <bool kAdan>
__global__ __launch_bounds__(kThreads) void step_kernel(
    const __grid_constant__ Table table, const Settings settings, const Forms forms,
    const __grid_constant__ Weights weights, const float* lr, const double* grad_norm, int first_parameter) {
  __shared__ Factors shared;
  const double norm = *grad_norm;
  if (!isfinite(norm)) return;
  const int record = find(table, blockIdx.x);
  const uint64_t* words = table.words + record * table.width;
  const float step = *reinterpret_cast<const float*>(words[kStep]);
  if (threadIdx.x == 0)
    shared = kAdan ? adan_factors(settings, step, *lr, norm) : adamw_factors(settings, step, *lr, norm);
  __syncthreads();
  const Factors f = shared;

  const int64_t numel = int64_t(words[table.width - 2]);
  const int64_t begin = int64_t(blockIdx.x - first_chunk(table, record)) * kChunk;
  const int64_t end = min(begin + kChunk, numel);
  const int64_t vectors_end = words[table.width - 1] & kUnaligned ? begin : end - (end - begin) % kVector;
  const int parameter = first_parameter + record;
  for (int64_t i = begin + threadIdx.x * kVector; i < vectors_end; i += kThreads * kVector)
    update<kAdan, kVector>(words, forms, weights.of, f, uint32_t(step), parameter, i);
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += kThreads)
    update<kAdan, 1>(words, forms, weights.of, f, uint32_t(step), parameter, i);
}

// Increment each step counter once, unless the gradient norm is not finite.
__global__ void count_kernel(const __grid_constant__ Table steps, const double* grad_norm) {
  if (!isfinite(*grad_norm)) return;
  for (int i = threadIdx.x; i < steps.count; i += blockDim.x)
    *reinterpret_cast<float*>(steps.words[i * steps.width]) += 1;
}

template <int kSize>
__device__ double block_sum(double x) {
  __shared__ double warps[kSize / 32];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = threadIdx.x < kSize / 32 ? warps[threadIdx.x] : 0;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  return x;  // valid in thread 0
}

// parts[chunk] is the sum of squares of this chunk. The first words of a record: pointer, whether bfloat16.
__global__ __launch_bounds__(kThreads) void sumsq_kernel(const __grid_constant__ Table table, double* parts) {
  const int record = find(table, blockIdx.x);
  const uint64_t* words = table.words + record * table.width;
  const void* grad = reinterpret_cast<const void*>(words[0]);
  const bool half = words[1];
  const int64_t numel = int64_t(words[2]);
  const int64_t begin = int64_t(blockIdx.x - first_chunk(table, record)) * kChunk;
  const int64_t end = min(begin + kChunk, numel);
  const int64_t vectors_end = words[3] & kUnaligned ? begin : end - (end - begin) % kVector;
  float sum = 0;
  for (int64_t i = begin + threadIdx.x * kVector; i < vectors_end; i += kThreads * kVector) {
    float g[kVector];
    load(grad, half, i, g);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += g[j] * g[j];
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += kThreads) {
    float g[1];
    load(grad, half, i, g);
    sum += g[0] * g[0];
  }
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

constexpr int kSumThreads = 1024;

__global__ __launch_bounds__(kSumThreads) void sum_kernel(const double* parts, int64_t count, double* sum) {
  double x = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) x += parts[i];
  x = block_sum<kSumThreads>(x);
  if (threadIdx.x == 0) *sum = x;
}

// Fills a table with records and launches whenever it is full. A launch has fewer than 2^31 blocks.
template <class Launch>
class Batches {
 public:
  Batches(int width, Launch launch) : launch_(launch) {
    table_.count = 0, table_.width = width;
    STD_TORCH_CHECK(width <= kWords, "too many tensors for one parameter");
  }

  // Add a record from its words (all but the last two) and its number of elements. `unaligned` disables vector
  // accesses.
  void add(const uint64_t* words, int64_t numel, bool unaligned) {
    const int64_t chunks = (numel + kChunk - 1) / kChunk;
    STD_TORCH_CHECK(chunks < INT32_MAX, "a tensor of ", numel, " elements is too large");
    if ((table_.count + 1) * table_.width > kWords || chunks_ + chunks > INT32_MAX) flush();
    uint64_t* to = table_.words + table_.count * table_.width;
    std::copy(words, words + table_.width - 2, to);
    to[table_.width - 2] = uint64_t(numel);
    to[table_.width - 1] = uint64_t(chunks_) | (unaligned ? kUnaligned : 0);
    ++table_.count, ++added_;
    chunks_ += chunks;
  }

  void flush() {
    if (chunks_) launch_(table_, unsigned(chunks_), int(added_ - table_.count));
    table_.count = 0, chunks_ = 0;
  }

 private:
  Table table_;
  Launch launch_;
  int64_t chunks_ = 0, added_ = 0;
};

bool is_unaligned(const void* pointer, bool half) { return reinterpret_cast<uintptr_t>(pointer) % (half ? 8 : 16); }

uint64_t word(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

Tensor grad_sumsq(Tensors grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads: expected at least one tensor");
  int64_t chunks = 0;
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(
        grad.scalar_type() == ScalarType::Float || is_bfloat16(grad), "grads: expected float32 or bfloat16");
    STD_TORCH_CHECK(grad.device() == grads[0].device(), "grads: on several devices");
    chunks += (grad.numel() + kChunk - 1) / kChunk;
  }
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const cudaStream_t stream = current_stream(grads[0]);
  Tensor parts = torch::stable::new_empty(grads[0], {chunks}, ScalarType::Double);
  Tensor sum = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
  auto* next = static_cast<double*>(parts.data_ptr());
  Batches batches(4, [&](const Table& table, unsigned blocks, int) {
    sumsq_kernel<<<blocks, kThreads, 0, stream>>>(table, next);
    check_launch("grad_sumsq");
    next += blocks;
  });
  for (const Tensor& grad : grads) {
    const bool half = is_bfloat16(grad);
    const uint64_t words[] = {word(grad.data_ptr()), half};
    if (grad.numel()) batches.add(words, grad.numel(), is_unaligned(grad.data_ptr(), half));
  }
  batches.flush();
  sum_kernel<<<1, kSumThreads, 0, stream>>>(
      static_cast<double*>(parts.data_ptr()), chunks, static_cast<double*>(sum.data_ptr()));
  check_launch("grad_sumsq");
  return sum;
}

template <bool kAdan>
void run(const Lists& lists, const Settings& settings, const Tensor& lr, const Tensor& grad_norm) {
  const size_t n = lists.parameters.size(), emas = lists.ema_weights.size();
  STD_TORCH_CHECK(emas <= kMostEmas, "ema_decays: ", emas, ", allowed are up to ", kMostEmas);
  if (!n) return;
  const torch::stable::accelerator::DeviceGuard guard(lr.get_device_index());
  const cudaStream_t stream = current_stream(lr);
  const auto* rate = static_cast<const float*>(lr.data_ptr());
  const auto* norm = static_cast<const double*>(grad_norm.data_ptr());
  Weights weights = {};
  std::copy(lists.ema_weights.begin(), lists.ema_weights.end(), weights.of);
  const Forms forms{lists.grads_bfloat16, lists.moments_bfloat16, int(emas)};

  Table counters;
  counters.count = 0, counters.width = 1;
  for (size_t i = 0; i < lists.steps.size(); ++i) {
    counters.words[counters.count++] = word(lists.steps[i]);
    if (counters.count == kWords || i + 1 == lists.steps.size()) {
      count_kernel<<<1, kThreads, 0, stream>>>(counters, norm);
      check_launch("optimiser step");
      counters.count = 0;
    }
  }
  Batches batches(kMoments + lists.moments + int(emas) + 2, [&](const Table& table, unsigned blocks, int first) {
    step_kernel<kAdan><<<blocks, kThreads, 0, stream>>>(table, settings, forms, weights, rate, norm, first);
    check_launch("optimiser step");
  });
  for (size_t i = 0; i < n; ++i) {
    const Pointers& from = lists.parameters[i];
    if (!from.numel) continue;
    std::vector<uint64_t> words{word(from.p), word(from.grad), word(from.step), word(from.half)};
    bool unaligned = is_unaligned(from.p, false) || is_unaligned(from.grad, forms.grads_bfloat16) ||
                     is_unaligned(from.half, true);
    for (int j = 0; j < lists.moments; ++j) {
      words.push_back(word(from.moments[j]));
      unaligned |= is_unaligned(from.moments[j], forms.moments_bfloat16);
    }
    for (size_t e = 0; e < emas; ++e) {
      words.push_back(word(lists.emas[e * n + i]));
      unaligned |= is_unaligned(lists.emas[e * n + i], false);
    }
    batches.add(words.data(), from.numel, unaligned);
  }
  batches.flush();
}

void adan_step(
    Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_diff, Tensors exp_avg_sq, Tensors neg_pre_grad,
    Tensors masters, Tensors emas, Tensors steps, Tensor lr, Tensor grad_norm, double beta1, double beta2,
    double beta3, double eps, double weight_decay, bool no_prox, double max_grad_norm, double clip_eps,
    std::vector<double> ema_decays) {
  const Lists lists = make_lists(
      params, grads, {exp_avg, exp_avg_diff, exp_avg_sq, neg_pre_grad}, masters, emas, steps, lr, grad_norm,
      ema_decays);
  run<true>(
      lists, {beta1, beta2, beta3, eps, weight_decay, max_grad_norm, clip_eps, no_prox}, lr, grad_norm);
}

void adamw_step(
    Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors masters, Tensors emas,
    Tensors steps, Tensor lr, Tensor grad_norm, double beta1, double beta2, double eps, double weight_decay,
    double max_grad_norm, double clip_eps, std::vector<double> ema_decays) {
  const Lists lists =
      make_lists(params, grads, {exp_avg, exp_avg_sq}, masters, emas, steps, lr, grad_norm, ema_decays);
  run<false>(lists, {beta1, beta2, 0, eps, weight_decay, max_grad_norm, clip_eps, false}, lr, grad_norm);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CUDA, m) {
  m.impl("grad_sumsq", TORCH_BOX(&grad_sumsq));
  m.impl("adan_step", TORCH_BOX(&adan_step));
  m.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace mdt_fast
