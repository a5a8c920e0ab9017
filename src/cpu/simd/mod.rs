//! Instruction sets: what a vector of f32 can do, once per set, and which set this machine gets.
//!
//! Every op of the tower is written once, over [`Simd`]. Five types answer it:
//!
//! ```text
//!   Avx512<TILES>   the same, and AMX       tile 32 × 32    Sapphire Rapids and later
//!   Avx512          16 lanes, 32 registers  tile 12 × 32    x86-64-v4: Zen 4, Ice Lake
//!   Avx2             8 lanes, 16 registers  tile  6 × 16    x86-64-v3: Zen 1, Haswell
//!   Neon             8 lanes, 32 halves     tile  6 × 16    AArch64
//!   Portable         4 lanes, plain Rust    tile  4 ×  8    everything else; what the compiler makes of it
//! ```
//!
//! A value of such a type is proof that the CPU has the instructions: only `detect` makes one. That is what
//! the unsafe intrinsics inside rely on. A [`Kernel`] handed to [`Simd::vectorize`] is compiled for the set;
//! for that to hold all the way down, everything it calls is `#[inline(always)]`.
//!
//! The register tile is `MR × NR`, `NR` = two vectors. 12 × 32 on AVX-512 keeps 24 accumulators, two vectors
//! of B and a broadcast in 27 of 32 registers; each step of K then issues 24 FMAs for 14 loads, so the FMA
//! unit is the only one that is ever full. Measured on a Zen 4 core: 98 % of its FMA peak.
//!
//! AMX multiplies bf16 alone, sixteen times as fast as AVX-512 multiplies f32. [`tiles`] says how fp16 goes through it.

use std::fmt;

use half::f16;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
mod neon;
mod portable;
pub(crate) mod tiles;

use portable::Portable;

use super::activation::exp2_by_rounding;
use crate::error::{Error, Result};

/// The most lanes that any [`Simd`] has.
pub(crate) const MAX_LANES: usize = 16;

