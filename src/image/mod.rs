//! Images: from bytes of a file to RGB8 ([`decode`]), from any size to the tower's ([`resize`]).
//!
//! ```text
//! path ─┐                ┌ jpeg  png  webp ┐            alpha: drop | over a colour
//! bytes ┼─▶ limits, magic ┤                 ├─▶ Raster ─▶ EXIF orientation ─▶ RGB8 ─▶ resize ─▶ RGB8 [side, side, 3]
//! RGB8 ─┘                └ gif   bmp   tiff ┘
//! ```
//!
//! How an image becomes a square is the profile's to say ([`Fit`]): by [`fit()`], of which a resize is a part.
//!
//! RGB8 is written where whoever wants it says (`room`): a GPU's backend has it in memory that the device copies from.
//!
//! The yardstick is Pillow, because the model was trained on what `Image.open(path).convert("RGB")` and
//! `resize(…, BICUBIC)` give: the pixels of every lossless format and of JPEG (feature `jpeg-exact`) equal Pillow
//! 13's byte for byte, and so does the resize. Where they must not (a file whose data end early, an orientation, a
//! transparent background), the difference is an error or a [`Warning`](crate::Warning), never a silent pixel.
//!
//! | stored as | becomes RGB8 by |
//! |---|---|
//! | grey 1, 2, 4 bits | × 255, 85, 17 |
//! | grey 12, 16, 32 bits, float (no alpha) | **clipped** to 0…255, not scaled: Pillow's rule, and why a 16-bit scan is white |
//! | grey with alpha, RGB, RGBA, CMYK at 16 bits | the high byte of each sample |
//! | palette | its colour; black beyond the palette's end |
//! | CMYK | `(255-k) - (255-k)*c/255` rounded; in JPEG the samples are taken as inverted, whoever wrote them |
//! | alpha | dropped ([`Alpha::Drop`]): the colour under it shows; or composed over a colour |
//! | premultiplied alpha (TIFF) | divided out first, `min(255, 255*c/a)` |
//! | animation, pages | the first frame on its canvas; the first page |
//! | ICC profile, gamma | ignored |

use std::io::Write;

use crate::error::ImageProblem;

mod bmp;
pub mod decode;
mod exif;
mod fit;
mod gif;
mod jpeg;
mod options;
mod pixels;
mod png;
mod prepare;
mod raster;
pub mod resize;
pub(crate) mod room;
mod source;
mod tiff;
mod webp;

pub use crate::config::{Fit, Frame};
pub use fit::fit;
pub use jpeg::EXACT as JPEG_EXACT;
pub use options::{Alpha, DecodeOptions, Exif, Limits};
pub use prepare::{Prepared, prepare, prepare_all};
pub(crate) use prepare::{prepare_range, share_wall};
pub use source::{ImageSource, read_limited};

/// Which release of Pillow the BICUBIC resize equals, byte for byte.
///
/// They differ only in which pass runs first on tall images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Resample {
    /// Pillow 12.3: horizontal first. Every release before agrees, but on images more than 100 times as tall as
    /// wide, which 12.2 and 12.3 shrink vertically first, as this rule does.
    #[default]
    Pillow,
    /// Pillow 13: vertical first where the height shrinks by more than twice what the width does.
    Pillow13,
}

/// Borrowed RGB8 pixels: row `y` starts at byte `y * stride`, three bytes a pixel.
#[derive(Clone, Copy, Debug)]
pub struct RgbView<'a> {
    data: &'a [u8], // [height, stride], the last row may end early
    width: u32,     // pixels
    height: u32,    // pixels
    stride: usize,  // bytes
}

impl<'a> RgbView<'a> {
    /// Borrows pixels that lie in memory. `stride` in bytes, at least `3 * width`.
    ///
    /// # Errors
    /// [`ImageProblem::Layout`] if a side is 0 or the last row does not fit into `data`.
    pub fn new(data: &'a [u8], width: u32, height: u32, stride: usize) -> Result<Self, ImageProblem> {
        let row = 3 * width as usize;
        let need = (height as usize)
            .checked_sub(1)
            .and_then(|rows| rows.checked_mul(stride))
            .and_then(|before| before.checked_add(row));
        match need {
            Some(need) if width > 0 && stride >= row && need <= data.len() => {
                Ok(Self { data, width, height, stride })
            }
            _ => Err(ImageProblem::Layout(format!(
                "{width}x{height} pixels with a stride of {stride} bytes in {} bytes",
                data.len()
            ))),
        }
    }

    /// Returns the width, in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Returns the height, in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Returns row `y`: `3 * width` bytes.
    ///
    /// # Panics
    /// If there is no row `y`.
    pub fn row(&self, y: u32) -> &'a [u8] {
        assert!(y < self.height, "row {y} of {}", self.height);
        let first = y as usize * self.stride;
        &self.data[first..first + 3 * self.width as usize]
    }
}

/// Owned RGB8 pixels, tightly packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Width, in pixels.
    pub width: u32,
    /// Height, in pixels.
    pub height: u32,
    /// Pixels, row-major, `[height, width, 3]`.
    pub data: Vec<u8>,
}

impl RgbImage {
    /// Borrows the pixels.
    pub fn view(&self) -> RgbView<'_> {
        RgbView::new(&self.data, self.width, self.height, 3 * self.width as usize)
            .expect("an RgbImage holds width * height * 3 bytes")
    }
    /// Writes the pixels as an 8-bit RGB PNG file.
    ///
    /// # Errors
    /// What `out` answered.
    pub fn write_png(&self, out: impl Write) -> std::io::Result<()> {
        use ::image::ImageEncoder as _;
        ::image::codecs::png::PngEncoder::new(out)
            .write_image(&self.data, self.width, self.height, ::image::ExtendedColorType::Rgb8)
            .map_err(|error| match error {
                ::image::ImageError::IoError(error) => error,
                other => std::io::Error::other(other),
            })
    }
}
