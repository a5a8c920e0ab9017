//! From an image of any size to the tower's square: stretched, or its centre.
//!
//! ```text
//!   Stretch       w × h ─▶ S × S
//!   CentreCrop    w × h ─▶ shortest edge S, the other ⌊S · long / short⌋ ─▶ columns ⌊(w' - S) / 2⌋ … + S, rows alike
//! ```
//!
//! # Source
//! [`Fit::CentreCrop`]: `get_resize_output_image_size` and `center_crop` of transformers' `image_transforms.py`, as
//! `CLIPImageProcessor` calls them with Pillow. Its newer kind, which has torchvision resize tensors, makes other bytes.

use super::resize::{resize, resize_part};
use super::{Fit, Frame, Resample, RgbImage, RgbView};

/// Makes an image fit a frame.
///
/// Shape: \[h, w, 3\] → \[side, side, 3\].
///
/// # Examples
/// ```
/// use imagehere::image::{Fit, Frame, Resample, RgbView, fit};
///
/// // A white square between two black ones.
/// let pixels = [[0; 30], [255; 30], [0; 30]].concat().repeat(10);
/// let wide = RgbView::new(&pixels, 30, 10, 90).unwrap();
///
/// let centre = fit(wide, Frame { side: 10, fit: Fit::CentreCrop }, Resample::Pillow);
/// assert!(centre.data.iter().all(|&sample| sample == 255));
/// let stretched = fit(wide, Frame::from(10), Resample::Pillow);
/// assert_eq!(stretched.data[0], 0);
/// ```
pub fn fit(src: RgbView<'_>, frame: Frame, rule: Resample) -> RgbImage {
    let side = frame.side;
    match frame.fit {
        Fit::Stretch => resize(src, side, side, rule),
        Fit::CentreCrop => {
            let (width, height) = covering(src.width(), src.height(), side);
            let middle = |size: u32| (size - side) / 2..(size - side) / 2 + side;
            resize_part(src, (width, height), middle(width), middle(height), rule)
        }
    }
}

/// Width and height of an image whose shorter side has been resized to `side`, in pixels.
fn covering(width: u32, height: u32, side: u32) -> (u32, u32) {
    // Python divides as f64 and truncates. That is the integer's floor: the quotient is at least 1/short below the next
    // integer, and products of 32 bits leave room for that in 53. What is too long for an image is as long as one can be.
    let long = |short: u32, long: u32| {
        let long = u64::from(side) * u64::from(long) / u64::from(short);
        u32::try_from(long).unwrap_or(u32::MAX)
    };
    if width <= height { (side, long(width, height)) } else { (long(height, width), side) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_those_of_transformers() {
        // get_resize_output_image_size(size=336, default_to_square=False)
        for (from, to) in [
            ((640, 480), (448, 336)),
            ((480, 640), (336, 448)),
            ((336, 336), (336, 336)),
            ((337, 336), (337, 336)),
            ((1000, 333), (1009, 336)),
            ((1, 7), (336, 2352)),
            ((427, 640), (336, 503)),
            ((3, 2), (504, 336)),
        ] {
            assert_eq!(covering(from.0, from.1, 336), to, "{from:?}");
        }
    }

    proptest! {
        #[test]
        fn the_longer_side_is_what_python_computes(w in 1u32..70_000, h in 1u32..70_000, side in 1u32..2000) {
            let (width, height) = covering(w, h, side);
            let (short, long) = (w.min(h), w.max(h));
            let python = ((u64::from(side) * u64::from(long)) as f64 / f64::from(short)) as u32;
            prop_assert_eq!((width.min(height), width.max(height)), (side, python));
            prop_assert_eq!(if w <= h { width } else { height }, side);
        }

        #[test]
        fn a_square_of_the_frames_size_stays_as_it_is(side in 1u32..40, seed in any::<u8>()) {
            let data: Vec<u8> = (0..3 * side * side).map(|i| (i as u8).wrapping_mul(seed)).collect();
            let square = RgbImage { width: side, height: side, data };
            for fit_rule in [Fit::Stretch, Fit::CentreCrop] {
                prop_assert_eq!(&fit(square.view(), Frame { side, fit: fit_rule }, Resample::Pillow), &square);
            }
        }
    }

    #[test]
    fn an_odd_margin_is_larger_behind() {
        // 7 columns in a frame of 4: 1 before, 2 behind.
        let data: Vec<u8> = (0..4).flat_map(|_| (0..7).flat_map(|x| [x; 3])).collect();
        let src = RgbView::new(&data, 7, 4, 21).unwrap();
        let centre = fit(src, Frame { side: 4, fit: Fit::CentreCrop }, Resample::Pillow);
        assert_eq!(centre.data[..12], [[1; 3], [2; 3], [3; 3], [4; 3]].concat());
    }

    #[test]
    fn a_very_long_image_costs_what_its_centre_does() {
        // Whole, it would be 336 × 6.7 million pixels, 6.8 GB.
        let data = vec![77; 3 * 20_000];
        let src = RgbView::new(&data, 1, 20_000, 3).unwrap();
        for rule in [Resample::Pillow, Resample::Pillow13] {
            let centre = fit(src, Frame { side: 336, fit: Fit::CentreCrop }, rule);
            assert_eq!((centre.width, centre.height), (336, 336));
            assert!(centre.data.iter().all(|&sample| sample == 77));
        }
    }
}
