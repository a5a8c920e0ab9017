//! AVX-512: 16 lanes. Needs F, BW, DQ, VL and what comes with them (Skylake-X and later, Zen 4 and later).
//!
//! With `TILES`, AMX beside it (`amx`): the same vectors, and matrix products in tile registers.

use std::arch::x86_64::*;

use half::f16;

use super::{Kernel, Simd, amx, tiles};

/// Proof that the CPU has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C; with `TILES`, AVX512-BF16 and AMX-BF16 as well.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const TILES: bool>(());

impl<const TILES: bool> Avx512<TILES> {
    /// Asks the CPU; for tiles, the operating system, too.
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let tiles = || is_x86_feature_detected!("avx512bf16") && amx::available();
        (has && (!TILES || tiles())).then_some(Self(()))
    }
}

impl<const TILES: bool> Avx512<TILES> {
    /// Stores the transpose of 16 × 16 lanes, rows `stride` apart.
    ///
    /// # Safety
    /// Each of 16 rows of `to` is writable for 16 elements.
    #[inline(always)]
    unsafe fn store_transposed(self, mut a: [__m512; 16], to: *mut f32, stride: usize) {
        // Pairs, then fours within each 128-bit quarter, then the quarters themselves as a 4 × 4 matrix.
        // SAFETY: the caller's promise; indices below stay under 16.
        unsafe {
            for quad in 0..4 {
                let [r0, r1, r2, r3] = [a[4 * quad], a[4 * quad + 1], a[4 * quad + 2], a[4 * quad + 3]];
                let low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
                let high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
                let low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
                let high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
                // Quarter q of a[4·quad + c] now holds column 4q + c of the quad's four rows.
                a[4 * quad] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
                a[4 * quad + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
                a[4 * quad + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
                a[4 * quad + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
            }
            for c in 0..4 {
                let [q0, q1, q2, q3] = [a[c], a[4 + c], a[8 + c], a[12 + c]];
                let low01 = _mm512_shuffle_f32x4::<0b01_00_01_00>(q0, q1);
                let high01 = _mm512_shuffle_f32x4::<0b11_10_11_10>(q0, q1);
                let low23 = _mm512_shuffle_f32x4::<0b01_00_01_00>(q2, q3);
                let high23 = _mm512_shuffle_f32x4::<0b11_10_11_10>(q2, q3);
                let row = |c: usize, v| self.store(to.add(c * stride), v);
                row(c, _mm512_shuffle_f32x4::<0b10_00_10_00>(low01, low23));
                row(4 + c, _mm512_shuffle_f32x4::<0b11_01_11_01>(low01, low23));
                row(8 + c, _mm512_shuffle_f32x4::<0b10_00_10_00>(high01, high23));
                row(12 + c, _mm512_shuffle_f32x4::<0b11_01_11_01>(high01, high23));
            }
        }
    }
}

/// Calls an intrinsic that needs nothing but the instruction set.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: the intrinsic touches registers only, and `self` is proof of the instruction set.
        unsafe { $e }
    };
}

impl<const TILES: bool> Simd for Avx512<TILES> {
    type V = __m512;
    const LANES: usize = 16;
    const MR: usize = 12;
    const KC: usize = 1024;
    const TILES: bool = TILES;

