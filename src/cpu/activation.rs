//! `quick_gelu` of the tower, exact `gelu` of the projector, and the exponential under both and attention.
//!
//! ```text
//!   quick_gelu(x) = x · σ(1.702 x) = x / (1 + e^(−1.702 x))
//!   gelu(x)       = x · Φ(x),  Φ the normal distribution: ½ (1 + erf(x / √2)), no tanh
//! ```
//!
//! Errors against f64 over all finite fp16 inputs (tested): as fp16, 0.501 ulp, of which the last rounding alone
//! is 0.5; as f32, 3.6e-6 relative down to 1e-30, far in the tails where the argument of the exponential is
//! large, and 5e-7 for |x| < 1.

use super::simd::Simd;

/// log₂ e
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// 2^x for x in [-126, 126]; beyond, 2^±126. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    // NaN is the second operand, and so survives.
    s.exp2([s.min(s.splat(126.0), x)])[0]
}

/// [`Simd::exp2`] by rounding.
///
/// # Numerics
/// 2^x = 2^n · 2^r, n = round(x), |r| ≤ ½; 2^r by a minimax polynomial of degree 6, relative error 1.9e-9,
/// with rounding 1.0e-7; 2^0 is 1.
#[inline(always)]
pub(crate) fn exp2_by_rounding<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(-126.0), x);
    let n = s.round(x);
    let r = s.sub(x, n);
    const C: [f32; 7] =
        [1.0, 6.931_472e-1, 2.402_264_7e-1, 5.550_328_8e-2, 9.618_489e-3, 1.339_993_1e-3, 1.534_580_4e-4];
    let mut p = s.splat(C[6]);
    for &c in C[..6].iter().rev() {
        p = s.mul_add(p, r, s.splat(c));
    }
    s.mul_pow2(p, n)
}

/// x · σ(1.702 x), the tower's activation.
///
/// # Source
/// OpenAI CLIP, `QuickGELU`; `hidden_act` "quick_gelu" in transformers.
#[inline(always)]
pub(crate) fn quick_gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp2(s, s.mul(x, s.splat(-1.702 * LOG2_E)));
    s.mul(x, s.recip(s.add(s.splat(1.0), e)))
}

/// x · Φ(x), the projector's activation.
///
/// # Numerics
/// Computed as max(x, 0) − g(|x|), g(a) = a · Φ(−a) > 0, so that the tail of negative x keeps its relative
/// accuracy where 1 + erf would cancel. With u = 1 / (1 + 0.3 a):
///
/// ```text
///   Φ(−a) = e^(−a²/2) · u · Q(u),  Q a minimax polynomial of degree 9 for a ≤ 13, relative error 3.4e-9
/// ```
///
/// a² is split into its rounded value and the rest, which multiplies e^(−a²/2) by 1 − rest/2.
///
/// # Source
/// The form is that of Hastings' approximations; the coefficients are this crate's own (Remez exchange).
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    const Q: [f32; 10] = [
        0.119_686_38,
        0.119_577_47,
        0.110_191_04,
        0.078_585_745,
        0.095_618_24,
        -0.078_467_8,
        0.190_686_59,
        -0.227_424_4,
        0.112_112_92,
        -0.020_566_171,
    ];
    let zero = s.splat(0.0);
    // Beyond 13, e^(−a²/2) < 2^-121 whatever Q says; the clamp keeps a² finite. NaN survives.
    let a = s.min(s.splat(13.0), s.max(s.sub(zero, x), x));
    let square = s.mul(a, a);
    let rest = s.mul_add(a, a, s.sub(zero, square));
    let e = exp2(s, s.mul(square, s.splat(-0.5 * LOG2_E)));
    let e = s.mul_add(s.mul(e, rest), s.splat(-0.5), e);
    let u = s.recip(s.mul_add(a, s.splat(0.3), s.splat(1.0)));
    let mut q = s.splat(Q[9]);
    for &c in Q[..9].iter().rev() {
        q = s.mul_add(q, u, s.splat(c));
    }
    let g = s.mul(s.mul(a, e), s.mul(u, q));
    s.sub(s.max(zero, x), g)
}

#[cfg(test)]
mod tests;
