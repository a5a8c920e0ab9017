//! GIF: the first frame on its canvas.

use weezl::{BitOrder, LzwStatus, decode::Decoder};

use super::Limits;
use super::pixels::Palette;
use super::raster::Raster;
use super::room::Room;
use crate::error::ImageProblem;

/// Decodes the first frame of a GIF file.
///
/// The canvas grows where the frame sticks out of it. What the frame leaves open, and what it declares transparent,
/// has alpha 0 and, under it, the transparent colour; without one, colour 0.
pub(super) fn decode(bytes: &[u8], limits: &Limits, room: &dyn Room) -> Result<Raster, ImageProblem> {
    let mut reader = Reader { rest: &bytes[6..] }; // past "GIF89a"
    let [w0, w1, h0, h1, flags, _background, _aspect] = reader.array()?;
    let canvas = [u16::from_le_bytes([w0, w1]), u16::from_le_bytes([h0, h1])].map(u32::from);
    let global = reader.palette(flags)?;

    let mut transparent = None;
    let frame = loop {
        match reader.array()? {
            [0x2c] => break Frame::read(&mut reader)?,
            [0x21] => {
                let [label] = reader.array()?;
                let mut first = true;
                while let Some(block) = reader.sub_block()? {
                    if let ([flags, _, _, index, ..], 0xf9, true) = (block, label, first) {
                        transparent = (flags & 1 == 1).then_some(*index);
                    }
                    first = false;
                }
            }
            [0x3b] => return Err(ImageProblem::Broken("it holds no image".into())),
            [_] => {} // stray bytes between blocks
        }
    };

    let width = canvas[0].max(frame.left + frame.width);
    let height = canvas[1].max(frame.top + frame.height);
    limits.check(width, height, 1 + 1 + 3 + 1)?; // frame, canvas, colour, alpha
    limits.check_size(frame.width.into(), frame.height.into())?;

    let (frame_w, frame_h) = (frame.width as usize, frame.height as usize);
    let mut indices = vec![0; frame_w * frame_h]; // [frame_h, frame_w], rows in the file's order
    let (filled, terminated) = frame.unpack(&mut reader, &mut indices)?;
    if filled < indices.len() {
        let row = filled / frame_w;
        return Err(ImageProblem::Broken(format!("its data end at row {row} of {frame_h}")));
    }

    let palette = frame.palette.clone().or(global).unwrap_or_else(Palette::grey);
    let mut raster = Raster::new(width, height, room);
    if transparent.is_some() {
        raster = raster.with_alpha();
    }
    let mut line = vec![transparent.unwrap_or(0); width as usize];
    let mut paint = |y: usize, line: &[u8]| {
        let (rgb, alpha) = raster.row_mut(y);
        palette.row(line, rgb);
        for (alpha, &index) in alpha.iter_mut().zip(line) {
            *alpha = if Some(index) == transparent { 0 } else { 255 };
        }
    };
    (0..height as usize).for_each(|y| paint(y, &line));
    for (row, y) in indices.chunks_exact(frame_w).zip(frame.row_order()) {
        let left = frame.left as usize;
        line[left..left + frame_w].copy_from_slice(row);
        paint(frame.top as usize + y, &line);
    }
    if !terminated {
        raster.faults.push("its end marker is missing".into());
    }
    Ok(raster)
}

/// One frame's description.
struct Frame {
    left: u32,
    top: u32,
    width: u32,
    height: u32,
    interlaced: bool,
    palette: Option<Palette>,
    code_bits: u8,
}

impl Frame {
    fn read(reader: &mut Reader<'_>) -> Result<Self, ImageProblem> {
        let [x0, x1, y0, y1, w0, w1, h0, h1, flags] = reader.array()?;
        let palette = reader.palette(flags)?;
        let [code_bits] = reader.array()?;
        if !(1..=11).contains(&code_bits) {
            return Err(ImageProblem::Broken(format!("its LZW codes start at {code_bits} bits")));
        }
        let [left, top, width, height] =
            [[x0, x1], [y0, y1], [w0, w1], [h0, h1]].map(|pair| u32::from(u16::from_le_bytes(pair)));
        Ok(Self { left, top, width, height, interlaced: flags & 0x40 != 0, palette, code_bits })
    }

