//! Several sequences in one buffer: plans laid end to end, and which image fills which slot.
//!
//! ```text
//!  plan 0                     plan 1                 plan 2
//!  ├ text ┤ image 0 ├ text ┤  ├ image 1 ├ text ┤     ├ image 0 ┤ image 1 ├ text ┤
//!  0                       L0                  L0+L1                            L0+L1+L2     ← cu_seqlens
//! ```
//!
//! Pure integers, as a single [`SequencePlan`] is. Image 0 above stands in two sequences and is encoded once.

use crate::error::{Error, Result};
use crate::prompt::{SegmentKind, SequencePlan, Slot};

/// Plans laid end to end without padding, as variable-length attention takes them.
///
/// A single plan is a packing of one: `PackedPlan::from(&plan)`.
#[derive(Clone, Debug, Default)]
pub struct PackedPlan<'p> {
    sequences: Vec<Sequence<'p>>, // [S]
}

/// One plan, and for each of its slots the image of the call that fills it.
#[derive(Clone, Debug)]
struct Sequence<'p> {
    plan: &'p SequencePlan,
    images: Vec<usize>, // [slots of the plan]
}

/// A run of rows of the packed buffer and what fills them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// First row of the packed buffer.
    pub offset: usize,
    /// Rows; never 0.
    pub len: usize,
    /// What fills them.
    pub content: Content,
}

/// What fills a [`Block`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Embeddings of these token ids.
    Text(Vec<u32>),
    /// The first rows of an image's features, by its index in the call.
    Image(usize),
}

impl<'p> PackedPlan<'p> {
    /// Makes an empty packing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a plan; `images[k]` is the image of the call that fills the plan's slot `k`.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are not as many images as slots.
    pub fn push(&mut self, plan: &'p SequencePlan, images: impl Into<Vec<usize>>) -> Result<()> {
        let images = images.into();
        if images.len() != plan.slots.len() {
            return Err(Error::argument(
                format!(
                    "sequence {} has {} slots but is given {} images",
                    self.sequences.len(),
                    plan.slots.len(),
                    images.len()
                ),
                "Name one image of the call for each slot of the plan",
            ));
        }
        self.sequences.push(Sequence { plan, images });
        Ok(())
    }

    /// Returns the number of sequences, **S**.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Returns whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Returns where each sequence begins and the last one ends, in positions; shape `[S + 1]`.
    pub fn cu_seqlens(&self) -> Vec<usize> {
        let mut ends = vec![0];
        ends.extend(self.sequences.iter().scan(0, |end, sequence| {
            *end += sequence.plan.input_ids.len();
            Some(*end)
        }));
        ends
    }

    /// Returns the number of positions of all sequences together.
    pub fn total_len(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.plan.input_ids.len()).sum()
    }

    /// Returns the token ids of all sequences, -1 in image rows; shape `[total_len]`.
    pub fn input_ids(&self) -> Vec<i64> {
        self.sequences.iter().flat_map(|sequence| sequence.plan.input_ids.iter().copied()).collect()
    }

    /// Returns the image mask of all sequences; shape `[total_len]`.
    pub fn im_mask(&self) -> Vec<bool> {
        self.sequences.iter().flat_map(|sequence| sequence.plan.im_mask.iter().copied()).collect()
    }

    /// Returns every slot in order, in positions of the packed buffer, with the image that fills it.
    pub fn slots(&self) -> Vec<(usize, Slot)> {
        self.starts()
            .flat_map(|(start, sequence)| {
                let shifted = move |slot: &Slot| Slot { offset: start + slot.offset, len: slot.len };
                sequence.images.iter().copied().zip(sequence.plan.slots.iter().map(shifted))
            })
            .collect()
    }

    /// Returns how many images a call must bring: one more than the largest index named.
    pub fn images_needed(&self) -> usize {
        self.sequences.iter().flat_map(|sequence| &sequence.images).map(|image| image + 1).max().unwrap_or(0)
    }

    /// Returns the blocks in order; together they cover `0..total_len` without a gap.
    pub(crate) fn blocks(&self) -> Vec<Block> {
        let mut blocks = Vec::new();
        for (start, sequence) in self.starts() {
            for segment in sequence.plan.segments.iter().filter(|segment| segment.len > 0) {
                let ids = &sequence.plan.input_ids[segment.offset..segment.offset + segment.len];
                let content = match segment.kind {
                    SegmentKind::Text => {
                        Content::Text(ids.iter().map(|&id| u32::try_from(id).unwrap_or(u32::MAX)).collect())
                    }
                    SegmentKind::Image(slot) => Content::Image(sequence.images[slot]),
                };
                blocks.push(Block { offset: start + segment.offset, len: segment.len, content });
            }
        }
        blocks
    }

    /// Returns each sequence with its first position in the packed buffer.
    fn starts(&self) -> impl Iterator<Item = (usize, &Sequence<'p>)> {
        self.sequences.iter().scan(0, |next, sequence| {
            let start = *next;
            *next += sequence.plan.input_ids.len();
            Some((start, sequence))
        })
    }
}

impl<'p> From<&'p SequencePlan> for PackedPlan<'p> {
    fn from(plan: &'p SequencePlan) -> Self {
        Self { sequences: vec![Sequence { plan, images: (0..plan.slots.len()).collect() }] }
    }
}

impl<'p> From<&PackedPlan<'p>> for PackedPlan<'p> {
    fn from(packed: &PackedPlan<'p>) -> Self {
        packed.clone()
    }
}