    #[inline]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn enter<const TILES: bool, K: Kernel>(simd: Avx512<TILES>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
        fn enter_with_bf16<const TILES: bool, K: Kernel>(simd: Avx512<TILES>, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` is proof of every feature that either enables.
        unsafe {
            match TILES {
                true => enter_with_bf16(self, kernel),
                false => enter(self, kernel),
            }
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn recip(self, a: __m512) -> __m512 {
        // 14 bits, and one step of Newton's: a division keeps the unit for 16 cycles.
        op!({
            let r = _mm512_rcp14_ps(a);
            _mm512_fmadd_ps(r, _mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0)), r)
        })
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn mul_pow2(self, a: __m512, n: __m512) -> __m512 {
        op!(_mm512_scalef_ps(a, n))
    }

    #[inline(always)]
    fn exp2<const N: usize>(self, a: [__m512; N]) -> [__m512; N] {
        // 2^⌊a⌋ · 2^r, r = a − ⌊a⌋ from 0 to 1; 2^r by a minimax polynomial, to 7.5e-8.
        const C: [f32; 6] =
            [0.999_999_94, 0.693_153_1, 0.240_153_61, 0.055_826_318, 0.008_989_34, 0.001_877_576_7];
        const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
        op!({
            let a = a.map(
                #[inline(always)]
                |a| _mm512_max_ps(_mm512_set1_ps(-126.0), a),
            );
            let r = a.map(
                #[inline(always)]
                |a| _mm512_reduce_ps::<DOWN>(a),
            );
            let mut p = [_mm512_set1_ps(C[5]); N];
            for c in [C[4], C[3], C[2], C[1], C[0]] {
                for (p, r) in p.iter_mut().zip(r) {
                    *p = _mm512_fmadd_ps(*p, r, _mm512_set1_ps(c));
                }
            }
            for (p, a) in p.iter_mut().zip(a) {
                *p = _mm512_scalef_ps(*p, a);
            }
            p
        })
    }

    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        // Halves onto each other until one is left. (`_mm512_reduce_add_ps` leaves the order open.)
        op!({
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<0b01>(two, two)))
        })
    }

    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        op!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a hint; it does not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for 16 readable elements.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, a: __m512) {
        // SAFETY: the caller vouches for 16 writable elements.
        unsafe { _mm512_storeu_ps(to, a) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: the caller vouches for 16 readable elements of 2 bytes: 256 bits.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, a: __m512) {
        // SAFETY: the caller vouches for 16 writable elements of 2 bytes: 256 bits.
        unsafe {
            let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            _mm256_storeu_si256(to.cast(), halves);
        }
    }

    #[inline(always)]
    unsafe fn transpose_f16(self, from: *const f16, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: rows 0..16 of `from` and `to` are the caller's promise; `transpose` stores 16 rows.
        unsafe {
            let mut a = [_mm512_setzero_ps(); 16];
            for (r, a) in a.iter_mut().enumerate() {
                *a = self.load_f16(from.add(r * from_stride));
            }
            self.store_transposed(a, to, to_stride);
        }
    }

    #[inline(always)]
    fn transpose_pairs(self, rows: &[&[f16; 32]; 16], to: &mut [f16; 512]) {
        // SAFETY: 32 fp16 are 16 lanes, in which pairs move as they are; `to` has 16 rows of them.
        unsafe {
            let mut a = [_mm512_setzero_ps(); 16];
            for (a, row) in a.iter_mut().zip(rows) {
                *a = self.load(row.as_ptr().cast());
            }
            self.store_transposed(a, to.as_mut_ptr().cast(), 16);
        }
    }

    #[inline(always)]
    fn zip_f16(self, even: &[f16; 16], odd: &[f16; 16], to: &mut [f16; 32]) {
        // SAFETY: 16 elements of 2 bytes are 256 bits, 32 of them 512.
        unsafe {
            let even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even.as_ptr().cast()));
            let odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(odd.as_ptr().cast()));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd)));
        }
    }

    #[inline(always)]
    fn round_f16(self, a: __m512) -> __m512 {
        op!(_mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)))
    }

    #[inline(always)]
    unsafe fn store_split(self, upper: *mut u16, lower: *mut u16, a: __m512) {
        if !TILES {
            // SAFETY: the caller's promise.
            return unsafe { tiles::store_split(self, upper, lower, a) };
        }
        // SAFETY: the caller vouches for 16 writable elements of 2 bytes, twice; `self` is proof of AVX512-BF16.
        unsafe {
            let high = _mm512_cvtneps_pbh(a);
            let rest = _mm512_sub_ps(a, _mm512_cvtpbh_ps(high));
            let low = _mm512_cvtneps_pbh(rest);
            _mm256_storeu_si256(upper.cast(), std::mem::transmute::<__m256bh, __m256i>(high));
            _mm256_storeu_si256(lower.cast(), std::mem::transmute::<__m256bh, __m256i>(low));
        }
    }

    #[inline(always)]
    unsafe fn store_split_pair(self, upper: *mut u16, lower: *mut u16, a: [__m512; 2]) {
        if !TILES {
            // SAFETY: the caller's promise.
            return unsafe { tiles::store_split_pair(self, upper, lower, a) };
        }
        // SAFETY: the caller vouches for 32 writable elements of 2 bytes, twice; `self` is proof of AVX512-BF16.
        unsafe {
            // The upper half of the bits is a bf16 as it is, cut off instead of rounded.
            let mask = _mm512_castsi512_ps(_mm512_set1_epi32(0xffff_0000_u32 as i32));
            let high = a.map(|a| _mm512_and_ps(a, mask));
            let rest = [_mm512_sub_ps(a[0], high[0]), _mm512_sub_ps(a[1], high[1])];
            let high = _mm512_cvtne2ps_pbh(high[1], high[0]);
            let rest = _mm512_cvtne2ps_pbh(rest[1], rest[0]);
            _mm512_storeu_si512(upper.cast(), std::mem::transmute::<__m512bh, __m512i>(high));
            _mm512_storeu_si512(lower.cast(), std::mem::transmute::<__m512bh, __m512i>(rest));
        }
    }

    #[inline(always)]
    fn with_tiles<R>(self, work: impl FnOnce() -> R) -> R {
        // SAFETY: `self` with TILES is proof of AMX.
        let _configured = TILES.then(|| unsafe { amx::Configured::new() });
        work()
    }

    #[inline(always)]
    unsafe fn add_products<const TERMS: usize>(
        self,
        steps: usize,
        operands: (*const u16, *const u16),
        acc: *mut f32,
        fresh: bool,
        meanwhile: impl FnMut(usize, usize),
    ) {
        // SAFETY: the caller's promise; `self` with TILES is proof of AMX.
        unsafe {
            match TILES {
                true => amx::add_products::<TERMS>(steps, operands, acc, fresh, meanwhile),
                false => tiles::add_products::<TERMS>(steps, operands, acc, fresh, meanwhile),
            }
        }
    }
}
