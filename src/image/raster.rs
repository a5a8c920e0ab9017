//! What every decoder hands over: RGB8, an alpha plane if there is one, an orientation, and faults survived.

use super::exif::Orientation;
use super::pixels::div255;
use super::room::{PixelMemory, Room};
use super::{RgbImage, RgbView};

/// A decoded image before alpha and orientation are dealt with.
#[derive(Debug)]
pub(super) struct Raster {
    pub width: u32,
    pub height: u32,
    pub rgb: PixelMemory,       // [height, width, 3]
    pub alpha: Option<Vec<u8>>, // [height, width]
    pub orientation: Orientation,
    /// The format, not EXIF, prescribes the orientation: it is applied always.
    pub orientation_is_format: bool,
    /// What is wrong with the file though every row is there; each half a sentence.
    pub faults: Vec<String>,
}

impl Raster {
    /// Takes memory from `room`, of which every row is to be written.
    pub fn new(width: u32, height: u32, room: &dyn Room) -> Self {
        Self::of(width, height, PixelMemory::new(room, 3 * width as usize * height as usize))
    }

    /// Takes pixels that are there.
    pub fn of(width: u32, height: u32, rgb: PixelMemory) -> Self {
        Self {
            width,
            height,
            rgb,
            alpha: None,
            orientation: Orientation::default(),
            orientation_is_format: false,
            faults: Vec::new(),
        }
    }

    /// Adds an alpha plane, opaque.
    pub fn with_alpha(mut self) -> Self {
        self.alpha = Some(vec![255; self.width as usize * self.height as usize]);
        self
    }

    /// Lends row `y`: `3 * width` bytes of colour, `width` bytes of alpha or none.
    pub fn row_mut(&mut self, y: usize) -> (&mut [u8], &mut [u8]) {
        let width = self.width as usize;
        let rgb = &mut self.rgb[3 * y * width..3 * (y + 1) * width];
        let alpha = match &mut self.alpha {
            Some(alpha) => &mut alpha[y * width..(y + 1) * width],
            None => &mut [],
        };
        (rgb, alpha)
    }

    /// Counts the pixels that are not fully opaque.
    pub fn transparent(&self) -> usize {
        self.alpha.as_ref().map_or(0, |alpha| alpha.iter().filter(|&&a| a < 255).count())
    }

    /// Composes the image over a colour and forgets the alpha plane.
    ///
    /// # Numerics
    /// `(back * (255 - a) + fore * a) / 255`, rounded: what Pillow's `paste` through a mask gives.
    pub fn compose_over(&mut self, back: [u8; 3]) {
        let Some(alpha) = self.alpha.take() else { return };
        for (pixel, &a) in self.rgb.chunks_exact_mut(3).zip(&alpha) {
            let a = u32::from(a);
            for (sample, back) in pixel.iter_mut().zip(back) {
                *sample = div255(u32::from(back) * (255 - a) + u32::from(*sample) * a);
            }
        }
    }

    /// Turns the pixels upright, in memory from `room`.
    pub fn into_upright(self, room: &dyn Room) -> Picture {
        let orientation = self.orientation;
        orientation.apply(self.into_stored(), room)
    }

    /// Takes the pixels as they are stored.
    pub fn into_stored(self) -> Picture {
        Picture { width: self.width, height: self.height, data: self.rgb }
    }
}

/// Finished pixels, tightly packed, wherever they lie.
#[derive(Clone, Debug)]
pub(super) struct Picture {
    pub width: u32,
    pub height: u32,
    pub data: PixelMemory, // [height, width, 3]
}

impl Picture {
    /// Borrows the pixels.
    pub fn view(&self) -> RgbView<'_> {
        RgbView::new(&self.data, self.width, self.height, 3 * self.width as usize)
            .expect("a picture holds width * height * 3 bytes")
    }

    /// Takes the pixels to the heap.
    pub fn into_image(self) -> RgbImage {
        RgbImage { width: self.width, height: self.height, data: self.data.into_vec() }
    }
}
