//! JPEG: `exact` (libjpeg-turbo's arithmetic, in C) or `portable` (pure Rust, up to 5 levels off), chosen once, here.

use super::Limits;
use super::exif::Orientation;
use super::pixels::cmyk_to_rgb;
use super::raster::Raster;
use super::room::{Heap, PixelMemory, Room};
use crate::error::ImageProblem;

// libjpeg reports errors by unwinding; where panics abort, it would take the process along.
#[cfg(all(feature = "jpeg-exact", panic = "unwind"))]
mod exact;
#[cfg(all(feature = "jpeg-exact", panic = "unwind"))]
use exact as decoder;

#[cfg(not(all(feature = "jpeg-exact", panic = "unwind")))]
mod portable;
#[cfg(not(all(feature = "jpeg-exact", panic = "unwind")))]
use portable as decoder;

/// Whether JPEG files decode to Pillow's pixels byte for byte: feature `jpeg-exact`, and not built with
/// `panic = "abort"`. Otherwise samples differ from Pillow's by up to 5 levels.
pub const EXACT: bool = cfg!(all(feature = "jpeg-exact", panic = "unwind"));

/// What a decoder hands over before colours are dealt with.
pub(super) struct Samples {
    pub width: u32,
    pub height: u32,
    /// 1: grey, 3: RGB, 4: CMYK.
    pub components: usize,
    pub data: PixelMemory, // [height, width, components]
    /// Faults survived; each half a sentence.
    faults: Vec<String>,
}

impl Samples {
    /// Memory for samples: from `room` where they are RGB8 already.
    fn memory(width: u32, height: u32, components: usize, room: &dyn Room) -> PixelMemory {
        let bytes = width as usize * height as usize * components;
        PixelMemory::new(if components == 3 { room } else { &Heap }, bytes)
    }
}

/// What the components of a JPEG are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// What its markers say.
    Marked,
    Grey,
    Rgb,
    YCbCr,
    Cmyk,
}

/// Decodes a JPEG file.
pub(super) fn decode(bytes: &[u8], limits: &Limits, room: &dyn Room) -> Result<Raster, ImageProblem> {
    let headers = Headers::parse(bytes);
    let Samples { width, height, components, data, faults } =
        decoder::decode(bytes, &headers, Stored::Marked, limits, room)?;
    let mut raster = match components {
        3 => Raster::of(width, height, data),
        1 => {
            let mut raster = Raster::new(width, height, room);
            raster.rgb.chunks_exact_mut(3).zip(&*data).for_each(|(pixel, &grey)| pixel.fill(grey));
            raster
        }
        _ => {
            let mut raster = Raster::new(width, height, room);
            for (pixel, inverted) in raster.rgb.chunks_exact_mut(3).zip(data.as_chunks::<4>().0) {
                pixel.copy_from_slice(&cmyk_to_rgb(inverted.map(|sample| 255 - sample)));
            }
            raster
        }
    };
    raster.orientation = Orientation::from_exif(&headers.exif);
    raster.faults = faults;
    Ok(raster)
}

/// Decodes the JPEG that is a part of a TIFF file; it must cover `width` × `height` pixels.
pub(super) fn decode_part(
    bytes: &[u8],
    stored: Stored,
    width: u32,
    height: u32,
) -> Result<Samples, ImageProblem> {
    // parts may be padded to whole MCUs, of up to 32 × 32 pixels; beyond that they lie
    let side = width.max(height).saturating_add(64);
    let pixels = (u64::from(width) + 64) * (u64::from(height) + 64);
    let limits = Limits { side, pixels, ..Limits::default() };
    let samples = decoder::decode(bytes, &Headers::parse(bytes), stored, &limits, &Heap)?;
    if samples.width < width || samples.height < height {
        let (w, h) = (samples.width, samples.height);
        return Err(ImageProblem::Broken(format!(
            "the JPEG within has {w}x{h} pixels, not {width}x{height}"
        )));
    }
    Ok(samples)
}

/// What the segments before the first scan tell, without a decoder.
#[derive(Debug, Default)]
struct Headers {
    /// The EXIF block, put together if it was split.
    exif: Vec<u8>,
    /// The frame header: components and sampling factors.
    frame: Option<Frame>,
    /// MCUs between restart markers; 0 = none.
    restart_interval: u32,
    /// Components in the first scan.
    first_scan: usize,
    /// The first byte of entropy-coded data.
    scan_at: usize,
}

/// The frame header (SOF).
#[derive(Debug)]
struct Frame {
    arithmetic: bool,
    progressive: bool,
    width: u32,
    height: u32,
    /// Horizontal and vertical sampling factor of each component.
    sampling: Vec<(u32, u32)>,
}

