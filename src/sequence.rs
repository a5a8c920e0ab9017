//! The sequence buffer: one allocation `[L, H]` of fp16, the LLM's `inputs_embeds`.
//!
//! It knows rows and who may write them, nothing else: no pixels, no projector. A [`SequenceBuffer`] lends
//! blocks of rows ([`RowsMut`]); whoever is lent a block writes into it in place, and nothing is copied
//! afterwards. [`SequenceBuffer::verify`] says whether everything that should be there is there.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::packing::PackedPlan;
use crate::prompt::Slot;

/// What unwritten rows of an owned buffer hold: a NaN that no arithmetic produces.
pub(crate) const POISON: f16 = f16::from_bits(0x7d5a);

/// The LLM's input embeddings: rows of `H` fp16 elements, owned and reusable, or lent by the caller.
///
/// An owned buffer grows to the sequence at hand and starts poisoned, so that a row nobody wrote is found.
/// A wrapped one is filled in place: rows outside the sequence and elements between rows are not touched.
/// Both kinds also come in a GPU's memory, from [`Encoder::device_sequence`](crate::Encoder::device_sequence)
/// and [`Encoder::wrap_device`](crate::Encoder::wrap_device); [`SequenceBuffer::to_host`] reads any of them.
///
/// # Examples
/// ```
/// use half::f16;
/// use imagehere::sequence::SequenceBuffer;
///
/// let mine = SequenceBuffer::new(); // grows as needed
/// assert_eq!(mine.len(), 0);
///
/// let mut theirs = vec![f16::ZERO; 100 * 256]; // 100 rows, 256 elements apart
/// let wrapped = SequenceBuffer::wrap(&mut theirs, 256);
/// assert_eq!(wrapped.len(), 0); // nothing encoded into it yet
/// ```
#[derive(Debug, Default)]
pub struct SequenceBuffer<'a> {
    storage: Storage<'a>,
    address: u64,      // of the first row, if on a device
    hidden: usize,     // H
    row_stride: usize, // elements
    layout: Layout,
}

/// Whose memory it is.
#[derive(Debug)]
enum Storage<'a> {
    Owned(Vec<f16>),
    Wrapped(&'a mut [f16]),
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "made by devices that have memory"))]
    Device(Box<dyn DeviceRows>),
}

/// Which memory rows lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// The host's.
    Host,
    /// That of the NVIDIA GPU with this ordinal.
    Cuda(usize),
}

/// Rows in a device's memory, as a backend makes or takes them.
pub(crate) trait DeviceRows: fmt::Debug + Send + Sync {
    /// Which device.
    fn place(&self) -> Place;

    /// Makes room for `rows` of `hidden` elements, poisoned, in memory of its own; or checks that the caller's
    /// has it. Returns address of the first element and row stride in elements.
    fn reserve(&mut self, rows: usize, hidden: usize) -> Result<(u64, usize)>;

    /// Copies `rows` of `hidden` elements to the host, shape `[rows, hidden]`.
    fn read(&self, rows: Range<usize>, hidden: usize) -> Result<Vec<f16>>;

    /// Looks at all elements of `rows` rows, on the device, and measures slots.
    fn check(&self, rows: usize, hidden: usize, slots: &[Slot]) -> Result<RowChecks>;
}

/// What a device says about rows in its memory.
#[derive(Debug)]
pub(crate) struct RowChecks {
    /// The first row that holds poison.
    pub(crate) poisoned: Option<usize>,
    /// The first row with an element that is not finite, and the first such channel of it.
    pub(crate) not_finite: Option<(usize, usize)>,
    /// Of each slot.
    pub(crate) mean_norms: Vec<f64>,
}

impl Default for Storage<'_> {
    fn default() -> Self {
        Self::Owned(Vec::new())
    }
}

/// What the buffer holds, as its plan says, and which of it was written.
#[derive(Debug, Default)]
struct Layout {
    cu_seqlens: Vec<usize>,    // [S + 1]
    slots: Vec<(usize, Slot)>, // [N], image and rows
    im_mask: Vec<bool>,        // [L]
    written: Vec<bool>,        // [L]
}

