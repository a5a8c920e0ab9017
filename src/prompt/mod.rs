//! From prompt text to a [`SequencePlan`]: pure integers, no pixels, no device.

mod plan;

pub use plan::{MarkerMismatch, Segment, SegmentKind, SequencePlan, Slot};
