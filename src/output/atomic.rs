//! A file that appears whole or not at all.
//!
//! ```text
//!   create ──▶ write … write ──▶ commit:  fsync ──▶ name it ──▶ fsync the directory
//!     │            │                                  │
//!     └── nothing visible yet ────────────────────────┘        dropped or killed before: nothing is left
//! ```
//!
//! On Linux the bytes go into a file without a name (`O_TMPFILE`), so that even `kill -9` leaves nothing to
//! clean up: the kernel frees what nobody can name. Elsewhere, and on file systems without that, they go
//! into a hidden file beside the target, removed when dropped; only a kill can leave that one behind, and
//! never under the target's name.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Bytes gathered for the disk; larger pieces go there at once.
const BUFFER: usize = 64 << 10;

/// A file being written that nobody sees until [`AtomicFile::commit`].
///
/// Dropped without a commit, it leaves nothing behind, and a file that was there before stays as it was.
///
/// # Examples
/// ```
/// # use std::io::Write;
/// # fn main() -> imagehere::Result<()> {
/// # let dir = tempfile::tempdir().unwrap();
/// let target = dir.path().join("notes.txt");
/// let mut file = imagehere::output::AtomicFile::create(&target)?;
/// file.write_all(b"all of it").unwrap();
/// assert!(!target.exists());
/// file.commit()?;
/// assert_eq!(std::fs::read(&target).unwrap(), b"all of it");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AtomicFile {
    asked: PathBuf,  // as the caller wrote it, for messages
    target: PathBuf, // symlinks resolved: replacing a link's file, not the link
    dir: PathBuf,
    scratch: Scratch,
}

/// Where the bytes are until they have their name.
#[derive(Debug)]
enum Scratch {
    /// An inode without a name.
    #[cfg(target_os = "linux")]
    Unnamed(File),
    /// A hidden file beside the target.
    Named(NamedTempFile),
}

impl AtomicFile {
    /// Starts a file that will be `target`. Creates nothing visible and touches no existing file.
    ///
    /// # Errors
    /// [`Error::Write`] if the directory is missing or not writable, or if `target` is a directory or
    /// anything else that is not a plain file.
    pub fn create(target: impl AsRef<Path>) -> Result<Self> {
        Self::create_as(target.as_ref().to_path_buf(), target.as_ref())
    }

    /// As [`AtomicFile::create`], for a file that messages call `asked`, after the place where it will be in the end.
    pub(crate) fn create_as(asked: PathBuf, target: &Path) -> Result<Self> {
        let (target, dir) = resolve(target).map_err(|e| write_error(&asked, e))?;
        let scratch = Scratch::create(&target, &dir).map_err(|e| write_error(&asked, e))?;
        Ok(Self { asked, target, dir, scratch })
    }

    /// Checks that [`AtomicFile::create`] would succeed, and leaves no trace: for asking before hours of
    /// work, not after.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn check(target: impl AsRef<Path>) -> Result<()> {
        Self::create(target).map(drop)
    }

    /// Gives the file its name, replacing what had it, once its bytes are on the disk.
    ///
    /// # Errors
    /// [`Error::Write`] if the disk is full or fails, or the directory has gone. Nothing is left behind,
    /// and what was at the target stays.
    pub fn commit(self) -> Result<()> {
        self.finish(true)
    }

    /// [`AtomicFile::commit`] without waiting for the disk: for files that can be made again. After a power
    /// cut the file may be there and empty.
    ///
    /// # Errors
    /// As [`AtomicFile::commit`].
    pub fn commit_unsynced(self) -> Result<()> {
        self.finish(false)
    }

    /// Turns a failure to write into this file into the error a user reads.
    pub(crate) fn failed(&self, source: io::Error) -> Error {
        write_error(&self.asked, source)
    }

    fn finish(self, sync: bool) -> Result<()> {
        let Self { asked, target, dir, scratch } = self;
        scratch.publish(&target, &dir, sync).map_err(|e| write_error(&asked, e))
    }
}

