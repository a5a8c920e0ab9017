//! Features by what the tower saw, in a directory that processes share.
//!
//! ```text
//!   checkpoint ─┐
//!   numerics   ─┼─▶ SHA-256 ─▶ DIR/<64 hex digits>.safetensors     one image: features F16 [1, P, H], its digests
//!   pixels     ─┘
//! ```
//!
//! The key has the pixels themselves, resized, not the file's name or time: how a file became these pixels is all in
//! them. An entry gets its name when it is whole ([`AtomicFile`](crate::output::AtomicFile)), by a rename; who reads
//! believes nothing that does not agree with its digests, and takes everything else for absent, so that it is made
//! again and replaced. Nothing is locked: two writers of one key write the same, and an entry that is taken away while
//! it is read stays readable to who has it open.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use half::f16;

use super::format::{self, Fault, not_finite, sha256_of};
use crate::error::{Error, Result};

/// What an entry calls itself.
const KIND: &str = "imagehere cached features";
/// How an entry's name ends.
const ENDING: &str = ".safetensors";
/// Bytes of an entry beside its rows, at most.
const HEADER: u64 = 1024;
/// The age from which a half-written file is nobody's any more.
const ABANDONED: Duration = Duration::from_secs(3600);

/// A directory of features, found again by checkpoint, device and pixels; bounded in bytes.
///
/// The tower is skipped for an image whose pixels were encoded before: by this checkpoint (as far as its fingerprint
/// tells checkpoints apart), this version of the library, and a device whose bits are the same
/// ([`Encoder::numerics`](crate::Encoder::numerics)). What was not used for longest goes first. Any number of processes may
/// use one directory, and may be killed at any moment; while several write, it may be larger for a moment by what they
/// write. Files that are not the cache's own are never touched. Digests find damage, not malice: whoever may write to the
/// directory decides what is found.
///
/// Give it to [`EncoderOptions::feature_cache`](crate::EncoderOptions::feature_cache).
#[derive(Clone, Debug)]
pub struct FeatureCache {
    dir: PathBuf,
    size: u64, // bytes
}

/// What an entry is found by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key(String); // 64 hexadecimal digits

impl Key {
    /// Of a checkpoint's fingerprint, a backend's numerics, and the digest of pixels.
    pub fn new(fingerprint: &str, numerics: &str, pixels: &str) -> Self {
        Self(sha256_of(["imagehere feature cache 1", crate::VERSION, fingerprint, numerics, pixels]))
    }
}

impl FeatureCache {
    /// The most that a cache holds unless told otherwise, in bytes: 10 GiB, a thousand images of the published model.
    pub const DEFAULT_SIZE: u64 = 10 << 30;

