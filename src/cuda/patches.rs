//! Launches `kernels/patches.cu`: the pixels of one image to normalised patch rows.

use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Span, Stream};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::matrix::Matrix;
use crate::error::Result;

parameters! {
    /// Of `patches`.
    pub(crate) struct PatchesParameters {
        out: DevicePtr<f16>, // [grid², 3·patch²]
        rgb: DevicePtr<u8>, // [grid · patch, 3 · grid · patch]
        table: DevicePtr<f16>, // [3, 256]
        grid: i32,
        patch: i32,
        out_pitch: i32,
        rgb_pitch: i32,
    }
}

/// Patches of a block.
const PATCHES: usize = 8;

/// Values of the table: one for each byte of each channel.
pub(crate) const TABLE: usize = 3 * 256;

pub(crate) const ENTRY: Entry = Entry::new("patches", 128, 2 * TABLE as u32);

/// The loaded kernel.
#[derive(Debug)]
pub(crate) struct Patches {
    kernel: Kernel<PatchesParameters>,
}

impl Patches {
    /// Finds the kernel in patches' module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        Ok(Self { kernel: Kernel::load(module, ENTRY)? })
    }

    /// Enqueues the cutting of one image, whose rows of pixels are `rgb_pitch` bytes apart, into `out`, and
    /// the zeroing of what is between its rows.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        out: &Matrix, // [grid², 3·patch²]
        rgb: Span<u8>,
        rgb_pitch: usize,
        table: Span<f16>, // as cpu's PixelTable has it
        patch: usize,
    ) -> Result<()> {
        let name = self.kernel.name();
        let grid = out.rows.isqrt();
        contract!(name, grid > 0 && grid * grid == out.rows, "{} patches are no square", out.rows);
        let len = 3 * patch * patch;
        contract!(name, patch > 0 && out.columns == len, "{} columns for patches of {patch}", out.columns);
        out.check(name, "out")?;
        out.check_vectors(name, "out")?;
        contract!(name, out.rows * out.pitch <= out.span.len(), "no room after the last row: {out:?}");
        let (height, width) = (grid * patch, 3 * grid * patch);
        let fits = rgb_pitch >= width && (height - 1) * rgb_pitch + width <= rgb.len();
        contract!(name, fits, "{height} rows of {width} bytes, {rgb_pitch} apart, in {rgb:?}");
        let aligned = table.ptr().is_aligned(16);
        contract!(name, table.len() >= TABLE && aligned, "a table of {TABLE} in {table:?}");
        let parameters = PatchesParameters {
            out: out.span.ptr(),
            rgb: rgb.ptr(),
            table: table.ptr(),
            grid: int(name, "grid", grid)?,
            patch: int(name, "patch", patch)?,
            out_pitch: int(name, "out_pitch", out.pitch)?,
            rgb_pitch: int(name, "rgb_pitch", rgb_pitch)?,
        };
        // SAFETY: the contract was checked; spans and matrices vouch for the memory.
        unsafe { launch(stream, &self.kernel, [out.rows.div_ceil(PATCHES), 1, 1], &parameters) }
    }
}

#[cfg(test)]
mod tests;
