//! The file that features are kept in, and the distrust with which it is read.
//!
//! ```text
//!   8 bytes   length of the header, little-endian
//!   header    JSON: {"__metadata__": {…, "rows": […], "digest": …}, "features": {"dtype": "F16", "shape": [N, P, H], …}}
//!   data      features F16 [N, P, H]
//! ```
//!
//! Any safetensors reader opens it. `rows` has the SHA-256 of each image's rows, `digest` that of shape and metadata:
//! a file that is cut, or has one bit turned over, is refused and never believed. Memory is taken only for bytes that
//! the file has, an image at a time, and what was read is checked before more is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::time::SystemTime;

use half::f16;
use serde::Deserialize;
use serde::de::IgnoredAny;
use sha2::{Digest as _, Sha256};

use crate::error::Result;
use crate::output::safetensors::{Entry, header};
pub(super) use crate::output::sha256;
use crate::output::{AtomicFile, hex};

/// The name of the tensor.
const TENSOR: &str = "features";
/// The format's version: another is refused.
const VERSION: &str = "1";
/// The longest header, in bytes: a thousand images with long names and warnings have less.
const MAX_HEADER: u64 = 8 << 20;
/// The most bytes of one image's features; the published model's have 10 035 200.
const MAX_IMAGE: u64 = 1 << 30;
/// Bytes in front of the header.
const PREFIX: u64 = 8;
/// Names that a message lists.
const LISTED: usize = 4;

/// Why a file of features cannot be used.
#[derive(Debug)]
pub(super) enum Fault {
    /// It cannot be read: the system's answer.
    Io(io::Error),
    /// It is not what was asked for, in a sentence with `it` as its subject.
    Other(String),
    /// What is wrong with what is in it, likewise.
    Bad(String),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Bad("it got shorter while it was read".to_owned()),
            _ => Self::Io(error),
        }
    }
}

