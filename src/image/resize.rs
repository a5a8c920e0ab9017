//! Pillow's BICUBIC, byte for byte.
//!
//! Separable, with bytes between the two passes. Per axis, n_in → n_out pixels:
//!
//! ```text
//! scale = n_in / n_out     stretch = max(scale, 1)     reach = 2 * stretch          (f64)
//! output i:  centre = (i + 0.5) * scale     window = [centre - reach, centre + reach), rounded, cut at the edges
//!            weight k = cubic((k + 0.5 - centre) / stretch), all divided by their sum, then rounded to 22 bits
//!            out = clip((2^21 + Σ weight * in) >> 22)                                (i32, exact)
//! cubic(x), a = -1/2:  |x| < 1: (a+2)|x|³ - (a+3)|x|² + 1     |x| < 2: a|x|³ - 5a|x|² + 8a|x| - 4a     else 0
//! ```
//!
//! Shrinking therefore averages (the window grows with the scale). A pass over an axis that keeps its size is left
//! out: it would change nothing. Which pass runs first does change bytes, and is all that the two rules of
//! [`Resample`] differ in.
//!
//! # Numerics
//! All sums are of integers and fit into 32 bits, so no order of summation, number of threads or instruction set
//! changes a byte.
//!
//! # Source
//! Pillow, `src/libImaging/Resample.c`.

use std::sync::OnceLock;

use rayon::prelude::*;

use super::{Resample, RgbImage, RgbView};

#[cfg(target_arch = "x86_64")]
mod avx2;
mod part;
#[cfg(feature = "cuda")]
mod passes;

pub(super) use part::resize_part;
#[cfg(feature = "cuda")]
pub(crate) use passes::{Passes, Table};

/// Bits after the point of a weight.
const PRECISION: u32 = 22;
/// Half a unit of the result, where every sum starts.
const HALF: i32 = 1 << (PRECISION - 1);
/// Products (weight × sample) from which a pass is worth more than one thread.
const PARALLEL: usize = 8 << 20;

/// Resizes to `width` × `height` pixels.
///
/// Shape: \[h, w, 3\] → \[height, width, 3\]. Neither the aspect ratio nor a part of the picture is kept on purpose:
/// both sides are forced, as upstream does. A side of 0 gives an image without pixels.
///
/// # Source
/// `PIL.Image.resize((width, height), BICUBIC)`; see the [module](self).
///
/// ```
/// use imagehere::image::{Resample, RgbView, resize::resize};
///
/// let grey = vec![90; 640 * 480 * 3];
/// let grey = RgbView::new(&grey, 640, 480, 640 * 3).unwrap();
/// let square = resize(grey, 490, 490, Resample::Pillow);
/// assert!(square.data.iter().all(|&sample| sample == 90));
/// ```
pub fn resize(src: RgbView<'_>, width: u32, height: u32, rule: Resample) -> RgbImage {
    let mut data = vec![0; 3 * width as usize * height as usize];
    Resizer::default().resize_into(src, width, height, rule, &mut data);
    RgbImage { width, height, data }
}

/// A resizer that keeps its tables and its scratch memory from one image to the next.
#[derive(Debug, Default)]
pub struct Resizer {
    horizontal: Option<Axis>,
    vertical: Option<Axis>,
    between: Vec<u8>, // what the first pass gives the second
}