impl<'a> SequenceBuffer<'a> {
    /// Makes an empty buffer that owns its memory and grows to each sequence encoded into it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wraps memory that the caller preallocated, row `i` starting at element `i * row_stride`.
    ///
    /// Encoding fills rows `0..L` of it in place and fails, with nothing written, if they do not fit.
    pub fn wrap(data: &'a mut [f16], row_stride: usize) -> Self {
        Self { storage: Storage::Wrapped(data), row_stride, ..Self::default() }
    }

    /// Takes rows in a device's memory.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "called by devices that have memory"))]
    pub(crate) fn on_device(rows: Box<dyn DeviceRows>) -> Self {
        Self { storage: Storage::Device(rows), ..Self::default() }
    }

    /// Returns which memory the rows lie in.
    pub fn place(&self) -> Place {
        match &self.storage {
            Storage::Owned(_) | Storage::Wrapped(_) => Place::Host,
            Storage::Device(rows) => rows.place(),
        }
    }

    /// Returns the device address of the first row, and the distance from one row to the next in elements, of a
    /// sequence in a device's memory. Good until the next sequence is encoded into this buffer.
    pub fn device_address(&self) -> Option<(u64, usize)> {
        let on_device = matches!(self.storage, Storage::Device(_)) && !self.is_empty();
        on_device.then_some((self.address, self.row_stride))
    }

    /// Returns **L**, the positions of the last sequence (or packing) encoded into this buffer.
    pub fn len(&self) -> usize {
        self.layout.im_mask.len()
    }

    /// Returns whether nothing was encoded into this buffer yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns **H**, the elements of a row; 0 while nothing was encoded.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Returns where each packed sequence begins and the last one ends, in positions; shape `[S + 1]`.
    pub fn cu_seqlens(&self) -> &[usize] {
        &self.layout.cu_seqlens
    }

    /// Returns every slot in order with the index of the image that fills it.
    pub fn slots(&self) -> &[(usize, Slot)] {
        &self.layout.slots
    }

    /// Returns the image mask, shape `[L]`.
    pub fn im_mask(&self) -> &[bool] {
        &self.layout.im_mask
    }

    /// Returns row `i`, shape `[H]`.
    ///
    /// # Panics
    /// If `i` is not below [`SequenceBuffer::len`], or the rows are not in host memory.
    pub fn row(&self, i: usize) -> &[f16] {
        assert!(i < self.len(), "row {i} of {}", self.len());
        let data = self.data().expect("rows in host memory; `to_host` reads those of a device");
        &data[i * self.row_stride..][..self.hidden]
    }

    /// Returns all rows, shape `[L, H]`, if they lie in host memory without gaps: always so in an owned buffer of
    /// the host's.
    pub fn as_slice(&self) -> Option<&[f16]> {
        let contiguous = self.row_stride == self.hidden || self.len() <= 1;
        self.data().filter(|_| contiguous).map(|data| &data[..self.len() * self.hidden])
    }

    /// Copies all rows, shape `[L, H]`, wherever they lie.
    ///
    /// # Errors
    /// [`Error::Device`] if they cannot be read back.
    pub fn to_host(&self) -> Result<Vec<f16>> {
        match &self.storage {
            Storage::Device(rows) => rows.read(0..self.len(), self.hidden),
            _ => Ok((0..self.len()).flat_map(|i| self.row(i).iter().copied()).collect()),
        }
    }

    fn data(&self) -> Option<&[f16]> {
        match &self.storage {
            Storage::Owned(data) => Some(data),
            Storage::Wrapped(data) => Some(data),
            Storage::Device(_) => None,
        }
    }