/// A file whose header was read and checked against its length; rows follow image by image.
#[derive(Debug)]
pub(super) struct Stored {
    /// What is said of the features; checked against its digest.
    pub metadata: BTreeMap<String, String>,
    /// **N**.
    pub images: usize,
    /// **P**.
    pub patches: usize,
    /// **H**.
    pub hidden: usize,
    file: File,
    rows: std::vec::IntoIter<String>, // [N], digests in hexadecimal; those not read yet
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Header {
    #[serde(rename = "__metadata__")]
    pub metadata: BTreeMap<String, String>,
    pub features: Info,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Info {
    pub dtype: String,
    pub shape: Vec<u64>,
    pub data_offsets: [u64; 2],
}

/// Opens a file of `kind` and reads its header.
pub(super) fn open(path: &Path, kind: &str) -> Result<Stored, Fault> {
    // A pipe would make us wait, a device might never end.
    let found = fs::metadata(path)?;
    if found.is_dir() {
        return Err(Fault::Io(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory")));
    }
    if !found.is_file() {
        return Err(Fault::Io(io::Error::new(io::ErrorKind::InvalidInput, "it is not a plain file")));
    }
    let mut file = File::open(path)?;
    let (header, data) = read_header(&mut file)?;
    let Header { metadata, features } = parse(&header, kind)?;

    let version = metadata.get("format_version").map_or("none", String::as_str);
    if version != VERSION {
        return Err(Fault::Bad(format!(
            "it has format version {version:?}, and this program reads {VERSION:?}"
        )));
    }
    let Info { dtype, shape, data_offsets } = features;
    if dtype != "F16" {
        return Err(Fault::Bad(format!("its features are {dtype:?}, not \"F16\"")));
    }
    let image = match shape[..] {
        [images, patches, hidden] if images > 0 && patches > 0 && hidden > 0 => {
            patches.checked_mul(hidden).and_then(|n| n.checked_mul(2)).filter(|&bytes| bytes <= MAX_IMAGE)
        }
        _ => None,
    };
    let need = image.and_then(|image| image.checked_mul(shape[0]));
    let Some(need) = need else {
        return Err(Fault::Bad(format!("its features have the shape {shape:?}, and [N, P, H] is expected")));
    };
    if data_offsets != [0, need] {
        return Err(Fault::Bad(format!(
            "its features of shape {shape:?} lie at bytes {data_offsets:?}, and need {need} from 0 on"
        )));
    }
    if data < need {
        return Err(Fault::Bad(format!(
            "it is cut: its features need {need} bytes after the header, and it has {data}"
        )));
    }
    if data > need {
        return Err(Fault::Bad(format!("{} bytes at its end belong to no features", data - need)));
    }
    if metadata.get("digest") != Some(&digest(&metadata, &shape)) {
        return Err(Fault::Bad("it is damaged: its header is not what was written".to_owned()));
    }
    let rows: Option<Vec<String>> = metadata.get("rows").and_then(|rows| serde_json::from_str(rows).ok());
    match rows {
        Some(rows) if rows.len() as u64 == shape[0] => Ok(Stored {
            metadata,
            images: shape[0] as usize,
            patches: shape[1] as usize,
            hidden: shape[2] as usize,
            file,
            rows: rows.into_iter(),
        }),
        _ => Err(Fault::Bad(format!("it has not one digest of rows for each of its {} images", shape[0]))),
    }
}

/// Reads the bytes of the header and says how many follow.
fn read_header(file: &mut File) -> Result<(Vec<u8>, u64), Fault> {
    let length = file.metadata()?.len();
    let Some(after) = length.checked_sub(PREFIX) else {
        return Err(Fault::Other(format!("it has {length} bytes, too few for a file of features")));
    };
    let mut prefix = [0; PREFIX as usize];
    file.read_exact(&mut prefix)?;
    let bytes = u64::from_le_bytes(prefix);
    if bytes > MAX_HEADER {
        return Err(Fault::Other(format!(
            "it is no file of features: its header would have {bytes} bytes, and {MAX_HEADER} is the limit"
        )));
    }
    let Some(data) = after.checked_sub(bytes) else {
        return Err(Fault::Bad(format!(
            "it is cut, or no file of features: its header would have {bytes} bytes, and {after} are there"
        )));
    };
    let mut header = vec![0; bytes as usize];
    file.read_exact(&mut header)?;
    Ok((header, data))
}

fn parse(header: &[u8], kind: &str) -> Result<Header, Fault> {
    if header.first() != Some(&b'{') {
        return Err(Fault::Other("it is no file of features: its header is no JSON object".to_owned()));
    }
    let error = match serde_json::from_slice::<Header>(header) {
        Ok(found) if found.metadata.get("kind").is_some_and(|found| found == kind) => return Ok(found),
        Ok(_) => {
            let problem = "it has a tensor `features`, but none that this program keeps there";
            return Err(Fault::Other(problem.to_owned()));
        }
        Err(error) => error,
    };
    let names = serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(header).unwrap_or_default();
    let others = names.keys().filter(|name| *name != TENSOR && *name != "__metadata__");
    let others: Vec<String> = others.take(LISTED).map(|name| format!("{name:?}")).collect();
    Err(match others.is_empty() {
        true => Fault::Bad(format!("it is no file of features, or damaged: {error}")),
        false => {
            let others = others.join(", ");
            Fault::Other(format!("it is a safetensors file, but not one of features: it holds {others}"))
        }
    })
}

impl Stored {
    /// Notes on the file that it was used at this time.
    pub fn touch(&self, now: SystemTime) -> io::Result<()> {
        self.file.set_modified(now)
    }

    /// Reads the next image's features, shape `[P, H]`.
    pub fn next_rows(&mut self) -> Result<Vec<f16>, Fault> {
        let place = self.images - self.rows.len();
        let Some(expected) = self.rows.next() else {
            return Err(Fault::Bad(format!("it has {} images, and no more", self.images)));
        };
        let mut rows = vec![f16::ZERO; self.patches * self.hidden]; // [P, H]; the file has as many
        self.file.read_exact(bytemuck::cast_slice_mut(&mut rows))?;
        if digest_of_rows(&rows) != expected {
            return Err(Fault::Bad(format!(
                "it is damaged: the rows of image {place} are not those written"
            )));
        }
        match not_finite(&rows, self.hidden) {
            Some(problem) => Err(Fault::Bad(format!("image {place} has {problem}"))),
            None => Ok(rows),
        }
    }
}

/// Writes features, each `[P, H]`, and what is said of them, up to the file's name; returns its bytes, too.
///
/// # Errors
/// [`crate::Error::Write`] if the target cannot be written; nothing is left behind then.
pub(super) fn stage(
    path: &Path,
    kind: &str,
    mut metadata: BTreeMap<String, String>,
    features: &[&[f16]],
    hidden: usize,
) -> Result<(AtomicFile, u64)> {
    let patches = features.first().map_or(0, |rows| rows.len() / hidden.max(1));
    let shape = vec![features.len(), patches, hidden]; // [N, P, H]
    let rows: Vec<String> = features.iter().map(|rows| digest_of_rows(rows)).collect();
    for (key, value) in [
        ("format", "pt".to_owned()), // row-major; some loaders ask for this key
        ("format_version", VERSION.to_owned()),
        ("kind", kind.to_owned()),
        ("version", format!("imagehere {}", crate::VERSION)),
        ("rows", serde_json::json!(rows).to_string()),
    ] {
        metadata.insert(key.to_owned(), value);
    }
    let wide: Vec<u64> = shape.iter().map(|&size| size as u64).collect();
    metadata.insert("digest".to_owned(), digest(&metadata, &wide));
    let entry = Entry { name: TENSOR.to_owned(), dtype: "F16", shape, width: size_of::<f16>() };
    let header = header(std::slice::from_ref(&entry), &metadata);

    let mut file = AtomicFile::create(path)?;
    let write = |file: &mut AtomicFile| -> io::Result<()> {
        file.write_all(&header)?;
        features.iter().try_for_each(|rows| file.write_all(bytemuck::cast_slice(rows)))
    };
    write(&mut file).map_err(|error| file.failed(error))?;
    Ok((file, (header.len() + entry.bytes()) as u64))
}

/// Says where the first value is that is NaN or infinite.
pub(super) fn not_finite(rows: &[f16], hidden: usize) -> Option<String> {
    let at = rows.iter().position(|x| !x.is_finite())?;
    Some(format!("{} in row {}, channel {}", rows[at], at / hidden, at % hidden))
}

/// SHA-256 of parts, each with its length in front, so that no two lists run into the same bytes.
pub(super) fn sha256_of<'p>(parts: impl IntoIterator<Item = &'p str>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(hash.finalize())
}

fn digest_of_rows(rows: &[f16]) -> String {
    sha256(bytemuck::cast_slice(rows))
}

/// The digest of shape and metadata, its own place aside.
pub(super) fn digest(metadata: &BTreeMap<String, String>, shape: &[u64]) -> String {
    let shape = format!("{shape:?}");
    let lines = metadata.iter().filter(|(key, _)| *key != "digest");
    sha256_of(std::iter::once(shape.as_str()).chain(lines.flat_map(|(key, value)| [key.as_str(), value])))
}

#[cfg(test)]
mod tests;
