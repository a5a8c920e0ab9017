//! JPEG without C, by `zune-jpeg`: the decoder of the `image` crate, asked to be strict so that it does not paint over
//! missing data. Samples differ from Pillow's by up to 5 levels (4:2:0), 3 (4:2:2, 4:4:4), 1 (grey).

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::{Headers, Samples, Stored};
use crate::error::ImageProblem;
use crate::image::Limits;
use crate::image::room::Room;

/// Decodes the file to grey, RGB or (inverted) CMYK.
pub(super) fn decode(
    bytes: &[u8],
    headers: &Headers,
    stored: Stored,
    limits: &Limits,
    room: &dyn Room,
) -> Result<Samples, ImageProblem> {
    let broken = |error: zune_jpeg::errors::DecodeErrors| ImageProblem::Broken(error.to_string());
    let Some(frame) = &headers.frame else {
        return Err(ImageProblem::Broken("it has no frame header".into()));
    };
    if frame.arithmetic {
        return Err(ImageProblem::Unsupported("a JPEG with arithmetic coding".into()));
    }
    if matches!(stored, Stored::Rgb | Stored::Cmyk) {
        return Err(ImageProblem::Unsupported(
            "such a JPEG within TIFF (without the feature `jpeg-exact`)".into(),
        ));
    }
    let (components, space) = match frame.sampling.len() {
        1 => (1, ColorSpace::Luma),
        3 => (3, ColorSpace::RGB),
        4 => (4, ColorSpace::CMYK),
        other => return Err(ImageProblem::Unsupported(format!("a JPEG of {other} components"))),
    };
    // upsampled components and the output, and for progressive files the coefficients
    let coefficients = if frame.progressive { 2 * components } else { 0 };
    limits.check(frame.width, frame.height, (2 * components + 3 + coefficients) as u64)?;

    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(frame.width as usize)
        .set_max_height(frame.height as usize)
        .jpeg_set_out_colorspace(space);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(broken)?;
    if decoder.dimensions() != Some((frame.width as usize, frame.height as usize)) {
        return Err(ImageProblem::Broken("its headers contradict each other".into()));
    }
    let mut data = Samples::memory(frame.width, frame.height, components, room); // [height, width, components]
    if decoder.output_buffer_size() != Some(data.len()) {
        return Err(ImageProblem::Broken("its headers contradict each other".into()));
    }
    decoder.decode_into(&mut data).map_err(broken)?;
    Ok(Samples { width: frame.width, height: frame.height, components, data, faults: Vec::new() })
}