    /// Makes room for a packing of rows of `hidden` elements and forgets what was there.
    ///
    /// # Errors
    /// [`Error::Argument`] if wrapped memory is too small or its stride too short; it is then untouched.
    pub(crate) fn prepare(&mut self, packed: &PackedPlan<'_>, hidden: usize) -> Result<()> {
        let rows = packed.total_len();
        match &mut self.storage {
            Storage::Owned(data) => {
                data.clear();
                data.resize(rows * hidden, POISON);
                self.row_stride = hidden;
            }
            Storage::Wrapped(data) => {
                let need =
                    rows.checked_sub(1).map_or(0, |before| before.saturating_mul(self.row_stride) + hidden);
                if self.row_stride < hidden || need > data.len() {
                    return Err(Error::argument(
                        format!(
                            "the sequence needs {rows} rows of {hidden} elements, but the buffer given has {} \
                             elements with a row stride of {}",
                            data.len(),
                            self.row_stride
                        ),
                        format!(
                            "Give at least {} elements and a stride of at least {hidden}",
                            rows.saturating_sub(1) * self.row_stride.max(hidden) + hidden
                        ),
                    ));
                }
            }
            Storage::Device(on_device) => {
                (self.address, self.row_stride) = on_device.reserve(rows, hidden)?;
            }
        }
        self.hidden = hidden;
        self.layout = Layout {
            cu_seqlens: packed.cu_seqlens(),
            slots: packed.slots(),
            im_mask: packed.im_mask(),
            written: vec![false; rows],
        };
        Ok(())
    }

    /// Forgets what was there, after a call that failed half-way.
    pub(crate) fn forget(&mut self) {
        self.layout = Layout::default();
    }

