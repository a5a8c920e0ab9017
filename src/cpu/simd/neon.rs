//! NEON: 8 lanes in two registers (every AArch64: Graviton, Ampere, Apple).
//!
//! Two registers to a vector, so that the tile is 6 × 16, as on AVX2: 24 accumulators, four registers of B and a
//! broadcast in 29 of 32, and 24 FMAs for ten loads. With four lanes to a vector the same 24 would take fourteen.

use std::arch::aarch64::*;
use std::arch::asm;

use half::f16;

use super::{Kernel, Simd};

/// Proof that the target has NEON, which this module is compiled for alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// Needs to ask nobody.
    pub(super) fn detect() -> Option<Self> {
        Some(Self(()))
    }
}

/// Calls intrinsics that need nothing but the instruction set.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: they touch registers only, and the target has NEON, or this module would not be compiled.
        unsafe { $e }
    };
}

/// Applies such an intrinsic to both registers of each vector.
macro_rules! both {
    ($f:ident($($a:ident),*)) => {
        op!(float32x4x2_t($f($($a.0),*), $f($($a.1),*)))
    };
}

/// Four fp16 as f32; exact. The intrinsic of that name asks for a younger compiler.
#[inline(always)]
fn widen(halves: uint16x4_t) -> float32x4_t {
    let wide;
    // SAFETY: an instruction of every AArch64, on registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) halves, options(pure, nomem, nostack))
    };
    wide
}

/// Four f32 as fp16, to nearest, ties to even.
#[inline(always)]
fn narrow(wide: float32x4_t) -> uint16x4_t {
    let halves;
    // SAFETY: as above.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) halves, in(vreg) wide, options(pure, nomem, nostack))
    };
    halves
}

/// The integer that a lane holds, added to the exponent field; 0 of NaN.
#[inline(always)]
fn mul_pow2(a: float32x4_t, n: float32x4_t) -> float32x4_t {
    op!({
        let n = vshlq_n_s32::<23>(vcvtnq_s32_f32(n));
        vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), n))
    })
}

/// The greater; `b` where either is NaN, unlike the instruction of that name.
#[inline(always)]
fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    op!(vbslq_f32(vcgtq_f32(a, b), a, b))
}

/// The lesser; `b` where either is NaN.
#[inline(always)]
fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    op!(vbslq_f32(vcltq_f32(a, b), a, b))
}

/// Columns of four rows of four.
#[inline(always)]
fn transpose([r0, r1, r2, r3]: [float32x4_t; 4]) -> [float32x4_t; 4] {
    op!({
        let even01 = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1));
        let odd01 = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
        let even23 = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3));
        let odd23 = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
        [
            vreinterpretq_f32_f64(vtrn1q_f64(even01, even23)),
            vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23)),
            vreinterpretq_f32_f64(vtrn2q_f64(even01, even23)),
            vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23)),
        ]
    })
}

impl Simd for Neon {
    type V = float32x4x2_t;
    const LANES: usize = 8;
    const MR: usize = 6;
    const TILES: bool = false;
    const KC: usize = 512; // L2 caches of these cores hold 512 KiB or more

    #[inline]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4x2_t {
        op!(float32x4x2_t(vdupq_n_f32(x), vdupq_n_f32(x)))
    }

    #[inline(always)]
    fn add(self, a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        both!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        both!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul(self, a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        both!(vmulq_f32(a, b))
    }

    #[inline(always)]
    fn div(self, a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        both!(vdivq_f32(a, b))
    }

    #[inline(always)]
    fn max(self, a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        float32x4x2_t(max(a.0, b.0), max(a.1, b.1))
    }

    #[inline(always)]
    fn min(self, a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t {
        float32x4x2_t(min(a.0, b.0), min(a.1, b.1))
    }

    #[inline(always)]
    fn mul_add(self, a: float32x4x2_t, b: float32x4x2_t, c: float32x4x2_t) -> float32x4x2_t {
        both!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn round(self, a: float32x4x2_t) -> float32x4x2_t {
        both!(vrndnq_f32(a))
    }

    #[inline(always)]
    fn mul_pow2(self, a: float32x4x2_t, n: float32x4x2_t) -> float32x4x2_t {
        float32x4x2_t(mul_pow2(a.0, n.0), mul_pow2(a.1, n.1))
    }

    #[inline(always)]
    fn reduce_add(self, a: float32x4x2_t) -> f32 {
        op!(vaddvq_f32(vaddq_f32(a.0, a.1)))
    }

    #[inline(always)]
    fn reduce_max(self, a: float32x4x2_t) -> f32 {
        op!(vmaxvq_f32(vmaxq_f32(a.0, a.1)))
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint; it does not fault.
        unsafe { asm!("prfm pldl2keep, [{0}]", in(reg) at, options(nostack, readonly, preserves_flags)) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> float32x4x2_t {
        // SAFETY: the caller vouches for 8 readable elements.
        unsafe { vld1q_f32_x2(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, a: float32x4x2_t) {
        // SAFETY: the caller vouches for 8 writable elements.
        unsafe { vst1q_f32_x2(to, a) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> float32x4x2_t {
        // SAFETY: the caller vouches for 8 readable elements of 2 bytes.
        let halves = unsafe { vld1_u16_x2(from.cast()) };
        float32x4x2_t(widen(halves.0), widen(halves.1))
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, a: float32x4x2_t) {
        // SAFETY: the caller vouches for 8 writable elements of 2 bytes.
        unsafe { vst1_u16_x2(to.cast(), uint16x4x2_t(narrow(a.0), narrow(a.1))) }
    }

    #[inline(always)]
    unsafe fn transpose_f16(self, from: *const f16, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: rows 0..8 of `from` and `to` are the caller's promise; indices below stay under 8.
        unsafe {
            let mut rows = [self.splat(0.0); 8];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = self.load_f16(from.add(r * from_stride));
            }
            let [r0, r1, r2, r3, r4, r5, r6, r7] = rows;
            let top =
                transpose([r0.0, r1.0, r2.0, r3.0]).into_iter().zip(transpose([r4.0, r5.0, r6.0, r7.0]));
            let bottom =
                transpose([r0.1, r1.1, r2.1, r3.1]).into_iter().zip(transpose([r4.1, r5.1, r6.1, r7.1]));
            for (c, (left, right)) in top.chain(bottom).enumerate() {
                self.store(to.add(c * to_stride), float32x4x2_t(left, right));
            }
        }
    }

    #[inline(always)]
    fn round_f16(self, a: float32x4x2_t) -> float32x4x2_t {
        float32x4x2_t(widen(narrow(a.0)), widen(narrow(a.1)))
    }
}
