//! A directory that appears whole or not at all.
//!
//! ```text
//!   create ──▶ file, write, commit … ──▶ commit:  fsync the directory ──▶ rename it ──▶ fsync the one around it
//!     │            │                                       │
//!     └── hidden, beside the target ───────────────────────┘        dropped before: removed
//! ```
//!
//! Its files are [`AtomicFile`]s in a hidden directory: each is on the disk before it has a name there, and all are
//! before the directory has its own. A kill can leave the hidden directory behind, with the files that were whole by
//! then, and never anything under the target's name. On Unix whoever fills a directory holds a lock on it, which ends
//! with the process however that ends: the next one that makes the same target removes what nobody holds.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::atomic::{HIDDEN_SUFFIX, hidden_prefix, parent_of, sync_dir};
use super::{AtomicFile, write_error};
use crate::error::{Error, Result};

/// A directory being filled that nobody sees until [`StagedDir::commit`].
///
/// Dropped without a commit, it leaves nothing behind. It never replaces a directory with something in it.
///
/// # Examples
/// ```
/// # use std::io::Write;
/// # fn main() -> imagehere::Result<()> {
/// # let place = tempfile::tempdir().unwrap();
/// let target = place.path().join("notes");
/// let notes = imagehere::output::StagedDir::create(&target)?;
/// let mut file = notes.file("first.txt")?;
/// file.write_all(b"all of it").unwrap();
/// file.commit()?;
/// assert!(!target.exists());
/// notes.commit()?;
/// assert_eq!(std::fs::read(target.join("first.txt")).unwrap(), b"all of it");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct StagedDir {
    asked: PathBuf,  // as the caller wrote it, for messages
    target: PathBuf, // symlinks resolved: replacing a link's directory, not the link
    parent: PathBuf,
    hidden: TempDir,
    /// Says that somebody fills the directory; `None` where directories cannot be locked.
    lock: Option<File>,
}

impl StagedDir {
    /// Starts a directory that will be `target`, which must not exist or be empty.
    ///
    /// # Errors
    /// [`Error::Write`] if `target` is there and is anything but an empty directory, or one that cannot be replaced
    /// (where the program runs, or where a disk is mounted), or if the directory around it is missing or not writable.
    pub fn create(target: impl AsRef<Path>) -> Result<Self> {
        let asked = target.as_ref().to_path_buf();
        let start = || {
            let (target, parent) = resolve(&asked)?;
            let prefix = hidden_prefix(&target);
            remove_abandoned(&parent, &prefix);
            let mut builder = tempfile::Builder::new();
            builder.prefix(&prefix).suffix(HIDDEN_SUFFIX);
            #[cfg(unix)]
            {
                // What any other program would give a new directory; the default here is the owner alone.
                use std::os::unix::fs::PermissionsExt;
                builder.permissions(fs::Permissions::from_mode(0o777));
            }
            let (hidden, lock) = loop {
                let hidden = builder.tempdir_in(&parent)?;
                if let Held::By(lock) = hold(hidden.path()) {
                    break (hidden, lock);
                }
                // Somebody took it for abandoned before it was locked, and removes it: another one, then.
            };
            Ok((target, parent, hidden, lock))
        };
        match start() {
            Ok((target, parent, hidden, lock)) => Ok(Self { asked, target, parent, hidden, lock }),
            Err(e) => Err(dir_error(&asked, e)),
        }
    }

    /// Checks that [`StagedDir::create`] would succeed, and leaves no trace: for asking before hours of work, not
    /// after.
    ///
    /// # Errors
    /// As [`StagedDir::create`].
    pub fn check(target: impl AsRef<Path>) -> Result<()> {
        Self::create(target).map(drop)
    }

    /// Starts a file of the directory. It is in it once it is committed.
    ///
    /// # Errors
    /// [`Error::Write`] if it cannot be written; the message calls it by the path that it will have.
    pub fn file(&self, name: &str) -> Result<AtomicFile> {
        AtomicFile::create_as(self.asked.join(name), &self.hidden.path().join(name))
    }

    /// Returns where the files are until the directory has its name.
    pub(crate) fn path(&self) -> &Path {
        self.hidden.path()
    }

    /// Gives the directory its name, with all files that were committed; they are on the disk by then.
    ///
    /// # Errors
    /// [`Error::Write`] if something has come under that name meanwhile, or the disk fails. Nothing is left behind,
    /// and what is at the target stays.
    pub fn commit(self) -> Result<()> {
        let Self { asked, target, parent, hidden, lock } = self;
        sync_dir(hidden.path());
        #[cfg(not(unix))]
        let _ = fs::remove_dir(&target); // only if it is empty; elsewhere the renaming itself replaces it
        fs::rename(hidden.path(), &target).map_err(|e| dir_error(&asked, e))?;
        let _ = hidden.keep(); // there is nothing under that name any more
        drop(lock);
        sync_dir(&parent);
        Ok(())
    }
}

