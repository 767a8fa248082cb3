// Choose the kept tokens on CUDA: one block per sample, one launch for the batch, up to 4096 tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>
#include <tuple>

#include "cuda.h"
#include "order.h"

namespace mdt_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostTokens = 4096;

inline __device__ uint32_t key_of(float x) { return ordered(x); }
inline __device__ uint64_t key_of(double x) { return ordered(x); }

// Sort the (number, token) pairs of a sample in registers, mark the first len_keep tokens in shared memory, and
// scan the marks: the count before a kept token is its slot. The sort is stable, so ties go to the lower token
// index.
template <class Number, int kThreads, int kItems>
__global__ __launch_bounds__(kThreads) void mask_plan_kernel(
    const Number* __restrict__ noise, int length, int len_keep, int64_t* __restrict__ ids_keep,
    int64_t* __restrict__ ids_mask, int64_t* __restrict__ ids_restore, float* __restrict__ mask) {
  using Key = decltype(key_of(Number()));
  using Sort = cub::BlockRadixSort<Key, kThreads, kItems, int>;
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ union {
    typename Sort::TempStorage sort;
    typename Scan::TempStorage scan;
  } shared;
  __shared__ bool kept[kThreads * kItems];

  const int64_t sample = blockIdx.x;
  const int first = threadIdx.x * kItems;
  Key keys[kItems];
  int tokens[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    tokens[j] = first + j;
    keys[j] = tokens[j] < length ? key_of(noise[sample * length + tokens[j]]) : Key(~Key(0));  // sorts last
  }
  Sort(shared.sort).Sort(keys, tokens);
#pragma unroll
  for (int j = 0; j < kItems; ++j) kept[tokens[j]] = first + j < len_keep;
  __syncthreads();

  int slots[kItems];
#pragma unroll
  for (int j = 0; j < kItems; ++j) slots[j] = kept[first + j];
  Scan(shared.scan).ExclusiveSum(slots, slots);
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int token = first + j;
    if (token >= length) break;
    const bool is_kept = kept[token];
    const int slot = is_kept ? slots[j] : token - slots[j];
    if (is_kept) ids_keep[sample * len_keep + slot] = token;
    else ids_mask[sample * (length - len_keep) + slot] = token;
    ids_restore[sample * length + token] = is_kept ? slot : len_keep + slot;
    mask[sample * length + token] = is_kept ? 0.0f : 1.0f;
  }
}

template <class Number, class... Outputs>
void launch(const Tensor& noise, int64_t len_keep, Outputs... outputs) {
  const unsigned batch = unsigned(noise.size(0));
  const int length = int(noise.size(1));
  const auto* numbers = static_cast<const Number*>(noise.data_ptr());
  const cudaStream_t stream = current_stream(noise);
  if (length <= 256) mask_plan_kernel<Number, 128, 2><<<batch, 128, 0, stream>>>(numbers, length, int(len_keep), outputs...);
  else if (length <= 1024) mask_plan_kernel<Number, 256, 4><<<batch, 256, 0, stream>>>(numbers, length, int(len_keep), outputs...);
  else mask_plan_kernel<Number, 1024, 4><<<batch, 1024, 0, stream>>>(numbers, length, int(len_keep), outputs...);
  check_launch("mask_plan");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_plan(Tensor noise, int64_t len_keep) {
  STD_TORCH_CHECK(noise.dim() == 2 && noise.is_contiguous(), "noise: expected [batch, tokens], contiguous");
  const int64_t batch = noise.size(0), length = noise.size(1);
  STD_TORCH_CHECK(length <= kMostTokens, "noise: ", length, " tokens, allowed are up to ", kMostTokens);
  STD_TORCH_CHECK(batch <= INT32_MAX, "noise: ", batch, " samples, allowed are up to ", INT32_MAX);
  STD_TORCH_CHECK(
      0 <= len_keep && len_keep <= length, "len_keep: got ", len_keep, ", allowed are 0..", length);
  const torch::stable::accelerator::DeviceGuard guard(noise.get_device_index());
  const auto make = [&](int64_t columns, ScalarType dtype) {
    return torch::stable::new_empty(noise, {batch, columns}, dtype);
  };
  Tensor keep = make(len_keep, ScalarType::Long), mask = make(length - len_keep, ScalarType::Long);
  Tensor restore = make(length, ScalarType::Long), dropped = make(length, ScalarType::Float);
  if (batch * length > 0) {
    auto* k = static_cast<int64_t*>(keep.data_ptr());
    auto* m = static_cast<int64_t*>(mask.data_ptr());
    auto* r = static_cast<int64_t*>(restore.data_ptr());
    auto* d = static_cast<float*>(dropped.data_ptr());
    if (noise.scalar_type() == ScalarType::Float) {
      launch<float>(noise, len_keep, k, m, r, d);
    } else {
      STD_TORCH_CHECK(noise.scalar_type() == ScalarType::Double, "noise: expected float32 or float64");
      launch<double>(noise, len_keep, k, m, r, d);
    }
  }
  return {keep, mask, restore, dropped};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CUDA, m) { m.impl("mask_plan", TORCH_BOX(&mask_plan)); }

}  // namespace mdt_fast
