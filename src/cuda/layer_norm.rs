//! Launches `kernels/layer_norm.cu`: layer norm of every row, two passes in f32.

use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Span, Stream};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::linear::{RowPart, room_for_parts};
use super::matrix::{Matrix, VECTOR};
use crate::config::LAYER_NORM_EPS;
use crate::error::Result;

parameters! {
    /// Of `layer_norm`.
    pub(crate) struct LayerNormParameters {
        y: DevicePtr<f16>, // [rows, width]
        parts: DevicePtr<RowPart>, // [rows, width / 16]
        x: DevicePtr<f16>, // [rows, width]
        weight: DevicePtr<f16>, // [width]
        bias: DevicePtr<f16>, // [width]
        rows: i32,
        width: i32,
        pitch: i32,
        eps: f32,
    }
}

/// Rows of a block, one a warp.
const ROWS: usize = 4;

pub(crate) const ENTRY: Entry = Entry::new("layer_norm", 32 * ROWS as u32, 0);

/// A norm's weights on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub(crate) weight: Span<f16>, // [C]
    pub(crate) bias: Span<f16>,   // [C]
}

impl Norm {
    /// Checks that `kernel` may load weights of `width` channels, 16 bytes at a time.
    pub(super) fn check(&self, kernel: &str, width: usize) -> Result<()> {
        let weights = self.weight.len().min(self.bias.len());
        contract!(kernel, weights >= width, "{width} channels, {weights} weights");
        let aligned = self.weight.ptr().is_aligned(16) && self.bias.ptr().is_aligned(16);
        contract!(kernel, aligned, "weights are not 16 bytes aligned: {self:?}");
        Ok(())
    }
}

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct LayerNorm {
    kernel: Kernel<LayerNormParameters>,
}

impl LayerNorm {
    /// Finds the kernel in layer_norm's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        Ok(Self { kernel: Kernel::load(module, ENTRY)? })
    }

    /// Enqueues the norm of all rows of `x` into `y`, which may be `x`.
    pub(crate) fn enqueue(&self, stream: &Stream, y: &Matrix, x: &Matrix, norm: &Norm) -> Result<()> {
        self.enqueue_with(stream, y, x, norm, None)
    }

    /// The same, and statistics of `y` for a layer that has the next norm folded in, `[rows, width / 16]`.
    pub(crate) fn enqueue_with(
        &self,
        stream: &Stream,
        y: &Matrix,
        x: &Matrix,
        norm: &Norm,
        parts: Option<Span<RowPart>>,
    ) -> Result<()> {
        let name = self.kernel.name();
        let width = x.columns;
        let shapes = |m: &Matrix| (m.rows, m.columns, m.pitch);
        contract!(name, shapes(y) == shapes(x), "{y:?} from {x:?}");
        contract!(name, width > 0 && width.is_multiple_of(VECTOR), "{width} channels are no multiple of 8");
        y.check(name, "y")?;
        y.check_vectors(name, "y")?;
        x.check(name, "x")?;
        x.check_vectors(name, "x")?;
        norm.check(name, width)?;
        if let Some(parts) = parts {
            room_for_parts(name, parts, x.rows, width)?;
        }
        if x.rows == 0 {
            return Ok(());
        }
        let parameters = LayerNormParameters {
            y: y.span.ptr(),
            parts: parts.map_or(DevicePtr::NULL, |parts| parts.ptr()),
            x: x.span.ptr(),
            weight: norm.weight.ptr(),
            bias: norm.bias.ptr(),
            rows: int(name, "rows", x.rows)?,
            width: int(name, "width", width)?,
            pitch: int(name, "pitch", x.pitch)?,
            eps: LAYER_NORM_EPS,
        };
        // SAFETY: the contract was checked; matrices and spans vouch for the memory.
        unsafe { launch(stream, &self.kernel, [x.rows.div_ceil(ROWS), 1, 1], &parameters) }
    }
}

#[cfg(test)]
mod tests;