/// Whose a directory is.
enum Held {
    /// Ours; without a lock where there is no such thing.
    By(Option<File>),
    /// Another process's, or nobody's any more.
    ByAnother,
}

/// Locks a directory. The lock goes with the process, or with the file that is returned.
fn hold(dir: &Path) -> Held {
    if !cfg!(unix) {
        return Held::By(None);
    }
    let file = match File::open(dir) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Held::ByAnother,
        Err(_) => return Held::By(None),
    };
    match file.try_lock() {
        Ok(()) if is(&file, dir) => Held::By(Some(file)),
        Ok(()) | Err(TryLockError::WouldBlock) => Held::ByAnother,
        Err(TryLockError::Error(_)) => Held::By(None), // then nobody can lock it, and nobody removes it
    }
}

/// Whether `path` still names the directory that was opened.
fn is(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |found: fs::Metadata| (found.dev(), found.ino());
        file.metadata().ok().map(id) == path.symlink_metadata().ok().map(id)
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}

/// Removes the hidden directories of a target that killed processes left. Whatever does not work out stays there: it is
/// in nobody's way.
fn remove_abandoned(parent: &Path, prefix: &OsStr) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let ours = is_hidden_name(&name, prefix) && entry.file_type().is_ok_and(|kind| kind.is_dir());
        if ours && let Held::By(Some(lock)) = hold(&entry.path()) {
            match fs::remove_dir_all(entry.path()) {
                Ok(()) => {
                    tracing::debug!(path = %entry.path().display(), "removed what a killed process left")
                }
                Err(error) => tracing::debug!(path = %entry.path().display(), %error, "cannot remove it"),
            }
            drop(lock);
        }
    }
}

/// Whether [`StagedDir::create`] gives such names: the prefix, six characters, the suffix.
fn is_hidden_name(name: &OsStr, prefix: &OsStr) -> bool {
    let middle = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
    let middle = middle.and_then(|rest| rest.strip_suffix(HIDDEN_SUFFIX.as_bytes()));
    middle.is_some_and(|middle| middle.len() == 6 && middle.iter().all(u8::is_ascii_alphanumeric))
}

/// Resolves symlinks and refuses what must not be replaced. Returns the target and the directory around it.
fn resolve(asked: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let refuse = |kind, problem: String| Err(io::Error::new(kind, problem));
    let taken = io::ErrorKind::AlreadyExists;
    let target: PathBuf = match fs::metadata(asked) {
        Ok(found) if found.is_dir() => {
            if let Some(entry) = fs::read_dir(asked)?.next() {
                let name = entry?.file_name();
                return refuse(taken, format!("it is not empty: it holds {}", name.display()));
            }
            fs::canonicalize(asked)?
        }
        Ok(_) => return refuse(taken, "it is a file".to_owned()),
        Err(_) if asked.symlink_metadata().is_ok() => {
            return refuse(taken, "it is a link that leads nowhere".to_owned());
        }
        Err(_) => asked.components().collect(), // without a slash at its end
    };
    if target.file_name().is_none() {
        return refuse(io::ErrorKind::InvalidInput, "it is no name of a directory".to_owned());
    }
    let parent = parent_of(&target)?;
    if target.exists() {
        if std::env::current_dir().and_then(fs::canonicalize).is_ok_and(|here| here == target) {
            return refuse(io::ErrorKind::ResourceBusy, "it is the directory that this runs in".to_owned());
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            if fs::metadata(&target)?.dev() != fs::metadata(&parent)?.dev() {
                return refuse(io::ErrorKind::ResourceBusy, "a disk is mounted there".to_owned());
            }
        }
    }
    Ok((target, parent))
}

