//! From a source to the square that the tower sees, several at a time, no more of them decoded at once than there are
//! threads.

use std::ops::Range;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::decode::{Format, decode};
use super::fit::fit;
use super::{DecodeOptions, Frame, ImageSource, Resample, RgbImage};
use crate::error::Result;
use crate::warning::Warning;

/// One image as the tower sees it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Prepared {
    /// The pixels, \[side, side, 3\].
    pub pixels: RgbImage,
    /// What the image was stored as.
    pub format: Format,
    /// Width before resizing, in pixels, turned upright.
    pub width: u32,
    /// Height before resizing, in pixels, turned upright.
    pub height: u32,
    /// What went through but deserves a word; each names the image.
    pub warnings: Vec<Warning>,
    /// Time spent on decoding this image.
    pub decode_time: Duration,
    /// Time spent on resizing it.
    pub resize_time: Duration,
}

/// Decodes one image and makes it fit a frame: that of [`ModelConfig::frame`](crate::config::ModelConfig::frame), or a
/// side in pixels, to which the image is stretched.
///
/// # Errors
/// As [`decode`].
pub fn prepare(
    index: usize,
    source: &ImageSource<'_>,
    frame: impl Into<Frame>,
    rule: Resample,
    options: &DecodeOptions,
) -> Result<Prepared> {
    let start = Instant::now();
    let decoded = decode(index, source, options)?;
    let decode_time = start.elapsed();
    let start = Instant::now();
    let view = decoded.view();
    let pixels = fit(view, frame.into(), rule);
    let resize_time = start.elapsed();
    let (width, height, format) = (view.width(), view.height(), decoded.format);
    Ok(Prepared { pixels, format, width, height, warnings: decoded.warnings, decode_time, resize_time })
}

/// As [`prepare`], for the images of one call, in parallel; each is decoded once, and its full size forgotten before
/// the thread takes the next.
///
/// # Errors
/// As [`decode`]; where several fail, the error is the first one's in the order of `sources`.
pub fn prepare_all(
    sources: &[ImageSource<'_>],
    frame: impl Into<Frame>,
    rule: Resample,
    options: &DecodeOptions,
) -> Result<Vec<Prepared>> {
    prepare_range(sources, 0..sources.len(), frame.into(), rule, options)
}

/// As [`prepare_all`], for some of the images of a call.
pub(crate) fn prepare_range(
    sources: &[ImageSource<'_>],
    range: Range<usize>,
    frame: Frame,
    rule: Resample,
    options: &DecodeOptions,
) -> Result<Vec<Prepared>> {
    let results: Vec<_> =
        range.into_par_iter().map(|index| prepare(index, &sources[index], frame, rule, options)).collect();
    results.into_iter().collect()
}

/// Shares out wall time between decoding and resizing, which overlap, by the time that threads spent on either.
pub(crate) fn share_wall(wall: Duration, decode: Duration, resize: Duration) -> (Duration, Duration) {
    let both = decode + resize;
    if both.is_zero() {
        return (decode, resize);
    }
    let decode = wall.mul_f64(decode.as_secs_f64() / both.as_secs_f64());
    (decode, wall.saturating_sub(decode))
}
