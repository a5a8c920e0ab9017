//! The two passes with AVX2: eight 32-bit sums an instruction; across, with VNNI where there is that.
//!
//! A weight has 24 bits and AVX2's only fast multiplication of integers (`vpmaddwd`) takes 16, two products at once. So
//! each weight is split, `weight = high * 2^11 + low`, and the two sums are joined at the end; in arithmetic modulo
//! 2^32 that is the same sum, whose true value fits.
//!
//! ```text
//! bytes of 4 pixels   r0 g0 b0 r1 g1 b1 r2 g2 b2 r3 g3 b3 (4 more, unused)
//! shuffled to words   r0 r1  g0 g1  b0 b1  0 0 │ r2 r3  g2 g3  b2 b3  0 0
//! times, pairwise     w0 w1  w0 w1  w0 w1  …   │ w2 w3  w2 w3  w2 w3  …        once with high, once with low
//! sums (i32)            R      G      B     0  │   R      G      B     0       the halves are added at the end
//! ```

use std::arch::x86_64::*;

use super::{Axis, HALF, PRECISION, Rows, Window, horizontal_portable, vertical_portable};

/// Bits of a weight's low half.
const LOW: u32 = 11;
/// Rows that share each load of weights.
const ROWS: usize = 4;
/// Bytes that the last window of a row may touch behind it: 3 idle pixels and the unused end of a load.
const BEYOND: usize = 16;

/// The weights of each window, in fours, split: high 0 1, high 2 3, low 0 1, low 2 3, two to a word.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    fours: Vec<[u32; 4]>,
    first: Vec<usize>, // of each window
}

impl Packed {
    pub fn new(windows: &[Window], weights: &[i32]) -> Self {
        let mut packed = Self { fours: Vec::new(), first: Vec::with_capacity(windows.len()) };
        for window in windows {
            packed.first.push(packed.fours.len());
            for four in weights[window.weights..window.weights + window.count].chunks(4) {
                let weight = |k: usize| four.get(k).copied().unwrap_or(0);
                let pair = |a: i32, b: i32| u32::from(a as u16) | u32::from(b as u16) << 16;
                let high = |k: usize| weight(k) >> LOW; // 24 bits leave 13
                let low = |k: usize| weight(k) & ((1 << LOW) - 1);
                packed.fours.push([
                    pair(high(0), high(1)),
                    pair(high(2), high(3)),
                    pair(low(0), low(1)),
                    pair(low(2), low(3)),
                ]);
            }
        }
        packed
    }
}

/// Resizes rows. The caller has found AVX2, and with `VNNI` AVX-512 VL and VNNI, where a pair of products and their sum
/// are one instruction.
pub(super) fn horizontal<const VNNI: bool>(src: Rows<'_>, axis: &Axis, out: &mut [u8]) {
    let bytes = 3 * axis.n_out as usize;
    let mut copies = [const { Vec::new() }; ROWS];
    for (band, out) in out.chunks_mut(ROWS * bytes).enumerate() {
        let count = out.len() / bytes;
        if count < ROWS {
            horizontal_portable(src.slice(band * ROWS..band * ROWS + count), axis, out);
            continue;
        }
        let mut rows: [&[u8]; ROWS] = std::array::from_fn(|i| src.row_and_beyond(band * ROWS + i));
        for (row, copy) in rows.iter_mut().zip(&mut copies) {
            if row.len() < src.bytes + BEYOND {
                *copy = [&row[..src.bytes], &[0; BEYOND]].concat();
                *row = copy;
            }
        }
        // SAFETY: `Kernel::available` offers this kernel only where its instructions were detected; each row is
        // followed by `BEYOND` readable bytes.
        unsafe {
            match VNNI {
                true => four_rows_vnni(rows, axis, out),
                false => four_rows(rows, axis, out),
            }
        };
    }
}

/// The function that resizes four rows at once, for some instructions: `$add_products(sums, words, weights)` adds products,
/// two to a sum.
macro_rules! four_rows {
    ($name:ident, $features:literal, $add_products:expr) => {
        /// # Safety
        /// Each of `rows` must be `3 * n_in + BEYOND` bytes long at least.
        #[target_feature(enable = $features)]
        unsafe fn $name(rows: [&[u8]; ROWS], axis: &Axis, out: &mut [u8]) {
            debug_assert!(rows.iter().all(|row| row.len() >= 3 * axis.n_in as usize + BEYOND));
            const IDLE: i8 = -128; // gives a zero
            #[rustfmt::skip]
            let to_words = _mm256_setr_epi8(
                0, IDLE, 3, IDLE,  1, IDLE, 4, IDLE,  2, IDLE,  5, IDLE,  IDLE, IDLE, IDLE, IDLE,
                6, IDLE, 9, IDLE,  7, IDLE, 10, IDLE,  8, IDLE, 11, IDLE,  IDLE, IDLE, IDLE, IDLE,
            );
            let spread_high = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
            let spread_low = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);

            let bytes = out.len() / ROWS;
            for (x, (window, &first)) in axis.windows.iter().zip(&axis.packed.first).enumerate() {
                let fours = &axis.packed.fours[first..first + window.count.div_ceil(4)];
                let mut high = [_mm256_setzero_si256(); ROWS];
                let mut low = [_mm256_setzero_si256(); ROWS];
                for (i, four) in fours.iter().enumerate() {
                    // SAFETY: `four` is 16 bytes.
                    let weights = _mm256_castsi128_si256(unsafe { _mm_loadu_si128(four.as_ptr().cast()) });
                    let weights_high = _mm256_permutevar8x32_epi32(weights, spread_high);
                    let weights_low = _mm256_permutevar8x32_epi32(weights, spread_low);
                    let at = 3 * (window.start + 4 * i);
                    for row in 0..ROWS {
                        // SAFETY: `at` is at most three bytes before the end of a row (each four begins inside its window),
                        // and `BEYOND` bytes follow the row.
                        let pixels = unsafe { _mm_loadu_si128(rows[row].as_ptr().add(at).cast()) };
                        let words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(pixels), to_words);
                        high[row] = $add_products(high[row], words, weights_high);
                        low[row] = $add_products(low[row], words, weights_low);
                    }
                }
                for row in 0..ROWS {
                    let joined = _mm256_add_epi32(_mm256_slli_epi32::<{ LOW as i32 }>(high[row]), low[row]);
                    let halves =
                        _mm_add_epi32(_mm256_castsi256_si128(joined), _mm256_extracti128_si256::<1>(joined));
                    let sums = _mm_add_epi32(halves, _mm_set1_epi32(HALF));
                    let words =
                        _mm_packs_epi32(_mm_srai_epi32::<{ PRECISION as i32 }>(sums), _mm_setzero_si128());
                    let pixel = _mm_cvtsi128_si32(_mm_packus_epi16(words, words)).to_le_bytes();
                    out[row * bytes + 3 * x..][..3].copy_from_slice(&pixel[..3]);
                }
            }
        }
    };
}

