//! Launches `kernels/attention_sm80.cu`: `softmax(Q Kᵀ / 8) V` per image and head, from packed QKV.

use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Stream};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::matrix::Matrix;
use crate::config::HEAD_SIZE;
use crate::error::Result;

parameters! {
    /// Of `attention`.
    pub(crate) struct AttentionParameters {
        out: DevicePtr<f16>, // [B · T, C]
        qkv: DevicePtr<f16>, // [B · T, 3C]
        tokens: i32,
        heads: i32,
        qkv_pitch: i32,
        out_pitch: i32,
    }
}

/// Queries of a block.
const QUERIES: usize = 64;

pub(crate) const ENTRY: Entry = Entry { name: "attention", threads: 128, shared: 5 * 64 * 64 * 2 };

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct Attention {
    kernel: Kernel<AttentionParameters>,
}

impl Attention {
    /// Finds the kernel in attention_sm80's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        Ok(Self { kernel: Kernel::load(module, ENTRY)? })
    }

    /// Enqueues attention over images of `tokens` rows each.
    pub(crate) fn enqueue(&self, stream: &Stream, out: &Matrix, qkv: &Matrix, tokens: usize) -> Result<()> {
        let name = self.kernel.name();
        out.check(name, "out")?;
        out.check_vectors(name, "out")?;
        qkv.check(name, "qkv")?;
        qkv.check_vectors(name, "qkv")?;
        let width = out.columns;
        contract!(
            name,
            width > 0 && width.is_multiple_of(HEAD_SIZE),
            "{width} channels in heads of {HEAD_SIZE}"
        );
        contract!(name, qkv.columns == 3 * width, "qkv has {} columns for {width} channels", qkv.columns);
        contract!(name, qkv.rows == out.rows, "{} rows of qkv, {} of out", qkv.rows, out.rows);
        contract!(
            name,
            tokens > 0 && out.rows.is_multiple_of(tokens),
            "{} rows, {tokens} an image",
            out.rows
        );
        if out.rows == 0 {
            return Ok(());
        }
        let (images, heads) = (out.rows / tokens, width / HEAD_SIZE);
        let parameters = AttentionParameters {
            out: out.span.ptr(),
            qkv: qkv.span.ptr(),
            tokens: int(name, "tokens", tokens)?,
            heads: int(name, "heads", heads)?,
            qkv_pitch: int(name, "qkv_pitch", qkv.pitch)?,
            out_pitch: int(name, "out_pitch", out.pitch)?,
        };
        // SAFETY: the contract was checked; matrices vouch for the memory.
        unsafe { launch(stream, &self.kernel, [tokens.div_ceil(QUERIES), heads, images], &parameters) }
    }
}

#[cfg(test)]
mod tests;