    /// Lends blocks of rows, all at once, each to be written in place.
    ///
    /// # Errors
    /// [`Error::Internal`] if the blocks are not in order, overlap or leave the sequence.
    pub(crate) fn lend(
        &mut self,
        blocks: impl IntoIterator<Item = Range<usize>>,
    ) -> Result<Vec<RowsMut<'_>>> {
        let (len, hidden, row_stride) = (self.len(), self.hidden, self.row_stride);
        let (place, address) = (self.place(), self.address);
        let mut rest = match &mut self.storage {
            Storage::Owned(data) => data.as_mut_slice(),
            Storage::Wrapped(data) => data,
            Storage::Device(_) => &mut [],
        };
        let mut next = 0; // first row of `rest`
        let mut lent = Vec::new();
        for block in blocks {
            if block.start < next || block.end < block.start || block.end > len {
                return Err(Error::Internal(format!("rows {block:?} lent after row {next} of {len}")));
            }
            if place != Place::Host {
                let first = address + (block.start * row_stride * size_of::<f16>()) as u64;
                lent.push(RowsMut::on_device(place, first, block.len(), hidden, row_stride));
                next = block.end;
                continue;
            }
            // The last row may end where the memory does, short of a whole stride.
            let start = ((block.start - next) * row_stride).min(rest.len());
            let size = (block.len() * row_stride).min(rest.len() - start);
            let (mine, after) = rest[start..].split_at_mut(size);
            lent.push(RowsMut::new(mine, hidden, row_stride));
            (rest, next) = (after, block.end);
        }
        Ok(lent)
    }

    /// Notes that a block's rows were written.
    pub(crate) fn mark_written(&mut self, block: Range<usize>) {
        self.layout.written[block].fill(true);
    }

    /// Checks that the sequence is complete, and measures its slots.
    ///
    /// Every row was written; no element is NaN or infinite; slots lie in order, apart and inside the
    /// sequence; the mask is true exactly in slots.
    ///
    /// # Errors
    /// [`Error::Incomplete`] with the first failure and where it is.
    pub fn verify(&self) -> Result<VerifyReport> {
        let incomplete = |problem: String| Err(Error::Incomplete { problem });
        if self.is_empty() {
            return incomplete("nothing was encoded into it".into());
        }
        let mut expected = vec![false; self.len()];
        let mut end = 0;
        for &(image, slot) in &self.layout.slots {
            if slot.offset < end || slot.offset + slot.len > self.len() {
                return incomplete(format!(
                    "the slot of image {image}, rows {}..{}, overlaps the one before or leaves the {} rows",
                    slot.offset,
                    slot.offset + slot.len,
                    self.len()
                ));
            }
            end = slot.offset + slot.len;
            expected[slot.offset..end].fill(true);
        }
        if let Some(at) = (0..self.len()).find(|&i| expected[i] != self.layout.im_mask[i]) {
            return incomplete(format!("the mask at row {at} disagrees with the slots"));
        }
        let (poisoned, not_finite, mean_norms) = match &self.storage {
            Storage::Device(rows) => {
                let slots: Vec<Slot> = self.layout.slots.iter().map(|&(_, slot)| slot).collect();
                let checks = rows.check(self.len(), self.hidden, &slots)?;
                (checks.poisoned, checks.not_finite, checks.mean_norms)
            }
            _ => {
                let is_poison = |x: &f16| x.to_bits() == POISON.to_bits();
                let rows = (0..self.len()).into_par_iter();
                let poisoned = rows.clone().find_first(|&i| self.row(i).iter().any(is_poison));
                let bad = |i| Some((i, self.row(i).iter().position(|x: &f16| !x.is_finite())?));
                let not_finite = rows.find_map_first(bad);
                let norms = self.layout.slots.iter().map(|&(_, slot)| self.mean_norm(slot));
                (poisoned, not_finite, norms.collect())
            }
        };
        let unwritten = self.layout.written.iter().position(|written| !written);
        let unwritten = unwritten.into_iter().chain(poisoned).min();
        let first = not_finite.filter(|&(row, _)| unwritten.is_none_or(|unwritten| row < unwritten));
        if let Some((row, channel)) = first {
            let value = self.value(row, channel)?;
            return incomplete(format!("row {row} ({}) holds {value} in channel {channel}", self.whose(row)));
        }
        if let Some(row) = unwritten {
            return incomplete(format!("row {row} ({}) was not written", self.whose(row)));
        }
        let slots = self.layout.slots.iter().zip(mean_norms);
        let slots = slots.map(|(&(image, slot), mean_norm)| SlotReport { image, slot, mean_norm });
        Ok(VerifyReport { rows: self.len(), slots: slots.collect() })
    }

    /// Returns one element, wherever it lies.
    fn value(&self, row: usize, channel: usize) -> Result<f16> {
        match &self.storage {
            Storage::Device(rows) => Ok(rows.read(row..row + 1, self.hidden)?[channel]),
            _ => Ok(self.row(row)[channel]),
        }
    }

    /// Returns the mean Euclidean norm of a slot's rows; 0 for an empty slot.
    fn mean_norm(&self, slot: Slot) -> f64 {
        let norm = |wide: &mut Vec<f32>, i| {
            wide.resize(self.hidden, 0.0);
            self.row(i).convert_to_f32_slice(wide);
            wide.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
        };
        // Collected, so that they are added in order, however many threads there are.
        let rows = (slot.offset..slot.offset + slot.len).into_par_iter();
        let norms: Vec<f64> = rows.map_init(Vec::new, norm).collect();
        norms.iter().sum::<f64>() / slot.len.max(1) as f64
    }

    /// Says what row `i` belongs to, for messages.
    fn whose(&self, i: usize) -> String {
        let holds = |slot: &Slot| (slot.offset..slot.offset + slot.len).contains(&i);
        match self.layout.slots.iter().find(|(_, slot)| holds(slot)) {
            Some((image, _)) => format!("image {image}"),
            None => "text".into(),
        }
    }
}

/// What [`SequenceBuffer::verify`] found in a complete sequence.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Rows checked.
    pub rows: usize,
    /// Every slot, in order.
    pub slots: Vec<SlotReport>,
}

/// One slot of a complete sequence.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SlotReport {
    /// The image that fills it, by its index in the call.
    pub image: usize,
    /// Its rows.
    pub slot: Slot,
    /// Mean Euclidean norm of its rows: near 0, or far from its neighbours', is worth a look.
    pub mean_norm: f64,
}

/// A lent block of consecutive rows of some `[L, H]` fp16 buffer, writable from several threads at once.
///
/// Shape `[rows, H]`, row `i` starting `i * row_stride` elements after the first.
#[derive(Debug)]
pub struct RowsMut<'a> {
    first: *mut f16, // an address of the device's, where it lies there
    place: Place,
    rows: usize,
    hidden: usize,     // H
    row_stride: usize, // elements
    _lent: PhantomData<&'a mut [f16]>,
}

