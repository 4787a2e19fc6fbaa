// The exponential of a softmax over the vectors of simd_<isa>.h; include them first.  Local to the
// including file, as everything compiled for one instruction set.
#pragma once

namespace fathom::cpu {
namespace {

// exp(x) for x <= 0, within 2 ulp; 0 below the smallest normal result, NaN for NaN.
// exp(x) = 2^n exp(r), n = round(x / ln 2), ln 2 in two parts (Cody and Waite); exp(r) by the
// polynomial of Cephes expf.
inline F f_exp(F x) {
  const F lowest = f_set(-87.33654f);
  const F bounded = f_max(lowest, x);  // in this order a NaN comes through
  const F n = f_round(f_mul(bounded, f_set(1.44269504f)));
  F r = f_fnma(n, f_set(0.693359375f), bounded);
  r = f_fnma(n, f_set(-2.12194440e-4f), r);
  F p = f_set(1.9875691500e-4f);
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_fma(f_mul(r, r), p, f_add(r, f_set(1.0f)));
  return f_zero_below(x, lowest, f_scale2(p, n));
}

}  // namespace
}  // namespace fathom::cpu
