//! Everything one device holds from open to drop, and the work of a call on it.
//!
//! ```text
//!   uploads   image ─ raw ─ resize ─▶ squares[round % 2] ─── event ──┐        ┌── next group's images …
//!                                                                    ▼        │ event
//!   compute   text rows ─ slot table ─────────────────────── patches ─ tower ─ … ─ scatter into every slot
//!             └ once a call                                  └─ one graph per number of images ┘
//! ```
//!
//! Images run in groups of up to [`MOST_IMAGES`]; decoding and uploading the next group overlap the current one's
//! tower. Addresses in a captured graph are those of this arena alone; slots are read from a table that is
//! uploaded before the replay, so one graph serves every prompt.
//!
//! Nothing is allocated inside a call, but for what grows to the largest one so far: the image being resized, the
//! tables of its resize, the table of text rows, the rows that go back to the host, and the [pool](super::blocks) that
//! images are decoded into. Where the device has no room for that, groups become smaller for good.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use bytemuck::Zeroable;
use half::f16;

use super::Gpu;
use super::driver::{DeviceMemory, DevicePtr, Event, GraphExec, Span, Stream, device_error, mebibytes};
use super::embed_tokens::{TextRow, TokenTable};
use super::fusions::{self, Fusions};
use super::launch;
use super::linear::{SlotRows, SlotTable};
use super::matrix::Matrix;
use super::pictures::{Growing, Resizer};
use super::range::RangeReport;
use super::tower::{Tower, Workspace};
use super::upload::Ring;
use super::verify::{RowCheck, SlotRange};
use super::weights::{DeviceWeights, Source};
use crate::backend::TraceFn;
use crate::checkpoint::{ConversionReport, DType, EmbeddingTable, RangePolicy};
use crate::config::ModelConfig;
use crate::cpu::PixelTable;
use crate::error::{Error, Result};
use crate::image::Resample;
use crate::image::decode::Decoded;
use crate::prompt::Slot;
use crate::sequence::{POISON, RowChecks};

/// Images in a group, at most: beyond about as many, more are no faster, and cost workspace. Each number of them has a
/// graph of its own, so none is padded to another's.
pub(crate) const MOST_IMAGES: usize = 16;
/// Bytes of a slot of the upload ring: a 5-megapixel image whole, larger ones in bands. What was decoded into a block
/// of the pool does not come this way.
const SLOT_BYTES: usize = 16 << 20;
/// Slots of one group that the table has room for.
const MOST_SLOTS: usize = 4096;

/// One device's memory, streams and graphs.
///
/// Fields are dropped in order: graphs first, then what they were captured with; streams and context last.
#[derive(Debug)]
pub(crate) struct Arena {
    graphs: BTreeMap<usize, GraphExec>, // by number of images
    workspace: Workspace,
    weights: DeviceWeights,
    fusions: Fusions, // what the weights were prepared for
    embedding: Option<Embedding>,
    squares: [DeviceMemory; 2], // each [B, S, S, 3]
    small: DeviceMemory,        // pixel table, slot table, report
    staging: Growing,           // rows for the host
    texts: Growing,             // table of text rows
    checks: Growing,            // what a completeness check found
    resizer: Resizer,
    ring: Ring,
    uploaded: [Event; 2], // the squares are there
    cut: [Event; 2],      // the squares were read
    round: usize,
    pub(crate) compute: Stream,
    pub(crate) uploads: Stream,
    config: ModelConfig,
    gpu: Gpu,
}

/// The token embedding table, on the device that has the text rows.
#[derive(Debug)]
struct Embedding {
    memory: DeviceMemory, // [vocabulary, H], as stored
    dtype: DType,
    policy: RangePolicy,
}

/// Parts of `small`, in bytes: each begins where the one before ends, 256 bytes aligned.
struct Small {
    pixels: std::ops::Range<usize>, // [3][256] fp16
    slots: std::ops::Range<usize>,  // [MOST_SLOTS] SlotRows
    begin: std::ops::Range<usize>,  // [MOST_IMAGES + 1] i32
    report: std::ops::Range<usize>, // RangeReport
}

