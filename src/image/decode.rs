//! Files to RGB8: limits, format, pixels, alpha, orientation, in this order.

#[cfg(any(feature = "cuda", test))]
use std::any::Any;
use std::borrow::Cow;
use std::fmt;

use rayon::prelude::*;

use super::raster::{Picture, Raster};
#[cfg(any(feature = "cuda", test))]
use super::room::PixelMemory;
use super::room::{Heap, Room};
use super::source::read_file;
use super::{Alpha, DecodeOptions, Exif, ImageSource, Limits, RgbImage, RgbView};
use super::{bmp, gif, jpeg, png, tiff, webp};
use crate::error::{Error, ImageProblem, Result};
use crate::warning::{Warning, WarningKind};

/// What an image was stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// JPEG, whatever its process but lossless and hierarchical.
    Jpeg,
    /// PNG.
    Png,
    /// WebP, lossy or lossless.
    WebP,
    /// GIF.
    Gif,
    /// Windows and OS/2 bitmap.
    Bmp,
    /// TIFF and BigTIFF.
    Tiff,
    /// Pixels that the caller lent.
    Rgb8,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Jpeg => "JPEG",
            Self::Png => "PNG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
            Self::Tiff => "TIFF",
            Self::Rgb8 => "RGB8",
        })
    }
}