// SAFETY: a `RowsMut` is an exclusive borrow of its rows, as `&'a mut [f16]` is, and f16 is Send + Sync.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: through `&RowsMut` rows are reached only by dereferencing what `row_ptr` returns, which is unsafe.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    /// Borrows `data` as rows of `hidden` elements, `row_stride` elements apart; as many rows as fit.
    ///
    /// # Panics
    /// If `hidden` is 0 or exceeds `row_stride`.
    pub fn new(data: &'a mut [f16], hidden: usize, row_stride: usize) -> Self {
        assert!(hidden > 0 && hidden <= row_stride, "rows of {hidden} elements, {row_stride} apart");
        let rows = if data.len() < hidden { 0 } else { (data.len() - hidden) / row_stride + 1 };
        Self { first: data.as_mut_ptr(), place: Place::Host, rows, hidden, row_stride, _lent: PhantomData }
    }

    /// Names rows in a device's memory, by the address of the first.
    pub(crate) fn on_device(place: Place, first: u64, rows: usize, hidden: usize, row_stride: usize) -> Self {
        let first = std::ptr::without_provenance_mut(first as usize);
        Self { first, place, rows, hidden, row_stride, _lent: PhantomData }
    }

    /// Returns which memory the rows lie in.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Returns whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Returns **H**, the elements of a row.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Returns how far apart rows start, in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Returns row `i`, shape `[H]`.
    ///
    /// # Panics
    /// If there is no row `i`, or it is not in host memory.
    pub fn row_mut(&mut self, i: usize) -> &mut [f16] {
        assert_eq!(self.place, Place::Host, "rows in host memory");
        let first = self.row_ptr(i);
        // SAFETY: `row_ptr` checked `i`; the row lies in the borrowed block, and `&mut self` makes it ours.
        unsafe { std::slice::from_raw_parts_mut(first, self.hidden) }
    }

    /// Returns a pointer to the first of row `i`'s `H` elements, for kernels whose threads write disjoint
    /// parts of a row; an address of the device's where the rows lie there ([`RowsMut::place`]).
    ///
    /// Dereferencing it is the caller's promise that no two threads touch the same element at once and
    /// that the borrow behind this block is alive.
    ///
    /// # Panics
    /// If there is no row `i`.
    pub fn row_ptr(&self, i: usize) -> *mut f16 {
        assert!(i < self.rows, "row {i} of a block of {}", self.rows);
        self.first.wrapping_add(i * self.row_stride)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::prompt::{Segment, SegmentKind, SequencePlan};

    const H: usize = 3;

    /// A plan of alternating text and image runs of the given lengths, text first.
    fn plan(runs: &[usize]) -> SequencePlan {
        let mut plan = SequencePlan {
            input_ids: vec![],
            slots: vec![],
            segments: vec![],
            im_mask: vec![],
            warnings: vec![],
        };
        for (i, &len) in runs.iter().enumerate() {
            let offset = plan.input_ids.len();
            let image = i % 2 == 1;
            plan.input_ids.extend(std::iter::repeat_n(if image { -1 } else { 7 }, len));
            plan.im_mask.extend(std::iter::repeat_n(image, len));
            if image {
                plan.slots.push(Slot { offset, len });
            }
            if len > 0 {
                let kind = if image { SegmentKind::Image(i / 2) } else { SegmentKind::Text };
                plan.segments.push(Segment { offset, len, kind, text: String::new() });
            }
        }
        plan.check().unwrap();
        plan
    }

    /// Writes `1 + row` into every element of the lent blocks.
    fn fill(sequence: &mut SequenceBuffer<'_>, blocks: &[Range<usize>]) {
        for (block, mut rows) in blocks.iter().zip(sequence.lend(blocks.iter().cloned()).unwrap()) {
            assert_eq!(rows.len(), block.len());
            for i in 0..rows.len() {
                rows.row_mut(i).fill(f16::from_f32((1 + block.start + i) as f32));
            }
        }
        for block in blocks {
            sequence.mark_written(block.clone());
        }
    }

    fn filled(plan: &SequencePlan) -> SequenceBuffer<'static> {
        let mut sequence = SequenceBuffer::new();
        sequence.prepare(&plan.into(), H).unwrap();
        fill(&mut sequence, &blocks(plan));
        sequence
    }

    fn blocks(plan: &SequencePlan) -> Vec<Range<usize>> {
        plan.segments.iter().map(|segment| segment.offset..segment.offset + segment.len).collect()
    }

    fn problem(sequence: &SequenceBuffer<'_>) -> String {
        sequence.verify().unwrap_err().to_string()
    }

    #[test]
    fn a_complete_sequence_passes_and_reports_norms() {
        let report = filled(&plan(&[2, 3, 1, 1])).verify().unwrap();
        assert_eq!(report.rows, 7);
        let norm = |rows: &[f64]| rows.iter().map(|x| x * (H as f64).sqrt()).sum::<f64>() / rows.len() as f64;
        assert!((report.slots[0].mean_norm - norm(&[3.0, 4.0, 5.0])).abs() < 1e-9);
        assert!((report.slots[1].mean_norm - norm(&[7.0])).abs() < 1e-9);
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // one block is what is lent
    fn verify_names_what_is_wrong() {
        let plan = plan(&[2, 3, 1, 1]);
        assert!(problem(&SequenceBuffer::new()).contains("nothing was encoded"));

        let mut sequence = SequenceBuffer::new();
        sequence.prepare(&(&plan).into(), H).unwrap();
        fill(&mut sequence, &[0..2, 2..5, 5..6]);
        assert!(problem(&sequence).contains("row 6 (image 1) was not written"), "{}", problem(&sequence));

        // Marked, but one element was left out: the poison tells.
        let mut sequence = SequenceBuffer::new();
        sequence.prepare(&(&plan).into(), H).unwrap();
        sequence.lend([5..6]).unwrap()[0].row_mut(0)[..H - 1].fill(f16::ONE);
        fill(&mut sequence, &[0..2, 2..5]);
        sequence.mark_written(5..7);
        assert!(problem(&sequence).contains("row 5 (text) was not written"), "{}", problem(&sequence));

        for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
            let mut sequence = filled(&plan);
            sequence.lend([3..4]).unwrap()[0].row_mut(0)[1] = bad;
            let problem = problem(&sequence);
            assert!(problem.contains("row 3 (image 0) holds") && problem.contains("channel 1"), "{problem}");
        }

        let mut sequence = filled(&plan);
        sequence.layout.im_mask[0] = true;
        assert!(problem(&sequence).contains("mask at row 0"));

        let mut sequence = filled(&plan);
        sequence.layout.slots[1].1.offset = 4;
        assert!(problem(&sequence).contains("slot of image 1"));
        sequence.layout.slots[1].1.offset = 7;
        assert!(problem(&sequence).contains("leaves the 7 rows"));
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // one block is what is lent
    fn blocks_out_of_order_or_out_of_bounds_are_not_lent() {
        let mut sequence = filled(&plan(&[2, 3]));
        let (late, early) = (3..5, 0..2);
        assert!(sequence.lend([late.clone(), early.clone()]).is_err());
        assert!(sequence.lend([early.clone(), 1..3]).is_err());
        assert!(sequence.lend([4..6]).is_err());
        assert_eq!(sequence.lend([early, late]).unwrap().len(), 2);
    }

    proptest! {
        #[test]
        fn lent_rows_are_the_buffers_rows_and_nothing_else(
            runs in prop::collection::vec(1usize..5, 1..8),
            gap in 0usize..4,
            spare in 0usize..9,
        ) {
            let plan = plan(&runs);
            let (len, stride) = (plan.input_ids.len(), H + gap);
            let sentinel = f16::from_f32(-1.0);
            let mut memory = vec![sentinel; (len - 1) * stride + H + spare];
            let mut sequence = SequenceBuffer::wrap(&mut memory, stride);
            sequence.prepare(&(&plan).into(), H).unwrap();
            fill(&mut sequence, &blocks(&plan));
            prop_assert!(sequence.verify().is_ok());
            for (i, x) in memory.iter().enumerate() {
                let (row, column) = (i / stride, i % stride);
                let inside = row < len && column < H;
                prop_assert_eq!(*x, if inside { f16::from_f32((1 + row) as f32) } else { sentinel });
            }
        }
    }
}
