//! What `kernels/range.cuh` says about weights that fp16 cannot hold.

use super::driver::{Pod, Span, Zeroable};
use super::launch::contract;
use crate::checkpoint::RangePolicy;
use crate::error::Result;

/// `RangeReport` in range.cuh: set to [`RangeReport::CLEAN`] before the first launch, merged by all after it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RangeReport {
    /// Least flat index of a value that the policy refuses.
    first: u64,
    /// Values beyond ±65504.
    count: u32,
    /// Nothing.
    pad: u32,
}

// SAFETY: integers without padding.
unsafe impl Zeroable for RangeReport {}
// SAFETY: as above.
unsafe impl Pod for RangeReport {}

impl RangeReport {
    /// Nothing was found yet.
    pub(crate) const CLEAN: Self = Self { first: u64::MAX, count: 0, pad: 0 };

    /// Index of the first value that was refused.
    pub(crate) fn refused(&self) -> Option<u64> {
        (self.first != u64::MAX).then_some(self.first)
    }

    /// Values beyond fp16's range; those that the policy saturates, if nothing was refused.
    pub(crate) fn out_of_range(&self) -> u32 {
        self.count
    }
}

/// A policy as the kernels take it.
pub(crate) fn code(policy: RangePolicy) -> i32 {
    match policy {
        RangePolicy::Refuse => 0,
        RangePolicy::Saturate => 1,
    }
}

/// Checks that there is a place for a report.
pub(crate) fn check_report(kernel: &str, report: Span<RangeReport>) -> Result<()> {
    contract!(kernel, report.len() >= 1 && report.ptr().is_aligned(8), "a report in {report:?}");
    Ok(())
}
