// Check the tensor lists of an optimiser step and convert them to pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <vector>

#include "update.h"

namespace mdt_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline bool is_bfloat16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

// Pointers to one parameter's tensors. Those that a call does not have are null.
struct Pointers {
  float* p = nullptr;          // the float32 parameter, or the float32 master of a bfloat16 one
  uint16_t* half = nullptr;    // that bfloat16 parameter
  const void* grad = nullptr;  // float32 or bfloat16
  void* moments[4] = {};       // Adan: m, v, n, minus the last gradient. AdamW: m, v
  float* step = nullptr;
  int64_t numel = 0;
};

// All parameters of a call. `emas` has all tensors of the first average first, as in the schema.
struct Lists {
  std::vector<Pointers> parameters;
  std::vector<float*> emas;
  std::vector<float*> steps;  // one for all parameters, or one per parameter
  std::vector<float> ema_weights;  // 1 - decay in double, then rounded: 1 - float(decay) would be less exact
  int moments;
  bool grads_bfloat16 = false, moments_bfloat16 = false;
};

inline void check_list(const char* name, const Tensors& list, size_t count) {
  STD_TORCH_CHECK(
      list.size() == count, name, ": ", list.size(), " tensors, expected ", count);
}

// Check that each tensor has the size of the parameter at the same index and the device of the first one, and that
// the whole list has one allowed dtype. Returns whether that is bfloat16.
inline bool check_like(const char* name, const Tensors& list, const Tensors& params, bool half_allowed) {
  check_list(name, list, params.size());
  const bool half = half_allowed && !list.empty() && is_bfloat16(list[0]);
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(
        list[i].scalar_type() == (half ? ScalarType::BFloat16 : ScalarType::Float),
        name, ": number ", i, " has another dtype than float32",
        half_allowed ? " and bfloat16, or than the others" : "");
    STD_TORCH_CHECK(list[i].numel() == params[i].numel(), name, ": number ", i, " has another size");
    STD_TORCH_CHECK(
        list[i].device() == params[0].device(), name, ": number ", i, " is on another device");
  }
  return half;
}

inline Lists make_lists(
    const Tensors& params, const Tensors& grads, const std::vector<Tensors>& moments, const Tensors& masters,
    const Tensors& emas, const Tensors& steps, const Tensor& lr, const Tensor& grad_norm,
    const std::vector<double>& ema_decays) {
  const size_t n = params.size();
  Lists lists;
  lists.moments = int(moments.size());
  const bool half = check_like("params", params, params, true);
  lists.grads_bfloat16 = check_like("grads", grads, params, true);
  for (const Tensors& list : moments) {
    const bool moments_bfloat16 = check_like("moments", list, params, true);
    STD_TORCH_CHECK(
        &list == &moments[0] || moments_bfloat16 == lists.moments_bfloat16, "moments: differ in dtype");
    lists.moments_bfloat16 = moments_bfloat16;
  }
  if (half || !masters.empty()) check_like("masters", masters, params, false);
  STD_TORCH_CHECK(half || masters.empty(), "masters: are for bfloat16 parameters");
  check_list("emas", emas, n * ema_decays.size());
  for (size_t e = 0; e < ema_decays.size(); ++e) {
    check_like("emas", Tensors(emas.begin() + e * n, emas.begin() + (e + 1) * n), params, false);
  }
  STD_TORCH_CHECK(steps.size() == 1 || steps.size() == n, "steps: ", steps.size(), " tensors, expected 1 or ", n);
  for (const Tensor& step : steps) {
    STD_TORCH_CHECK(
        step.scalar_type() == ScalarType::Float && step.numel() == 1 && (n == 0 || step.device() == params[0].device()),
        "steps: expected one float32 number each, on the parameters' device");
    lists.steps.push_back(static_cast<float*>(step.data_ptr()));
  }
  STD_TORCH_CHECK(lr.scalar_type() == ScalarType::Float && lr.numel() == 1, "lr: expected one float32 number");
  STD_TORCH_CHECK(
      grad_norm.scalar_type() == ScalarType::Double && grad_norm.numel() == 1,
      "grad_norm: expected one float64 number");
  STD_TORCH_CHECK(
      n == 0 || (lr.device() == params[0].device() && grad_norm.device() == params[0].device()),
      "lr, grad_norm: expected on the parameters' device");

  for (size_t i = 0; i < n; ++i) {
    Pointers pointers;
    pointers.p = static_cast<float*>((half ? masters : params)[i].data_ptr());
    pointers.half = half ? static_cast<uint16_t*>(params[i].data_ptr()) : nullptr;
    pointers.grad = grads[i].data_ptr();
    for (size_t j = 0; j < moments.size(); ++j) pointers.moments[j] = moments[j][i].data_ptr();
    pointers.step = lists.steps[steps.size() == 1 ? 0 : i];
    pointers.numel = params[i].numel();
    lists.parameters.push_back(pointers);
  }
  for (const Tensor& ema : emas) lists.emas.push_back(static_cast<float*>(ema.data_ptr()));
  for (double decay : ema_decays) lists.ema_weights.push_back(float(1 - decay));
  return lists;
}

}  // namespace mdt_fast
