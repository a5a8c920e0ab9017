//! The CUDA backend of a build without the feature `cuda`: it says so.

use crate::error::{Error, Result};

/// Names GPU `ordinal`: not in this build.
///
/// # Errors
/// [`Error::Device`] always: the feature `cuda` is off.
pub fn describe(ordinal: usize) -> Result<String> {
    Err(Error::Device {
        device: format!("cuda:{ordinal}"),
        problem: "this build has no CUDA backend: the feature `cuda` is off".into(),
        remedy: "Build with `--features cuda`, or use `cpu`".into(),
    })
}
