//! TIFF and BigTIFF: the first page, in strips or tiles, chunky or planar, both byte orders.
//!
//! | | read | refused |
//! |---|---|---|
//! | compression | none, PackBits, LZW, deflate (with predictors), CCITT groups 3 (1-D) and 4, JPEG | CCITT run lengths, old JPEG, zstd, LZMA, WebP, LERC |
//! | colour | grey 1 to 32 bits and float, palette, RGB, CMYK, YCbCr in JPEG | CIE L\*a\*b\*, other YCbCr |
//!
//! The orientation is part of the format: it is applied always, as Pillow does on loading.

use super::exif::{ORIENTATION, Orientation, Tags};
use super::pixels::{Palette, clip, cmyk_to_rgb, grey_factor, unpack_bits, unpremultiply};
use super::raster::Raster;
use super::room::Room;
use super::{Limits, jpeg};
use crate::error::ImageProblem;

mod unpack;

use unpack::{Coding, Packing};

/// Decodes the first page of a TIFF file.
pub(super) fn decode(bytes: &[u8], limits: &Limits, room: &dyn Room) -> Result<Raster, ImageProblem> {
    let tags =
        Tags::parse(bytes).ok_or_else(|| ImageProblem::Broken("its data end within its header".into()))?;
    if !tags.whole() {
        return Err(ImageProblem::Broken("its data end before the tags that describe them".into()));
    }
    let page = Page::read(&tags, limits)?;
    let mut raster = Raster::new(page.width as u32, page.height as u32, room);
    if page.alpha != Alpha::None {
        raster = raster.with_alpha();
    }

    let chunk_bytes = page.chunk_row_bytes() * page.chunk_height;
    let mut chunk = vec![0; chunk_bytes]; // [chunk_height, chunk_width, samples]
    let mut plane = vec![0; if page.planes > 1 { chunk_bytes / page.planes } else { 0 }];
    for down in 0..page.chunks_down() {
        let top = down * page.chunk_height;
        // the last strip is as high as what is left; a tile is always whole
        let rows = if page.tiled { page.chunk_height } else { page.chunk_height.min(page.height - top) };
        for across in 0..page.chunks_across() {
            let index = down * page.chunks_across() + across;
            if page.planes == 1 {
                page.unpack(bytes, index, rows, &mut chunk[..rows * page.chunk_row_bytes()])?;
            } else {
                let per_plane = page.chunks_across() * page.chunks_down();
                let sample = page.bits / 8;
                for p in 0..page.planes {
                    let plane = &mut plane[..rows * page.chunk_width * sample];
                    page.unpack(bytes, p * per_plane + index, rows, plane)?;
                    let slots = chunk[p * sample..].chunks_mut(page.planes * sample);
                    slots
                        .zip(plane.chunks_exact(sample))
                        .for_each(|(slot, from)| slot[..sample].copy_from_slice(from));
                }
            }
            let left = across * page.chunk_width;
            let width = page.chunk_width.min(page.width - left);
            let visible = rows.min(page.height - top);
            for (y, row) in chunk.chunks_exact(page.chunk_row_bytes()).take(visible).enumerate() {
                let (rgb, alpha) = raster.row_mut(top + y);
                let alpha = if alpha.is_empty() { alpha } else { &mut alpha[left..left + width] };
                page.row(row, &mut rgb[3 * left..3 * (left + width)], alpha);
            }
        }
    }

    raster.orientation = Orientation::new(tags.integer(ORIENTATION).unwrap_or(1));
    raster.orientation_is_format = true;
    Ok(raster)
}

/// What the samples of a pixel mean.
#[derive(Clone, Debug)]
enum Colour {
    Grey {
        white_is_zero: bool,
        number: Number,
    },
    Palette(Box<Palette>),
    Rgb,
    Cmyk,
    /// Only within JPEG, which gives RGB.
    YCbCr,
}

/// What the bits of a grey sample mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Unsigned,
    Signed,
    Float,
}

/// What the first sample beyond the colour means; further ones are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alpha {
    None,
    Straight,
    Premultiplied,
}

