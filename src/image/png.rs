//! PNG: rows from the `png` crate, samples by Pillow's rules.

use std::io::Cursor;

use png::{BitDepth, ColorType, DecodingError, InterlaceInfo, Transformations};

use super::Limits;
use super::exif::Orientation;
use super::pixels::{Palette, clip, grey_factor, grey_row, unpack_bits};
use super::raster::Raster;
use super::room::Room;
use crate::error::ImageProblem;

/// Decodes the default image of a PNG file (of an animation: its first frame).
pub(super) fn decode(bytes: &[u8], limits: &Limits, room: &dyn Room) -> Result<Raster, ImageProblem> {
    let budget = usize::try_from(limits.alloc_bytes).unwrap_or(usize::MAX);
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: budget });
    decoder.set_transformations(Transformations::IDENTITY);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);

    let header = decoder.read_header_info().map_err(problem)?;
    let (width, height, interlaced) = (header.width, header.height, header.interlaced);
    let held = 3 + 1 + if interlaced { header.bytes_per_pixel() as u64 } else { 0 };
    limits.check(width, height, held)?;

    let mut reader = decoder.read_info().map_err(problem)?;
    let info = reader.info();
    let samples = Samples::new(info)?;
    let bits_per_pixel = info.bits_per_pixel();
    let row_bytes = info.raw_row_length() - 1; // without the byte that names its filter

    let mut raster = Raster::new(width, height, room);
    if samples.has_alpha() {
        raster = raster.with_alpha();
    }
    // Rows are asked for one by one, never "the frame": that would go on to read, and insist on, what follows.
    let mut row = vec![0; row_bytes];
    if interlaced {
        let mut whole = vec![0; row_bytes * height as usize]; // [height, row_bytes]
        for _ in 0..adam7_rows(width, height) {
            let Some(InterlaceInfo::Adam7(place)) = reader.read_row(&mut row).map_err(problem)? else {
                return Err(ImageProblem::Broken("its data end before its last row".into()));
            };
            png::expand_interlaced_row(&mut whole, row_bytes, &row, &place, bits_per_pixel as u8);
        }
        for (y, row) in whole.chunks_exact(row_bytes).enumerate() {
            let (rgb, alpha) = raster.row_mut(y);
            samples.row(row, rgb, alpha);
        }
    } else {
        for y in 0..height as usize {
            if reader.read_row(&mut row).map_err(problem)?.is_none() {
                return Err(ImageProblem::Broken(format!("its data end at row {y} of {height}")));
            }
            let (rgb, alpha) = raster.row_mut(y);
            samples.row(&row, rgb, alpha);
        }
    }

    let chunks = Chunks::scan(bytes);
    raster.orientation = chunks.exif.map(Orientation::from_exif).unwrap_or_default();
    if !chunks.ended {
        raster.faults.push("its end marker (IEND) is missing".into());
    }
    Ok(raster)
}

/// How a row's bytes become colour and alpha.
struct Samples {
    colour: ColorType,
    bits: u8,
    palette: Palette,
    /// Palette: an alpha per colour.
    alphas: Option<[u8; 256]>,
    /// Grey, RGB: the one colour that is transparent, as stored, 16 bits a sample.
    key: Option<[u16; 3]>,
}

impl Samples {
    fn new(info: &png::Info<'_>) -> Result<Self, ImageProblem> {
        let mut samples = Self {
            colour: info.color_type,
            bits: info.bit_depth as u8,
            palette: Palette::grey(),
            alphas: None,
            key: None,
        };
        let transparent = info.trns.as_deref();
        match info.color_type {
            ColorType::Indexed => {
                let Some(colours) = &info.palette else {
                    return Err(ImageProblem::Broken("it has no palette though its pixels need one".into()));
                };
                samples.palette = Palette::new(colours.as_chunks::<3>().0.iter().copied());
                samples.alphas = transparent.map(|given| {
                    let mut alphas = [255; 256];
                    alphas.iter_mut().zip(given).for_each(|(slot, &alpha)| *slot = alpha);
                    alphas
                });
            }
            ColorType::Grayscale | ColorType::Rgb => {
                // the `png` crate has cut the values of images of up to 8 bits to one byte each
                let values: Option<Vec<u16>> = transparent.map(|given| match info.bit_depth {
                    BitDepth::Sixteen => {
                        given.as_chunks::<2>().0.iter().map(|&be| u16::from_be_bytes(be)).collect()
                    }
                    _ => given.iter().map(|&value| u16::from(value)).collect(),
                });
                samples.key = match values.as_deref() {
                    Some(&[grey]) => Some([grey; 3]),
                    Some(&[r, g, b]) => Some([r, g, b]),
                    _ => None,
                };
            }
            ColorType::GrayscaleAlpha | ColorType::Rgba => {}
        }
        Ok(samples)
    }

    fn has_alpha(&self) -> bool {
        let stored = matches!(self.colour, ColorType::GrayscaleAlpha | ColorType::Rgba);
        stored || self.alphas.is_some() || self.key.is_some()
    }

