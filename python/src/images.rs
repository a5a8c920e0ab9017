//! Images as Python has them: paths, bytes, arrays, PIL's images, features. Pixels are borrowed where their layout allows.

use std::path::PathBuf;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

use imagehere::features::Features;
use imagehere::image::{ImageSource, Limits, RgbImage, RgbView};

use crate::buffer::View;
use crate::errors::argument;
use crate::features::Features as PyFeatures;

/// One image of a call.
pub enum Picture {
    Path(PathBuf),
    /// The bytes of a file, and what messages call it.
    File(String, View),
    /// Rows of RGB8, so many bytes apart.
    Pixels {
        view: View,
        width: u32,
        height: u32,
        stride: usize,
    },
    /// Pixels that lay otherwise.
    Copied(RgbImage),
    Features(Features),
}

impl Picture {
    /// What the library reads.
    pub fn source(&self) -> Option<ImageSource<'_>> {
        match self {
            Self::Path(path) => Some(path.into()),
            // SAFETY: a view's memory stays where it is; who changes it meanwhile gets an image of both.
            Self::File(name, view) => {
                let bytes = unsafe { slice(view.first(), view.bytes()) };
                Some(ImageSource::Named(name.as_str().into(), bytes.into()))
            }
            Self::Pixels { view, width, height, stride } => {
                let bytes = (*height as usize - 1) * stride + 3 * *width as usize;
                // SAFETY: as above; `array` saw that rows of these sizes lie there.
                let data = unsafe { slice(view.first(), bytes) };
                RgbView::new(data, *width, *height, *stride).ok().map(Into::into)
            }
            Self::Copied(image) => Some(image.into()),
            Self::Features(_) => None,
        }
    }

    /// The features that were given instead of an image.
    pub fn features(&self) -> Option<Features> {
        match self {
            Self::Features(features) => Some(features.clone()),
            _ => None,
        }
    }

    /// What messages call it.
    pub fn name(&self, index: usize) -> String {
        self.source().map_or_else(|| format!("features {index}"), |source| source.name())
    }
}

/// # Safety
/// As [`std::slice::from_raw_parts`], but `first` may be null where there are no bytes.
unsafe fn slice<'a>(first: *const u8, bytes: usize) -> &'a [u8] {
    match bytes {
        0 => &[],
        // SAFETY: the caller's promise.
        _ => unsafe { std::slice::from_raw_parts(first, bytes) },
    }
}

/// Takes the images of a call: a list, or one alone.
pub fn pictures(images: &Bound<'_, PyAny>) -> PyResult<Vec<Picture>> {
    if let Some(one) = picture(images, 0)? {
        return Ok(vec![one]);
    }
    let items = images.try_iter().map_err(|_| unknown(images, 0))?;
    let mut pictures = Vec::new();
    for (i, item) in items.enumerate() {
        let item = item?;
        pictures.push(picture(&item, i)?.ok_or_else(|| unknown(&item, i))?);
    }
    Ok(pictures)
}

fn unknown(object: &Bound<'_, PyAny>, index: usize) -> PyErr {
    let class = object.get_type().fully_qualified_name().map_or_else(|_| "?".into(), |name| name.to_string());
    PyTypeError::new_err(format!(
        "image {index} is a {class}. Give a path, the bytes of a file, a PIL image, a uint8 array [height, width, 3] or \
         features"
    ))
}

/// Takes one image; `None` if it is none.
fn picture(object: &Bound<'_, PyAny>, index: usize) -> PyResult<Option<Picture>> {
    if let Ok(features) = object.cast::<PyFeatures>() {
        return Ok(Some(Picture::Features(features.get().inner.clone())));
    }
    if object.is_instance_of::<PyString>() || object.hasattr("__fspath__")? {
        return Ok(Some(Picture::Path(object.extract()?)));
    }
    if object.hasattr("tobytes")? && object.hasattr("convert")? && object.hasattr("mode")? {
        return pil(object, index).map(Some);
    }
    let Some(view) = View::of(object, false) else { return Ok(None) };
    match view.shape().len() {
        1 if matches!(view.format(), "B" | "b" | "c") && view.strides() == [1] => {
            let name = format!("{} bytes in memory", view.bytes());
            Ok(Some(Picture::File(name, view)))
        }
        _ => array(object.py(), view, index).map(Some),
    }
}

/// Takes an image of Pillow's. Its pixels have a fourth byte that nobody asked for: they are copied.
fn pil(image: &Bound<'_, PyAny>, index: usize) -> PyResult<Picture> {
    let mode: String = image.getattr("mode")?.extract()?;
    let rgb = match mode.as_str() {
        "RGB" => image.clone(),
        _ => image.call_method1("convert", ("RGB",))?,
    };
    let (width, height): (u32, u32) = rgb.getattr("size")?.extract()?;
    let pixels = rgb.call_method0("tobytes")?.cast_into::<PyBytes>().map_err(PyErr::from)?;
    let expected = 3 * u64::from(width) * u64::from(height);
    match View::of(&pixels, false) {
        Some(view) if view.bytes() as u64 == expected && expected > 0 => {
            Ok(Picture::Pixels { view, width, height, stride: 3 * width as usize })
        }
        _ => {
            Err(argument(image.py(), format!("image {index} is an image of {width}x{height} without pixels")))
        }
    }
}

/// Takes an array of pixels.
fn array(py: Python<'_>, view: View, index: usize) -> PyResult<Picture> {
    let (shape, format) = (view.shape(), view.format());
    let refuse = |why: &str| {
        Err(argument(
            py,
            format!(
                "image {index} is an array {shape:?} of {format:?}, {why}. Give uint8 [height, width, 3], RGB"
            ),
        ))
    };
    if format != "B" {
        return refuse("not of bytes");
    }
    let (&[height, width, 3], &[down, across, deep]) = (shape, view.strides()) else {
        return refuse("not of three colours");
    };
    let (Ok(width32), Ok(height32)) = (u32::try_from(width), u32::try_from(height)) else {
        return refuse("too large");
    };
    if width == 0 || height == 0 {
        return refuse("without pixels");
    }
    if deep == 1 && across == 3 && down >= 3 * width {
        let stride = down.unsigned_abs();
        return Ok(Picture::Pixels { view, width: width32, height: height32, stride });
    }
    if deep == 1 && across == 3 && height == 1 {
        let stride = 3 * width.unsigned_abs();
        return Ok(Picture::Pixels { view, width: width32, height: height32, stride });
    }
    // An array may be larger than its memory: of broadcasts.
    if u64::from(width32) * u64::from(height32) > Limits::default().pixels {
        return refuse("too large");
    }
    let mut data = Vec::with_capacity(3 * width.unsigned_abs() * height.unsigned_abs());
    for y in 0..height {
        for x in 0..width {
            for colour in 0..3 {
                // SAFETY: element [y, x, colour] of the view.
                data.push(unsafe { *view.first().offset(y * down + x * across + colour * deep) });
            }
        }
    }
    Ok(Picture::Copied(RgbImage { width: width32, height: height32, data }))
}
