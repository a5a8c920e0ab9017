//! AVX2 with FMA and F16C: 8 lanes (Haswell and later, Zen and later).

use std::arch::x86_64::*;

use half::f16;

use super::{Kernel, Simd};

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Asks the CPU.
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

/// Calls an intrinsic that needs nothing but the instruction set.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: the intrinsic touches registers only, and `self` is proof of the instruction set.
        unsafe { $e }
    };
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const MR: usize = 6;
    const TILES: bool = false;
    const KC: usize = 512; // L2 caches of this age hold 256 or 512 KiB

    #[inline]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enter<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` is proof of every feature that `enter` enables.
        unsafe { enter(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        op!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_min_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        op!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        op!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn mul_pow2(self, a: __m256, n: __m256) -> __m256 {
        // Added to the exponent field; the caller keeps a and the result normal.
        op!({
            let n = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n))
        })
    }

    #[inline(always)]
    fn reduce_add(self, a: __m256) -> f32 {
        op!({
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<0b01>(two, two)))
        })
    }

    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        op!({
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<0b01>(two, two)))
        })
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint; it does not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: the caller vouches for 8 readable elements.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, a: __m256) {
        // SAFETY: the caller vouches for 8 writable elements.
        unsafe { _mm256_storeu_ps(to, a) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256 {
        // SAFETY: the caller vouches for 8 readable elements of 2 bytes: 128 bits.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, a: __m256) {
        // SAFETY: the caller vouches for 8 writable elements of 2 bytes: 128 bits.
        unsafe {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a);
            _mm_storeu_si128(to.cast(), halves);
        }
    }

    #[inline(always)]
    unsafe fn transpose_f16(self, from: *const f16, from_stride: usize, to: *mut f32, to_stride: usize) {
        // Pairs, then fours within each 128-bit half, then the halves.
        // SAFETY: rows 0..8 of `from` and `to` are the caller's promise; indices below stay under 8.
        unsafe {
            let mut a = [_mm256_setzero_ps(); 8];
            for (r, a) in a.iter_mut().enumerate() {
                *a = self.load_f16(from.add(r * from_stride));
            }
            for quad in 0..2 {
                let [r0, r1, r2, r3] = [a[4 * quad], a[4 * quad + 1], a[4 * quad + 2], a[4 * quad + 3]];
                let low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
                let high01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
                let low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
                let high23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
                // Half q of a[4·quad + c] now holds column 4q + c of the quad's four rows.
                a[4 * quad] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
                a[4 * quad + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
                a[4 * quad + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
                a[4 * quad + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
            }
            for c in 0..4 {
                self.store(to.add(c * to_stride), _mm256_permute2f128_ps::<0x20>(a[c], a[4 + c]));
                self.store(to.add((4 + c) * to_stride), _mm256_permute2f128_ps::<0x31>(a[c], a[4 + c]));
            }
        }
    }

    #[inline(always)]
    fn round_f16(self, a: __m256) -> __m256 {
        op!(_mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a)))
    }
}
