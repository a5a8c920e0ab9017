//! Launches `kernels/attention_sm80.cu`, or on Hopper `attention_sm90.cu` ([`sm90`]): `softmax(Q Kᵀ / 8) V` per image
//! and head, from packed QKV.

use std::f32::consts::LOG2_E;
use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Stream};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::matrix::Matrix;
use crate::config::HEAD_SIZE;
use crate::error::Result;

pub(crate) mod sm90;

use sm90::AttentionSm90;

/// What scores are multiplied by, for a softmax in powers of two.
pub(crate) const SCALE: f32 = 0.125 * LOG2_E;

/// The same, where queries come divided by 8: Hopper's kernels only.
pub(crate) const SCALE_OF_DIVIDED: f32 = LOG2_E;

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

/// Queries of a block: both give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queries {
    /// 128: each key and value is read half as often.
    Many,
    /// 64: more blocks, for few heads and images.
    Few,
}

impl Queries {
    /// Their number.
    pub(crate) const fn count(self) -> usize {
        match self {
            Self::Many => 128,
            Self::Few => 64,
        }
    }
}

/// Keys of a tile, two of which, and of values, are in shared memory beside the queries (attention_sm80.cu).
const KEYS: usize = 112;

const fn entry(name: &'static str, queries: Queries) -> Entry {
    Entry::new(name, 128, ((queries.count() + 4 * KEYS) * HEAD_SIZE * 2) as u32)
}

/// Many queries, few queries.
pub(crate) const ENTRIES: [Entry; 2] =
    [entry("attention_128", Queries::Many), entry("attention", Queries::Few)];

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct Attention {
    kernels: [Kernel<AttentionParameters>; 2],
    pub(crate) sm90: Option<AttentionSm90>,
}

impl Attention {
    /// Finds the kernels in attention_sm80's module, and in attention_sm90's on Hopper.
    pub(crate) fn load(module: &Arc<Module>, sm90: Option<&Arc<Module>>) -> Result<Self> {
        let [many, few] = ENTRIES.map(|entry| Kernel::load(module, entry));
        Ok(Self { kernels: [many?, few?], sm90: sm90.map(AttentionSm90::load).transpose()? })
    }

    /// Enqueues attention over images of `tokens` rows each, in the blocks that are done first on the
    /// stream's device. `scale`: [`SCALE`], or on Hopper [`SCALE_OF_DIVIDED`].
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        out: &Matrix,
        qkv: &Matrix,
        tokens: usize,
        scale: f32,
    ) -> Result<()> {
        if let Some(sm90) = &self.sm90 {
            return sm90.enqueue(stream, out, qkv, tokens, scale);
        }
        let pairs = out.rows / tokens.max(1) * (out.columns / HEAD_SIZE);
        let queries = choose_queries(tokens, pairs, stream.context().multiprocessors() as usize);
        let name = self.kernels[usize::from(queries == Queries::Few)].name();
        contract!(name, scale == SCALE, "scores times {scale}, the kernel has {SCALE}");
        self.enqueue_in(stream, queries, out, qkv, tokens)
    }

    /// Enqueues attention in given portable blocks.
    pub(crate) fn enqueue_in(
        &self,
        stream: &Stream,
        queries: Queries,
        out: &Matrix, // [B · T, C]
        qkv: &Matrix, // [B · T, 3C]
        tokens: usize,
    ) -> Result<()> {
        let kernel = &self.kernels[usize::from(queries == Queries::Few)];
        let name = kernel.name();
        let (images, heads) = images_and_heads(name, out, qkv, tokens)?;
        if images == 0 {
            return Ok(());
        }
        let parameters = AttentionParameters {
            out: out.span.ptr(),
            qkv: qkv.span.ptr(),
            tokens: int(name, "tokens", tokens)?,
            heads: int(name, "heads", heads)?,
            qkv_pitch: int(name, "qkv_pitch", qkv.pitch)?,
            out_pitch: int(name, "out_pitch", out.pitch)?,
        };
        let grid = [tokens.div_ceil(queries.count()), heads, images];
        // SAFETY: the contract was checked; matrices vouch for the memory.
        unsafe { launch(stream, kernel, grid, &parameters) }
    }
}

/// Checks what all variants ask of their matrices; the images and heads in them.
fn images_and_heads(name: &str, out: &Matrix, qkv: &Matrix, tokens: usize) -> Result<(usize, usize)> {
    let width = out.columns;
    contract!(name, tokens > 0 && out.rows.is_multiple_of(tokens), "{} rows, {tokens} an image", out.rows);
    let whole = width > 0 && width.is_multiple_of(HEAD_SIZE);
    contract!(name, whole, "{width} channels in heads of {HEAD_SIZE}");
    out.check(name, "out")?;
    out.check_vectors(name, "out")?;
    qkv.check(name, "qkv")?;
    qkv.check_vectors(name, "qkv")?;
    contract!(name, qkv.columns == 3 * width, "qkv has {} columns for {width} channels", qkv.columns);
    contract!(name, qkv.rows == out.rows, "{} rows of qkv, {} of out", qkv.rows, out.rows);
    Ok((out.rows / tokens, width / HEAD_SIZE))
}

/// Chooses the blocks for so many pairs of image and head: large ones as soon as there are two for each
/// multiprocessor, which is what it holds at a time. By counting, not by measurement (kernels/README.md).
pub(crate) fn choose_queries(tokens: usize, pairs: usize, multiprocessors: usize) -> Queries {
    let blocks = tokens.div_ceil(Queries::Many.count()) * pairs;
    if blocks < 2 * multiprocessors { Queries::Few } else { Queries::Many }
}

#[cfg(test)]
mod tests;
