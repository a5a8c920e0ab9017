//! Launches `kernels/convert.cu`: a weight as the checkpoint stores it, to fp16 rows of the device's pitch.

use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Span, Stream};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::matrix::{Matrix, VECTOR};
use super::range::{RangeReport, check_report, code};
use crate::checkpoint::{DType, RangePolicy};
use crate::error::Result;

parameters! {
    /// Of `convert_bf16`, `convert_f16` and `convert_f32`.
    pub(crate) struct ConvertParameters {
        out: DevicePtr<f16>, // [rows, columns]
        from: DevicePtr<u8>, // [rows, columns], packed
        rows: i64,
        columns: i32,
        out_pitch: i64,
        policy: i32,
        scale: f32,
        report: DevicePtr<RangeReport>,
    }
}

const THREADS: usize = 256;

const fn entry(name: &'static str) -> Entry {
    Entry::new(name, THREADS as u32, 0)
}

/// By [`place`].
pub(crate) const ENTRIES: [Entry; 3] = [entry("convert_bf16"), entry("convert_f16"), entry("convert_f32")];

/// A dtype's place among the entries of a file.
pub(super) fn place(dtype: DType) -> usize {
    match dtype {
        DType::Bf16 => 0,
        DType::F16 => 1,
        DType::F32 => 2,
    }
}

/// Values as a checkpoint stores them, packed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored {
    pub(crate) values: Span<u8>,
    pub(crate) dtype: DType,
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct Convert {
    kernels: [Kernel<ConvertParameters>; 3],
}

impl Convert {
    /// Finds the kernels in convert's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        let [bf16, f16, f32] = ENTRIES.map(|entry| Kernel::load(module, entry));
        Ok(Self { kernels: [bf16?, f16?, f32?] })
    }

    /// Enqueues the conversion of packed values into `out`, times `scale`, and the zeroing of what is between
    /// its rows. Whether any did not fit is in `report` when the stream is done.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        out: &Matrix,
        from: Stored,
        scale: f32,
        policy: RangePolicy,
        report: Span<RangeReport>,
    ) -> Result<()> {
        let Stored { values, dtype } = from;
        let kernel = &self.kernels[place(dtype)];
        let name = kernel.name();
        out.check(name, "out")?;
        contract!(name, out.rows * out.pitch <= out.span.len(), "no room after the last row: {out:?}");
        let bytes = out.rows * out.columns * dtype.size();
        contract!(name, bytes <= values.len(), "{bytes} bytes of values in {values:?}");
        contract!(name, values.ptr().is_aligned(dtype.size() as u64), "{} in {values:?}", dtype.name());
        check_report(name, report)?;
        let threads = out.rows * out.pitch.div_ceil(VECTOR);
        if out.rows == 0 || out.columns == 0 {
            return Ok(());
        }
        let parameters = ConvertParameters {
            out: out.span.ptr(),
            from: values.ptr(),
            rows: out.rows as i64,
            columns: int(name, "columns", out.columns)?,
            out_pitch: out.pitch as i64,
            policy: code(policy),
            scale,
            report: report.ptr(),
        };
        // SAFETY: the contract was checked; spans and matrices vouch for the memory.
        unsafe { launch(stream, kernel, [threads.div_ceil(THREADS), 1, 1], &parameters) }
    }
}

#[cfg(test)]
mod tests;