/// Says what failed and what to do about it, where that is not what it is for a file.
fn dir_error(path: &Path, source: io::Error) -> Error {
    use io::ErrorKind as K;
    let remedy = match source.kind() {
        K::AlreadyExists | K::DirectoryNotEmpty | K::NotADirectory => {
            "Choose a directory that is empty or does not exist yet; nothing was changed"
        }
        K::ResourceBusy => "Name a directory inside it, one that does not exist yet; nothing was changed",
        K::InvalidInput => "Give the name of a directory that is empty or does not exist yet",
        _ => return write_error(path, source),
    };
    Error::Write { path: path.to_path_buf(), source, remedy: remedy.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::output::testkit::names;

    fn add(dir: &StagedDir, name: &str, bytes: &[u8]) {
        let mut file = dir.file(name).unwrap();
        file.write_all(bytes).unwrap();
        file.commit().unwrap();
    }

    #[test]
    fn it_appears_whole_with_the_files_that_were_committed() {
        let place = tempfile::tempdir().unwrap();
        for (there, name) in [(false, "new"), (true, "empty"), (false, "slash/")] {
            let target = place.path().join(name);
            if there {
                fs::create_dir(&target).unwrap();
            }
            let dir = StagedDir::create(&target).unwrap();
            add(&dir, "a", b"first");
            add(&dir, "b", b"second");
            let mut dropped = dir.file("c").unwrap();
            dropped.write_all(b"half").unwrap();
            drop(dropped);
            assert_eq!(target.exists(), there);
            dir.commit().unwrap();
            assert_eq!(names(&target), ["a", "b"]);
            assert_eq!(fs::read(target.join("b")).unwrap(), b"second");
        }
        assert_eq!(names(place.path()), ["empty", "new", "slash"]);
    }

    #[test]
    fn dropped_it_leaves_nothing() {
        let place = tempfile::tempdir().unwrap();
        let dir = StagedDir::create(place.path().join("new")).unwrap();
        add(&dir, "a", b"first");
        drop(dir);
        StagedDir::check(place.path().join("new")).unwrap();
        assert_eq!(names(place.path()), [""; 0]);
    }

    #[test]
    fn what_came_meanwhile_stays() {
        let place = tempfile::tempdir().unwrap();
        for as_file in [false, true] {
            let target = place.path().join(format!("new-{as_file}"));
            let dir = StagedDir::create(&target).unwrap();
            add(&dir, "a", b"ours");
            let theirs = if as_file { target.clone() } else { target.join("theirs") };
            fs::create_dir_all(theirs.parent().unwrap()).unwrap();
            fs::write(&theirs, "theirs").unwrap();
            let message = dir.commit().unwrap_err().to_string();
            assert!(message.contains("is empty or does not exist yet"), "{message}");
            assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
        }
        assert_eq!(names(place.path()), ["new-false", "new-true"]);
    }

    #[cfg(unix)]
    #[test]
    fn what_a_killed_process_left_goes_and_what_another_fills_stays() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        let left = [".new.a1B2c3.tmp", ".new.a1B2c4.tmp"].map(path);
        left.iter().for_each(|dir| fs::create_dir(dir).unwrap());
        fs::write(left[0].join("half"), "half").unwrap();
        let others =
            [".other.a1B2c3.tmp", ".new.mine.tmp", ".new.tmp", "new.a1B2c3.tmp", ".new.a1B2c3.tmq"].map(path);
        others.iter().for_each(|dir| fs::create_dir(dir).unwrap());
        fs::write(path(".new.a1B2c5.tmp"), "a file").unwrap();

        let first = StagedDir::create(path("new")).unwrap();
        assert!(left.iter().all(|dir| !dir.exists()));
        let second = StagedDir::create(path("new")).unwrap();
        assert!(first.path().is_dir() && second.path().is_dir(), "one that is being filled was removed");
        add(&first, "a", b"first");
        drop(second);
        first.commit().unwrap();
        assert_eq!(names(&path("new")), ["a"]);
        assert!(others.iter().all(|dir| dir.is_dir()) && path(".new.a1B2c5.tmp").is_file());
    }

    #[cfg(unix)]
    #[test]
    fn a_new_directory_is_as_readable_as_any_other_and_a_link_keeps_pointing() {
        use std::os::unix::fs::PermissionsExt;
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        fs::create_dir(path("other")).unwrap();
        StagedDir::create(path("ours")).unwrap().commit().unwrap();
        let mode = |name| fs::metadata(path(name)).unwrap().permissions().mode();
        assert_eq!(mode("ours"), mode("other"));

        std::os::unix::fs::symlink(path("other"), path("link")).unwrap();
        let dir = StagedDir::create(path("link")).unwrap();
        add(&dir, "a", b"");
        dir.commit().unwrap();
        assert!(path("link").is_symlink());
        assert_eq!(names(&path("other")), ["a"]);
    }

    #[test]
    fn refusals_say_what_to_do() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("full")).unwrap();
        fs::write(place.path().join("full/file"), "").unwrap();
        let refused = |name: &str, parts: [&str; 2]| {
            let message = StagedDir::check(place.path().join(name)).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        };
        let empty = "is empty or does not exist yet";
        refused("full", ["it is not empty: it holds file", empty]);
        refused("full/file", ["it is a file", empty]);
        refused("full/file/new", ["is a file", empty]);
        refused("no/such", ["there is no directory", "mkdir -p"]);
        refused("no/..", ["it is no name of a directory", empty]);
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("nowhere", place.path().join("link")).unwrap();
            refused("link", ["leads nowhere", empty]);
        }
        assert_eq!(names(&place.path().join("full")), ["file"]);
    }
}
