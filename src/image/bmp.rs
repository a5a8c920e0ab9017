//! BMP: every layout that Pillow reads, and the bit fields that it does not.

use super::Limits;
use super::pixels::{Palette, unpack_bits};
use super::raster::Raster;
use super::room::Room;
use crate::error::ImageProblem;

/// What the two headers say.
#[derive(Debug)]
struct Header {
    width: u32,
    height: u32,
    top_down: bool,
    bits: u16,
    rle: bool,
    /// Red, green, blue, alpha; a mask of 0 is a channel that is not there.
    masks: Option<[u32; 4]>,
    palette: Palette,
    /// The first byte of the pixels.
    offset: usize,
}

/// Decodes a BMP file.
pub(super) fn decode(bytes: &[u8], limits: &Limits, room: &dyn Room) -> Result<Raster, ImageProblem> {
    let header = Header::parse(bytes, limits)?;
    let (width, height) = (header.width as usize, header.height as usize);
    let mut raster = Raster::new(header.width, header.height, room);
    // file row to picture row
    let place = |y: usize| if header.top_down { y } else { height - 1 - y };

    if header.rle {
        let indices = run_lengths(bytes, header.offset, width, height, header.bits == 4)?; // [height, width]
        for (y, row) in indices.chunks_exact(width).enumerate() {
            header.palette.row(row, raster.row_mut(place(y)).0);
        }
        return Ok(raster);
    }

    let row_bytes = (width * usize::from(header.bits)).div_ceil(8);
    let stride = row_bytes.next_multiple_of(4);
    let need = header.offset + stride * (height - 1) + row_bytes; // the last row's padding may be missing
    if bytes.len() < need {
        let missing = need - bytes.len();
        return Err(ImageProblem::Broken(format!("its data end {missing} bytes before its last row does")));
    }
    let fields = header.masks.map(|masks| masks.map(Field::new));
    if fields.is_some_and(|[.., alpha]| alpha.max > 0) {
        raster = raster.with_alpha();
    }
    for y in 0..height {
        let first = header.offset + y * stride;
        let row = &bytes[first..first + row_bytes];
        let (rgb, alpha) = raster.row_mut(place(y));
        match (header.bits, fields) {
            (1..=8, _) => {
                let mut indices = vec![0; width];
                unpack_bits(row, header.bits as u8, &mut indices);
                header.palette.row(&indices, rgb);
            }
            (24, _) => {
                for (to, from) in rgb.chunks_exact_mut(3).zip(row.as_chunks::<3>().0) {
                    to.copy_from_slice(&[from[2], from[1], from[0]]);
                }
            }
            (_, Some(fields)) => {
                let size = usize::from(header.bits / 8);
                for (x, (to, from)) in rgb.chunks_exact_mut(3).zip(row.chunks_exact(size)).enumerate() {
                    let word = from.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
                    let [r, g, b, a] = fields.map(|field| field.of(word));
                    to.copy_from_slice(&[r, g, b]);
                    if let Some(alpha) = alpha.get_mut(x) {
                        *alpha = a;
                    }
                }
            }
            (_, None) => unreachable!("a header of 16 or 32 bits has masks"),
        }
    }
    Ok(raster)
}

/// The bits of a word that hold one channel.
#[derive(Clone, Copy, Debug)]
struct Field {
    shift: u32,
    max: u32,
}

impl Field {
    fn new(mask: u32) -> Self {
        let shift = if mask == 0 { 0 } else { mask.trailing_zeros() };
        Self { shift, max: mask >> shift }
    }

    /// The channel stretched over 0…255, rounded down as Pillow rounds 5 and 6 bits.
    fn of(self, word: u32) -> u8 {
        let value = u64::from(word >> self.shift & self.max);
        (value * 255).checked_div(u64::from(self.max)).unwrap_or(0) as u8
    }
}

