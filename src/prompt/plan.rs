//! The layout of a sequence: ids, slots, mask.
//!
//! ```text
//!  segments   ├── text ──┤──── image 0 ────┤ text ┤──── image 1 ────┤── text ──┤
//!  input_ids   1 92543 …  -1 -1 -1 … -1 -1  1 328…  -1 -1 -1 … -1 -1  1 281 …
//!  im_mask     0   0   …   1  1  1 …  1  1  0   0    1  1  1 …  1  1  0   0
//!             0          140               1365  1370             2595       L
//! ```

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

/// A run of positions of one kind; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Segment {
    /// First position.
    pub offset: usize,
    /// Positions.
    pub len: usize,
    /// What fills them.
    pub kind: SegmentKind,
    /// What the positions of a text segment spell, BOS aside: the whole text, also where a cut lost its end.
    /// Empty for images and for text that came as ids.
    pub text: String,
}

/// What fills a [`Segment`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SegmentKind {
    /// Token embeddings.
    Text,
    /// The features of one image, by its index in the prompt, which is also that of its slot.
    Image(usize),
}

/// The layout of one sequence of **L** positions: integers alone.
///
/// Made by [`plan`](super::plan()), [`plan_tokens`](super::plan_tokens()) or a [`Planner`](super::Planner);
/// [`SequencePlan::check`] states what holds between its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SequencePlan {
    /// Token ids, -1 in image rows; shape `[L]`.
    pub input_ids: Vec<i64>,
    /// One slot per image, in the order of the prompt; shape `[N]`. A cut keeps the slot of an image that
    /// it lost: `len` 0 at offset L.
    pub slots: Vec<Slot>,
    /// The runs of text and image rows, in order, covering `0..L` without a gap.
    pub segments: Vec<Segment>,
    /// True in image rows; shape `[L]`. PLoRA consumes it.
    pub im_mask: Vec<bool>,
    /// What deserves a word about this layout.
    pub warnings: Vec<Warning>,
}

impl SequencePlan {
    /// Returns **L**, the number of positions.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// Returns whether there is no position.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// Returns the ids of all positions, `[L]`, those of image rows being `image_token`: as engines want them.
    pub fn ids_with(&self, image_token: u32) -> impl Iterator<Item = i64> + '_ {
        self.input_ids.iter().map(move |&id| if id < 0 { i64::from(image_token) } else { id })
    }

    /// Returns the number of images, **N**, those that a cut lost included.
    pub fn image_count(&self) -> usize {
        self.slots.len()
    }

    /// Checks that the parts agree, for plans that went through other hands.
    ///
    /// Slots are disjoint, in order and inside the sequence; `im_mask` is true exactly in slots; ids are -1
    /// exactly there; segments cover `0..L` without a gap, and image segment `i` is slot `i`.
    ///
    /// # Errors
    /// The first disagreement, with both sides.
    pub fn check(&self) -> Result<(), String> {
        let len = self.len();
        if self.im_mask.len() != len {
            return Err(format!("im_mask has {} positions, input_ids {len}", self.im_mask.len()));
        }
        let mut inside = vec![false; len]; // [L]
        let mut free = 0;
        for (i, slot) in self.slots.iter().enumerate() {
            let end = slot.offset.checked_add(slot.len).filter(|&end| end <= len);
            let Some(end) = end.filter(|_| slot.offset >= free) else {
                return Err(format!(
                    "slot {i} has {} positions from {}, but {free} is the first free one of {len}",
                    slot.len, slot.offset
                ));
            };
            inside[slot.offset..end].fill(true);
            free = end;
        }
        for (at, &inside) in inside.iter().enumerate() {
            let (id, mask) = (self.input_ids[at], self.im_mask[at]);
            if mask != inside || (id == -1) != inside || id < -1 {
                return Err(format!(
                    "position {at} has id {id} and mask {mask}, but lies {} a slot",
                    if inside { "inside" } else { "outside" }
                ));
            }
        }
        let mut next = 0;
        let mut seen = 0;
        for (i, segment) in self.segments.iter().enumerate() {
            if segment.offset != next || segment.len == 0 || segment.len > len - next {
                return Err(format!(
                    "segment {i} has {} positions from {}, but {next} of {len} are covered before it",
                    segment.len, segment.offset
                ));
            }
            next += segment.len;
            let here = Slot { offset: segment.offset, len: segment.len };
            match segment.kind {
                SegmentKind::Text if inside[segment.offset] || inside[next - 1] => {
                    return Err(format!("segment {i} is text, but overlaps a slot"));
                }
                SegmentKind::Text => {}
                SegmentKind::Image(image) if image == seen && self.slots.get(image) == Some(&here) => {
                    seen += 1
                }
                SegmentKind::Image(image) => {
                    return Err(format!("segment {i}, {here:?}, is not the slot of image {image}"));
                }
            }
        }
        if next != len {
            return Err(format!("the segments cover {next} positions of {len}"));
        }
        match self.slots[seen..].iter().find(|slot| slot.len > 0) {
            Some(slot) => Err(format!("{slot:?} has no segment")),
            None => Ok(()),
        }
    }
}
