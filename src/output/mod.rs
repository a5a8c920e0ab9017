//! Sinks: where a finished sequence goes.
//!
//! [`AtomicFile`] makes a file that appears whole or not at all, and [`StagedDir`] a directory; [`safetensors`] fills
//! one file with a sequence, [`npy`] a directory.
//! Nothing here changes a value: what the encoder wrote is what the file holds, byte for byte.

mod atomic;
pub mod npy;
pub mod safetensors;
mod staged;
#[cfg(test)]
mod testkit;

pub use atomic::AtomicFile;
pub(crate) use atomic::write_error;
pub use staged::StagedDir;

// Tensors are written as the machine holds them, and every format written here is little-endian.
#[cfg(not(target_endian = "little"))]
compile_error!("imagehere writes tensors as they lie in memory, which must be little-endian");