impl Resizer {
    /// As [`resize`], into memory of the caller's.
    ///
    /// # Panics
    /// If `out` is not `3 * width * height` bytes long.
    pub fn resize_into(&mut self, src: RgbView<'_>, width: u32, height: u32, rule: Resample, out: &mut [u8]) {
        assert_eq!(out.len(), 3 * width as usize * height as usize, "out is not {width}x{height} RGB8");
        if out.is_empty() {
            return;
        }
        let kernel = Kernel::best();
        let rows = Rows {
            data: src.data,
            stride: src.stride,
            bytes: 3 * src.width as usize,
            count: src.height as usize,
        };
        let wide = (src.width != width).then(|| Axis::cached(&mut self.horizontal, src.width, width));
        let high = (src.height != height).then(|| Axis::cached(&mut self.vertical, src.height, height));
        match (wide, high) {
            (None, None) => {
                for (y, row) in out.chunks_exact_mut(rows.bytes).enumerate() {
                    row.copy_from_slice(rows.row(y));
                }
            }
            (Some(wide), None) => kernel.horizontal(rows, wide, out),
            (None, Some(high)) => kernel.vertical(rows, high, 0, out),
            (Some(wide), Some(high)) if rule.vertical_first((src.width, src.height), (width, height)) => {
                self.between.resize(rows.bytes * height as usize, 0); // [height, w, 3]
                kernel.vertical(rows, high, 0, &mut self.between);
                kernel.horizontal(Rows::packed(&self.between, rows.bytes), wide, out);
            }
            (Some(wide), Some(high)) => {
                // only the rows that the second pass looks at (all of them, but for enlargements' windows)
                let needed = high.span();
                let bytes = 3 * width as usize;
                self.between.resize(bytes * needed.len(), 0); // [needed, width, 3]
                kernel.horizontal(rows.slice(needed.clone()), wide, &mut self.between);
                let between = Rows::packed(&self.between, bytes);
                kernel.vertical(between, high, needed.start, out);
            }
        }
    }
}

impl Resample {
    /// Sizes are width and height, in pixels.
    fn vertical_first(self, from: (u32, u32), to: (u32, u32)) -> bool {
        let shrinks = |from: u32, to: u32| i64::from(from) - i64::from(to);
        let (across, down) = (shrinks(from.0, to.0), shrinks(from.1, to.1));
        down > 0
            && match self {
                Self::Pillow => i64::from(from.1) > 100 * i64::from(from.0),
                Self::Pillow13 => down > 2 * across,
            }
    }
}

/// The windows and weights of one axis, or of a run of its outputs.
#[derive(Clone, Debug)]
struct Axis {
    n_in: u32,
    n_out: u32,           // of the run
    windows: Vec<Window>, // [n_out]
    weights: Vec<i32>,    // windows' weights, one after the other
    #[cfg(target_arch = "x86_64")]
    packed: avx2::Packed,
}

/// The inputs of one output: `count` from `start` on, their weights at `weights`.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: usize,
    count: usize,
    weights: usize,
}

impl Axis {
    fn new(n_in: u32, n_out: u32) -> Self {
        Self::part(n_in, n_out, 0..n_out)
    }

    /// Of some of the `n_out` outputs alone.
    fn part(n_in: u32, n_out: u32, outputs: std::ops::Range<u32>) -> Self {
        let scale = f64::from(n_in) / f64::from(n_out);
        let stretch = scale.max(1.0);
        let reach = 2.0 * stretch;
        let (mut windows, mut weights) = (Vec::with_capacity(outputs.len()), Vec::new());
        let mut exact = Vec::new();
        for i in outputs.clone() {
            let centre = (f64::from(i) + 0.5) * scale;
            let start = ((centre - reach + 0.5) as i64).max(0);
            let end = ((centre + reach + 0.5) as i64).min(i64::from(n_in));
            exact.clear();
            exact.extend((start..end).map(|k| cubic((k as f64 - centre + 0.5) * (1.0 / stretch))));
            // in this order, one by one: the sum's rounding is part of the result
            let sum = exact.iter().fold(0.0, |sum, weight| sum + weight);
            windows.push(Window { start: start as usize, count: exact.len(), weights: weights.len() });
            weights.extend(exact.iter().map(|weight| {
                let weight = if sum == 0.0 { *weight } else { weight / sum };
                (weight * f64::from(1 << PRECISION) + if weight < 0.0 { -0.5 } else { 0.5 }) as i32
            }));
        }
        #[cfg(target_arch = "x86_64")]
        let packed = avx2::Packed::new(&windows, &weights);
        Self {
            n_in,
            n_out: outputs.len() as u32,
            windows,
            weights,
            #[cfg(target_arch = "x86_64")]
            packed,
        }
    }

    /// Keeps the tables while the sizes stay the same.
    fn cached(slot: &mut Option<Self>, n_in: u32, n_out: u32) -> &Self {
        let fits = slot.as_ref().is_some_and(|axis| (axis.n_in, axis.n_out) == (n_in, n_out));
        if !fits {
            *slot = Some(Self::new(n_in, n_out));
        }
        slot.as_ref().expect("the axis was just put there")
    }

