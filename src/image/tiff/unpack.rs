//! The parts of a TIFF file, from packed bytes to rows of samples.

use std::io::Read;

use fax::Color;
use fax::decoder::{DecodeStatus, Group4Decoder, pels};
use weezl::{BitOrder, LzwStatus};

use super::super::jpeg;
use crate::error::ImageProblem;

/// How bytes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    None,
    PackBits,
    Lzw,
    Deflate,
    Group4,
    Jpeg,
}

impl Coding {
    pub fn new(number: u64) -> Result<Self, ImageProblem> {
        let name = match number {
            1 => return Ok(Self::None),
            4 => return Ok(Self::Group4),
            5 => return Ok(Self::Lzw),
            7 => return Ok(Self::Jpeg),
            8 | 32946 => return Ok(Self::Deflate),
            32773 => return Ok(Self::PackBits),
            2 => "CCITT run lengths",
            3 => "CCITT group 3",
            6 => "old-style JPEG",
            34887 => "LERC",
            34925 => "LZMA",
            50000 => "zstd",
            50001 => "WebP",
            _ => return Err(ImageProblem::Unsupported(format!("a TIFF of compression {number}"))),
        };
        Err(ImageProblem::Unsupported(format!("a TIFF compressed with {name}")))
    }
}

/// The rectangle that a part unpacks to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub width: usize,
    pub rows: usize,
    pub samples: usize,
    pub bits: usize,
}

impl Shape {
    fn row_bytes(self) -> usize {
        (self.width * self.samples * self.bits).div_ceil(8)
    }
}

/// What all parts of a page have in common.
#[derive(Debug)]
pub(super) struct Packing {
    pub coding: Coding,
    pub predictor: u64,
    /// Each byte's bits are stored in reverse.
    pub reversed: bool,
    pub little_endian: bool,
    pub jpeg_tables: Vec<u8>,
    pub fax_options: u64,
}

impl Packing {
    /// Unpacks `stored` to exactly `out`: `shape.rows` rows.
    pub fn unpack(
        &self,
        stored: &[u8],
        shape: Shape,
        colours: jpeg::Stored,
        out: &mut [u8],
    ) -> Result<(), ImageProblem> {
        let flipped: Vec<u8>;
        let stored = if self.reversed && self.coding != Coding::Jpeg {
            let used = if self.coding == Coding::None { out.len().min(stored.len()) } else { stored.len() };
            flipped = stored[..used].iter().map(|byte| byte.reverse_bits()).collect();
            &flipped
        } else {
            stored
        };
        match self.coding {
            Coding::None => out.copy_from_slice(stored.get(..out.len()).ok_or_else(early)?),
            Coding::PackBits => pack_bits(stored, out)?,
            Coding::Lzw => lzw(stored, out)?,
            Coding::Deflate => {
                flate2::read::ZlibDecoder::new(stored).read_exact(out).map_err(|error| {
                    match error.kind() {
                        std::io::ErrorKind::UnexpectedEof => early(),
                        _ => ImageProblem::Broken(format!("its deflate stream: {error}")),
                    }
                })?;
            }
            Coding::Group4 => self.group_4(stored, shape, out)?,
            Coding::Jpeg => self.jpeg(stored, shape, colours, out)?,
        }
        if matches!(self.coding, Coding::Lzw | Coding::Deflate) {
            self.undo_prediction(shape, out)?;
        }
        Ok(())
    }

    /// CCITT group 4: a black pixel is a 1.
    fn group_4(&self, stored: &[u8], shape: Shape, out: &mut [u8]) -> Result<(), ImageProblem> {
        let broken = || ImageProblem::Broken("its group 4 codes make no sense".into());
        let width = u16::try_from(shape.width).ok().filter(|_| shape.samples * shape.bits == 1);
        let Some(width) = width.filter(|_| self.fax_options & 2 == 0) else {
            return Err(ImageProblem::Unsupported("such a TIFF in CCITT group 4".into()));
        };
        let bytes = stored.iter().map(|&byte| Ok::<u8, std::convert::Infallible>(byte));
        let mut decoder = Group4Decoder::new(bytes, width).map_err(|_| broken())?;
        for row in out.chunks_exact_mut(shape.row_bytes()) {
            if decoder.advance().map_err(|_| broken())? == DecodeStatus::End {
                return Err(early());
            }
            row.fill(0);
            for (x, colour) in pels(decoder.transition(), width).enumerate() {
                if colour == Color::Black {
                    row[x / 8] |= 0x80 >> (x % 8);
                }
            }
        }
        Ok(())
    }

