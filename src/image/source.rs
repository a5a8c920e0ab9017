//! Where an image comes from.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{Limits, RgbImage, RgbView};
use crate::error::ImageProblem;

/// One image of a call: a file, the bytes of one, or pixels.
///
/// ```
/// use imagehere::image::{ImageSource, RgbView};
///
/// let file: ImageSource<'_> = "photo.jpg".into();
/// assert_eq!(file.name(), "photo.jpg");
/// let pixels = [0u8; 2 * 3 * 3];
/// let pixels: ImageSource<'_> = RgbView::new(&pixels, 2, 3, 6).unwrap().into();
/// assert_eq!(pixels.name(), "2x3 pixels in memory");
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ImageSource<'a> {
    /// A file to read.
    Path(Cow<'a, Path>),
    /// The bytes of a file, in memory.
    Bytes(Cow<'a, [u8]>),
    /// The bytes of a file, and what messages call it: `stdin`, an address, a key.
    Named(Cow<'a, str>, Cow<'a, [u8]>),
    /// Pixels: nothing to decode, nothing copied.
    Rgb8(RgbView<'a>),
}

impl ImageSource<'_> {
    /// Returns what messages call it: its path, its name, or what stands for one.
    pub fn name(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Bytes(bytes) => format!("{} bytes in memory", bytes.len()),
            Self::Named(name, _) => name.to_string(),
            Self::Rgb8(view) => format!("{}x{} pixels in memory", view.width(), view.height()),
        }
    }
}

impl<'a> From<&'a Path> for ImageSource<'a> {
    fn from(path: &'a Path) -> Self {
        Self::Path(Cow::Borrowed(path))
    }
}

impl<'a> From<&'a PathBuf> for ImageSource<'a> {
    fn from(path: &'a PathBuf) -> Self {
        Self::Path(Cow::Borrowed(path))
    }
}

impl From<PathBuf> for ImageSource<'_> {
    fn from(path: PathBuf) -> Self {
        Self::Path(Cow::Owned(path))
    }
}

impl<'a> From<&'a str> for ImageSource<'a> {
    /// The path of a file.
    fn from(path: &'a str) -> Self {
        Self::Path(Cow::Borrowed(Path::new(path)))
    }
}

impl<'a> From<&'a [u8]> for ImageSource<'a> {
    /// The bytes of a file.
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(Cow::Borrowed(bytes))
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for ImageSource<'a> {
    /// The bytes of a file, as `include_bytes!` gives them.
    fn from(bytes: &'a [u8; N]) -> Self {
        Self::Bytes(Cow::Borrowed(bytes))
    }
}

impl From<Vec<u8>> for ImageSource<'_> {
    /// The bytes of a file.
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(Cow::Owned(bytes))
    }
}

impl<'a> From<RgbView<'a>> for ImageSource<'a> {
    fn from(view: RgbView<'a>) -> Self {
        Self::Rgb8(view)
    }
}

impl<'a> From<&'a RgbImage> for ImageSource<'a> {
    fn from(image: &'a RgbImage) -> Self {
        Self::Rgb8(image.view())
    }
}

/// Reads a stream (stdin, say) to its end, or to one byte past `limit` bytes, where it gives up.
///
/// # Errors
/// [`ImageProblem::TooLarge`] beyond `limit`; [`ImageProblem::Unreadable`] with the system's reason.
pub fn read_limited(reader: impl Read, limit: u64) -> Result<Vec<u8>, ImageProblem> {
    let mut bytes = Vec::new();
    reader.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(ImageProblem::Unreadable)?;
    if bytes.len() as u64 > limit {
        return Err(ImageProblem::TooLarge(format!("it has more than {limit} bytes, the limit")));
    }
    Ok(bytes)
}

/// Reads a file within the limit: its length is looked at first, and not trusted.
pub(super) fn read_file(path: &Path, limits: &Limits) -> Result<Vec<u8>, ImageProblem> {
    let file = File::open(path).map_err(ImageProblem::Unreadable)?;
    let metadata = file.metadata().map_err(ImageProblem::Unreadable)?;
    if metadata.is_dir() {
        return Err(ImageProblem::Unreadable(std::io::ErrorKind::IsADirectory.into()));
    }
    limits.check_file(metadata.len())?;
    read_limited(file, limits.file_bytes)
}