impl Headers {
    /// Walks the segments as far as they make sense. It judges nothing: decoders do.
    fn parse(bytes: &[u8]) -> Self {
        let mut headers = Self::default();
        let mut at = 2; // past SOI
        while let Some((marker, segment, next)) = segment(bytes, at) {
            match marker {
                0xe1 => {
                    if let Some(block) = segment.strip_prefix(b"Exif\0\0") {
                        headers.exif.extend_from_slice(block);
                    }
                }
                0xdd if segment.len() >= 2 => {
                    headers.restart_interval = u32::from(u16::from_be_bytes([segment[0], segment[1]]));
                }
                0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) && segment.len() >= 6 => {
                    headers.frame = Some(Frame {
                        arithmetic: marker >= 0xc9,
                        progressive: matches!(marker & 3, 2),
                        height: u32::from(u16::from_be_bytes([segment[1], segment[2]])),
                        width: u32::from(u16::from_be_bytes([segment[3], segment[4]])),
                        sampling: segment[6..]
                            .as_chunks::<3>()
                            .0
                            .iter()
                            .take(usize::from(segment[5]))
                            .map(|component| (u32::from(component[1] >> 4), u32::from(component[1] & 15)))
                            .collect(),
                    });
                }
                0xda => {
                    headers.first_scan = segment.first().map_or(0, |&count| count.into());
                    headers.scan_at = next;
                    break;
                }
                _ => {}
            }
            at = next;
        }
        headers
    }
}

#[cfg(all(feature = "jpeg-exact", panic = "unwind"))]
impl Headers {
    /// Whether the first scan has as many restart markers as its size asks for.
    fn has_every_restart(&self, bytes: &[u8]) -> bool {
        let (Some(frame), interval @ 1..) = (&self.frame, self.restart_interval) else { return false };
        // a scan of one component counts in blocks of 8 × 8, one of several in the blocks of the largest factors
        let factor = |of: fn(&(u32, u32)) -> u32| match self.first_scan {
            1 => 1,
            _ => frame.sampling.iter().map(of).max().unwrap_or(1).max(1),
        };
        let across = frame.width.div_ceil(8 * factor(|&(h, _)| h));
        let down = frame.height.div_ceil(8 * factor(|&(_, v)| v));
        let expected = (across * down).div_ceil(interval).saturating_sub(1);

        let mut found = 0;
        let mut at = self.scan_at;
        while let Some(&[byte, next]) = bytes.get(at..).and_then(|rest| rest.first_chunk::<2>()) {
            match (byte, next) {
                (0xff, 0xd0..=0xd7) => found += 1,
                (0xff, 0x01..=0xfe) => break,
                _ => {}
            }
            at += 1;
        }
        found >= expected
    }

    /// Counts the components that any scan holds.
    fn scanned_components(&self, bytes: &[u8]) -> usize {
        let mut seen = [false; 256];
        let mut at = 2;
        while let Some((marker, segment, next)) = segment(bytes, at) {
            if let (0xda, [count, components @ ..]) = (marker, segment) {
                for component in components.chunks_exact(2).take(usize::from(*count)) {
                    seen[usize::from(component[0])] = true;
                }
            }
            at = next;
        }
        seen.iter().filter(|&&seen| seen).count()
    }
}

/// Finds the next segment from byte `at` on: its marker, its payload, and the byte after it.
fn segment(bytes: &[u8], mut at: usize) -> Option<(u8, &[u8], usize)> {
    loop {
        let marker = *bytes.get(at + 1)?;
        match (bytes[at], marker) {
            // stray bytes, fill bytes, and markers without payload
            (0xff, 0x00 | 0x01 | 0xd0..=0xd8) => at += 2,
            (0xff, 0xd9) => return None,
            (0xff, 0xff) => at += 1,
            (0xff, _) => {
                let length = usize::from(u16::from_be_bytes([*bytes.get(at + 2)?, *bytes.get(at + 3)?]));
                let next = at + 2 + length;
                return Some((marker, bytes.get(at + 4..next)?, next));
            }
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_found_past_stray_bytes() {
        let file = [
            &[0xff, 0xd8][..],
            &[0xff, 0xe1, 0, 10, b'E', b'x', b'i', b'f', 0, 0, 7, 8],
            &[1, 2, 0xff, 0xff, 0xff, 0xdd, 0, 4, 0, 9],
            &[0xff, 0xc2, 0, 14, 8, 0, 5, 0, 6, 2, 1, 0x21, 0, 2, 0x11, 0],
            &[0xff, 0xda, 0, 3, 2, 0xaa],
        ]
        .concat();
        let headers = Headers::parse(&file);
        assert_eq!(headers.exif, [7, 8]);
        assert_eq!(headers.restart_interval, 9);
        assert_eq!(headers.first_scan, 2);
        assert_eq!(headers.scan_at, file.len() - 1);
        let frame = headers.frame.expect("a frame header");
        assert_eq!((frame.width, frame.height, frame.progressive, frame.arithmetic), (6, 5, true, false));
        assert_eq!(frame.sampling, [(2, 1), (1, 1)]);
        for end in 0..file.len() {
            Headers::parse(&file[..end]);
        }
    }
}
