//! Pixels to normalised patches: `x = (u8 / 255 − mean) / std`, in im2col order.
//!
//! ```text
//!   image [S, S, 3] u8            patches [P, 3 · patch²] fp16, row-major over the grid
//!   ┌───┬───┬───┐                 patch 0:  R rows 0‥13 │ G rows 0‥13 │ B rows 0‥13
//!   │ 0 │ 1 │ 2 │       ──▶       patch 1:  …
//!   └───┴───┴───┘                 the order of the patch embedding's weights: channel, y, x
//! ```
//!
//! # Numerics
//! A byte has 256 values and a pixel three channels, so the arithmetic is done once, in f32 in torchvision's
//! order of operations (`ToTensor`, then `Normalize`), rounded to fp16 and looked up.

use half::f16;
use rayon::prelude::*;

use crate::config::{PIXEL_MEAN, PIXEL_STD};
use crate::image::RgbView;

/// What each byte becomes in each channel, `[3][256]`.
#[derive(Debug)]
pub(crate) struct PixelTable([[f16; 256]; 3]);

impl PixelTable {
    pub(crate) fn new() -> Self {
        Self(std::array::from_fn(|channel| {
            std::array::from_fn(|byte| {
                f16::from_f32((byte as f32 / 255.0 - PIXEL_MEAN[channel]) / PIXEL_STD[channel])
            })
        }))
    }

    /// All values, channel by channel: `[3 · 256]`.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for other devices"))]
    pub(crate) fn values(&self) -> &[f16] {
        self.0.as_flattened()
    }

    /// Cuts `image`, of `grid · patch` pixels each way, into `patches`, `[grid², 3 · patch²]`.
    pub(crate) fn cut(&self, image: RgbView<'_>, grid: usize, patch: usize, patches: &mut [f16]) {
        let len = 3 * patch * patch;
        assert_eq!((image.width() as usize, image.height() as usize), (grid * patch, grid * patch));
        assert_eq!(patches.len(), grid * grid * len);
        patches.par_chunks_exact_mut(grid * len).enumerate().for_each(|(row, patches)| {
            for y in 0..patch {
                let pixels = image.row((row * patch + y) as u32);
                for (pixels, to) in pixels.chunks_exact(3 * patch).zip(patches.chunks_exact_mut(len)) {
                    for (channel, table) in self.0.iter().enumerate() {
                        let to = &mut to[(channel * patch + y) * patch..][..patch];
                        for (to, pixel) in to.iter_mut().zip(pixels.chunks_exact(3)) {
                            *to = table[pixel[channel] as usize];
                        }
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests;
