//! Launches `kernels/embed_tokens.cu`: rows of the embedding table, straight into sequences.

use std::sync::Arc;

use half::f16;

use super::convert::place;
use super::driver::{DevicePtr, Module, Pod, Span, Stream, Zeroable};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::range::{RangeReport, check_report, code};
use crate::checkpoint::{DType, RangePolicy};
use crate::error::Result;

/// A row to be filled, and with which token's embedding (`TextRow` in embed_tokens.cu).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct TextRow {
    /// Its first element.
    pub(crate) to: DevicePtr<f16>,
    /// Below the vocabulary's size; a row with another id is not written.
    pub(crate) id: i32,
    /// Nothing.
    pub(crate) pad: i32,
}

// SAFETY: integers without padding.
unsafe impl Zeroable for TextRow {}
// SAFETY: as above.
unsafe impl Pod for TextRow {}

/// The embedding table on the device, as stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenTable {
    pub(crate) values: Span<u8>, // [vocabulary, H], packed
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) hidden: usize,
}

parameters! {
    /// Of `embed_tokens_bf16`, `embed_tokens_f16` and `embed_tokens_f32`.
    pub(crate) struct EmbedParameters {
        rows: DevicePtr<TextRow>, // [count]
        count: i32,
        table: DevicePtr<u8>, // [vocab, hidden]
        vocab: i32,
        hidden: i32,
        policy: i32,
        report: DevicePtr<RangeReport>,
    }
}

const fn entry(name: &'static str) -> Entry {
    Entry::new(name, 128, 0)
}

/// By [`place`].
pub(crate) const ENTRIES: [Entry; 3] =
    [entry("embed_tokens_bf16"), entry("embed_tokens_f16"), entry("embed_tokens_f32")];

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct EmbedTokens {
    kernels: [Kernel<EmbedParameters>; 3],
}

impl EmbedTokens {
    /// Finds the kernels in embed_tokens' module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        let [bf16, f16, f32] = ENTRIES.map(|entry| Kernel::load(module, entry));
        Ok(Self { kernels: [bf16?, f16?, f32?] })
    }

    /// Enqueues the filling of all `rows`, which must have room for H elements each and lie apart. Whether
    /// any value did not fit is in `report` when the stream is done.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        rows: Span<TextRow>,
        table: &TokenTable,
        policy: RangePolicy,
        report: Span<RangeReport>,
    ) -> Result<()> {
        let TokenTable { values, dtype, rows: vocab, hidden } = *table;
        let kernel = &self.kernels[place(dtype)];
        let name = kernel.name();
        contract!(name, rows.ptr().is_aligned(8), "rows in {rows:?}");
        let bytes = vocab * hidden * dtype.size();
        contract!(name, bytes <= values.len(), "{bytes} bytes of values in {values:?}");
        contract!(name, values.ptr().is_aligned(dtype.size() as u64), "{} in {values:?}", dtype.name());
        check_report(name, report)?;
        if rows.len() == 0 {
            return Ok(());
        }
        let parameters = EmbedParameters {
            rows: rows.ptr(),
            count: int(name, "count", rows.len())?,
            table: values.ptr(),
            vocab: int(name, "vocab", vocab)?,
            hidden: int(name, "hidden", hidden)?,
            policy: code(policy),
            report: report.ptr(),
        };
        // SAFETY: the contract was checked; spans vouch for the memory, the caller for where the rows point.
        unsafe { launch(stream, kernel, [rows.len(), 1, 1], &parameters) }
    }
}

#[cfg(test)]
mod tests;
