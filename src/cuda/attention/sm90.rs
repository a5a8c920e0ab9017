//! Launches `kernels/attention_sm90.cu`: attention on Hopper.

use std::sync::Arc;

use half::f16;

use super::images_and_heads;
use crate::config::HEAD_SIZE;
use crate::cuda::driver::{DevicePtr, Module, Stream, TensorMap};
use crate::cuda::launch::{Entry, Kernel, contract, int, launch, parameters};
use crate::cuda::matrix::Matrix;
use crate::error::Result;

parameters! {
    /// Of `attention_sm90`.
    pub(crate) struct AttentionSm90Parameters {
        out: DevicePtr<f16>, // [B · T, C]
        q: TensorMap,        // qkv as [B][T][3C], in boxes of a consumer's queries
        kv: TensorMap,       // the same, in boxes of a tile's keys
        tokens: i32,
        heads: i32,
        images: i32,
        out_pitch: i32,
        scale: f32,
    }
}

/// Warp groups of a block that multiply, beside the one that copies: all give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Consumers {
    /// 128 queries.
    Two,
    /// 192: keys and values are read less often, queries beyond the last token are more.
    Three,
}

/// Queries of a consumer, keys of a tile; tiles of queries, of keys and of values in shared memory (attention_sm90.cu).
const QUERIES: usize = 64;
const KEYS: usize = 112;
const QUERY_STAGES: usize = 2;
const STAGES: usize = 4;
const WARP_GROUP: usize = 128; // threads

impl Consumers {
    const ALL: [Self; 2] = [Self::Two, Self::Three];

    const fn count(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Three => 3,
        }
    }

    /// Queries of a block.
    pub(crate) const fn queries(self) -> usize {
        self.count() * QUERIES
    }

    const fn entry(self, name: &'static str) -> Entry {
        let rows = QUERY_STAGES * self.queries() + 2 * STAGES * KEYS;
        let barriers = 2 * (QUERY_STAGES + 2 * STAGES);
        let shared = 1024 + rows * HEAD_SIZE * size_of::<f16>() + barriers * 8;
        Entry::new(name, ((1 + self.count()) * WARP_GROUP) as u32, shared as u32).programmatic()
    }
}

/// In the order of [`Consumers::ALL`].
pub(crate) const ENTRIES: [Entry; 2] =
    [Consumers::Two.entry("attention_sm90"), Consumers::Three.entry("attention_sm90_192")];

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct AttentionSm90 {
    kernels: [Kernel<AttentionSm90Parameters>; 2],
}

impl AttentionSm90 {
    /// Finds the kernels in attention_sm90's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        let [two, three] = ENTRIES.map(|entry| Kernel::load(module, entry));
        Ok(Self { kernels: [two?, three?] })
    }

    /// Enqueues attention over images of `tokens` rows each, in the blocks that are done first on the stream's device.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        out: &Matrix,
        qkv: &Matrix,
        tokens: usize,
        scale: f32,
    ) -> Result<()> {
        let pairs = out.rows / tokens.max(1) * (out.columns / HEAD_SIZE);
        let consumers = choose(tokens, pairs, stream.context().multiprocessors() as usize);
        self.enqueue_in(stream, consumers, out, qkv, tokens, scale)
    }

    /// Enqueues attention in given blocks.
    pub(crate) fn enqueue_in(
        &self,
        stream: &Stream,
        consumers: Consumers,
        out: &Matrix, // [B · T, C]
        qkv: &Matrix, // [B · T, 3C]
        tokens: usize,
        scale: f32,
    ) -> Result<()> {
        let kernel = &self.kernels[consumers as usize];
        let name = kernel.name();
        let (images, heads) = images_and_heads(name, out, qkv, tokens)?;
        contract!(name, scale > 0.0 && scale.is_finite(), "scores times {scale}");
        if images == 0 {
            return Ok(());
        }
        let tasks = tokens.div_ceil(consumers.queries()) * heads * images;
        int(name, "tasks", tasks)?;
        let map = |rows| {
            let sizes = [qkv.columns, tokens, images];
            TensorMap::new(stream.context(), qkv.span.ptr(), sizes, [qkv.pitch, tokens * qkv.pitch], rows)
        };
        let parameters = AttentionSm90Parameters {
            out: out.span.ptr(),
            q: map(QUERIES)?,
            kv: map(KEYS)?,
            tokens: int(name, "tokens", tokens)?,
            heads: int(name, "heads", heads)?,
            images: int(name, "images", images)?,
            out_pitch: int(name, "out_pitch", out.pitch)?,
            scale,
        };
        let blocks = tasks.min(stream.context().multiprocessors() as usize).max(1);
        // SAFETY: the contract was checked; matrices vouch for the memory.
        unsafe { launch(stream, kernel, [blocks, 1, 1], &parameters) }
    }
}

/// Chooses the blocks for so many pairs of image and head: those whose busiest multiprocessor has fewer queries, by
/// counting, not by measurement (kernels/README.md).
pub(crate) fn choose(tokens: usize, pairs: usize, multiprocessors: usize) -> Consumers {
    let busiest = |consumers: Consumers| {
        let tasks = tokens.div_ceil(consumers.queries()) * pairs;
        tasks.div_ceil(multiprocessors.max(1)) * consumers.queries()
    };
    if busiest(Consumers::Three) < busiest(Consumers::Two) { Consumers::Three } else { Consumers::Two }
}

#[cfg(test)]
mod tests;
