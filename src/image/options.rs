//! What a caller may choose about decoding, and the limits that hold before anything is allocated.

use crate::error::ImageProblem;

/// What happens to an EXIF orientation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Exif {
    /// The image is rotated or mirrored as its orientation says: the picture as people see it.
    #[default]
    Apply,
    /// The stored pixels are taken as they are: what upstream does. (TIFF is turned either way, as in Pillow: there
    /// the orientation is part of the format, not of EXIF.)
    Ignore,
}

/// What happens to an alpha channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Alpha {
    /// It is dropped, and the colours under it show, whatever they are: what upstream does.
    #[default]
    Drop,
    /// The image is composed over one colour (red, green, blue).
    Over([u8; 3]),
}

impl Alpha {
    /// Over black.
    pub const BLACK: Self = Self::Over([0; 3]);
    /// Over white.
    pub const WHITE: Self = Self::Over([255; 3]);
}

/// How much one image may take. Sizes are checked against the file's header, before the memory is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of one file. Default 256 MiB.
    pub file_bytes: u64,
    /// Pixels of one image. Default 178 956 970, where Pillow refuses too.
    pub pixels: u64,
    /// Pixels of the longer side. Default 131 072.
    pub side: u32,
    /// Bytes that decoding one image may hold at once, the file itself not counted. Default 1 GiB.
    pub alloc_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { file_bytes: 256 << 20, pixels: 178_956_970, side: 1 << 17, alloc_bytes: 1 << 30 }
    }
}

impl Limits {
    /// Sets the limit on one file, in bytes.
    #[must_use]
    pub fn with_file_bytes(mut self, bytes: u64) -> Self {
        self.file_bytes = bytes;
        self
    }

    /// Sets the limit on one image's area, in pixels.
    #[must_use]
    pub fn with_pixels(mut self, pixels: u64) -> Self {
        self.pixels = pixels;
        self
    }

    /// Sets the limit on the longer side, in pixels.
    #[must_use]
    pub fn with_side(mut self, pixels: u32) -> Self {
        self.side = pixels;
        self
    }

    /// Sets the limit on memory held while one image is decoded, in bytes.
    #[must_use]
    pub fn with_alloc_bytes(mut self, bytes: u64) -> Self {
        self.alloc_bytes = bytes;
        self
    }

    /// Refuses a file of `bytes` bytes that is too long.
    pub(super) fn check_file(&self, bytes: u64) -> Result<(), ImageProblem> {
        if bytes > self.file_bytes {
            let limit = self.file_bytes;
            return Err(ImageProblem::TooLarge(format!("it has {bytes} bytes; the limit is {limit}")));
        }
        Ok(())
    }

    /// Refuses an image of `width` × `height` pixels that is empty, too wide, too high or too large.
    pub(super) fn check_size(&self, width: u64, height: u64) -> Result<(), ImageProblem> {
        if width == 0 || height == 0 {
            return Err(ImageProblem::Broken(format!("its header declares {width}x{height} pixels")));
        }
        if width.max(height) > u64::from(self.side) {
            let limit = self.side;
            return Err(ImageProblem::TooLarge(format!(
                "it declares {width}x{height} pixels; the limit is {limit} on a side"
            )));
        }
        if width * height > self.pixels {
            let (pixels, limit) = (width * height, self.pixels);
            return Err(ImageProblem::TooLarge(format!(
                "it declares {width}x{height} = {pixels} pixels; the limit is {limit}"
            )));
        }
        Ok(())
    }

    /// Refuses memory of `bytes` bytes held at once for an image of `width` × `height` pixels.
    pub(super) fn check_alloc(&self, width: u64, height: u64, bytes: u64) -> Result<(), ImageProblem> {
        if bytes > self.alloc_bytes {
            let limit = self.alloc_bytes;
            return Err(ImageProblem::TooLarge(format!(
                "decoding its {width}x{height} pixels takes {bytes} bytes of memory; the limit is {limit}"
            )));
        }
        Ok(())
    }

    /// Both checks at once, for decoders that hold `bytes_per_pixel` at their peak.
    pub(super) fn check(&self, width: u32, height: u32, bytes_per_pixel: u64) -> Result<(), ImageProblem> {
        let (width, height) = (u64::from(width), u64::from(height));
        self.check_size(width, height)?;
        self.check_alloc(width, height, (width * height).saturating_mul(bytes_per_pixel))
    }
}

/// How images become RGB8. Start from [`DecodeOptions::default`] and change what you need.
///
/// ```
/// use imagehere::image::{Alpha, DecodeOptions, Exif};
///
/// let upstream = DecodeOptions::default().with_exif(Exif::Ignore);
/// let readable = DecodeOptions::default().with_alpha(Alpha::WHITE);
/// assert_eq!(upstream.alpha, Alpha::Drop);
/// assert_eq!(readable.exif, Exif::Apply);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct DecodeOptions {
    /// What happens to an EXIF orientation.
    pub exif: Exif,
    /// What happens to an alpha channel.
    pub alpha: Alpha,
    /// How much one image may take.
    pub limits: Limits,
}

impl DecodeOptions {
    /// Chooses what happens to an EXIF orientation.
    #[must_use]
    pub fn with_exif(mut self, exif: Exif) -> Self {
        self.exif = exif;
        self
    }

    /// Chooses what happens to an alpha channel.
    #[must_use]
    pub fn with_alpha(mut self, alpha: Alpha) -> Self {
        self.alpha = alpha;
        self
    }

    /// Chooses how much one image may take.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
}