    /// JPEG, whose tables may stand apart.
    fn jpeg(
        &self,
        stored: &[u8],
        shape: Shape,
        colours: jpeg::Stored,
        out: &mut [u8],
    ) -> Result<(), ImageProblem> {
        // both have a start and an end marker: two of the four go
        let whole: Vec<u8>;
        let file = match (self.jpeg_tables.strip_suffix(&[0xff, 0xd9]), stored.strip_prefix(&[0xff, 0xd8])) {
            (Some(tables), Some(rest)) => {
                whole = [tables, rest].concat();
                &whole
            }
            _ => stored,
        };
        let samples = jpeg::decode_part(file, colours, shape.width as u32, shape.rows as u32)?;
        let row_bytes = shape.row_bytes();
        if samples.components != shape.samples || shape.bits != 8 {
            return Err(ImageProblem::Broken("the JPEG within has other components than it says".into()));
        }
        let width = samples.width as usize * samples.components;
        for (to, from) in out.chunks_exact_mut(row_bytes).zip(samples.data.chunks_exact(width)) {
            to.copy_from_slice(&from[..row_bytes]);
        }
        Ok(())
    }

    /// Turns differences back into samples, row by row.
    fn undo_prediction(&self, shape: Shape, out: &mut [u8]) -> Result<(), ImageProblem> {
        let rows = out.chunks_exact_mut(shape.row_bytes());
        let step = shape.samples;
        match (self.predictor, shape.bits) {
            (1, _) => {}
            (2, 8) => rows.for_each(|row| sum_up(row, step, u8::wrapping_add)),
            (2, 16 | 32) => {
                let bytes = shape.bits / 8;
                let load = |sample: &[u8]| {
                    let push = |word: u32, &byte: &u8| word << 8 | u32::from(byte);
                    match self.little_endian {
                        true => sample.iter().rev().fold(0, push),
                        false => sample.iter().fold(0, push),
                    }
                };
                rows.for_each(|row| {
                    for at in (step * bytes..row.len()).step_by(bytes) {
                        let before = at - step * bytes;
                        let sum = load(&row[at..at + bytes]).wrapping_add(load(&row[before..before + bytes]));
                        let sample = &mut row[at..at + bytes];
                        match self.little_endian {
                            true => sample.copy_from_slice(&sum.to_le_bytes()[..bytes]),
                            false => sample.copy_from_slice(&sum.to_be_bytes()[4 - bytes..]),
                        }
                    }
                });
            }
            (3, 32) => rows.for_each(|row| {
                // the first bytes of all samples, then the second, …: most significant first
                sum_up(row, step, u8::wrapping_add);
                let planes = row.to_vec();
                let count = row.len() / 4;
                for (i, sample) in row.chunks_exact_mut(4).enumerate() {
                    for (byte, slot) in sample.iter_mut().enumerate() {
                        let plane = if self.little_endian { 3 - byte } else { byte };
                        *slot = planes[plane * count + i];
                    }
                }
            }),
            (predictor, bits) => {
                return Err(ImageProblem::Unsupported(format!(
                    "a TIFF with predictor {predictor} over samples of {bits} bits"
                )));
            }
        }
        Ok(())
    }
}

fn early() -> ImageProblem {
    ImageProblem::Broken("its data end before its last row".into())
}

/// Adds to each element the one `step` before it.
fn sum_up<T: Copy>(row: &mut [T], step: usize, add: fn(T, T) -> T) {
    for at in step..row.len() {
        row[at] = add(row[at], row[at - step]);
    }
}

