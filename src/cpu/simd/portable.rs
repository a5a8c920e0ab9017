//! Plain Rust in groups of four lanes: what every CPU can do, and the shape that compilers vectorise.

use half::f16;

use super::{Kernel, Simd};

/// Needs no proof. With `TILES` it takes the way that AMX takes, as slowly as plain Rust does: for the tests, which so
/// see that way on every machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable<const TILES: bool>;

/// Applies an expression to each lane.
macro_rules! lanes {
    ($lane:ident => $e:expr) => {
        std::array::from_fn(|$lane| $e)
    };
}

impl<const TILES: bool> Simd for Portable<TILES> {
    type V = [f32; 4];
    const LANES: usize = 4;
    const MR: usize = 4;
    const KC: usize = 512;
    const TILES: bool = TILES;

    #[inline]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 4] {
        [x; 4]
    }

    #[inline(always)]
    fn add(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes!(i => a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes!(i => a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes!(i => a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes!(i => a[i] / b[i])
    }

    #[inline(always)]
    fn max(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        lanes!(i => if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        // Without the instruction, a fused multiply-add is a slow library call.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            lanes!(i => a[i].mul_add(b[i], c[i]))
        } else {
            lanes!(i => a[i] * b[i] + c[i])
        }
    }

    #[inline(always)]
    fn round(self, a: [f32; 4]) -> [f32; 4] {
        // 1.5 · 2^23: there f32 has no fraction bits, so the addition rounds.
        const MAGIC: f32 = 12_582_912.0;
        lanes!(i => (a[i] + MAGIC) - MAGIC)
    }

    #[inline(always)]
    fn mul_pow2(self, a: [f32; 4], n: [f32; 4]) -> [f32; 4] {
        // `as` makes 0 of NaN, so that NaN · 2^NaN stays the NaN that `a` is.
        lanes!(i => f32::from_bits(a[i].to_bits().wrapping_add(((n[i] as i32) << 23) as u32)))
    }

    #[inline(always)]
    fn reduce_add(self, a: [f32; 4]) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }

    #[inline(always)]
    fn reduce_max(self, a: [f32; 4]) -> f32 {
        a[0].max(a[2]).max(a[1].max(a[3]))
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> [f32; 4] {
        // SAFETY: the caller vouches for 4 readable elements.
        unsafe { from.cast::<[f32; 4]>().read() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, a: [f32; 4]) {
        // SAFETY: the caller vouches for 4 writable elements.
        unsafe { to.cast::<[f32; 4]>().write(a) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> [f32; 4] {
        // SAFETY: the caller vouches for 4 readable elements.
        let halves = unsafe { from.cast::<[f16; 4]>().read() };
        lanes!(i => halves[i].to_f32())
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, a: [f32; 4]) {
        let halves: [f16; 4] = lanes!(i => f16::from_f32(a[i]));
        // SAFETY: the caller vouches for 4 writable elements.
        unsafe { to.cast::<[f16; 4]>().write(halves) }
    }

    #[inline(always)]
    unsafe fn transpose_f16(self, from: *const f16, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: rows 0..4 of `from` and `to` are the caller's promise.
        unsafe {
            let mut rows = [[0.0; 4]; 4];
            for (r, row) in rows.iter_mut().enumerate() {
                *row = self.load_f16(from.add(r * from_stride));
            }
            let columns: [[f32; 4]; 4] = std::array::from_fn(|c| rows.map(|row| row[c]));
            for (c, column) in columns.into_iter().enumerate() {
                self.store(to.add(c * to_stride), column);
            }
        }
    }

    #[inline(always)]
    fn round_f16(self, a: [f32; 4]) -> [f32; 4] {
        lanes!(i => f16::from_f32(a[i]).to_f32())
    }
}