    /// Opens a directory; makes it, and those around it, if it does not exist.
    ///
    /// One that cannot be written to is a cache all the same: what is in it is found, and what could not be kept is a
    /// warning of the call.
    ///
    /// # Errors
    /// [`Error::Argument`] if it is a file or cannot be made.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        let made = match fs::metadata(&dir) {
            Ok(found) if found.is_dir() => Ok(()),
            Ok(_) => Err(io::Error::new(io::ErrorKind::NotADirectory, "it is a file")),
            // Where nothing is named, nothing is what would be made, and entries would lie wherever the process is.
            Err(_) if dir.as_os_str().is_empty() => {
                Err(io::Error::new(io::ErrorKind::NotFound, "it has no name"))
            }
            Err(_) => fs::create_dir_all(&dir),
        };
        match made {
            Ok(()) => Ok(Self { dir, size: Self::DEFAULT_SIZE }),
            Err(error) => Err(Error::argument(
                format!("{} cannot be a feature cache: {error}", dir.display()),
                "Give a directory, or a path where one can be made",
            )),
        }
    }

    /// Sets the most that it holds, in bytes.
    #[must_use]
    pub fn with_size(mut self, bytes: u64) -> Self {
        self.size = bytes;
        self
    }

    /// Returns the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the most that it holds, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Finds the features of a key, shape `[P, H]`, and notes that they were used. Whatever is wrong with an entry, it is
    /// as if it were not there.
    pub(crate) fn get(&self, key: &Key, patches: usize, hidden: usize) -> Option<Vec<f16>> {
        let path = self.path(key);
        let read = || {
            let mut entry = format::open(&path, KIND)?;
            let shape = (entry.images, entry.patches, entry.hidden);
            if shape != (1, patches, hidden) || entry.metadata.get("key") != Some(&key.0) {
                return Err(Fault::Bad("it is another entry under this one's name".to_owned()));
            }
            let rows = entry.next_rows()?;
            // Not ours, or a file system without times: then it only goes sooner.
            let _ = entry.touch(SystemTime::now());
            Ok(rows)
        };
        match read() {
            Ok(rows) => {
                tracing::debug!(path = %path.display(), "found in the feature cache");
                Some(rows)
            }
            Err(Fault::Io(error)) if error.kind() == io::ErrorKind::NotFound => None,
            Err(fault) => {
                tracing::warn!(path = %path.display(), ?fault, "an entry of the feature cache cannot be used");
                None
            }
        }
    }

    /// Keeps features, each `[P, H]`, and takes away what was not used for longest, so that no more is there than may be.
    /// Returns how many were kept: of a call that is larger than the cache, the last.
    ///
    /// # Errors
    /// [`Error::Write`] at the first that cannot be written; those before it are kept.
    pub(crate) fn put(&self, entries: &[(Key, &[f16])], hidden: usize) -> Result<usize> {
        // What the encoder's own check will refuse is not to be found again.
        let sound = entries.iter().filter(|(_, rows)| not_finite(rows, hidden).is_none());
        let mut kept: Vec<&(Key, &[f16])> = Vec::new();
        let mut bytes = 0;
        for entry in sound.rev() {
            let more = size_of_val(entry.1) as u64 + HEADER;
            if bytes + more > self.size {
                break;
            }
            bytes += more;
            kept.push(entry);
        }
        if kept.is_empty() {
            return Ok(0);
        }
        self.trim(bytes);
        for (key, rows) in kept.iter().rev() {
            let metadata = [("key".to_owned(), key.0.clone())].into();
            let (file, _) = format::stage(&self.path(key), KIND, metadata, &[rows], hidden)?;
            file.commit_unsynced()?;
        }
        self.trim(0); // others may have written, too
        Ok(kept.len())
    }

    /// Takes away what was not used for longest until `room` more bytes may come, and half-written files that were
    /// left behind.
    fn trim(&self, room: u64) {
        let Ok(listed) = fs::read_dir(&self.dir) else { return };
        let now = SystemTime::now();
        let mut entries = Vec::new(); // when used, bytes, path
        let mut bytes = room;
        for file in listed.flatten() {
            let (name, Ok(found)) = (file.file_name(), file.metadata()) else { continue };
            let (Some(name), true) = (name.to_str(), found.is_file()) else { continue };
            let used = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            if is_entry(name) {
                bytes += found.len();
                entries.push((used, found.len(), file.path()));
            } else if is_scratch(name) && now.duration_since(used).is_ok_and(|age| age > ABANDONED) {
                let _ = fs::remove_file(file.path());
            }
        }
        if bytes <= self.size {
            return;
        }
        entries.sort();
        for (_, length, path) in entries {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::debug!(path = %path.display(), %error, "cannot take an entry away");
                }
                _ => bytes -= length,
            }
            if bytes <= self.size {
                break;
            }
        }
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{}{ENDING}", key.0))
    }
}

/// Whether an entry has this name.
fn is_entry(name: &str) -> bool {
    name.strip_suffix(ENDING).is_some_and(|key| key.len() == 64 && key.bytes().all(is_hex))
}

/// Whether an entry that is being written may have this name, as [`crate::output::AtomicFile`] gives it.
fn is_scratch(name: &str) -> bool {
    let Some(rest) = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp")) else { return false };
    rest.starts_with("imagehere.")
        || rest.split_once(ENDING).is_some_and(|(key, _)| is_entry(&format!("{key}{ENDING}")))
}

fn is_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests;
