//! Launches `kernels/fold.cu`: a layer norm's weights, taken into the linear layer that follows it.

use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Span, Stream};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::layer_norm::Norm;
use super::linear::{FoldedNorm, Layer};
use super::matrix::VECTOR;
use crate::error::Result;

parameters! {
    /// Of `fold_norm`.
    pub(crate) struct FoldParameters {
        w: DevicePtr<f16>, // [N, K]
        column_sums: DevicePtr<f32>, // [N]
        bias32: DevicePtr<f32>, // [N]
        gamma: DevicePtr<f16>, // [K]
        beta: DevicePtr<f16>, // [K]
        bias: DevicePtr<f16>, // [N]
        beyond: DevicePtr<u32>, // [1]
        n: i32,
        k: i32,
        pitch: i32,
    }
}

/// Rows of a block, one a warp.
const ROWS: usize = 4;

pub(crate) const ENTRY: Entry = Entry::new("fold_norm", 32 * ROWS as u32, 0);

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct Fold {
    kernel: Kernel<FoldParameters>,
}

impl Fold {
    /// Finds the kernel in fold's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        Ok(Self { kernel: Kernel::load(module, ENTRY)? })
    }

    /// Enqueues the change of `layer`'s weights, in place, and what is left of the norm, into `folded`; without it,
    /// nothing but the count of elements that fp16 would not hold, added to `beyond`.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        layer: &Layer,
        norm: &Norm,
        folded: Option<&FoldedNorm>,
        beyond: Span<u32>,
    ) -> Result<()> {
        let (name, w) = (self.kernel.name(), &layer.weight);
        let (n, k) = (w.rows, w.columns);
        w.check(name, "w")?;
        w.check_vectors(name, "w")?;
        contract!(name, n > 0 && k > 0 && k.is_multiple_of(VECTOR), "a layer of {w:?}");
        let weights = norm.weight.len().min(norm.bias.len());
        contract!(name, weights >= k, "{k} channels, {weights} weights");
        let aligned = norm.weight.ptr().is_aligned(16) && norm.bias.ptr().is_aligned(16);
        contract!(name, aligned, "weights are not 16 bytes aligned: {norm:?}");
        contract!(name, layer.bias.len() >= n && beyond.len() == 1, "{} biases of {n}", layer.bias.len());
        let (mut column_sums, mut bias32) = (DevicePtr::NULL, DevicePtr::NULL);
        if let Some(folded) = folded {
            let room = folded.column_sums.len().min(folded.bias.len());
            contract!(name, room >= n, "room for {room} column sums of {n}");
            (column_sums, bias32) = (folded.column_sums.ptr(), folded.bias.ptr());
        }
        let parameters = FoldParameters {
            w: w.span.ptr(),
            column_sums,
            bias32,
            gamma: norm.weight.ptr(),
            beta: norm.bias.ptr(),
            bias: layer.bias.ptr(),
            beyond: beyond.ptr(),
            n: int(name, "N", n)?,
            k: int(name, "K", k)?,
            pitch: int(name, "pitch", w.pitch)?,
        };
        // SAFETY: the contract was checked; matrices and spans vouch for the memory.
        unsafe { launch(stream, &self.kernel, [n.div_ceil(ROWS), 1, 1], &parameters) }
    }
}

#[cfg(test)]
mod tests;
