//! Images: from bytes of a file to RGB8 ([`decode`]), from any size to the tower's ([`resize`]).

use crate::error::ImageProblem;

pub mod decode;
pub mod resize;

/// Which release of Pillow the BICUBIC resize equals, byte for byte.
///
/// They differ only in which pass runs first on tall images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Resample {
    /// Every Pillow up to 12: horizontal first, always.
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
}