impl Format {
    /// Recognises a file by its first bytes; its name never matters.
    ///
    /// # Errors
    /// [`ImageProblem::Unsupported`], naming what the bytes look like.
    pub fn of(bytes: &[u8]) -> Result<Self, ImageProblem> {
        match bytes {
            [0xff, 0xd8, 0xff, ..] => Ok(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Ok(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Ok(Self::Gif),
            [b'I', b'I', 0x2a | 0x2b, 0, ..] | [b'M', b'M', 0, 0x2a | 0x2b, ..] => Ok(Self::Tiff),
            [b'I', b'I', 0, 0x2a, ..] | [b'M', b'M', 0x2a, 0, ..] => Ok(Self::Tiff),
            [b'B', b'M', ..] => Ok(Self::Bmp),
            [] => Err(ImageProblem::Broken("it is empty".into())),
            _ => Err(ImageProblem::Unsupported(looks_like(bytes))),
        }
    }
}

/// Says what bytes are that are none of our formats.
fn looks_like(bytes: &[u8]) -> String {
    const MAGIC: [(usize, &[u8], &str); 21] = [
        (4, b"ftypavif", "an AVIF image"),
        (4, b"ftypavis", "an AVIF image"),
        (4, b"ftyphei", "a HEIC image"),
        (4, b"ftyphev", "a HEIC image"),
        (4, b"ftypmif1", "a HEIF image"),
        (4, b"ftyp", "a video"),
        (0, b"\xff\x0a", "a JPEG XL image"),
        (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
        (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
        (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
        (0, b"8BPS", "a Photoshop document"),
        (0, b"\0\0\x01\0", "an icon"),
        (0, b"qoif", "a QOI image"),
        (0, b"\x76\x2f\x31\x01", "an OpenEXR image"),
        (0, b"%PDF", "a PDF document"),
        (0, b"<svg", "an SVG drawing"),
        (0, b"<?xml", "an XML document (SVG?)"),
        (0, b"<!DOCTYPE", "a web page: the download gave no image"),
        (0, b"<html", "a web page: the download gave no image"),
        (0, b"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
        (0, b"PK\x03\x04", "a zip archive"),
    ];
    let known = MAGIC.iter().find(|(at, magic, _)| bytes.get(*at..).is_some_and(|b| b.starts_with(magic)));
    match known {
        Some((_, _, name)) => format!("it is {name}"),
        None => {
            let (count, first) = (bytes.len(), bytes.iter().take(8).map(|byte| format!("{byte:02x}")));
            let first: Vec<String> = first.collect();
            format!("its {count} bytes start with {}, which no supported format does", first.join(" "))
        }
    }
}

/// RGB8 pixels, decoded or lent, and what was worth a word on the way.
#[derive(Clone, Debug)]
pub struct Decoded<'a> {
    pixels: Pixels<'a>,
    /// What the image was stored as.
    pub format: Format,
    /// What went through but deserves a word; each names the image.
    pub warnings: Vec<Warning>,
}

#[derive(Clone, Debug)]
enum Pixels<'a> {
    Owned(Picture),
    Borrowed(RgbView<'a>),
}

impl<'a> Decoded<'a> {
    /// Takes pixels that the caller lent.
    pub(crate) fn of(view: RgbView<'a>) -> Self {
        Self { pixels: Pixels::Borrowed(view), format: Format::Rgb8, warnings: Vec::new() }
    }

    /// The memory that a room lent for the pixels, if that is where they are and it is a `T`.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn held<T: 'static>(&mut self) -> Option<&mut T> {
        match &mut self.pixels {
            Pixels::Owned(Picture { data: PixelMemory::Held(held), .. }) => {
                let held: &mut dyn Any = &mut **held;
                held.downcast_mut()
            }
            _ => None,
        }
    }

    /// Borrows the pixels: what was decoded, or what the caller lent.
    pub fn view(&self) -> RgbView<'_> {
        match &self.pixels {
            Pixels::Owned(picture) => picture.view(),
            Pixels::Borrowed(view) => *view,
        }
    }

    /// Takes the pixels; lent ones are copied.
    pub fn into_image(self) -> RgbImage {
        match self.pixels {
            Pixels::Owned(picture) => picture.into_image(),
            Pixels::Borrowed(view) => RgbImage {
                width: view.width(),
                height: view.height(),
                data: (0..view.height()).flat_map(|y| view.row(y)).copied().collect(),
            },
        }
    }
}

/// Decodes one image. `index` is its place among the images of the call, for messages.
///
/// Shape: any → \[height, width, 3\] RGB8. Lent pixels pass through, neither copied nor changed.
///
/// # Errors
/// [`Error::Image`] naming the index and the source: unreadable, not of a supported format, broken (its data end
/// before its last row, or contradict themselves), or beyond a limit of [`DecodeOptions::limits`], which the header is
/// held against before memory is asked for.
///
/// # Source
/// Pillow's `Image.open(path).convert("RGB")`; see the table in [`crate::image`].
///
/// ```
/// use imagehere::image::{DecodeOptions, RgbImage, decode};
///
/// let mut file = Vec::new();
/// RgbImage { width: 2, height: 1, data: vec![1, 2, 3, 4, 5, 6] }.write_png(&mut file)?;
/// let decoded = decode::decode(0, &file.into(), &DecodeOptions::default())?;
/// assert_eq!(decoded.view().row(0), [1, 2, 3, 4, 5, 6]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn decode<'a>(index: usize, source: &ImageSource<'a>, options: &DecodeOptions) -> Result<Decoded<'a>> {
    decode_in(&Heap, index, source, options)
}

/// As [`decode`], with the pixels of a file in memory that `room` lends.
///
/// # Errors
/// As [`decode`].
pub(crate) fn decode_in<'a>(
    room: &dyn Room,
    index: usize,
    source: &ImageSource<'a>,
    options: &DecodeOptions,
) -> Result<Decoded<'a>> {
    decode_unnamed(room, index, source, options).map_err(|problem| {
        let remedy = remedy(&problem).to_owned();
        Error::Image { index, name: source.name(), problem, remedy }
    })
}

/// Decodes the images of one call, in parallel.
///
/// # Errors
/// As [`decode`]; where several fail, the error is the first one's in the order of `sources`.
pub fn decode_all<'a>(sources: &[ImageSource<'a>], options: &DecodeOptions) -> Result<Vec<Decoded<'a>>> {
    let results: Vec<_> =
        sources.par_iter().enumerate().map(|(index, source)| decode(index, source, options)).collect();
    results.into_iter().collect()
}

