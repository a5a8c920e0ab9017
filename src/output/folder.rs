//! A directory to put things into, made if it is missing.

use std::fs;
use std::path::{Path, PathBuf};

use super::write_error;
use crate::error::Result;

/// A directory that goes away again when this is dropped, with those around it that were made for it, if nothing was put
/// into it.
///
/// # Examples
/// ```
/// # fn main() -> imagehere::Result<()> {
/// # let place = tempfile::tempdir().unwrap();
/// let dir = place.path().join("some/where");
/// drop(imagehere::output::Folder::make(&dir)?);
/// assert!(!place.path().join("some").exists());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropped, it takes what is empty away again"]
pub struct Folder {
    made: Vec<PathBuf>, // innermost first
}

impl Folder {
    /// Makes `dir`, and those around it, if they do not exist.
    ///
    /// # Errors
    /// [`crate::Error::Write`] if it is a file or cannot be made.
    pub fn make(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let missing = dir.ancestors().take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists());
        let folder = Self { made: missing.map(Path::to_path_buf).collect() };
        match fs::create_dir_all(dir) {
            Ok(()) => Ok(folder),
            Err(error) => Err(write_error(dir, error)),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Refused where there is something in it, as it is after a success.
        self.made.iter().for_each(|dir| drop(fs::remove_dir(dir)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_away_unless_something_is_in_it() {
        let place = tempfile::tempdir().unwrap();
        let deep = place.path().join("new/deep");
        drop(Folder::make(&deep).unwrap());
        assert!(place.path().exists() && !place.path().join("new").exists());
        let made = Folder::make(&deep).unwrap();
        fs::write(deep.join("file"), "").unwrap();
        drop(made);
        drop(Folder::make(&deep).unwrap());
        assert!(deep.join("file").exists());
        assert!(Folder::make(deep.join("file/inside")).is_err());
    }
}