/// Vectors of f32 in one instruction set.
pub(crate) trait Simd: Copy + fmt::Debug + Send + Sync + 'static {
    /// A vector, `[LANES]`.
    type V: Copy;
    /// f32 in a vector: a power of two, at most [`MAX_LANES`].
    const LANES: usize;
    /// Rows of the register tile.
    const MR: usize;
    /// Columns of the register tile.
    const NR: usize = 2 * Self::LANES;
    /// Steps of K between two packings of B. `KC × 128` f32 should fill about half of the L2 cache.
    const KC: usize;
    /// Whether products go through tile registers, and what they read is split for that ([`tiles`]).
    const TILES: bool;

    /// Runs `kernel` in code compiled for this instruction set.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    /// `[x; LANES]`
    fn splat(self, x: f32) -> Self::V;
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `1 / a` to within two units in the last place, for normal |a| < 2^126.
    #[inline(always)]
    fn recip(self, a: Self::V) -> Self::V {
        self.div(self.splat(1.0), a)
    }
    /// The greater; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The lesser; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once where the set has a fused instruction.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The nearest integer, ties to even, for |a| < 2^22.
    fn round(self, a: Self::V) -> Self::V;
    /// `a · 2^n` for integers |n| ≤ 126 where a and the result are normal.
    fn mul_pow2(self, a: Self::V, n: Self::V) -> Self::V;
    /// `2^a` for a ≤ 126, to 1.5e-7 of it; 2^-126 for a < -126. NaN stays NaN. A chain of a dozen instructions, so the
    /// more vectors go side by side the better, up to eight.
    #[inline(always)]
    fn exp2<const N: usize>(self, a: [Self::V; N]) -> [Self::V; N] {
        a.map(
            #[inline(always)]
            |a| exp2_by_rounding(self, a),
        )
    }
    /// The sum of all lanes, in a fixed order.
    fn reduce_add(self, a: Self::V) -> f32;
    /// The greatest lane; unspecified if any is NaN.
    fn reduce_max(self, a: Self::V) -> f32;

    /// Brings the cache line at `at` into the L2 cache, if it can be had; any address will do.
    fn prefetch(self, at: *const u8);

    /// Loads `LANES` f32.
    ///
    /// # Safety
    /// `from` is readable for `LANES` elements.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// Stores `LANES` f32.
    ///
    /// # Safety
    /// `to` is writable for `LANES` elements.
    unsafe fn store(self, to: *mut f32, a: Self::V);
    /// Loads `LANES` fp16 as f32; exact.
    ///
    /// # Safety
    /// `from` is readable for `LANES` elements.
    unsafe fn load_f16(self, from: *const f16) -> Self::V;
    /// Stores as `LANES` fp16, to nearest, ties to even; too great becomes infinite.
    ///
    /// # Safety
    /// `to` is writable for `LANES` elements.
    unsafe fn store_f16(self, to: *mut f16, a: Self::V);
    /// Transposes a block of `LANES × LANES` fp16 into f32: `to[c · to_stride + r] = from[r · from_stride + c]`.
    ///
    /// # Safety
    /// Each of the `LANES` rows of `from` is readable, and of `to` writable, for `LANES` elements.
    unsafe fn transpose_f16(self, from: *const f16, from_stride: usize, to: *mut f32, to_stride: usize);
    /// Transposes 16 × 16 pairs: pair `c` of row `r` becomes pair `r` of `to`'s row `c`, `[16][32]`.
    #[inline(always)]
    fn transpose_pairs(self, rows: &[&[f16; 32]; 16], to: &mut [f16; 512]) {
        for (column, to) in to.chunks_exact_mut(32).enumerate() {
            for (to, row) in to.chunks_exact_mut(2).zip(rows) {
                to.copy_from_slice(&row[2 * column..][..2]);
            }
        }
    }

    /// Makes pairs of one element of `even` and one of `odd`.
    #[inline(always)]
    fn zip_f16(self, even: &[f16; 16], odd: &[f16; 16], to: &mut [f16; 32]) {
        for (to, pair) in to.chunks_exact_mut(2).zip(even.iter().zip(odd)) {
            to.copy_from_slice(&[*pair.0, *pair.1]);
        }
    }

    /// Rounds to fp16, to nearest, ties to even, and back.
    fn round_f16(self, a: Self::V) -> Self::V;
    /// Splits numbers in two bf16 each, [`tiles`] says how, and stores `LANES` of each.
    ///
    /// # Safety
    /// `upper` and `lower` are writable for `LANES` elements.
    #[inline(always)]
    unsafe fn store_split(self, upper: *mut u16, lower: *mut u16, a: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { tiles::store_split(self, upper, lower, a) }
    }

    /// Splits the numbers of two vectors, none of them negative or infinite, in two bf16 each to within 2^-16, and stores the
    /// `2 · LANES` of each; of a NaN one is a NaN.
    ///
    /// # Safety
    /// `upper` and `lower` are writable for `2 · LANES` elements.
    #[inline(always)]
    unsafe fn store_split_pair(self, upper: *mut u16, lower: *mut u16, a: [Self::V; 2]) {
        // SAFETY: the caller's promise.
        unsafe { tiles::store_split_pair(self, upper, lower, a) }
    }

    /// Runs `work`, which calls [`Simd::add_products`].
    #[inline(always)]
    fn with_tiles<R>(self, work: impl FnOnce() -> R) -> R {
        work()
    }

    /// `acc + A · B`, or without the sum `A · B` if `fresh`, over so many steps of k, in the order that [`tiles`] gives;
    /// with the first `TERMS` of its four products, 2 to 4. After each of them `meanwhile`, which gets the numbers of step and
    /// product, has the vectors: they are free while the tiles multiply, and some 500 instructions are what the processor
    /// looks ahead.
    ///
    /// # Safety
    /// `a` is readable for `steps` blocks of [`tiles::SPLIT`] elements, `b` too, or with two terms for blocks of
    /// [`tiles::BLOCK`], upper halves alone; `acc` is readable and writable for [`tiles::ACC`]; a call of
    /// [`Simd::with_tiles`] is around it; `meanwhile` keeps off all of them.
    #[inline(always)]
    unsafe fn add_products<const TERMS: usize>(
        self,
        steps: usize,
        (a, b): (*const u16, *const u16),
        acc: *mut f32,
        fresh: bool,
        meanwhile: impl FnMut(usize, usize),
    ) {
        // SAFETY: the caller's promise.
        unsafe { tiles::add_products::<TERMS>(steps, (a, b), acc, fresh, meanwhile) }
    }

    /// Loads the first `LANES` elements of a slice, or all of a shorter one and zeros.
    #[inline(always)]
    fn load_f16_slice(self, from: &[f16]) -> Self::V {
        if from.len() >= Self::LANES {
            // SAFETY: there are `LANES` elements.
            return unsafe { self.load_f16(from.as_ptr()) };
        }
        let mut whole = [f16::ZERO; MAX_LANES];
        whole[..from.len()].copy_from_slice(from);
        // SAFETY: `whole` has `MAX_LANES >= LANES` elements.
        unsafe { self.load_f16(whole.as_ptr()) }
    }

    /// Stores to the first `LANES` elements of a slice, or to all of a shorter one.
    #[inline(always)]
    fn store_f16_slice(self, to: &mut [f16], a: Self::V) {
        if to.len() >= Self::LANES {
            // SAFETY: there are `LANES` elements.
            return unsafe { self.store_f16(to.as_mut_ptr(), a) };
        }
        let mut whole = [f16::ZERO; MAX_LANES];
        // SAFETY: `whole` has `MAX_LANES >= LANES` elements.
        unsafe { self.store_f16(whole.as_mut_ptr(), a) };
        to.copy_from_slice(&whole[..to.len()]);
    }
}