const SMALL: Small = {
    const fn after(previous: usize, bytes: usize) -> std::ops::Range<usize> {
        let start = previous.next_multiple_of(256);
        start..start + bytes
    }
    let pixels = after(0, 3 * 256 * size_of::<f16>());
    let slots = after(pixels.end, MOST_SLOTS * size_of::<SlotRows>());
    let begin = after(slots.end, (MOST_IMAGES + 1) * size_of::<i32>());
    let report = after(begin.end, size_of::<RangeReport>());
    Small { pixels, slots, begin, report }
};

impl Arena {
    /// Allocates and uploads all that a model needs on `gpu`; without `embedding`, all but text rows. Says what
    /// fp16 did to its weights, if it was the device that converted them.
    ///
    /// # Errors
    /// Those of [`DeviceWeights::convert`]; [`Error::Device`] if there is no room for the weights and one image at
    /// a time, or the driver fails.
    pub(crate) fn new(
        gpu: Gpu,
        config: &ModelConfig,
        weights: Source<'_>,
        embedding: Option<&EmbeddingTable>,
    ) -> Result<(Self, ConversionReport)> {
        let context = gpu.context.clone();
        let (compute, uploads) = (Stream::new(&context)?, Stream::new(&context)?);
        let mut ring = Ring::new(&context, SLOT_BYTES)?;
        let (mut weights, report) = match weights {
            Source::Host(weights) => {
                (DeviceWeights::upload(&compute, config, weights)?, ConversionReport::default())
            }
            Source::Stored(weights, policy) => {
                let convert = &gpu.kernels.convert;
                DeviceWeights::convert(&compute, convert, &mut ring, config, weights, policy)?
            }
        };
        let wanted =
            if gpu.kernels.linear.sm90.is_some() { Fusions::from_environment()? } else { Fusions::NONE };
        let fusions = fusions::fold(&compute, &gpu.kernels.fold, &mut weights, config, wanted)?;
        let embedding = embedding.map(|table| Embedding::upload(&compute, &mut ring, table)).transpose()?;
        let small = DeviceMemory::new(&context, SMALL.report.end, "the tables of a call")?;
        // SAFETY: `small` is kept beside the streams that use it.
        let pixels = unsafe { small.span() }.slice(SMALL.pixels)?;
        ring.send_all(&compute, pixels, PixelTable::new().values())?;
        compute.synchronize()?;
        let (workspace, squares) = largest_group(&compute, config, MOST_IMAGES)?;
        let events = || Ok::<_, Error>([Event::new(&context)?, Event::new(&context)?]);
        let arena = Self {
            graphs: BTreeMap::new(),
            squares,
            weights,
            fusions,
            embedding,
            small,
            staging: Growing::new(&context, "the rows of a sequence"),
            texts: Growing::new(&context, "the table of text rows"),
            checks: Growing::new(&context, "a completeness check"),
            resizer: Resizer::new(&context),
            ring,
            uploaded: events()?,
            cut: events()?,
            round: 0,
            compute,
            uploads,
            config: config.clone(),
            workspace,
            gpu,
        };
        tracing::info!(
            device = arena.gpu.describe(),
            images = arena.workspace.images(),
            weight_bytes = arena.weights.bytes(),
            fusions = ?arena.fusions,
            "CUDA backend"
        );
        Ok((arena, report))
    }

    /// The device and its kernels.
    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The model's numbers.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Gives up the memory of groups, and takes what `most` images need, or fewer.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room for one image, or the driver fails.
    pub(crate) fn regroup(&mut self, most: usize) -> Result<()> {
        self.settle();
        self.graphs.clear();
        self.workspace.release();
        self.squares = [0, 1].map(|_| DeviceMemory::none(&self.gpu.context));
        (self.workspace, self.squares) = largest_group(&self.compute, &self.config, most)?;
        Ok(())
    }

    /// Images that one group can have.
    pub(crate) fn group_size(&self) -> usize {
        self.workspace.images()
    }

