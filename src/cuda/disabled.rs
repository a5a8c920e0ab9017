//! The CUDA backend of a build without the feature `cuda`: it says so.

use std::convert::Infallible;

use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, RangePolicy};
use crate::error::{Error, Result};
use crate::warning::Warning;

/// Names GPU `ordinal`: not in this build.
///
/// # Errors
/// [`Error::Device`] always: the feature `cuda` is off.
pub fn describe(ordinal: usize) -> Result<String> {
    match Gpu::open(ordinal)?.0 {}
}

/// A GPU that this build cannot open.
#[derive(Debug)]
pub(crate) struct Gpu(Infallible);

impl Gpu {
    /// Opens GPU `ordinal`: not in this build.
    ///
    /// # Errors
    /// [`Error::Device`] always: the feature `cuda` is off.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        Err(Error::Device {
            device: format!("cuda:{ordinal}"),
            problem: "this build has no CUDA backend: the feature `cuda` is off".into(),
            remedy: "Build with `--features cuda`, or use `cpu`".into(),
        })
    }

    /// Opens every GPU: none in this build.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub(crate) fn open_all() -> Result<Vec<Self>> {
        Self::open(0).map(|gpu| vec![gpu])
    }
}

/// Never called with one: there is no [`Gpu`].
pub(crate) fn open_backend(
    gpus: Vec<Gpu>,
    _: &Checkpoint,
    _: RangePolicy,
) -> Result<(Box<dyn Backend>, Vec<Warning>)> {
    match gpus.into_iter().next() {
        Some(gpu) => match gpu.0 {},
        None => Err(Error::Internal("a backend on no device".into())),
    }
}
