// adaLN on the CPU: gated residual, layer norm and modulation in one pass over the rows, forward and backward.
#include <cmath>

#include "rows.h"
#include "vectors.h"

namespace mdt_fast {
namespace {

MDT_TARGETS float sum_of_squares(const float* x, float mean, int64_t length) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += (x[i + lane] - mean) * (x[i + lane] - mean);
  for (; i < length; ++i) lanes[0] += (x[i] - mean) * (x[i] - mean);
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

MDT_TARGETS void add_product(
    const float* __restrict x, const float* __restrict a, const float* __restrict b, float* __restrict out,
    int64_t length) {
  for (int64_t i = 0; i < length; ++i) out[i] = x[i] + a[i] * b[i];
}

MDT_TARGETS void modulate(
    const float* __restrict x, float mean, float rstd, const float* __restrict shift, const float* __restrict scale,
    float* __restrict out, int64_t length) {
  for (int64_t i = 0; i < length; ++i) out[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
}

// n = normal, g = dout * (1 + scale); dshift += dout, dscale += dout * n.
MDT_TARGETS void modulate_back(
    const float* __restrict x, float mean, float rstd, const float* __restrict scale, const float* __restrict dout,
    float* __restrict n, float* __restrict g, float* __restrict dshift, float* __restrict dscale, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    const float normal = (x[i] - mean) * rstd;
    n[i] = normal;
    g[i] = dout[i] * (1.0f + scale[i]);
    dshift[i] += dout[i];
    dscale[i] += dout[i] * normal;
  }
}

MDT_TARGETS void norm_back(
    const float* __restrict g, const float* __restrict n, float mean_g, float mean_gn, float rstd,
    const float* __restrict more, float* __restrict dx, int64_t length) {
  if (more)
    for (int64_t i = 0; i < length; ++i) dx[i] = (g[i] - mean_g - n[i] * mean_gn) * rstd + more[i];
  else
    for (int64_t i = 0; i < length; ++i) dx[i] = (g[i] - mean_g - n[i] * mean_gn) * rstd;
}

// dy = gate * dr, dgate += y * dr.
MDT_TARGETS void gate_back(
    const float* __restrict dr, const float* __restrict y, const float* __restrict gate, float* __restrict dy,
    float* __restrict dgate, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    dgate[i] += y[i] * dr[i];
    dy[i] = gate[i] * dr[i];
  }
}

MDT_TARGETS void renew(
    const float* __restrict n, const float* __restrict shift, const float* __restrict scale, float* __restrict out,
    int64_t length) {
  for (int64_t i = 0; i < length; ++i) out[i] = n[i] * (1.0f + scale[i]) + shift[i];
}

float* numbers(const char* name, const Tensor& tensor, int64_t rows) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.numel() == rows && tensor.is_contiguous(), name,
      ": expected float32 [", rows, "]");
  return static_cast<float*>(tensor.data_ptr());
}

void ln_modulate_fwd(
    Tensor x, Optional y, Optional gate, Tensor shift, Tensor scale, Optional offsets, double eps, Optional residual,
    Tensor out, Tensor mean, Tensor rstd) {
  const int64_t R = x.size(0), D = x.size(1), B = scale.size(0);
  const Rows xs("x", x, R, D), ys("y", y, R, D), gates("gate", gate, B, D, true), shifts("shift", shift, B, D, true);
  const Rows scales("scale", scale, B, D, true), residuals("residual", residual, R, D), outs("out", out, R, D);
  STD_TORCH_CHECK(bool(ys) == bool(gates) && bool(ys) == bool(residuals), "y, gate, residual: expected all or none");
  float *means = numbers("mean", mean, R), *rstds = numbers("rstd", rstd, R);
  const auto chunks = chunks_of(R, B, offsets);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    Buffers buffer(7, D);
    for (int64_t c = first; c < last; ++c) {
      const int64_t b = chunks[c].sample;
      const float *shift_D = shifts.read(b, buffer[0]), *scale_D = scales.read(b, buffer[1]);
      const float* gate_D = gates ? gates.read(b, buffer[2]) : nullptr;
      for (int64_t i = chunks[c].first; i < chunks[c].last; ++i) {
        const float* r = xs.read(i, buffer[3]);
        if (ys) {
          float* sum_D = residuals.write(i, buffer[4]);
          add_product(r, gate_D, ys.read(i, buffer[5]), sum_D, D);
          residuals.done(i, sum_D);
          r = residuals.read(i, buffer[4]);  // as stored
        }
        const float m = sum(r, D) / D, s = 1.0f / std::sqrt(sum_of_squares(r, m, D) / D + float(eps));
        float* out_D = outs.write(i, buffer[6]);
        modulate(r, m, s, shift_D, scale_D, out_D, D);
        outs.done(i, out_D);
        means[i] = m, rstds[i] = s;
      }
    }
  });
}