/// The layout of the page.
#[derive(Debug)]
struct Page {
    width: usize,
    height: usize,
    tiled: bool,
    chunk_width: usize,
    chunk_height: usize,
    /// 1, or as many as there are samples to a pixel.
    planes: usize,
    /// Samples to a pixel, and bits to a sample.
    samples: usize,
    bits: usize,
    colour: Colour,
    alpha: Alpha,
    packing: Packing,
    /// Where each chunk starts and how many bytes it has: rows of chunks, then planes.
    offsets: Vec<u64>,
    counts: Option<Vec<u64>>,
}

impl Page {
    fn read(tags: &Tags<'_>, limits: &Limits) -> Result<Self, ImageProblem> {
        let broken = |what: String| ImageProblem::Broken(what);
        let unsupported = |what: String| Err(ImageProblem::Unsupported(what));
        let number = |tag: u16, default: u64| tags.integer(tag).unwrap_or(default);

        let (Some(width), Some(height)) = (tags.integer(256), tags.integer(257)) else {
            return Err(broken("it does not say how large it is".into()));
        };
        limits.check_size(width, height)?;

        let compression = number(259, 1);
        let coding = Coding::new(compression)?;
        let photometric = number(262, 0);
        let in_jpeg = coding == Coding::Jpeg;
        let mut samples = number(277, if in_jpeg && matches!(photometric, 2 | 6) { 3 } else { 1 }) as usize;
        let mut extra = tags.integers(338).unwrap_or_default();
        let planar = number(284, 1) == 2;
        if planar && extra.iter().all(|&extra| extra == 0) {
            samples = samples.saturating_sub(extra.len()); // planes that nobody needs
            extra.clear();
        }
        if !(1..=6).contains(&samples) {
            return unsupported(format!("a TIFF of {samples} samples a pixel"));
        }
        let mut depths = tags.integers(258).unwrap_or_else(|| vec![1]);
        depths.truncate(samples);
        let bits = match depths[..] {
            [first, ref others @ ..] if others.iter().all(|&depth| depth == first) => first as usize,
            _ => return unsupported(format!("a TIFF of {depths:?} bits a sample")),
        };
        let format = tags.integers(339).unwrap_or_else(|| vec![1]);
        let kind = match format[..] {
            [1, ..] | [4, ..] => Number::Unsigned,
            [2, ..] if bits == 8 => Number::Unsigned, // Pillow's reading
            [2, ..] => Number::Signed,
            [3, ..] => Number::Float,
            _ => return unsupported(format!("a TIFF of sample format {format:?}")),
        };

        let colour = match photometric {
            0 | 1 => Colour::Grey { white_is_zero: photometric == 0, number: kind },
            2 => Colour::Rgb,
            3 => {
                let map = tags.integers(320).unwrap_or_default(); // every red, every green, every blue
                let [reds, greens, blues] =
                    [0, 1, 2].map(|i| &map[i * map.len() / 3..(i + 1) * map.len() / 3]);
                let colours = reds.iter().zip(greens).zip(blues);
                let palette = Palette::new(colours.map(|((&r, &g), &b)| [r, g, b].map(|v| (v >> 8) as u8)));
                Colour::Palette(Box::new(palette))
            }
            5 => Colour::Cmyk,
            6 if in_jpeg => Colour::YCbCr,
            6 => return unsupported("a TIFF of YCbCr without JPEG".into()),
            8..=10 => return unsupported("a TIFF of CIE L*a*b* colours".into()),
            other => return unsupported(format!("a TIFF of photometric interpretation {other}")),
        };
        let readable = match &colour {
            Colour::Grey { number: Number::Float, .. } => bits == 32,
            Colour::Grey { number: Number::Signed, .. } => matches!(bits, 16 | 32),
            // Pillow inverts up to 8 bits and forgets to above: neither would be right for both
            Colour::Grey { white_is_zero: true, .. } => matches!(bits, 1 | 2 | 4 | 8),
            Colour::Grey { .. } => matches!(bits, 1 | 2 | 4 | 8 | 12 | 16 | 32),
            Colour::Palette(_) => matches!(bits, 1 | 2 | 4 | 8),
            Colour::Rgb | Colour::Cmyk => matches!(bits, 8 | 16),
            Colour::YCbCr => bits == 8,
        };
        let channels = colour.channels();
        let (many, depth_of_many) = (samples > 1, matches!(bits, 8 | 16));
        if !readable || samples < channels || (many && !depth_of_many) || (many && channels == 1 && bits != 8)
        {
            return unsupported(format!(
                "a TIFF of {samples} samples of {bits} bits, photometric interpretation {photometric}"
            ));
        }
        if number_needs_unsigned(&colour, kind) {
            return unsupported(format!("a TIFF of sample format {format:?} in colour"));
        }
        let alpha = match (samples - channels, extra.first()) {
            (0, _) | (_, Some(0)) => Alpha::None,
            (1, None) if matches!(colour, Colour::Rgb) => Alpha::Straight,
            (_, Some(1)) if matches!(colour, Colour::Rgb) => Alpha::Premultiplied,
            (_, Some(2 | 999)) if !matches!(colour, Colour::Cmyk) => Alpha::Straight,
            _ => return unsupported(format!("a TIFF of {samples} samples, the extra ones being {extra:?}")),
        };

        let tiled = tags.integer(324).is_some() && tags.integer(273).is_none();
        let (chunk_width, chunk_height, offsets, counts) = if tiled {
            (number(322, 0), number(323, 0), tags.integers(324), tags.integers(325))
        } else {
            (width, number(278, height).min(height), tags.integers(273), tags.integers(279))
        };
        if chunk_width == 0 || chunk_height == 0 {
            return Err(broken(format!("its parts have {chunk_width}x{chunk_height} pixels")));
        }
        // the chunk, its plane, and the picture
        let chunk_bits = chunk_width.saturating_mul(chunk_height).saturating_mul((samples * bits) as u64);
        limits.check_alloc(
            width,
            height,
            (width * height).saturating_mul(4).saturating_add(chunk_bits / 4),
        )?;

        let page = Self {
            width: width as usize,
            height: height as usize,
            tiled,
            chunk_width: chunk_width as usize,
            chunk_height: chunk_height as usize,
            planes: if planar { samples } else { 1 },
            samples,
            bits,
            colour,
            alpha,
            packing: Packing {
                coding,
                predictor: number(317, 1),
                reversed: number(266, 1) == 2,
                little_endian: tags.little_endian(),
                jpeg_tables: tags.bytes(347).unwrap_or_default().to_vec(),
                fax_options: number(293, 0),
            },
            offsets: offsets.unwrap_or_default(),
            counts,
        };
        let (found, needed) = (page.offsets.len(), page.planes * page.chunks_across() * page.chunks_down());
        if found < needed {
            return Err(broken(format!("it is made of {needed} parts and names {found}")));
        }
        Ok(page)
    }

