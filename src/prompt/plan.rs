//! The layout of a sequence: ids, slots, mask.

use serde::Serialize;

use crate::warning::Warning;

/// The rows one image fills in the sequence, in positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Slot {
    /// First position.
    pub offset: usize,
    /// Positions filled: **P**, less where a cut goes through the image, 0 where it is lost.
    pub len: usize,
}

/// A run of positions of one kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Segment {
    /// First position.
    pub offset: usize,
    /// Positions.
    pub len: usize,
    /// What fills them.
    pub kind: SegmentKind,
}

/// What fills a [`Segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SegmentKind {
    /// Token embeddings.
    Text,
    /// The features of one image, by its index in the prompt.
    Image(usize),
}

/// The layout of one sequence of **L** positions: integers alone.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SequencePlan {
    /// Token ids, -1 in image rows; shape `[L]`.
    pub input_ids: Vec<i64>,
    /// One slot per image, in the order of the prompt; shape `[N]`.
    pub slots: Vec<Slot>,
    /// The runs of text and image rows, in order, covering `0..L` without a gap.
    pub segments: Vec<Segment>,
    /// True in image rows; shape `[L]`. PLoRA consumes it.
    pub im_mask: Vec<bool>,
    /// What deserves a word about this layout.
    pub warnings: Vec<Warning>,
}

/// Markers and images that do not match.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MarkerMismatch {
    /// Markers found.
    pub markers: usize,
    /// Images given.
    pub images: usize,
}

impl std::fmt::Display for MarkerMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} markers, {} images", self.markers, self.images)
    }
}
