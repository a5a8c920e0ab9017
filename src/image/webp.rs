//! WebP: the first frame, by `image`'s decoder. Lossless files equal Pillow; lossy ones are as libwebp draws them,
//! within what the `image-webp` crate promises.

use std::io::Cursor;

use ::image::codecs::webp::WebPDecoder;
use ::image::{ColorType, ImageDecoder as _, ImageError};

use super::Limits;
use super::exif::Orientation;
use super::raster::Raster;
use super::room::{Heap, PixelMemory, Room};
use crate::error::ImageProblem;

/// Decodes a WebP file (of an animation: its first frame, on its canvas).
pub(super) fn decode(bytes: &[u8], limits: &Limits, room: &dyn Room) -> Result<Raster, ImageProblem> {
    // what is missing may be the pixels or, behind them, the orientation: either way it is another picture
    let declared = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    if let Some(missing) = declared.saturating_add(8).checked_sub(bytes.len()).filter(|&missing| missing > 0)
    {
        return Err(ImageProblem::Broken(format!("its data end {missing} bytes early")));
    }
    let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(problem)?;
    let (width, height) = decoder.dimensions();
    // RGBA, three planes of YUV or one of lossless ARGB, and the raster
    limits.check(width, height, 4 + 4 + 4)?;
    let has_alpha = decoder.color_type() == ColorType::Rgba8;
    let place: &dyn Room = if has_alpha { &Heap } else { room };
    let mut samples = PixelMemory::new(place, decoder.total_bytes() as usize); // [height, width, 3 or 4]
    decoder.read_image(&mut samples).map_err(problem)?;

    let mut raster = if has_alpha {
        let mut raster = Raster::new(width, height, room).with_alpha();
        for (y, row) in samples.chunks_exact(4 * width as usize).enumerate() {
            let (rgb, alpha) = raster.row_mut(y);
            for ((rgb, alpha), from) in rgb.chunks_exact_mut(3).zip(alpha).zip(row.as_chunks::<4>().0) {
                rgb.copy_from_slice(&from[..3]);
                *alpha = from[3];
            }
        }
        raster
    } else {
        Raster::of(width, height, samples)
    };
    raster.orientation = chunk(bytes, b"EXIF").map(Orientation::from_exif).unwrap_or_default();
    Ok(raster)
}

/// Finds a chunk of the RIFF container.
fn chunk<'a>(bytes: &'a [u8], name: &[u8; 4]) -> Option<&'a [u8]> {
    let mut rest = bytes.get(12..)?;
    loop {
        let (kind, tail) = rest.split_first_chunk::<4>()?;
        let (length, tail) = tail.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        if kind == name {
            return tail.get(..length);
        }
        rest = tail.get(length.checked_add(length % 2)?..)?;
    }
}

/// Whose fault an error of `image` is.
fn problem(error: ImageError) -> ImageProblem {
    match error {
        ImageError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            ImageProblem::Broken("its data end before its last row".into())
        }
        ImageError::Unsupported(error) => ImageProblem::Unsupported(error.to_string()),
        ImageError::Limits(error) => ImageProblem::TooLarge(error.to_string()),
        other => ImageProblem::Broken(other.to_string()),
    }
}
