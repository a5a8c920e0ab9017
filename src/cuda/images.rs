//! The kernels that build.rs compiled: a table, empty where there was no nvcc.

/// A kernel file's fat binary.
#[derive(Debug)]
pub(crate) struct Image {
    /// The file's stem: `linear_sm80`.
    pub(crate) name: &'static str,
    /// As nvcc made it.
    pub(crate) bytes: &'static [u8],
}

/// Bytes at an address where the driver may read words.
#[cfg_attr(not(has_kernels), allow(dead_code, reason = "there is nothing to put there"))]
#[repr(C, align(16))]
struct Aligned<T>(T);

/// The kernel files that are loaded, by stem; those of `_sm90` on Hopper alone.
pub(crate) const STEMS: &[&str] = &[
    "linear_sm80",
    "linear_sm90",
    "attention_sm80",
    "attention_sm90",
    "layer_norm",
    "patches",
    "resize",
    "embed_tokens",
    "convert",
    "fold",
    "verify",
];

include!(concat!(env!("OUT_DIR"), "/images.rs"));