    /// Rows for the host, `[rows, H]`, poisoned: what nobody writes is found.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room or the driver fails.
    pub(crate) fn staging(&mut self, rows: usize) -> Result<Span<f16>> {
        let span = self.staging.span(rows * self.config.hidden_size * size_of::<f16>())?.cast()?;
        self.poison(span)?;
        Ok(span)
    }

    /// Enqueues the poisoning of rows: what nobody writes is found.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn poison(&self, rows: Span<f16>) -> Result<()> {
        self.compute.fill_16(rows, POISON.to_bits())
    }

    /// Copies rows of H elements from the host to rows `pitch` apart, and waits for that.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn upload_rows(&self, to: DevicePtr<f16>, pitch: usize, from: &[f16]) -> Result<()> {
        let hidden = self.config.hidden_size;
        let rows = from.len() / hidden;
        let len = rows.checked_sub(1).map_or(0, |before| before * pitch + hidden);
        // SAFETY: rows lent to this call, which waits for the copy.
        let span = unsafe { Span::new(to, len) };
        self.compute.upload_rows_and_wait(span, pitch, from, hidden)
    }

    /// Looks at every element of `rows` and measures the slots in them, on the device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room for the answers or the driver fails.
    pub(crate) fn check(&mut self, rows: &Matrix, slots: &[Slot]) -> Result<RowChecks> {
        let bytes = [
            rows.rows * size_of::<RowCheck>(),
            slots.len() * size_of::<SlotRange>(),
            slots.len() * size_of::<f32>(),
        ];
        let second = bytes[0].next_multiple_of(256);
        let starts = [0, second, second + bytes[1].next_multiple_of(256)];
        let span = self.checks.span(starts[2] + bytes[2])?;
        let part = |i: usize| span.slice(starts[i]..starts[i] + bytes[i]);
        let (checks, ranges, norms) = (part(0)?.cast()?, part(1)?, part(2)?.cast()?);
        let as_range = |slot: &Slot| SlotRange { offset: slot.offset as i32, len: slot.len as i32 };
        let of_slots: Vec<SlotRange> = slots.iter().map(as_range).collect();
        self.ring.send_all(&self.compute, ranges, &of_slots)?;
        let verify = &self.gpu.kernels.verify;
        verify.enqueue_rows(&self.compute, checks, rows)?;
        verify.enqueue_slots(&self.compute, norms, checks, ranges.cast()?)?;
        let mut found = vec![RowCheck::zeroed(); rows.rows];
        let mut mean_norms = vec![0.0f32; slots.len()];
        self.compute.download_and_wait(checks, &mut found)?;
        self.compute.download_and_wait(norms, &mut mean_norms)?;
        Ok(RowChecks {
            poisoned: found.iter().position(RowCheck::is_poisoned),
            not_finite: found.iter().enumerate().find_map(|(i, check)| Some((i, check.bad_channel()?))),
            mean_norms: mean_norms.into_iter().map(f64::from).collect(),
        })
    }

    /// Enqueues the embeddings of all text rows of a call.
    ///
    /// # Errors
    /// [`Error::Internal`] if this device has no embedding table; [`Error::Device`] if the driver fails.
    pub(crate) fn enqueue_texts(&mut self, rows: &[TextRow]) -> Result<()> {
        let report = self.small(SMALL.report)?;
        self.ring.send_all(&self.compute, report, &[RangeReport::CLEAN])?;
        if rows.is_empty() {
            return Ok(());
        }
        let table = self.texts.span(size_of_val(rows))?;
        self.ring.send_all(&self.compute, table, rows)?;
        let Some(Embedding { memory, dtype, policy }) = &self.embedding else {
            return Err(Error::Internal("text rows on a device without the embedding table".into()));
        };
        let embedding = TokenTable {
            // SAFETY: the embedding is kept beside the stream that reads it.
            values: unsafe { memory.span() },
            dtype: *dtype,
            rows: self.config.vocab_size,
            hidden: self.config.hidden_size,
        };
        let embed_tokens = &self.gpu.kernels.embed_tokens;
        embed_tokens.enqueue(&self.compute, table.cast()?, &embedding, *policy, report.cast()?)
    }

    /// Waits for all work, and says what the text rows held that fp16 cannot.
    ///
    /// # Errors
    /// [`Error::Device`] if anything failed since.
    pub(crate) fn finish(&mut self) -> Result<RangeReport> {
        let mut report = [RangeReport::CLEAN];
        self.compute.download_and_wait(self.small(SMALL.report)?.cast()?, &mut report)?;
        Ok(report[0])
    }

    /// Waits for both streams, whatever became of their work: nothing of it touches memory afterwards.
    pub(crate) fn settle(&self) {
        let (uploads, compute) = (self.uploads.synchronize(), self.compute.synchronize());
        if let Err(error) = uploads.and(compute) {
            tracing::debug!(%error, "while waiting for a call that failed");
        }
    }

    /// Begins a group: its squares may be overwritten once the group before last has read them.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn begin_group(&mut self) -> Result<()> {
        self.round += 1;
        self.uploads.wait_for(&self.cut[self.round % 2])
    }

    /// Uploads image `place` of the group and enqueues its resize. The image may be dropped then.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room or the driver fails.
    pub(crate) fn enqueue_image(
        &mut self,
        place: usize,
        image: &mut Decoded<'_>,
        rule: Resample,
    ) -> Result<()> {
        let side = self.config.image_size;
        let square = self.square(place)?;
        let (stream, kernels, ring) = (&self.uploads, &self.gpu.kernels, &mut self.ring);
        self.resizer.enqueue(stream, kernels, ring, image, rule, side, square)
    }

    /// Enqueues the tower for the group's images, into the slots of each: `slots[i]` are those of image `i`.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails; [`Error::Argument`] if an image has too many slots.
    pub(crate) fn end_group(
        &mut self,
        slots: &[Vec<SlotRows>],
        trace: Option<&mut TraceFn<'_>>,
    ) -> Result<()> {
        let images = slots.len();
        let parity = self.round % 2;
        self.uploaded[parity].record(&self.uploads)?;
        self.compute.wait_for(&self.uploaded[parity])?;
        let table = self.enqueue_slots(slots)?;
        let pixels = self.small(SMALL.pixels)?.cast()?;
        let (side, patch) = (self.config.image_size, self.config.patch_size);
        for i in 0..images {
            let (out, square) = (self.workspace.patches_of(i)?, self.square(i)?);
            self.gpu.kernels.patches.enqueue(&self.compute, &out, square, 3 * side, pixels, patch)?;
        }
        self.cut[parity].record(&self.compute)?;
        self.enqueue_tower(images, &table, trace)
    }

    /// Captures the graph of a group of `images` and runs it once, writing nothing but its workspace.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn warm_up(&mut self, images: usize) -> Result<()> {
        let table = self.enqueue_slots(&vec![Vec::new(); images])?;
        self.enqueue_tower(images, &table, None)?;
        self.compute.synchronize()
    }

    /// Uploads the slot table of a group.
    fn enqueue_slots(&mut self, slots: &[Vec<SlotRows>]) -> Result<SlotTable> {
        let all: Vec<SlotRows> = slots.concat();
        if all.len() > MOST_SLOTS {
            return Err(Error::argument(
                format!("{} images of a call fill {} slots, {MOST_SLOTS} at most", slots.len(), all.len()),
                "Split the sequences over several calls, with features kept from the first",
            ));
        }
        let mut begin = vec![0];
        begin.extend(slots.iter().scan(0, |end, slots| {
            *end += slots.len() as i32;
            Some(*end)
        }));
        let (to_slots, to_begin) = (self.small(SMALL.slots)?, self.small(SMALL.begin)?);
        let used = to_slots.slice(0..size_of_val(all.as_slice()))?;
        self.ring.send_all(&self.compute, used, &all)?;
        let used = to_begin.slice(0..size_of_val(begin.as_slice()))?;
        self.ring.send_all(&self.compute, used, &begin)?;
        Ok(SlotTable { slots: to_slots.cast()?, begin: to_begin.cast()? })
    }

    /// Enqueues tower and projector: by a graph, or launch by launch where somebody looks at the stages.
    fn enqueue_tower(
        &mut self,
        images: usize,
        table: &SlotTable,
        trace: Option<&mut TraceFn<'_>>,
    ) -> Result<()> {
        let Self { graphs, compute: stream, config, weights, workspace, gpu, fusions, .. } = self;
        let tower = Tower { kernels: &gpu.kernels, config, weights, workspace, fusions: *fusions };
        if let Some(trace) = trace {
            let mut values = Vec::new();
            return tower.enqueue(
                stream,
                images,
                table,
                Some(&mut |stage, Matrix { span, rows, columns, pitch }| {
                    values.resize(rows * columns, f16::ZERO);
                    let to = values.as_mut_ptr();
                    // SAFETY: `values` has so many rows and is left alone until the wait.
                    unsafe { stream.download_rows(*span, *pitch, (*rows, *columns), to, *columns)? };
                    stream.synchronize()?;
                    for (image, values) in values.chunks_exact(values.len() / images).enumerate() {
                        trace(image, stage, values);
                    }
                    Ok(())
                }),
            );
        }
        let work = || tower.enqueue(stream, images, table, None);
        if launch::waits() {
            return work();
        }
        let graph = match graphs.entry(images) {
            Entry::Occupied(captured) => captured.into_mut(),
            Entry::Vacant(place) => {
                tracing::debug!(images, "capturing the tower");
                place.insert(stream.capture(work)?)
            }
        };
        // SAFETY: the graph was captured with the memory of this arena, which outlives it; streams order its use.
        unsafe { stream.replay(graph) }
    }

    /// Image `i` of the current group, resized, `[S, S, 3]`.
    fn square(&self, i: usize) -> Result<Span<u8>> {
        let bytes = 3 * self.config.image_size * self.config.image_size;
        // SAFETY: the squares are kept beside the streams that use them; events order the two.
        unsafe { self.squares[self.round % 2].span() }.slice(i * bytes..(i + 1) * bytes)
    }

    /// A part of `small`.
    fn small(&self, part: std::ops::Range<usize>) -> Result<Span<u8>> {
        // SAFETY: it is kept beside the stream that uses it.
        unsafe { self.small.span() }.slice(part)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.settle();
    }
}