    /// The inputs that any window looks at.
    fn span(&self) -> std::ops::Range<usize> {
        let end = self.windows.iter().map(|window| window.start + window.count).max();
        self.windows.first().map_or(0, |window| window.start)..end.unwrap_or(0)
    }

    /// Products per sample across.
    fn products(&self) -> usize {
        self.weights.len()
    }

    fn weights(&self, window: Window) -> &[i32] {
        &self.weights[window.weights..window.weights + window.count]
    }
}

fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Rows of RGB8 somewhere in memory.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [u8],
    stride: usize, // bytes from row to row
    bytes: usize,  // bytes of a row
    count: usize,
}

impl<'a> Rows<'a> {
    fn packed(data: &'a [u8], bytes: usize) -> Self {
        Self { data, stride: bytes, bytes, count: data.len() / bytes }
    }

    fn row(self, y: usize) -> &'a [u8] {
        &self.data[y * self.stride..][..self.bytes]
    }

    /// Row `y` and whatever lies behind it.
    #[cfg(target_arch = "x86_64")]
    fn row_and_beyond(self, y: usize) -> &'a [u8] {
        &self.data[y * self.stride..]
    }

    fn slice(self, rows: std::ops::Range<usize>) -> Self {
        Self { data: &self.data[rows.start * self.stride..], count: rows.len(), ..self }
    }
}

/// Which instructions the two passes use. They agree on every byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2, and AVX-512's sums of products of words.
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Kernel {
    /// Chooses once and says so.
    fn best() -> Self {
        static CHOICE: OnceLock<Kernel> = OnceLock::new();
        *CHOICE.get_or_init(|| {
            let choice = Self::available().last().copied().unwrap_or(Self::Portable);
            tracing::debug!(kernel = ?choice, "resize");
            choice
        })
    }

    /// What this machine can run, best last.
    fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut kernels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            kernels.push(Self::Avx2);
            if std::arch::is_x86_feature_detected!("avx512vl")
                && std::arch::is_x86_feature_detected!("avx512vnni")
            {
                kernels.push(Self::Vnni);
            }
        }
        kernels
    }

    /// Resizes every row: \[n, w, 3\] → \[n, n_out, 3\].
    fn horizontal(self, src: Rows<'_>, axis: &Axis, out: &mut [u8]) {
        const BAND: usize = 16; // rows of one task
        let bytes = 3 * axis.n_out as usize;
        let band = |(i, out): (usize, &mut [u8])| {
            let first = i * BAND;
            let src = src.slice(first..first + out.len() / bytes);
            match self {
                Self::Portable => horizontal_portable(src, axis, out),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => avx2::horizontal::<false>(src, axis, out),
                #[cfg(target_arch = "x86_64")]
                Self::Vnni => avx2::horizontal::<true>(src, axis, out),
            }
        };
        if axis.products() * 3 * src.count < PARALLEL {
            out.chunks_mut(BAND * bytes).enumerate().for_each(band);
        } else {
            out.par_chunks_mut(BAND * bytes).enumerate().for_each(band);
        }
    }

    /// Resizes every column: \[h, w, 3\] → \[n_out, w, 3\]. `src` starts at row `skipped` of the axis.
    fn vertical(self, src: Rows<'_>, axis: &Axis, skipped: usize, out: &mut [u8]) {
        let one = |(y, out): (usize, &mut [u8])| {
            let window = axis.windows[y];
            let src = src.slice(window.start - skipped..window.start - skipped + window.count);
            match self {
                Self::Portable => vertical_portable(src, axis.weights(window), out),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => avx2::vertical::<false>(src, axis.weights(window), out),
                #[cfg(target_arch = "x86_64")]
                Self::Vnni => avx2::vertical::<true>(src, axis.weights(window), out),
            }
        };
        if axis.products() * src.bytes < PARALLEL {
            out.chunks_mut(src.bytes).enumerate().for_each(one);
        } else {
            out.par_chunks_mut(src.bytes).enumerate().for_each(one);
        }
    }
}