fn decode_unnamed<'a>(
    room: &dyn Room,
    index: usize,
    source: &ImageSource<'a>,
    options: &DecodeOptions,
) -> Result<Decoded<'a>, ImageProblem> {
    let bytes = match source {
        ImageSource::Path(path) => Cow::Owned(read_file(path, &options.limits)?),
        ImageSource::Bytes(bytes) | ImageSource::Named(_, bytes) => {
            options.limits.check_file(bytes.len() as u64)?;
            Cow::Borrowed(&**bytes)
        }
        ImageSource::Rgb8(view) => {
            options.limits.check_size(view.width().into(), view.height().into())?;
            return Ok(Decoded::of(*view));
        }
    };
    let format = Format::of(&bytes)?;
    let raster = raster(format, &bytes, &options.limits, room)?;
    drop(bytes);

    let who = || format!("image {index} ({})", source.name());
    let mut warnings = Vec::new();
    let picture = settle(raster, options, room, who, &mut warnings);
    tracing::debug!(index, %format, width = picture.width, height = picture.height, "decoded");
    Ok(Decoded { pixels: Pixels::Owned(picture), format, warnings })
}

/// Hands the bytes to their decoder.
fn raster(format: Format, bytes: &[u8], limits: &Limits, room: &dyn Room) -> Result<Raster, ImageProblem> {
    match format {
        Format::Jpeg => jpeg::decode(bytes, limits, room),
        Format::Png => png::decode(bytes, limits, room),
        Format::WebP => webp::decode(bytes, limits, room),
        Format::Gif => gif::decode(bytes, limits, room),
        Format::Bmp => bmp::decode(bytes, limits, room),
        Format::Tiff => tiff::decode(bytes, limits, room),
        Format::Rgb8 => unreachable!("no file is recognised as lent pixels"),
    }
}

/// Deals with faults, alpha and orientation; says what a user would want to know.
fn settle(
    mut raster: Raster,
    options: &DecodeOptions,
    room: &dyn Room,
    who: impl Fn() -> String,
    warnings: &mut Vec<Warning>,
) -> Picture {
    for fault in std::mem::take(&mut raster.faults) {
        let message = format!("{} was decoded to its last row, but {fault}", who());
        warnings.push(Warning::new(WarningKind::ImageTolerated, message));
    }

    match options.alpha {
        Alpha::Drop => {
            let (transparent, pixels) =
                (raster.transparent(), raster.width as usize * raster.height as usize);
            if 100 * transparent > pixels {
                let percent = 100.0 * transparent as f64 / pixels as f64;
                let message = format!(
                    "{} is transparent in {percent:.0} % of its pixels, and alpha was dropped: the colours under it \
                     show; `--alpha white` or `--alpha black` composes it over a colour",
                    who()
                );
                warnings.push(Warning::new(WarningKind::AlphaDropped, message));
            }
        }
        Alpha::Over(colour) => raster.compose_over(colour),
    }

    let (number, verb) = (raster.orientation.number(), raster.orientation.verb());
    if number == 1 {
        return raster.into_stored();
    }
    if raster.orientation_is_format {
        let message = format!(
            "{} was {verb}, as its TIFF orientation {number} says (with any `--exif`, as Pillow does it)",
            who()
        );
        warnings.push(Warning::new(WarningKind::ExifApplied, message));
        return raster.into_upright(room);
    }
    match options.exif {
        Exif::Apply => {
            let message = format!(
                "{} was {verb}, as its EXIF orientation {number} says; `--exif ignore` takes the pixels as stored, \
                 as upstream does",
                who()
            );
            warnings.push(Warning::new(WarningKind::ExifApplied, message));
            raster.into_upright(room)
        }
        Exif::Ignore => {
            let message = format!(
                "{} has the EXIF orientation {number}, which was ignored; `--exif apply` has it {verb}",
                who()
            );
            warnings.push(Warning::new(WarningKind::ExifIgnored, message));
            raster.into_stored()
        }
    }
}

/// What to do about a problem.
fn remedy(problem: &ImageProblem) -> &'static str {
    match problem {
        ImageProblem::Unreadable(_) => "Check the path and that you may read it",
        ImageProblem::Unsupported(_) => {
            "Convert it to PNG or JPEG; supported are JPEG, PNG, WebP, GIF, BMP and TIFF"
        }
        ImageProblem::Broken(_) => "Fetch the file again, or open it in an image program and save it anew",
        ImageProblem::TooLarge(_) => {
            "Scale it down (the model sees a few hundred pixels a side), or raise `DecodeOptions::limits`"
        }
        ImageProblem::Layout(_) => {
            "Pass the width and height in pixels and the stride in bytes that the buffer has"
        }
    }
}