    /// Unpacks the frame's indices; says how many there were, and whether the file's end marker was met.
    fn unpack(&self, reader: &mut Reader<'_>, indices: &mut [u8]) -> Result<(usize, bool), ImageProblem> {
        let mut lzw = Decoder::new(BitOrder::Lsb, self.code_bits);
        let mut filled = 0;
        let mut ended = false;
        loop {
            // a block that the file cuts short still holds pixels; no block at all ends them
            let block = reader.sub_block_or_rest();
            let mut data = block.unwrap_or_default();
            while !ended && filled < indices.len() {
                let step = lzw.decode_bytes(data, &mut indices[filled..]);
                data = &data[step.consumed_in..];
                filled += step.consumed_out;
                match step.status {
                    Ok(LzwStatus::Done) => ended = true,
                    Ok(LzwStatus::NoProgress) => break,
                    Ok(LzwStatus::Ok) if step.consumed_in + step.consumed_out == 0 => break,
                    Ok(LzwStatus::Ok) => {}
                    Err(error) => return Err(ImageProblem::Broken(format!("its LZW codes: {error}"))),
                }
            }
            if block.is_none() {
                break;
            }
        }
        Ok((filled, reader.reaches_end()))
    }

    /// The frame's rows in the order in which the file has them.
    fn row_order(&self) -> impl Iterator<Item = usize> {
        let height = self.height as usize;
        let passes: &[(usize, usize)] = match self.interlaced {
            true => &[(0, 8), (4, 8), (2, 4), (1, 2)],
            false => &[(0, 1)],
        };
        passes.iter().flat_map(move |&(first, step)| (first..height).step_by(step))
    }
}

/// The part of the file that has not been read.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], ImageProblem> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or_else(|| ImageProblem::Broken("its data end before its first frame".into()))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ImageProblem> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// Reads the palette that `flags` announce. One of 0, 1, 2, … stands for greys, also beyond its end.
    fn palette(&mut self, flags: u8) -> Result<Option<Palette>, ImageProblem> {
        if flags & 0x80 == 0 {
            return Ok(None);
        }
        let colours = self.take(3 << ((flags & 7) + 1))?.as_chunks::<3>().0;
        let greys = colours.iter().enumerate().all(|(i, colour)| *colour == [i as u8; 3]);
        Ok(Some(if greys { Palette::grey() } else { Palette::new(colours.iter().copied()) }))
    }

    /// Reads the next block of a chain of blocks; `None` at its end.
    fn sub_block(&mut self) -> Result<Option<&'a [u8]>, ImageProblem> {
        match self.array()? {
            [0] => Ok(None),
            [length] => self.take(length.into()).map(Some),
        }
    }

    /// As [`Self::sub_block`], with what is left where the file ends first.
    fn sub_block_or_rest(&mut self) -> Option<&'a [u8]> {
        let (&length, tail) = self.rest.split_first()?;
        if length == 0 {
            self.rest = tail;
            return None;
        }
        let (block, rest) = tail.split_at_checked(length.into()).unwrap_or((tail, &[]));
        self.rest = rest;
        Some(block)
    }

    /// Whether the blocks that follow lead to the end marker.
    fn reaches_end(&mut self) -> bool {
        let mut walk = || -> Result<bool, ImageProblem> {
            loop {
                match self.array()? {
                    [0x3b] => return Ok(true),
                    [0x2c] => {
                        Frame::read(self)?;
                    }
                    [0x21] => drop(self.array::<1>()?),
                    [_] => continue,
                }
                while self.sub_block()?.is_some() {}
            }
        };
        walk().unwrap_or(false)
    }
}