/// The workspace, and both places for resized images, for as many images as there is room for, `most` at most.
fn largest_group(
    stream: &Stream,
    config: &ModelConfig,
    most: usize,
) -> Result<(Workspace, [DeviceMemory; 2])> {
    let context = stream.context();
    let square = 3 * config.image_size * config.image_size; // bytes
    let need = |images: usize| Workspace::bytes(config, images) + 2 * images * square;
    for images in [MOST_IMAGES, 12, 8, 6, 4, 3, 2, 1].into_iter().filter(|images| *images <= most) {
        let squares = || DeviceMemory::if_room(context, images * square);
        if let (Some(first), Some(second)) = (squares()?, squares()?)
            && let Some(workspace) = Workspace::if_room(stream, config, images)?
        {
            return Ok((workspace, [first, second]));
        }
        tracing::info!(images, bytes = need(images), "no room for so many images at once");
    }
    let (free, total) = context.memory()?;
    Err(device_error(
        context.ordinal(),
        format!(
            "after the weights, one image needs {}; {} of {} are free",
            mebibytes(need(1)),
            mebibytes(free),
            mebibytes(total)
        ),
        "Free memory on the device, or use `cpu`",
    ))
}

impl Embedding {
    /// Uploads the table as it is stored.
    fn upload(stream: &Stream, ring: &mut Ring, table: &EmbeddingTable) -> Result<Self> {
        let row = table.hidden() * table.dtype().size();
        let memory = DeviceMemory::new(stream.context(), table.rows() * row, "the token embedding table")?;
        // SAFETY: the result is kept beside the stream.
        let span = unsafe { memory.span() };
        let band = (ring.bytes() / row.max(1)).max(1);
        for first in (0..table.rows()).step_by(band) {
            let end = table.rows().min(first + band);
            ring.send(stream, span.slice(first * row..end * row)?, |slot| table.copy_stored(first, slot))?;
        }
        stream.synchronize()?;
        Ok(Self { memory, dtype: table.dtype(), policy: table.policy() })
    }
}