/// The end of every sum: back to a byte.
fn clip8(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

fn horizontal_portable(src: Rows<'_>, axis: &Axis, out: &mut [u8]) {
    for (y, out) in out.chunks_exact_mut(3 * axis.n_out as usize).enumerate() {
        let row = src.row(y).as_chunks::<3>().0;
        for (out, &window) in out.chunks_exact_mut(3).zip(&axis.windows) {
            let pixels = &row[window.start..window.start + window.count];
            let mut sums = [HALF; 3];
            for (pixel, weight) in pixels.iter().zip(axis.weights(window)) {
                for (sum, &sample) in sums.iter_mut().zip(pixel) {
                    *sum += weight * i32::from(sample);
                }
            }
            out.copy_from_slice(&sums.map(clip8));
        }
    }
}

/// One output row from the rows of its window.
fn vertical_portable(src: Rows<'_>, weights: &[i32], out: &mut [u8]) {
    const BLOCK: usize = 32; // sums that stay in registers
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let first = block * BLOCK;
        let mut sums = [HALF; BLOCK];
        for (y, &weight) in weights.iter().enumerate() {
            let samples = &src.row(y)[first..first + out.len()];
            if let Ok(samples) = <&[u8; BLOCK]>::try_from(samples) {
                for (sum, &sample) in sums.iter_mut().zip(samples) {
                    *sum += weight * i32::from(sample);
                }
            } else {
                for (sum, &sample) in sums.iter_mut().zip(samples) {
                    *sum += weight * i32::from(sample);
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = clip8(sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The recipe, word for word: no tables, no blocks, no skipped rows.
    fn by_the_book(src: &RgbImage, width: u32, height: u32, vertical_first: bool) -> RgbImage {
        let pass = |src: &RgbImage, n_out: u32, across: bool| {
            let (w, h) = (src.width as usize, src.height as usize);
            let (out_w, out_h) = if across { (n_out as usize, h) } else { (w, n_out as usize) };
            let axis = Axis::new(if across { src.width } else { src.height }, n_out);
            let mut data = vec![0; 3 * out_w * out_h];
            for y in 0..out_h {
                for x in 0..out_w {
                    let window = axis.windows[if across { x } else { y }];
                    for c in 0..3 {
                        let mut sum = i64::from(HALF);
                        for (k, &weight) in axis.weights(window).iter().enumerate() {
                            let (from_x, from_y) =
                                if across { (window.start + k, y) } else { (x, window.start + k) };
                            sum += i64::from(weight) * i64::from(src.data[3 * (from_y * w + from_x) + c]);
                        }
                        data[3 * (y * out_w + x) + c] = (sum >> 22).clamp(0, 255) as u8;
                    }
                }
            }
            RgbImage { width: out_w as u32, height: out_h as u32, data }
        };
        if vertical_first {
            pass(&pass(src, height, false), width, true)
        } else {
            pass(&pass(src, width, true), height, false)
        }
    }

    fn noise(width: u32, height: u32, seed: u64) -> RgbImage {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // extremes are where rounding and clipping go wrong
            match state >> 61 {
                0 => 0,
                1 => 255,
                _ => (state >> 40) as u8,
            }
        };
        let data = (0..3 * width * height).map(|_| next()).collect();
        RgbImage { width, height, data }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]

        /// Every kernel, at every size, is the recipe; and strides and what lies behind rows do not matter.
        #[test]
        fn kernels_follow_the_recipe(
            (w, h) in (1u32..90, 1u32..90), (width, height) in (1u32..70, 1u32..70),
            padding in 0usize..40, seed in any::<u64>(), rule in prop::bool::ANY,
        ) {
            let src = noise(w, h, seed);
            let stride = 3 * w as usize + padding;
            let mut data = vec![0xee; stride * (h as usize - 1) + 3 * w as usize];
            for (y, row) in src.data.chunks_exact(3 * w as usize).enumerate() {
                data[y * stride..][..row.len()].copy_from_slice(row);
            }
            let view = RgbView::new(&data, w, h, stride).unwrap();
            let rule = if rule { Resample::Pillow } else { Resample::Pillow13 };
            let vertical_first = rule.vertical_first((view.width, view.height), (width, height));
            let expected = by_the_book(&src, width, height, vertical_first);
            prop_assert!(resize(view, width, height, rule) == expected);

            let rows = Rows { data: &data, stride, bytes: 3 * w as usize, count: h as usize };
            let wide = Axis::new(w, width);
            let high = Axis::new(h, height);
            for kernel in Kernel::available() {
                let mut out = vec![0; 3 * (width * h) as usize];
                kernel.horizontal(rows, &wide, &mut out);
                let mut expected = vec![0; out.len()];
                horizontal_portable(rows, &wide, &mut expected);
                prop_assert!(out == expected, "{kernel:?} across");
                let mut out = vec![0; 3 * (w * height) as usize];
                kernel.vertical(rows, &high, 0, &mut out);
                let mut expected = vec![0; out.len()];
                Kernel::Portable.vertical(rows, &high, 0, &mut expected);
                prop_assert!(out == expected, "{kernel:?} down");
            }
        }
    }

    #[test]
    fn several_threads_change_nothing() {
        let src = noise(1500, 1100, 7);
        let rows = Rows::packed(&src.data, 4500);
        let axis = Axis::new(1500, 490);
        assert!(axis.products() * 3 * rows.count >= PARALLEL, "too small to be shared among threads");
        for kernel in Kernel::available() {
            let mut out = vec![0; 3 * 490 * 1100];
            kernel.horizontal(rows, &axis, &mut out);
            let mut expected = vec![0; out.len()];
            horizontal_portable(rows, &axis, &mut expected);
            assert!(out == expected, "{kernel:?}");
        }
    }

    #[test]
    fn a_resizer_can_be_reused_for_other_sizes() {
        let mut resizer = Resizer::default();
        for (w, h, to) in [(30, 20, 25), (30, 20, 25), (5, 70, 25), (5, 70, 9), (300, 2, 40)] {
            let src = noise(w, h, 3);
            let mut out = vec![0; 3 * to as usize * to as usize];
            resizer.resize_into(src.view(), to, to, Resample::Pillow, &mut out);
            assert_eq!(out, by_the_book(&src, to, to, false).data, "{w}x{h} to {to}");
        }
    }

    #[test]
    fn the_order_of_passes_depends_on_the_rule() {
        use Resample::{Pillow, Pillow13};
        let order = |rule: Resample, from: (u32, u32), to: (u32, u32)| rule.vertical_first(from, to);
        assert!(!order(Pillow, (270, 1200), (490, 490)));
        assert!(order(Pillow13, (270, 1200), (490, 490)));
        // down by 1000, across by 500, then by 499
        assert!(!order(Pillow13, (990, 1490), (490, 490)));
        assert!(order(Pillow13, (989, 1490), (490, 490)));
        assert!(!order(Pillow13, (100, 490), (490, 490)));
        // Pillow 12's exception, which asks for more than 100 times, and for shrinking
        assert!(!order(Pillow, (5, 500), (490, 490)));
        assert!(order(Pillow, (5, 501), (490, 490)));
        assert!(!order(Pillow, (4, 490), (490, 490)));
        assert!(!order(Pillow, (2, 401), (490, 490)));
    }

    #[test]
    fn nothing_is_resized_to_nothing() {
        let src = noise(4, 4, 1);
        assert_eq!(resize(src.view(), 0, 7, Resample::Pillow).data, Vec::<u8>::new());
    }

    #[test]
    fn weights_sum_to_one_and_fit_their_halves() {
        for (n_in, n_out) in
            [(1, 490), (2, 490), (3, 2), (490, 491), (1920, 490), (131_072, 490), (7, 131_072)]
        {
            let axis = Axis::new(n_in, n_out);
            for &window in &axis.windows {
                let sum: i64 = axis.weights(window).iter().map(|&weight| i64::from(weight)).sum();
                assert!((sum - (1 << 22)).abs() <= window.count as i64, "{n_in} to {n_out}: {sum}");
                assert!(axis.weights(window).iter().all(|weight| weight.abs() < 1 << 24));
            }
        }
    }
}