impl Header {
    fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, ImageProblem> {
        let cut = || ImageProblem::Broken("its data end within its header".into());
        let word = |at: usize| -> Result<u32, ImageProblem> {
            let field = bytes.get(at..at + 4).ok_or_else(cut)?;
            Ok(u32::from_le_bytes([field[0], field[1], field[2], field[3]]))
        };
        let half = |at: usize| Ok::<u32, ImageProblem>(word(at.saturating_sub(2))? >> 16);
        let unsupported = |what: String| Err(ImageProblem::Unsupported(what));

        let declared_offset = word(10)? as usize;
        let size = word(14)? as usize; // of the second header, which starts here
        if ![12, 40, 52, 56, 64, 108, 124].contains(&size) {
            return unsupported(format!("a BMP header of {size} bytes"));
        }
        let core = size == 12; // OS/2's first, with narrower fields
        let (width, height, bits, compression, colours) = if core {
            (half(18)?, half(20)? as i32, half(24)?, 0, 0)
        } else {
            (word(18)?, word(22)? as i32, half(28)?, word(30)?, word(46)?)
        };
        let top_down = height < 0;
        let height = height.unsigned_abs();
        let bits = bits as u16;
        // colour and alpha, and one index a pixel while runs are unrolled
        limits.check(width, height, 3 + 1 + 1)?;

        let mut next = 14 + size;
        let mut masks = None;
        match (compression, bits) {
            (0, 1 | 4 | 8 | 24) => {}
            (0, 16) => masks = Some([0x7c00, 0x3e0, 0x1f, 0]),
            (0, 32) => masks = Some([0xff_0000, 0xff00, 0xff, 0]), // the fourth byte is no alpha
            (1, 8) | (2, 4) => {}
            (3, 16 | 24 | 32) => {
                let mut given = [word(54)?, word(58)?, word(62)?, 0];
                if size >= 56 {
                    given[3] = word(66)?;
                } else if size == 40 {
                    next += 12; // the masks follow the header instead of being part of it
                }
                masks = Some(match (bits, given) {
                    (32, [0, 0, 0, 0]) => [0xff_0000, 0xff00, 0xff, 0xff00_0000],
                    (32, given) => given,
                    (_, [r, g, b, _]) => [r, g, b, 0],
                });
                let [r, g, b, a] = masks.unwrap_or_default();
                let contiguous = [r, g, b, a].into_iter().all(|mask| {
                    let field = Field::new(mask);
                    field.max & field.max.wrapping_add(1) == 0
                });
                if !contiguous
                    || r == 0
                    || g == 0
                    || b == 0
                    || (bits == 24 && [r, g, b] != [0xff_0000, 0xff00, 0xff])
                {
                    return unsupported(format!("BMP bit fields {r:#x}, {g:#x}, {b:#x}, {a:#x}"));
                }
            }
            (0..=3, _) => return unsupported(format!("a BMP of {bits} bits per pixel")),
            (4, _) => return unsupported("a JPEG wrapped in a BMP".into()),
            (5, _) => return unsupported("a PNG wrapped in a BMP".into()),
            _ => return unsupported(format!("BMP compression {compression}")),
        }

        let mut palette = Palette::grey();
        let mut offset = declared_offset;
        if bits <= 8 {
            let entry = if core { 3 } else { 4 }; // bytes of a colour: blue, green, red, nothing
            let colours = if colours == 0 { 1 << bits } else { colours as usize };
            if colours > 65_536 {
                return unsupported(format!("a BMP palette of {colours} colours"));
            }
            if declared_offset == next {
                offset += entry * colours; // the writer forgot the palette
            }
            let stored = bytes.get(next..next + entry * colours).ok_or_else(cut)?;
            next += entry * colours;
            let stored = || stored.chunks_exact(entry).map(|colour| [colour[2], colour[1], colour[0]]);
            // 0, 1, 2, … is no palette but greys, also beyond its end
            let greys =
                bits == 8 && colours > 2 && stored().take(256).enumerate().all(|(i, c)| c == [i as u8; 3]);
            if !greys {
                palette = Palette::new(stored());
            }
        }
        let offset = if offset == 0 { next } else { offset };
        Ok(Self { width, height, top_down, bits, rle: matches!(compression, 1 | 2), masks, palette, offset })
    }
}

/// Unrolls run lengths into one index a pixel, in the file's order of rows.
///
/// Pixels that the runs leave out have index 0. As in Pillow, a bitmap that ends before its last pixel is an error.
fn run_lengths(
    bytes: &[u8],
    offset: usize,
    width: usize,
    height: usize,
    nibbles: bool,
) -> Result<Vec<u8>, ImageProblem> {
    let all = width * height;
    let mut indices = Vec::with_capacity(all);
    let mut at = offset;
    let mut x = 0;
    while indices.len() < all {
        let (Some(&count), Some(&value)) = (bytes.get(at), bytes.get(at + 1)) else { break };
        at += 2;
        match (count, value) {
            (0, 0) => {
                indices.resize(indices.len().next_multiple_of(width), 0);
                x = 0;
            }
            (0, 1) => break,
            (0, 2) => {
                let (Some(&right), Some(&up)) = (bytes.get(at), bytes.get(at + 1)) else { break };
                at += 2;
                let skip = usize::from(right) + usize::from(up) * width;
                indices.resize(all.min(indices.len() + skip), 0);
                x = indices.len() % width;
            }
            (0, literal) => {
                let pixels = usize::from(literal).min(all - indices.len());
                let stored = if nibbles { pixels.div_ceil(2) } else { pixels };
                let Some(run) = bytes.get(at..at + stored) else { break };
                at += stored;
                if nibbles {
                    indices.extend(run.iter().flat_map(|byte| [byte >> 4, byte & 15]).take(pixels));
                } else {
                    indices.extend_from_slice(run);
                }
                x += usize::from(literal);
                at += at % 2; // runs of literals are padded to even places of the file
            }
            (run, _) => {
                let run = usize::from(run).min(width.saturating_sub(x));
                for i in 0..run {
                    indices.push(match nibbles {
                        true if i % 2 == 0 => value >> 4,
                        true => value & 15,
                        false => value,
                    });
                }
                x += run;
            }
        }
    }
    if indices.len() < all {
        let row = indices.len() / width;
        return Err(ImageProblem::Broken(format!("its data end at row {row} of {height}")));
    }
    indices.truncate(all);
    Ok(indices)
}