    fn chunks_across(&self) -> usize {
        self.width.div_ceil(self.chunk_width)
    }

    fn chunks_down(&self) -> usize {
        self.height.div_ceil(self.chunk_height)
    }

    /// Bytes of one row of a chunk, all planes together.
    fn chunk_row_bytes(&self) -> usize {
        (self.chunk_width * self.samples * self.bits).div_ceil(8)
    }

    /// Unpacks one chunk (of one plane) into `out`.
    fn unpack(&self, bytes: &[u8], index: usize, rows: usize, out: &mut [u8]) -> Result<(), ImageProblem> {
        let start = usize::try_from(self.offsets[index]).unwrap_or(usize::MAX);
        let rest = bytes.get(start..).unwrap_or_default();
        let count = self.counts.as_ref().and_then(|counts| counts.get(index));
        let stored = match (self.packing.coding, count) {
            // what is not packed has the length it needs; some writers give a wrong one
            (Coding::None, _) | (_, None) => rest,
            (_, Some(&count)) => rest.get(..usize::try_from(count).unwrap_or(usize::MAX)).unwrap_or(rest),
        };
        let samples = self.samples / self.planes;
        let expected = match (&self.colour, samples) {
            (Colour::YCbCr, 3) => jpeg::Stored::YCbCr,
            (Colour::Rgb, 3) => jpeg::Stored::Rgb,
            (Colour::Cmyk, 4) => jpeg::Stored::Cmyk,
            (Colour::YCbCr, _) if self.packing.coding == Coding::Jpeg => {
                return Err(ImageProblem::Unsupported("a TIFF of YCbCr in separate planes".into()));
            }
            _ => jpeg::Stored::Grey,
        };
        let shape = unpack::Shape { width: self.chunk_width, rows, samples, bits: self.bits };
        self.packing.unpack(stored, shape, expected, out)
    }