    /// Converts one row. `alpha` is empty if the image has none.
    fn row(&self, row: &[u8], rgb: &mut [u8], alpha: &mut [u8]) {
        let wide = self.bits == 16;
        let key = self.key.filter(|_| !alpha.is_empty());
        let opaque_unless = |is_key: bool| if is_key { 0 } else { 255 };
        match self.colour {
            ColorType::Grayscale if wide => {
                let (row, _) = row.as_chunks::<2>();
                grey_row(row.iter().map(|&be| clip(u16::from_be_bytes(be))), rgb);
                if let Some([key, ..]) = key {
                    let stored = row.iter().map(|&be| u16::from_be_bytes(be));
                    alpha.iter_mut().zip(stored).for_each(|(a, v)| *a = opaque_unless(v == key));
                }
            }
            ColorType::Grayscale => {
                let factor = grey_factor(self.bits);
                let mut stored = vec![0; rgb.len() / 3];
                unpack_bits(row, self.bits, &mut stored);
                grey_row(stored.iter().map(|v| v * factor), rgb);
                if let Some([key, ..]) = key {
                    alpha.iter_mut().zip(&stored).for_each(|(a, &v)| *a = opaque_unless(u16::from(v) == key));
                }
            }
            ColorType::Indexed => {
                let mut indices = vec![0; rgb.len() / 3];
                unpack_bits(row, self.bits, &mut indices);
                self.palette.row(&indices, rgb);
                if let Some(alphas) = &self.alphas {
                    alpha.iter_mut().zip(&indices).for_each(|(a, &i)| *a = alphas[usize::from(i)]);
                }
            }
            ColorType::Rgb if wide => {
                for (i, (to, from)) in rgb.chunks_exact_mut(3).zip(row.as_chunks::<6>().0).enumerate() {
                    to.copy_from_slice(&[from[0], from[2], from[4]]);
                    if let Some(key) = key {
                        alpha[i] = opaque_unless(key.map(u16::to_be_bytes).as_flattened() == from);
                    }
                }
            }
            ColorType::Rgb => {
                rgb.copy_from_slice(row);
                if let Some(key) = key {
                    for (a, pixel) in alpha.iter_mut().zip(row.as_chunks::<3>().0) {
                        *a = opaque_unless(pixel.map(u16::from) == key);
                    }
                }
            }
            ColorType::GrayscaleAlpha | ColorType::Rgba => {
                // a sample's high byte comes first
                let sample = if wide { 2 } else { 1 };
                let samples = if self.colour == ColorType::Rgba { 4 } else { 2 };
                let last = samples - 1;
                let pixels = row.chunks_exact(samples * sample);
                for ((to, a), from) in rgb.chunks_exact_mut(3).zip(alpha).zip(pixels) {
                    for (i, to) in to.iter_mut().enumerate() {
                        *to = from[i.min(last - 1) * sample];
                    }
                    *a = from[last * sample];
                }
            }
        }
    }
}

/// Rows of the seven passes together; a pass without columns has no rows.
fn adam7_rows(width: u32, height: u32) -> u64 {
    // first column, column step, first row, row step
    const PASSES: [[u32; 4]; 7] =
        [[0, 8, 0, 8], [4, 8, 0, 8], [0, 4, 4, 8], [2, 4, 0, 4], [0, 2, 2, 4], [1, 2, 0, 2], [0, 1, 1, 2]];
    PASSES
        .iter()
        .filter(|[column, ..]| width > *column)
        .map(|[_, _, row, step]| u64::from(height.saturating_sub(*row).div_ceil(*step)))
        .sum()
}

/// What the chunks tell beside the pixels, wherever in the file they stand.
struct Chunks<'a> {
    exif: Option<&'a [u8]>,
    ended: bool,
}

impl<'a> Chunks<'a> {
    fn scan(bytes: &'a [u8]) -> Self {
        let mut chunks = Self { exif: None, ended: false };
        let mut rest = &bytes[8..]; // past the signature
        while let Some((length, tail)) = rest.split_first_chunk::<4>() {
            let length = u32::from_be_bytes(*length) as usize;
            let Some((kind, tail)) = tail.split_first_chunk::<4>() else { break };
            let (Some(data), Some(next)) = (tail.get(..length), tail.get(length + 4..)) else { break };
            match kind {
                b"eXIf" => chunks.exif = Some(data),
                b"IEND" => {
                    chunks.ended = true;
                    break;
                }
                _ => {}
            }
            rest = next;
        }
        chunks
    }
}

/// Whose fault an error of the `png` crate is.
fn problem(error: DecodingError) -> ImageProblem {
    match error {
        DecodingError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageProblem::Broken("its data end before its last row".into())
        }
        DecodingError::LimitsExceeded => {
            ImageProblem::TooLarge("decoding it takes more memory than the limit allows".into())
        }
        other => ImageProblem::Broken(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::adam7_rows;

    #[test]
    fn passes_without_columns_have_no_rows() {
        assert_eq!(adam7_rows(1, 1), 1);
        assert_eq!(adam7_rows(8, 8), 1 + 1 + 1 + 2 + 2 + 4 + 4);
        assert_eq!(adam7_rows(1, 8), 1 + 1 + 2 + 4); // passes 1, 3, 5 and 7
        assert_eq!(adam7_rows(5, 1), 4); // passes 1, 2, 4 and 6
    }
}
