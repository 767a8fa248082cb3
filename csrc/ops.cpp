// The schemas of all native ops. The implementations are in the other .cpp files for the CPU, in .cu files for CUDA.
#include <torch/csrc/stable/library.h>

#include "targets.h"

namespace mdt_fast {
namespace {

#ifdef MDT_AVX512
__attribute__((target("avx512f"))) int64_t vector_bits() { return 512; }
#endif
#ifdef MDT_WIDTHS
__attribute__((target("avx2"))) int64_t vector_bits() { return 256; }
__attribute__((target("default"))) int64_t vector_bits() { return 128; }
#else
int64_t vector_bits() { return 0; }  // whatever the compiler flags say
#endif

int64_t chosen_bits() { return vector_bits(); }

}  // namespace
}  // namespace mdt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(mdt_fast, m) {
  m.def("vector_bits() -> int");  // the vector width of the code that the loader picked
  m.def("mask_plan(Tensor noise, int len_keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("grad_sumsq(Tensor[] grads) -> Tensor");
  m.def(
      "adan_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_diff, "
      "Tensor(d!)[] exp_avg_sq, Tensor(e!)[] neg_pre_grad, Tensor(f!)[] masters, Tensor(g!)[] emas, "
      "Tensor(h!)[] steps, Tensor lr, Tensor grad_norm, float beta1, float beta2, float beta3, float eps, "
      "float weight_decay, bool no_prox, float max_grad_norm, float clip_eps, float[] ema_decays) -> ()");
  m.def(
      "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
      "Tensor(d!)[] masters, Tensor(e!)[] emas, Tensor(f!)[] steps, Tensor lr, Tensor grad_norm, "
      "float beta1, float beta2, float eps, float weight_decay, float max_grad_norm, float clip_eps, "
      "float[] ema_decays) -> ()");
  // These write into tensors that the caller has allocated.
  m.def(
      "ln_modulate_fwd_cpu(Tensor x, Tensor? y, Tensor? gate, Tensor shift, Tensor scale, Tensor? offsets, "
      "float eps, Tensor(a!)? residual, Tensor(b!) out, Tensor(c!) mean, Tensor(d!) rstd) -> ()");
  m.def(
      "ln_modulate_bwd_cpu(Tensor x, Tensor? y, Tensor? gate, Tensor shift, Tensor scale, Tensor? offsets, "
      "Tensor mean, Tensor rstd, Tensor? dresidual, Tensor dout, Tensor(a!) dx, Tensor(b!)? dy, "
      "Tensor(c!)? dgate, Tensor(d!) dshift, Tensor(e!) dscale, Tensor(f!)? out) -> ()");
  m.def("gate_residual_fwd_cpu(Tensor x, Tensor y, Tensor gate, Tensor? offsets, Tensor(a!) out) -> ()");
  m.def(
      "gate_residual_bwd_cpu(Tensor y, Tensor gate, Tensor? offsets, Tensor dout, Tensor(a!) dy, "
      "Tensor(b!) dgate) -> ()");
  m.def("bias_gelu_fwd_cpu(Tensor x, Tensor bias, Tensor(a!) out) -> ()");
  m.def(
      "bias_gelu_bwd_cpu(Tensor x, Tensor bias, Tensor dout, Tensor(a!) dx, Tensor(b!) dbias, "
      "Tensor(c!)? out) -> ()");
  m.def("transposed_cpu(Tensor x, Tensor(a!) out) -> ()");
  // The backward op adds to dtable.
  m.def(
      "rel_attention_fwd_cpu(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? q_places, Tensor? k_places, "
      "Tensor? q_offsets, Tensor? k_offsets, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "rel_attention_bwd_cpu(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? table, Tensor? q_places, "
      "Tensor? k_places, Tensor? q_offsets, Tensor? k_offsets, float scale, Tensor lse, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dtable) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CompositeExplicitAutograd, m) {
  m.impl("vector_bits", TORCH_BOX(&mdt_fast::chosen_bits));
}
