//! Launches `kernels/verify.cu`: is a sequence complete? One pass over its rows, a few numbers back.

use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Pod, Span, Stream, Zeroable};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::matrix::Matrix;
use crate::error::Result;

/// What one row looks like (`RowCheck` in verify.cu).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowCheck {
    bad_channel: i32,
    poisoned: i32,
    /// Euclidean norm; anything where a channel is not finite.
    pub(crate) norm: f32,
}

impl RowCheck {
    /// The first channel that is NaN or infinite.
    pub(crate) fn bad_channel(&self) -> Option<usize> {
        usize::try_from(self.bad_channel).ok()
    }

    /// True if an element was never written.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned != 0
    }
}

/// Rows of a slot (`SlotRange` in verify.cu).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotRange {
    pub(crate) offset: i32,
    pub(crate) len: i32,
}

// SAFETY: numbers without padding.
unsafe impl Zeroable for RowCheck {}
// SAFETY: as above.
unsafe impl Pod for RowCheck {}
// SAFETY: as above.
unsafe impl Zeroable for SlotRange {}
// SAFETY: as above.
unsafe impl Pod for SlotRange {}

parameters! {
    /// Of `verify_rows`.
    pub(crate) struct RowsParameters {
        check: DevicePtr<RowCheck>, // [count]
        rows: DevicePtr<f16>, // [count, hidden]
        pitch: i64,
        count: i32,
        hidden: i32,
    }
}

parameters! {
    /// Of `verify_slots`.
    pub(crate) struct SlotsParameters {
        mean_norm: DevicePtr<f32>, // [slots]
        check: DevicePtr<RowCheck>,
        ranges: DevicePtr<SlotRange>, // [slots]
        slots: i32,
    }
}

/// Rows or slots of a block, one a warp.
const WARPS: usize = 4;

/// Rows, slots.
pub(crate) const ENTRIES: [Entry; 2] =
    [Entry::new("verify_rows", 32 * WARPS as u32, 0), Entry::new("verify_slots", 32 * WARPS as u32, 0)];

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct Verify {
    rows: Kernel<RowsParameters>,
    slots: Kernel<SlotsParameters>,
}

impl Verify {
    /// Finds the kernels in verify's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        Ok(Self { rows: Kernel::load(module, ENTRIES[0])?, slots: Kernel::load(module, ENTRIES[1])? })
    }

    /// Enqueues a look at every row.
    pub(crate) fn enqueue_rows(&self, stream: &Stream, check: Span<RowCheck>, rows: &Matrix) -> Result<()> {
        let name = self.rows.name();
        contract!(name, check.len() >= rows.rows, "{} rows into {check:?}", rows.rows);
        rows.check(name, "rows")?;
        if rows.rows == 0 {
            return Ok(());
        }
        let parameters = RowsParameters {
            check: check.ptr(),
            rows: rows.span.ptr(),
            pitch: rows.pitch as i64,
            count: int(name, "count", rows.rows)?,
            hidden: int(name, "hidden", rows.columns)?,
        };
        // SAFETY: the contract was checked; spans and matrices vouch for the memory.
        unsafe { launch(stream, &self.rows, [rows.rows.div_ceil(WARPS), 1, 1], &parameters) }
    }

    /// Enqueues the mean norm of each slot; `ranges` must lie within the rows of `check`.
    pub(crate) fn enqueue_slots(
        &self,
        stream: &Stream,
        mean_norm: Span<f32>,
        check: Span<RowCheck>,
        ranges: Span<SlotRange>,
    ) -> Result<()> {
        let name = self.slots.name();
        contract!(name, mean_norm.len() >= ranges.len(), "{ranges:?} slots into {mean_norm:?}");
        if ranges.len() == 0 {
            return Ok(());
        }
        let parameters = SlotsParameters {
            mean_norm: mean_norm.ptr(),
            check: check.ptr(),
            ranges: ranges.ptr(),
            slots: int(name, "slots", ranges.len())?,
        };
        // SAFETY: the contract was checked; spans vouch for the memory, the caller for the ranges.
        unsafe { launch(stream, &self.slots, [ranges.len().div_ceil(WARPS), 1, 1], &parameters) }
    }
}

#[cfg(test)]
mod tests;
