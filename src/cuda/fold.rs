//! Launches `kernels/fold.cu`: a layer norm's weights, taken into the linear layer that follows it, and a scale into the
//! first of its rows.

use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Span, Stream};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::layer_norm::Norm;
use super::linear::{FoldedNorm, Layer};
use super::matrix::VECTOR;
use crate::error::Result;

/// `FoldArgs` in fold.cu, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct FoldArgs {
    w: DevicePtr<f16>,           // [N, K]
    bias: DevicePtr<f16>,        // [N]
    column_sums: DevicePtr<f32>, // [N]
    bias32: DevicePtr<f32>,      // [N]
    gamma: DevicePtr<f16>,       // [K]
    beta: DevicePtr<f16>,        // [K]
    beyond: DevicePtr<u32>,      // [1]
    n: i32,
    k: i32,
    pitch: i32,
    scaled: i32,
    scale: f32,
    dry: i32,
}

parameters! {
    /// Of `fold_norm`.
    pub(crate) struct FoldParameters {
        args: FoldArgs,
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

/// What a linear layer takes in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Folding<'a> {
    pub(crate) layer: &'a Layer,
    /// The norm before it, and where what is left of that goes.
    pub(crate) norm: Option<(&'a Norm, FoldedNorm)>,
    /// How many rows are multiplied by what.
    pub(crate) scaled: (usize, f32),
    /// Counts the elements that fp16 would not hold.
    pub(crate) beyond: Span<u32>,
}

impl Fold {
    /// Finds the kernel in fold's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        Ok(Self { kernel: Kernel::load(module, ENTRY)? })
    }

    /// Enqueues the change of a layer's weights, in place; with `dry`, nothing but the count.
    pub(crate) fn enqueue(&self, stream: &Stream, folding: &Folding<'_>, dry: bool) -> Result<()> {
        let Folding { layer, norm, scaled: (scaled, scale), beyond } = *folding;
        let (name, w) = (self.kernel.name(), &layer.weight);
        let (n, k) = (w.rows, w.columns);
        w.check(name, "w")?;
        w.check_vectors(name, "w")?;
        contract!(name, n > 0 && k > 0 && k.is_multiple_of(VECTOR), "a layer of {w:?}");
        contract!(
            name,
            scaled <= n && layer.bias.len() >= n,
            "{scaled} rows, {} biases of {n}",
            layer.bias.len()
        );
        contract!(name, beyond.len() == 1, "{} counters", beyond.len());
        if let Some((norm, folded)) = norm {
            norm.check(name, k)?;
            let room = folded.column_sums.len().min(folded.bias.len());
            contract!(name, room >= n, "room for {room} column sums of {n}");
        }
        let args = FoldArgs {
            w: w.span.ptr(),
            bias: layer.bias.ptr(),
            column_sums: norm.map_or(DevicePtr::NULL, |(_, folded)| folded.column_sums.ptr()),
            bias32: norm.map_or(DevicePtr::NULL, |(_, folded)| folded.bias.ptr()),
            gamma: norm.map_or(DevicePtr::NULL, |(norm, _)| norm.weight.ptr()),
            beta: norm.map_or(DevicePtr::NULL, |(norm, _)| norm.bias.ptr()),
            beyond: beyond.ptr(),
            n: int(name, "N", n)?,
            k: int(name, "K", k)?,
            pitch: int(name, "pitch", w.pitch)?,
            scaled: int(name, "scaled", scaled)?,
            scale,
            dry: i32::from(dry),
        };
        // SAFETY: the contract was checked; matrices and spans vouch for the memory.
        unsafe { launch(stream, &self.kernel, [n.div_ceil(ROWS), 1, 1], &FoldParameters { args }) }
    }
}

#[cfg(test)]
mod tests;