/// Starts a file that will be `target` and lets `write` fill it, through a buffer; returns it and its bytes. Nobody sees it
/// before [`AtomicFile::commit`].
///
/// # Errors
/// [`Error::Write`] as [`AtomicFile::create`], or with what `write` fails with; nothing is left behind then.
pub fn stage(
    target: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(AtomicFile, u64)> {
    let mut file = AtomicFile::create(target)?;
    let written = |file: &mut AtomicFile| {
        let mut out = BufWriter::with_capacity(BUFFER, file);
        write(&mut out)?;
        out.flush()?;
        out.get_mut().stream_position()
    };
    match written(&mut file) {
        Ok(bytes) => Ok((file, bytes)),
        Err(error) => Err(file.failed(error)),
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.scratch.file().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.scratch.file().flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.scratch.file().seek(to)
    }
}

impl Scratch {
    fn create(target: &Path, dir: &Path) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        if let Some(file) = linux::unnamed_in(dir)? {
            return Ok(Self::Unnamed(file));
        }
        let prefix = hidden_prefix(target);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(HIDDEN_SUFFIX);
        #[cfg(unix)]
        {
            // What any other program would give a new file; the default here is the owner alone.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        builder.tempfile_in(dir).map(Self::Named)
    }

    fn file(&mut self) -> &mut File {
        match self {
            #[cfg(target_os = "linux")]
            Self::Unnamed(file) => file,
            Self::Named(file) => file.as_file_mut(),
        }
    }

    fn publish(mut self, target: &Path, dir: &Path, sync: bool) -> io::Result<()> {
        if sync {
            self.file().sync_all()?;
        }
        match self {
            #[cfg(target_os = "linux")]
            Self::Unnamed(file) => linux::name(&file, target, dir)?,
            Self::Named(file) => drop(file.persist(target).map_err(|e| e.error)?),
        }
        if sync {
            sync_dir(dir);
        }
        Ok(())
    }
}

/// Resolves symlinks and refuses what a file must not replace. Returns the target and its directory.
fn resolve(asked: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let target = match fs::metadata(asked) {
        Ok(found) if found.is_dir() => {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"));
        }
        // Renaming over /dev/null would replace the device for everyone.
        Ok(found) if !found.is_file() => {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a plain file"));
        }
        Ok(_) => fs::canonicalize(asked)?,
        Err(_) => asked.to_path_buf(),
    };
    if target.file_name().is_none() || asked.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "it names a directory"));
    }
    let dir = parent_of(&target)?;
    Ok((target, dir))
}

/// Returns the directory that `target` will be in, which must be there.
pub(super) fn parent_of(target: &Path) -> io::Result<PathBuf> {
    let dir = match target.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_path_buf(),
        _ => PathBuf::from("."),
    };
    match fs::metadata(&dir) {
        Ok(found) if found.is_dir() => Ok(dir),
        Ok(_) => Err(io::Error::new(io::ErrorKind::NotADirectory, format!("{} is a file", dir.display()))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no directory `{}`", dir.display())))
        }
        Err(e) => Err(e),
    }
}

/// What the hidden name begins with that something has until it is `target`; the end is [`HIDDEN_SUFFIX`].
pub(super) fn hidden_prefix(target: &Path) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(target.file_name().unwrap_or_default());
    prefix.push(".");
    prefix
}

/// What hidden names end with.
pub(super) const HIDDEN_SUFFIX: &str = ".tmp";

/// Waits until the names in a directory are on the disk: without this a power cut can lose them. Not every file system
/// can do it, and the files themselves are safe, so a refusal is no error.
pub(super) fn sync_dir(dir: &Path) {
    #[cfg(unix)]
    let _ = File::open(dir).and_then(|dir| dir.sync_all());
    #[cfg(not(unix))]
    let _ = dir;
}

/// Says what failed and what to do about it.
pub(crate) fn write_error(path: &Path, source: io::Error) -> Error {
    use io::ErrorKind as K;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.display().to_string(),
        _ => ".".to_owned(),
    };
    let remedy = match source.kind() {
        K::NotFound => format!("Create the directory first (`mkdir -p {dir}`) or choose another target"),
        K::NotADirectory => "Choose a target in a directory".to_owned(),
        K::IsADirectory => "Name a file inside it instead".to_owned(),
        K::InvalidInput => "Choose the name of a plain file".to_owned(),
        K::PermissionDenied => {
            format!("Get write permission for the directory `{dir}` or choose another target")
        }
        K::ReadOnlyFilesystem => "Choose a target on a file system that is not read-only".to_owned(),
        K::StorageFull | K::QuotaExceeded | K::FileTooLarge => {
            "Make room there or choose a target on another disk; nothing was left behind".to_owned()
        }
        _ => "Check that directory and its disk, or choose another target".to_owned(),
    };
    Error::Write { path: path.to_path_buf(), source, remedy }
}

#[cfg(target_os = "linux")]
mod linux {
    //! Files without a name, and how they get one.