four_rows!(four_rows, "avx2", add_products);
four_rows!(four_rows_vnni, "avx2,avx512vl,avx512vnni", _mm256_dpwssd_epi32);

#[target_feature(enable = "avx2")]
fn add_products(sums: __m256i, words: __m256i, weights: __m256i) -> __m256i {
    _mm256_add_epi32(sums, _mm256_madd_epi16(words, weights))
}

/// One output row from the rows of its window. The caller has found AVX2, and with `VNNI` AVX-512 VL and VNNI.
pub(super) fn vertical<const VNNI: bool>(src: Rows<'_>, weights: &[i32], out: &mut [u8]) {
    if out.len() < BLOCK {
        return vertical_portable(src, weights, out);
    }
    // SAFETY: `Kernel::available` offers this kernel only where its instructions were detected; `out` has a whole block.
    unsafe {
        match VNNI {
            true => down_vnni(src, weights, out),
            false => down(src, weights, out),
        }
    }
}

/// Bytes of a row whose sums stay in registers.
const BLOCK: usize = 32;

/// The function behind [`vertical`], for some instructions, as in `four_rows`. Two rows at a time, byte by byte:
///
/// ```text
/// a0 a1 a2 …  b0 b1 b2 …   interleaved to words   a0 b0  a1 b1  a2 b2  …     times, pairwise     wa wb  wa wb  …
/// ```
macro_rules! down {
    ($name:ident, $features:literal, $add_products:expr) => {
        /// # Safety
        /// `out` must be `BLOCK` bytes long at least.
        #[target_feature(enable = $features)]
        unsafe fn $name(src: Rows<'_>, weights: &[i32], out: &mut [u8]) {
            let len = out.len();
            let none = [0; BLOCK];
            for first in (0..len).step_by(BLOCK) {
                // The last block reaches back to be a whole one.
                let first = first.min(len - BLOCK);
                let mut high = [_mm256_setzero_si256(); BLOCK / 8];
                let mut low = [_mm256_setzero_si256(); BLOCK / 8];
                for (i, pair) in weights.chunks(2).enumerate() {
                    let odd = pair.get(1).copied().unwrap_or(0);
                    let words = |a: i32, b: i32| _mm256_set1_epi32(a & 0xffff | b << 16);
                    let weights_high = words(pair[0] >> LOW, odd >> LOW);
                    let mask = (1 << LOW) - 1;
                    let weights_low = words(pair[0] & mask, odd & mask);
                    let a = &src.row(2 * i)[first..first + BLOCK];
                    let b = if pair.len() > 1 { &src.row(2 * i + 1)[first..first + BLOCK] } else { &none };
                    for half in 0..2 {
                        // SAFETY: 16 of 32 bytes each.
                        let (a, b) = unsafe {
                            let at = |row: &[u8]| _mm_loadu_si128(row.as_ptr().add(16 * half).cast());
                            (at(a), at(b))
                        };
                        let quarters = [_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)];
                        for (j, bytes) in quarters.into_iter().enumerate() {
                            let (words, at) = (_mm256_cvtepu8_epi16(bytes), 2 * half + j);
                            high[at] = $add_products(high[at], words, weights_high);
                            low[at] = $add_products(low[at], words, weights_low);
                        }
                    }
                }
                let mut sums = [0i32; BLOCK];
                for (j, sums) in sums.chunks_exact_mut(8).enumerate() {
                    let joined = _mm256_add_epi32(_mm256_slli_epi32::<{ LOW as i32 }>(high[j]), low[j]);
                    let rounded = _mm256_add_epi32(joined, _mm256_set1_epi32(HALF));
                    let shifted = _mm256_srai_epi32::<{ PRECISION as i32 }>(rounded);
                    // SAFETY: 8 of them.
                    unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), shifted) };
                }
                for (out, sum) in out[first..first + BLOCK].iter_mut().zip(sums) {
                    *out = sum.clamp(0, 255) as u8;
                }
            }
        }
    };
}

down!(down, "avx2", add_products);
down!(down_vnni, "avx2,avx512vl,avx512vnni", _mm256_dpwssd_epi32);
