//! Files of a checkpoint: mapped if they hold weights, read whole if they are small.
//!
//! Tables are looked at where they are mapped. Weights are read by the system's calls ([`MappedFile::read_at`]), which
//! answer for a file that got shorter meanwhile, where a look at the mapping would end the process.
//!
//! The one place of this module that maps memory.

use std::fs::{self, File};
use std::io::Read as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// What a git-lfs pointer begins with, and that of its predecessor.
const POINTERS: [&[u8]; 2] =
    [b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/"];

/// A weights file, mapped read-only.
///
/// The mapping shows the file as it is, not as it was: another process that truncates the file while it is
/// mapped makes the next look at the lost part fail with SIGBUS, which ends this process. Downloaders that
/// write beside the target and rename, as those of the Hub do, are safe: the mapping keeps the old file.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
    #[cfg(unix)]
    file: File,
}

impl MappedFile {
    /// Maps a file; links are followed.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is absent, no regular file, empty, a git-lfs pointer, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        // SAFETY: the contract of `Mmap::map` is that nobody modifies the file while it is mapped. We cannot
        // enforce it, and say so above and in the documentation of `Checkpoint`; every byte we read is read
        // as data whose every bit pattern is valid, and no check of a value is relied on for memory safety.
        let map = unsafe { Mmap::map(&file) };
        let map = map.map_err(|error| {
            Error::checkpoint(
                path,
                format!("cannot map it: {error}"),
                "Check the file and the address space limit",
            )
        })?;
        refuse_pointer(path, &map)?;
        Ok(Self {
            path: path.to_owned(),
            map,
            #[cfg(unix)]
            file,
        })
    }

    /// Reads the bytes from `start` on into `out`, past the mapping: what is no longer there is an error.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the file got shorter since it was opened, or its disk fails.
    ///
    /// # Panics
    /// If the file did not have these bytes when it was opened.
    pub fn read_at(&self, start: usize, out: &mut [u8]) -> Result<()> {
        let mapped = &self.map[start..start + out.len()];
        #[cfg(unix)]
        {
            let _ = mapped;
            use std::os::unix::fs::FileExt as _;
            self.file.read_exact_at(out, start as u64).map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Error::checkpoint(
                    &self.path,
                    format!("it got shorter while it was read: it had {} bytes", self.map.len()),
                    "Run it again once nothing writes to the file any more",
                ),
                _ => cannot_read(&self.path, &error),
            })
        }
        // Elsewhere a file that is mapped cannot be cut.
        #[cfg(not(unix))]
        {
            out.copy_from_slice(mapped);
            Ok(())
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Gives the pages that lie in `range` (bytes) back to the page cache: they no longer count as this
    /// process's memory, and the next access finds them again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            let range = range.start.min(self.map.len())..range.end.min(self.map.len());
            if !range.is_empty() {
                // SAFETY: on a read-only mapping of a file there are no changes that `MADV_DONTNEED` could
                // lose; a later access maps the same page of the file again, also through a live slice.
                let advised = unsafe {
                    self.map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        range.start,
                        range.len(),
                    )
                };
                if let Err(error) = advised {
                    tracing::debug!(path = %self.path.display(), %error, "cannot release mapped pages");
                }
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Reads a small file of a checkpoint (JSON, tokenizer) whole.
///
/// # Errors
/// [`Error::Checkpoint`] if it is absent, no regular file, empty, longer than `limit` bytes or a git-lfs
/// pointer.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    // One byte more than allowed: a file that grows after its size was asked is caught as well.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| cannot_open(path, &error))?;
    if bytes.len() as u64 > limit {
        return Err(Error::checkpoint(
            path,
            format!("it is longer than {limit} bytes, which no such file is"),
            "Download the file again",
        ));
    }
    refuse_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Opens a regular, non-empty file. A named pipe in its place would otherwise block for ever.
fn open_regular(path: &Path) -> Result<File> {
    let metadata = fs::metadata(path).map_err(|error| cannot_open(path, &error))?;
    if !metadata.is_file() {
        return Err(Error::checkpoint(
            path,
            "it is not a regular file",
            "Put the checkpoint's own file there",
        ));
    }
    if metadata.len() == 0 {
        return Err(Error::checkpoint(path, "the file is empty (0 bytes)", "Download the file again"));
    }
    File::open(path).map_err(|error| cannot_open(path, &error))
}

fn cannot_open(path: &Path, error: &std::io::Error) -> Error {
    // The Hub's cache is made of links into `blobs`; an interrupted download leaves them hanging.
    if let Ok(target) = fs::read_link(path)
        && error.kind() == std::io::ErrorKind::NotFound
    {
        let problem = format!("it is a link to {}, which does not exist", target.display());
        return Error::checkpoint(path, problem, "Complete the download");
    }
    let remedy = match error.kind() {
        std::io::ErrorKind::NotFound => "Complete the download, or check the directory",
        std::io::ErrorKind::PermissionDenied => "Make the file readable",
        _ => "Check the file and its disk",
    };
    Error::checkpoint(path, format!("cannot open it: {error}"), remedy)
}

#[cfg(unix)]
fn cannot_read(path: &Path, error: &std::io::Error) -> Error {
    Error::checkpoint(path, format!("cannot read it: {error}"), "Check the file and its disk")
}

fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if POINTERS.iter().any(|pointer| bytes.starts_with(pointer)) {
        return Err(Error::checkpoint(
            path,
            "this is a git-lfs pointer, not the file itself",
            "Run `git lfs install && git lfs pull` in the clone, or download the file from the Hub",
        ));
    }
    Ok(())
}
