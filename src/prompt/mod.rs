//! From prompt text to a [`SequencePlan`]: pure integers, no pixels, no device.
//!
//! ```text
//!  Request ──▶ template ──▶ split at markers ──▶ tokenize each segment ──▶ lay out ──▶ SequencePlan
//!              one string    count = images?      BOS, control tokens       limit, cut   ids, slots, im_mask
//! ```
//!
//! Where upstream is silent this module speaks: a wrong number of markers is an error that shows where each
//! stands, a sequence past the limit an error with its sum, a cut a warning that names what was lost. Where
//! upstream is careless it is careful: a control token typed by a user is text, unless asked otherwise.
//!
//! One difference is deliberate: a prompt without images gets one BOS, not upstream's two.

mod layout;
mod markers;
mod plan;
mod planner;
mod request;
mod template;
#[cfg(test)]
mod tests;
mod turns;

pub use markers::MarkerMismatch;
pub use plan::{Segment, SegmentKind, SequencePlan, Slot};
pub use planner::{Planner, TokenSegment, plan, plan_tokens};
pub use request::{Bos, LengthOptions, Meta, Request};
pub use template::{DEFAULT_META_INSTRUCTION, MARKER, MarkerPlace, PromptText};
pub use turns::{Role, Turn, TurnPart};