void ln_modulate_bwd(
    Tensor x, Optional y, Optional gate, Tensor shift, Tensor scale, Optional offsets, Tensor mean, Tensor rstd,
    Optional dresidual, Tensor dout, Tensor dx, Optional dy, Optional dgate, Tensor dshift, Tensor dscale,
    Optional out) {
  const int64_t R = x.size(0), D = x.size(1), B = scale.size(0);
  const Rows xs("x", x, R, D), ys("y", y, R, D), gates("gate", gate, B, D, true), shifts("shift", shift, B, D, true);
  const Rows scales("scale", scale, B, D, true), mores("dresidual", dresidual, R, D), douts("dout", dout, R, D);
  const Rows dxs("dx", dx, R, D), dys("dy", dy, R, D), dgates("dgate", dgate, B, D), outs("out", out, R, D);
  const Rows dshifts("dshift", dshift, B, D), dscales("dscale", dscale, B, D);
  STD_TORCH_CHECK(
      bool(ys) == bool(gates) && bool(ys) == bool(dys) && bool(ys) == bool(dgates),
      "y, gate, dy, dgate: expected all or none");
  const float *means = numbers("mean", mean, R), *rstds = numbers("rstd", rstd, R);
  const auto chunks = chunks_of(R, B, offsets);
  std::vector<float> part_shift(chunks.size() * D), part_scale(chunks.size() * D);
  std::vector<float> part_gate(ys ? chunks.size() * D : 0);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    Buffers buffer(12, D);
    for (int64_t c = first; c < last; ++c) {
      const int64_t b = chunks[c].sample;
      const float *shift_D = shifts.read(b, buffer[0]), *scale_D = scales.read(b, buffer[1]);
      const float* gate_D = gates ? gates.read(b, buffer[2]) : nullptr;
      for (int64_t i = chunks[c].first; i < chunks[c].last; ++i) {
        float *n = buffer[3], *g = buffer[4], *dx_D = dxs.write(i, buffer[5]);
        const float *r = xs.read(i, buffer[6]), *y_D = ys ? ys.read(i, buffer[10]) : nullptr;
        if (ys) {  // recompute the residual, which was not saved
          add_product(r, gate_D, y_D, buffer[11], D);
          xs.round(buffer[11]);
          r = buffer[11];
        }
        modulate_back(
            r, means[i], rstds[i], scale_D, douts.read(i, buffer[7]), n, g, &part_shift[c * D],
            &part_scale[c * D], D);
        norm_back(
            g, n, sum(g, D) / D, dot(g, n, D) / D, rstds[i], mores ? mores.read(i, buffer[8]) : nullptr, dx_D, D);
        dxs.done(i, dx_D);
        if (ys) {
          float* dy_D = dys.write(i, buffer[9]);
          gate_back(dx_D, y_D, gate_D, dy_D, &part_gate[c * D], D);
          dys.done(i, dy_D);
        }
        if (outs) {
          float* out_D = outs.write(i, g);
          renew(n, shift_D, scale_D, out_D, D);
          outs.done(i, out_D);
        }
      }
    }
  });
  add_parts(part_shift, chunks, dshifts, B, D);
  add_parts(part_scale, chunks, dscales, B, D);
  if (ys) add_parts(part_gate, chunks, dgates, B, D);
}

void gate_residual_fwd(Tensor x, Tensor y, Tensor gate, Optional offsets, Tensor out) {
  const int64_t R = x.size(0), D = x.size(1), B = gate.size(0);
  const Rows xs("x", x, R, D), ys("y", y, R, D), gates("gate", gate, B, D, true), outs("out", out, R, D);
  const auto chunks = chunks_of(R, B, offsets);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    Buffers buffer(4, D);
    for (int64_t c = first; c < last; ++c) {
      const float* gate_D = gates.read(chunks[c].sample, buffer[0]);
      for (int64_t i = chunks[c].first; i < chunks[c].last; ++i) {
        float* out_D = outs.write(i, buffer[1]);
        add_product(xs.read(i, buffer[2]), gate_D, ys.read(i, buffer[3]), out_D, D);
        outs.done(i, out_D);
      }
    }
  });
}

void gate_residual_bwd(Tensor y, Tensor gate, Optional offsets, Tensor dout, Tensor dy, Tensor dgate) {
  const int64_t R = y.size(0), D = y.size(1), B = gate.size(0);
  const Rows ys("y", y, R, D), gates("gate", gate, B, D, true), douts("dout", dout, R, D), dys("dy", dy, R, D);
  const Rows dgates("dgate", dgate, B, D);
  const auto chunks = chunks_of(R, B, offsets);
  std::vector<float> parts(chunks.size() * D);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    Buffers buffer(4, D);
    for (int64_t c = first; c < last; ++c) {
      const float* gate_D = gates.read(chunks[c].sample, buffer[0]);
      for (int64_t i = chunks[c].first; i < chunks[c].last; ++i) {
        float* dy_D = dys.write(i, buffer[1]);
        gate_back(douts.read(i, buffer[2]), ys.read(i, buffer[3]), gate_D, dy_D, &parts[c * D], D);
        dys.done(i, dy_D);
      }
    }
  });
  add_parts(parts, chunks, dgates, B, D);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mdt_fast, CPU, m) {
  m.impl("ln_modulate_fwd_cpu", TORCH_BOX(&ln_modulate_fwd));
  m.impl("ln_modulate_bwd_cpu", TORCH_BOX(&ln_modulate_bwd));
  m.impl("gate_residual_fwd_cpu", TORCH_BOX(&gate_residual_fwd));
  m.impl("gate_residual_bwd_cpu", TORCH_BOX(&gate_residual_bwd));
}

}  // namespace mdt_fast