    /// Converts one row of a chunk, cut to the picture.
    fn row(&self, row: &[u8], rgb: &mut [u8], alpha: &mut [u8]) {
        let mut samples = vec![0; rgb.len() / 3 * self.samples]; // 8 bits each
        self.narrow(row, &mut samples);
        for (i, (rgb, pixel)) in rgb.chunks_exact_mut(3).zip(samples.chunks_exact(self.samples)).enumerate() {
            let a = pixel.get(self.colour.channels()).copied().unwrap_or(255);
            let colour = match &self.colour {
                Colour::Grey { .. } => [pixel[0]; 3],
                Colour::Palette(palette) => palette.0[usize::from(pixel[0])],
                Colour::Rgb | Colour::YCbCr => [pixel[0], pixel[1], pixel[2]],
                Colour::Cmyk => cmyk_to_rgb([pixel[0], pixel[1], pixel[2], pixel[3]]),
            };
            rgb.copy_from_slice(&match self.alpha {
                Alpha::Premultiplied => unpremultiply(colour, a),
                Alpha::None | Alpha::Straight => colour,
            });
            if let Some(slot) = alpha.get_mut(i) {
                *slot = a;
            }
        }
    }

    /// Brings the samples of a row to 8 bits.
    fn narrow(&self, row: &[u8], out: &mut [u8]) {
        let little = self.packing.little_endian;
        let high = usize::from(little); // of two bytes
        match (&self.colour, self.bits) {
            (Colour::Grey { number: Number::Float, .. }, _) => {
                let floats = row.as_chunks::<4>().0.iter();
                let value = |&b| if little { f32::from_le_bytes(b) } else { f32::from_be_bytes(b) };
                out.iter_mut().zip(floats).for_each(|(out, b)| *out = clip(value(b)));
            }
            (Colour::Grey { number, .. }, 16) => {
                let words = row.as_chunks::<2>().0.iter();
                let word = |&b| if little { u16::from_le_bytes(b) } else { u16::from_be_bytes(b) };
                out.iter_mut().zip(words.map(word)).for_each(|(out, word)| {
                    *out = if *number == Number::Signed { clip(word as i16) } else { clip(word) }
                });
            }
            (Colour::Grey { number, .. }, 32) => {
                let words = row.as_chunks::<4>().0.iter();
                let word = |&b| if little { u32::from_le_bytes(b) } else { u32::from_be_bytes(b) };
                // Pillow holds both in a signed number, where large unsigned ones turn black
                out.iter_mut().zip(words.map(word)).for_each(|(out, word)| {
                    *out = if *number == Number::Signed { clip(word as i32) } else { clip(word) }
                });
            }
            (Colour::Grey { .. }, 12) => {
                for (pair, b) in out.chunks_mut(2).zip(row.chunks(3)) {
                    let byte = |i: usize| u16::from(b.get(i).copied().unwrap_or(0));
                    let values = [byte(0) << 4 | byte(1) >> 4, (byte(1) & 15) << 8 | byte(2)];
                    pair.iter_mut().zip(values).for_each(|(out, value)| *out = clip(value));
                }
            }
            (_, 16) => {
                out.iter_mut().zip(row.as_chunks::<2>().0).for_each(|(out, word)| *out = word[high]);
            }
            (colour, bits) => {
                unpack_bits(row, bits as u8, out);
                if let Colour::Grey { white_is_zero, .. } = colour {
                    let factor = grey_factor(bits as u8);
                    out.chunks_mut(self.samples).for_each(|pixel| {
                        pixel[0] *= factor;
                        if *white_is_zero {
                            pixel[0] = 255 - pixel[0];
                        }
                    });
                }
            }
        }
    }
}

impl Colour {
    /// Samples that are colour.
    fn channels(&self) -> usize {
        match self {
            Self::Grey { .. } | Self::Palette(_) => 1,
            Self::Rgb | Self::YCbCr => 3,
            Self::Cmyk => 4,
        }
    }
}

/// Whether a colour is given in numbers that only greys may have.
fn number_needs_unsigned(colour: &Colour, number: Number) -> bool {
    !matches!(colour, Colour::Grey { .. }) && number != Number::Unsigned
}