    use std::fs::{self, File, OpenOptions};
    use std::io;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, OFlags};

    /// Opens a file without a name on the file system of `dir`; `None` where there is no such thing.
    pub fn unnamed_in(dir: &Path) -> io::Result<Option<File>> {
        // Naming it later goes through /proc, which a bare chroot may lack.
        if !Path::new("/proc/self/fd").is_dir() {
            return Ok(None);
        }
        match OpenOptions::new().write(true).custom_flags(OFlags::TMPFILE.bits() as i32).open(dir) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(e),
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => Err(e),
            Err(_) => Ok(None), // not supported here, in one of several spellings
        }
    }

    /// Names `file` `target`, replacing what had the name.
    pub fn name(file: &File, target: &Path, dir: &Path) -> io::Result<()> {
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        let link = |to: &Path| {
            rustix::fs::linkat(CWD, &unnamed, CWD, to, AtFlags::SYMLINK_FOLLOW).map_err(io::Error::from)
        };
        match link(target) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            done => return done,
        }
        // A link cannot replace; a rename can. Between the two the file has a hidden name.
        let hidden = |n: u32| dir.join(format!(".imagehere.{}.{n}.tmp", std::process::id()));
        let mut n = 0;
        let scratch = loop {
            match link(&hidden(n)) {
                Ok(()) => break hidden(n),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && n < 1000 => n += 1,
                Err(e) => return Err(e),
            }
        };
        fs::rename(&scratch, target).inspect_err(|_| drop(fs::remove_file(&scratch)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::testkit::names;

    /// Both kinds of scratch file keep the same promises.
    fn both(target: &Path) -> Vec<AtomicFile> {
        let named = || {
            let (resolved, dir) = resolve(target).unwrap();
            let scratch = Scratch::Named(tempfile::Builder::new().prefix(".x").tempfile_in(&dir).unwrap());
            AtomicFile { asked: target.into(), target: resolved, dir, scratch }
        };
        vec![AtomicFile::create(target).unwrap(), named()]
    }

    #[test]
    fn it_appears_whole_replaces_and_leaves_nothing_else() {
        for kind in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("t.bin");
            for bytes in [&b"first"[..], b"second"] {
                let mut file = both(&target).swap_remove(kind);
                file.write_all(bytes).unwrap();
                assert_ne!(fs::read(&target).ok().as_deref(), Some(bytes));
                file.commit().unwrap();
                assert_eq!(fs::read(&target).unwrap(), bytes);
                assert_eq!(names(dir.path()), ["t.bin"]);
            }
        }
    }

    #[test]
    fn dropped_it_leaves_what_was_there() {
        for kind in 0..2 {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("t.bin");
            let mut file = both(&target).swap_remove(kind);
            file.write_all(b"half").unwrap();
            drop(file);
            assert_eq!(names(dir.path()), [""; 0]);
            fs::write(&target, "old").unwrap();
            both(&target).swap_remove(kind).write_all(b"half").unwrap();
            assert_eq!(names(dir.path()), ["t.bin"]);
            assert_eq!(fs::read(&target).unwrap(), b"old");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn on_linux_the_scratch_file_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = AtomicFile::create(dir.path().join("t.bin")).unwrap();
        if matches!(file.scratch, Scratch::Unnamed(_)) {
            assert_eq!(names(dir.path()), [""; 0]);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_new_file_is_as_readable_as_any_other() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("other"), "").unwrap();
        AtomicFile::create(dir.path().join("ours")).unwrap().commit().unwrap();
        let mode = |name| fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode("ours"), mode("other"));
    }

    #[cfg(unix)]
    #[test]
    fn a_symlink_keeps_pointing() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::write(&real, "old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let mut file = AtomicFile::create(&link).unwrap();
        file.write_all(b"new").unwrap();
        file.commit().unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&real).unwrap(), b"new");
    }

    #[test]
    fn refusals_say_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let refused = |target: PathBuf| AtomicFile::check(target).unwrap_err().to_string();
        let message = refused(dir.path().join("no/such/t.bin"));
        assert!(message.contains("there is no directory") && message.contains("mkdir -p"), "{message}");
        let message = refused(dir.path().to_path_buf());
        assert!(message.contains("it is a directory") && message.contains("Name a file inside"), "{message}");
        let message = refused(dir.path().join("new/"));
        assert!(message.contains("names a directory"), "{message}");
        let message = refused(dir.path().join("file/t.bin"));
        assert!(message.contains("Choose a target in a directory"), "{message}");
        #[cfg(unix)]
        {
            let message = refused("/dev/null".into());
            assert!(message.contains("not a plain file"), "{message}");
        }
        assert_eq!(names(dir.path()), ["file"]);
    }
}