/// Apple's run lengths.
fn pack_bits(mut stored: &[u8], out: &mut [u8]) -> Result<(), ImageProblem> {
    let mut filled = 0;
    while filled < out.len() {
        let (&head, rest) = stored.split_first().ok_or_else(early)?;
        let room = out.len() - filled;
        stored = match head {
            0..=127 => {
                let (run, rest) = rest.split_at_checked(usize::from(head) + 1).unwrap_or((rest, &[]));
                let used = run.len().min(room);
                out[filled..filled + used].copy_from_slice(&run[..used]);
                filled += used;
                rest
            }
            128 => rest,
            _ => {
                let (&value, rest) = rest.split_first().ok_or_else(early)?;
                let used = (257 - usize::from(head)).min(room);
                out[filled..filled + used].fill(value);
                filled += used;
                rest
            }
        };
    }
    Ok(())
}

/// LZW as TIFF 6 has it: most significant bit first, codes that widen one early.
fn lzw(stored: &[u8], out: &mut [u8]) -> Result<(), ImageProblem> {
    if let [0, second, ..] = stored
        && second & 1 == 1
    {
        return Err(ImageProblem::Unsupported("a TIFF compressed with LZW of before 1988".into()));
    }
    let mut decoder = weezl::decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8);
    let (mut data, mut filled) = (stored, 0);
    while filled < out.len() {
        let step = decoder.decode_bytes(data, &mut out[filled..]);
        data = &data[step.consumed_in..];
        filled += step.consumed_out;
        match step.status {
            Ok(LzwStatus::Ok) if step.consumed_in + step.consumed_out > 0 => {}
            Ok(_) => break,
            Err(error) => return Err(ImageProblem::Broken(format!("its LZW codes: {error}"))),
        }
    }
    if filled < out.len() { Err(early()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_lengths_unpack() {
        let stored = [0xfe, 0xaa, 0x02, 0x80, 0x00, 0x2a, 0x80, 0xfd, 0xbb, 0x00, 0x11];
        let expected = [0xaa, 0xaa, 0xaa, 0x80, 0x00, 0x2a, 0xbb, 0xbb, 0xbb, 0xbb, 0x11];
        let mut out = [0; 11];
        pack_bits(&stored, &mut out).unwrap();
        assert_eq!(out, expected);
        let mut fewer = [0; 8]; // the last run is longer than its room
        pack_bits(&stored, &mut fewer).unwrap();
        assert_eq!(fewer, expected[..8]);
        assert!(pack_bits(&stored, &mut [0; 12]).is_err());
        assert!(pack_bits(&[0x05, 1, 2], &mut [0; 6]).is_err());
        assert!(pack_bits(&[0xfe], &mut [0; 3]).is_err());
    }

    #[test]
    fn predictions_are_undone() {
        let packing = |predictor, little_endian| Packing {
            coding: Coding::Lzw,
            predictor,
            reversed: false,
            little_endian,
            jpeg_tables: Vec::new(),
            fax_options: 0,
        };
        let shape = |width, samples, bits| Shape { width, rows: 1, samples, bits };
        let mut row = [1, 10, 2, 250, 255, 7];
        packing(2, true).undo_prediction(shape(3, 2, 8), &mut row).unwrap();
        assert_eq!(row, [1, 10, 3, 4, 2, 11]);
        let mut row = [0x01, 0xff, 0x00, 0x03];
        packing(2, false).undo_prediction(shape(2, 1, 16), &mut row).unwrap();
        assert_eq!(row, [0x01, 0xff, 0x02, 0x02]);
        let mut row = [0xff, 0x01, 0x03, 0x00];
        packing(2, true).undo_prediction(shape(2, 1, 16), &mut row).unwrap();
        assert_eq!(row, [0xff, 0x01, 0x02, 0x02]);
        let error = packing(2, true).undo_prediction(shape(8, 1, 1), &mut [0]).unwrap_err();
        assert!(matches!(error, ImageProblem::Unsupported(_)));
    }
}