/// Work written once over [`Simd`].
///
/// `run` must be `#[inline(always)]`, and so must all it calls, or it runs without the instructions.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// Does the work with the vectors of `simd`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// An instruction set by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Isa {
    Amx,
    Avx512,
    Avx2,
    Neon,
    Portable,
}

impl Isa {
    /// Best first: the order of choice.
    pub(crate) const ALL: [Self; 5] = [Self::Amx, Self::Avx512, Self::Avx2, Self::Neon, Self::Portable];

    /// Returns the name that logs show and [`ISA_VARIABLE`] takes.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
            Self::Portable => "portable",
        }
    }
}

/// Environment variable that names the instruction set to use, for tests and measurements.
pub(crate) const ISA_VARIABLE: &str = "IMAGEHERE_CPU_ISA";

/// Chooses among what the CPU `has`: what was wished for, else the best. Pure.
fn choose(has: impl Fn(Isa) -> bool, wish: Option<&str>) -> Result<Isa> {
    let names = |sets: &[Isa]| sets.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ");
    let usable: Vec<Isa> = Isa::ALL.into_iter().filter(|&isa| has(isa)).collect();
    let Some(wish) = wish else { return Ok(usable[0]) };
    usable.iter().copied().find(|isa| isa.name() == wish).ok_or_else(|| Error::Device {
        device: "cpu".into(),
        problem: format!("{ISA_VARIABLE}={wish}, but this CPU and build have {}", names(&usable)),
        remedy: format!("Unset {ISA_VARIABLE} or set it to one of {}", names(&usable)),
    })
}

/// The instruction set in use, with the proof that it may be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Machine {
    #[cfg(target_arch = "x86_64")]
    Amx(avx512::Avx512<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
    Neon(neon::Neon),
    Portable(Portable<false>),
    /// The way of AMX without AMX.
    #[cfg(test)]
    PortableTiles(Portable<true>),
}

impl Machine {
    /// Returns the proof that this CPU has `isa`, if it has.
    pub(crate) fn detect(isa: Isa) -> Option<Self> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => avx512::Avx512::<true>::detect().map(Self::Amx),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Avx512::<false>::detect().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Avx2::detect().map(Self::Avx2),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Amx | Isa::Avx512 | Isa::Avx2 => None,
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Isa::Neon => neon::Neon::detect().map(Self::Neon),
            #[cfg(not(all(target_arch = "aarch64", target_feature = "neon")))]
            Isa::Neon => None,
            Isa::Portable => Some(Self::Portable(Portable)),
        }
    }

    /// Chooses the best that this CPU has, or what [`ISA_VARIABLE`] names.
    ///
    /// # Errors
    /// [`Error::Device`] if the variable names a set that this CPU or this build has not.
    pub(crate) fn choose() -> Result<Self> {
        let wish = std::env::var(ISA_VARIABLE).ok();
        let isa = choose(|isa| Self::detect(isa).is_some(), wish.as_deref().filter(|wish| !wish.is_empty()))?;
        Self::detect(isa).ok_or_else(|| Error::Internal(format!("{} was there a moment ago", isa.name())))
    }

    /// Returns every set that this CPU has, best first, and the way of AMX: what the tests run through.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let tiles = Self::PortableTiles(Portable);
        Isa::ALL.into_iter().filter_map(Self::detect).chain([tiles]).collect()
    }

    /// Returns whether products go through tile registers.
    pub(crate) fn has_tiles(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => true,
            #[cfg(test)]
            Self::PortableTiles(_) => true,
            _ => false,
        }
    }

    /// Returns its name.
    pub(crate) fn isa(self) -> Isa {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => Isa::Amx,
            #[cfg(test)]
            Self::PortableTiles(_) => Isa::Portable,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => Isa::Avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => Isa::Avx2,
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Self::Neon(_) => Isa::Neon,
            Self::Portable(_) => Isa::Portable,
        }
    }

    /// Runs `kernel` in code compiled for the instruction set.
    pub(crate) fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(kernel),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Self::Neon(simd) => simd.vectorize(kernel),
            Self::Portable(simd) => simd.vectorize(kernel),
            #[cfg(test)]
            Self::PortableTiles(simd) => simd.vectorize(kernel),
        }
    }

    /// Hands the instruction set to `kernel` as a type, for its constants; the code stays as it is until
    /// [`Simd::vectorize`].
    pub(crate) fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => kernel.run(simd),
            #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
            Self::Neon(simd) => kernel.run(simd),
            Self::Portable(simd) => kernel.run(simd),
            #[cfg(test)]
            Self::PortableTiles(simd) => kernel.run(simd),
        }
    }
}

#[cfg(test)]
mod tests;
