//! What `benches/cuda.rs` measures: launches by themselves, and whole encodes. Not part of the API.
//!
//! Memory that a benchmark asks for stays allocated to the end of the process: so its handles are plain values.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use half::f16;

use super::Gpu;
use super::arena::MOST_IMAGES;
use super::backend::CudaBackend;
use super::driver::{DeviceMemory, DevicePtr, Event, GraphExec, Pod, Span, Stream, Zeroable};
use super::embed_tokens::{TextRow, TokenTable};
use super::layer_norm::Norm;
use super::linear::{SlotRows, SlotTable};
use super::matrix::{Matrix, VECTOR};
use super::peers::group_sizes;
use super::range::RangeReport;
use super::resize::{DevicePasses, Pixels, Resize};
use super::rows::{Shared, lock};
use super::verify::{RowCheck, SlotRange};
use super::weights::Source;
use crate::checkpoint::weights::{LayerWeights, LinearWeights, NormWeights, VisionWeights};
use crate::checkpoint::{DType, EmbeddingTable, RangePolicy};
use crate::config::ModelConfig;
use crate::cpu::{CpuBackend, PixelTable};
use crate::encoder::{Encoder, EncoderOptions};
use crate::error::{Error, Result};
use crate::image::decode::Decoded;
use crate::image::resize::Passes;
use crate::image::{Resample, RgbView};
use crate::prompt::{Planner, Slot};
use crate::sequence::{POISON, SequenceBuffer};
use crate::synth::noise;
use crate::tokenizer::{self, Tokenizer};

mod attention;
mod linear;

pub use attention::{Attention, Blocks};
pub use linear::{Cut, Epilogue, Linear, Norms, Prediction, Variant, predictions};

/// fp16 noise of mean 0 and the given deviation: the same values for the same seed.
pub fn halves(seed: u64, count: usize, deviation: f32) -> Vec<f16> {
    noise::halves(seed, "benchmark", count, 0.0, deviation)
}

/// How a call with so many images is split into groups.
pub fn groups(images: usize) -> Vec<usize> {
    group_sizes(images, 1, MOST_IMAGES)
}

/// A device and a stream of its own.
#[derive(Debug)]
pub struct Machine {
    stream: Stream,
    gpu: Gpu,
}

/// `[rows, columns]` of fp16 on the device, rows a multiple of 16 bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows(Matrix);

/// Pictures of RGB8 on the device, without gaps.
#[derive(Clone, Copy, Debug)]
pub struct Picture(Pixels);

/// Which rows each image fills, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Slots(SlotTable);

/// A table of token embeddings in bf16, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Tokens(TokenTable);

/// Rows to be filled from such a table, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Texts {
    rows: Span<TextRow>,
    tokens: Tokens,
    report: Span<RangeReport>,
}

/// Places for what a completeness check finds, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Checks {
    rows: Span<RowCheck>,
    ranges: Span<SlotRange>,
    norms: Span<f32>,
}

/// A resize from one picture to another, with its tables on the device.
#[derive(Clone, Debug)]
pub struct Resizing {
    from: Pixels,
    to: Pixels,
    between: Span<u8>,
    passes: Arc<Passes>,
    tables: DevicePasses,
}

/// One launch, or two of a resize or a check.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named as the launchers' arguments are")]
pub enum Launch {
    Linear(Linear),
    Attention(Attention),
    LayerNorm { out: Rows, input: Rows, weight: Rows, bias: Rows },
    Patches { out: Rows, picture: Picture, table: Rows, patch: usize },
    Resize(Resizing),
    EmbedTokens(Texts),
    Verify { rows: Rows, checks: Checks },
}

impl Rows {
    /// `[rows, columns]` that begin at element `at` of this.
    ///
    /// # Errors
    /// [`Error::Internal`] if they do not fit.
    pub fn window(&self, at: usize, rows: usize, columns: usize) -> Result<Self> {
        let (span, pitch) = (self.0.span, columns.next_multiple_of(VECTOR));
        Matrix::new(span.slice(at..at + rows * pitch)?, rows, columns, pitch).map(Self)
    }

    /// Elements from one row to the next.
    pub fn pitch(&self) -> usize {
        self.0.pitch
    }
}

impl Machine {
    /// Opens GPU 0.
    ///
    /// # Errors
    /// [`Error::Device`] if there is none that can be used, or this build has no kernels.
    pub fn open() -> Result<Self> {
        let gpu = Gpu::open(0)?;
        Ok(Self { stream: Stream::new(&gpu.context)?, gpu })
    }

    /// Names the device and the kernels.
    pub fn describe(&self) -> String {
        self.gpu.describe()
    }

    /// Multiprocessors of the device.
    pub fn multiprocessors(&self) -> usize {
        self.gpu.context.multiprocessors() as usize
    }

    /// Allocates for good.
    fn allocate(&self, bytes: usize) -> Result<Span<u8>> {
        let memory = Box::leak(Box::new(DeviceMemory::new(&self.gpu.context, bytes, "a benchmark")?));
        // SAFETY: it is never freed.
        Ok(unsafe { memory.span() })
    }

    /// Allocates and fills.
    fn upload<T: Pod>(&self, values: &[T]) -> Result<Span<T>> {
        let span = self.allocate(size_of_val(values))?.cast()?;
        self.stream.upload_and_wait(span, values)?;
        Ok(span)
    }

    /// Makes rows that hold `values`, with zeros between them.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn rows(&self, values: &[f16], columns: usize) -> Result<Rows> {
        let (rows, pitch) = (values.len() / columns, columns.next_multiple_of(VECTOR));
        let span = self.allocate(rows * pitch * size_of::<f16>())?.cast::<f16>()?;
        self.stream.fill(span, 0)?;
        self.stream.upload_rows_and_wait(span, pitch, values, columns)?;
        Matrix::new(span, rows, columns, pitch).map(Rows)
    }

    /// Makes `[1, count]` of nothing in particular, to cut windows from.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn room(&self, count: usize) -> Result<Rows> {
        let count = count.next_multiple_of(VECTOR);
        let span = self.allocate(count * size_of::<f16>())?.cast()?;
        Matrix::new(span, 1, count, count).map(Rows)
    }

    /// Fills rows and what is between them with a NaN that no kernel writes.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub fn poison(&self, rows: Rows) -> Result<()> {
        let Matrix { span, rows, pitch, .. } = rows.0;
        self.stream.fill_16(span.slice(0..rows * pitch)?, POISON.to_bits())
    }

    /// Reads rows, with what is between them.
    ///
    /// # Errors
    /// [`Error::Device`] if anything enqueued before failed.
    pub fn read(&self, rows: Rows) -> Result<Vec<f16>> {
        let Matrix { span, rows, pitch, .. } = rows.0;
        let mut values = vec![f16::ZERO; rows * pitch];
        self.stream.download_and_wait(span.slice(0..rows * pitch)?, &mut values)?;
        Ok(values)
    }

    /// Makes a picture.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn picture(&self, width: usize, height: usize, rgb: &[u8]) -> Result<Picture> {
        Pixels::new(self.upload(rgb)?, height, width, 3 * width).map(Picture)
    }

    /// Reads a picture.
    ///
    /// # Errors
    /// [`Error::Device`] if anything enqueued before failed.
    pub fn read_picture(&self, picture: Picture) -> Result<Vec<u8>> {
        let mut rgb = vec![0; picture.0.rows * picture.0.pitch];
        self.stream.download_and_wait(picture.0.span.slice(0..rgb.len())?, &mut rgb)?;
        Ok(rgb)
    }

    /// Makes the table that patches are normalised by.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn pixel_table(&self) -> Result<(Rows, Vec<f16>)> {
        let table = PixelTable::new();
        Ok((self.rows(table.values(), table.values().len())?, table.values().to_vec()))
    }

    /// Makes a table of slots: image `i` fills the `i`-th of `rows`.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn slots(&self, rows: &[Rows]) -> Result<Slots> {
        let slot = |Rows(m): &Rows| SlotRows {
            first: m.span.ptr(),
            pitch: m.pitch as i64,
            rows: m.rows as i32,
            pad: 0,
        };
        let slots: Vec<SlotRows> = rows.iter().map(slot).collect();
        let begin: Vec<i32> = (0..=rows.len() as i32).collect();
        Ok(Slots(SlotTable { slots: self.upload(&slots)?, begin: self.upload(&begin)? }))
    }

    /// Makes a table of `[vocabulary, H]` bf16.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn tokens(&self, table: &[u16], hidden: usize) -> Result<Tokens> {
        let values = self.upload(table)?.cast()?;
        Ok(Tokens(TokenTable { values, dtype: DType::Bf16, rows: table.len() / hidden, hidden }))
    }

    /// Asks for the rows `ids` of a table in `out`.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn texts(&self, tokens: Tokens, ids: &[u32], out: Rows) -> Result<Texts> {
        let to = |i: usize| out.0.span.ptr().add(i * out.0.pitch);
        let row = |(i, &id): (usize, &u32)| TextRow { to: to(i), id: id as i32, pad: 0 };
        let rows: Vec<TextRow> = ids.iter().enumerate().map(row).collect();
        Ok(Texts { rows: self.upload(&rows)?, tokens, report: self.upload(&[RangeReport::CLEAN])? })
    }

    /// Makes room for a check of `rows` rows with slots of `len` rows each, one after the other.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn checks(&self, rows: usize, len: usize) -> Result<Checks> {
        let range = |slot: usize| SlotRange { offset: (slot * len) as i32, len: len as i32 };
        let ranges: Vec<SlotRange> = (0..rows / len).map(range).collect();
        let norms = self.upload(&vec![f32::NAN; ranges.len()])?;
        Ok(Checks {
            rows: self.upload(&vec![RowCheck::zeroed(); rows])?,
            ranges: self.upload(&ranges)?,
            norms,
        })
    }

    /// Reads the mean norm of each slot; `None` if a row was incomplete.
    ///
    /// # Errors
    /// [`Error::Device`] if anything enqueued before failed.
    pub fn read_checks(&self, checks: Checks) -> Result<Option<Vec<f32>>> {
        let mut found = vec![RowCheck::zeroed(); checks.rows.len()];
        let mut norms = vec![0.0; checks.norms.len()];
        self.stream.download_and_wait(checks.rows, &mut found)?;
        self.stream.download_and_wait(checks.norms, &mut norms)?;
        let complete = found.iter().all(|row| !row.is_poisoned() && row.bad_channel().is_none());
        Ok(complete.then_some(norms))
    }

    /// Prepares a resize by today's Pillow's rule.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn resizing(&self, from: Picture, to: Picture) -> Result<Resizing> {
        let size = |pixels: &Pixels| (pixels.width as u32, pixels.rows as u32);
        let passes = Passes::new(size(&from.0), size(&to.0), Resample::default());
        let words: Vec<i32> = passes
            .horizontal
            .iter()
            .chain(&passes.vertical)
            .flat_map(|table| table.words.iter().copied())
            .collect();
        let tables = DevicePasses::new(self.upload(&words)?, &passes)?;
        let between = self.allocate(Resize::between_bytes(&passes, from.0.width, to.0.width))?;
        Ok(Resizing { from: from.0, to: to.0, between, passes: Arc::new(passes), tables })
    }

    /// Runs a launch and waits for it.
    ///
    /// # Errors
    /// [`Error::Internal`] if a contract is broken; [`Error::Device`] if the device fails.
    pub fn run(&self, launch: &Launch) -> Result<()> {
        self.enqueue(launch)?;
        self.stream.synchronize()
    }

    fn enqueue(&self, launch: &Launch) -> Result<()> {
        let (stream, kernels) = (&self.stream, &self.gpu.kernels);
        match launch {
            Launch::Linear(layer) => self.enqueue_linear(layer),
            Launch::Attention(attention) => self.enqueue_attention(attention),
            Launch::LayerNorm { out, input, weight, bias } => {
                let norm = Norm { weight: weight.0.span, bias: bias.0.span };
                kernels.layer_norm.enqueue(stream, &out.0, &input.0, &norm)
            }
            Launch::Patches { out, picture, table, patch } => {
                let Pixels { span, pitch, .. } = picture.0;
                kernels.patches.enqueue(stream, &out.0, span, pitch, table.0.span, *patch)
            }
            Launch::Resize(Resizing { from, to, between, passes, tables }) => {
                kernels.resize.enqueue(stream, to, from, *between, passes, tables).map(|_| ())
            }
            Launch::EmbedTokens(Texts { rows, tokens, report }) => {
                kernels.embed_tokens.enqueue(stream, *rows, &tokens.0, RangePolicy::Refuse, *report)
            }
            Launch::Verify { rows, checks } => {
                kernels.verify.enqueue_rows(stream, checks.rows, &rows.0)?;
                kernels.verify.enqueue_slots(stream, checks.norms, checks.rows, checks.ranges)
            }
        }
    }

    /// Records launches, one after the other, to be timed.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn record(&self, launches: &[Launch]) -> Result<Recording<'_>> {
        let work = || launches.iter().try_for_each(|launch| self.enqueue(launch));
        let graph = self.stream.capture(work)?;
        let [start, end] = [Event::with_time(&self.gpu.context)?, Event::with_time(&self.gpu.context)?];
        Ok(Recording { machine: self, graph, start, end })
    }
}

/// Launches that were recorded.
#[derive(Debug)]
pub struct Recording<'m> {
    graph: GraphExec,
    start: Event,
    end: Event,
    machine: &'m Machine,
}

impl Recording<'_> {
    /// Replays them `times` times and returns the time that took on the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub fn time(&self, times: u64) -> Result<Duration> {
        let stream = &self.machine.stream;
        self.start.record(stream)?;
        for _ in 0..times {
            // SAFETY: the memory of a machine is never freed, and its stream orders the replays.
            unsafe { stream.replay(&self.graph)? };
        }
        self.end.record(stream)?;
        elapsed(&self.start, &self.end)
    }
}

/// The time between two events, once the later one is past. At least a nanosecond: emulated devices have no time.
fn elapsed(start: &Event, end: &Event) -> Result<Duration> {
    end.synchronize()?;
    Ok(Duration::from_secs_f64((f64::from(end.milliseconds_since(start)?) / 1e3).max(1e-9)))
}

/// One model with random weights on the device and on the CPU.
#[derive(Debug)]
pub struct Encode {
    cuda: Encoder,
    cpu: Encoder,
    devices: Shared,
    events: [Event; 2],
}

impl Encode {
    /// Makes weights for `config` and uploads them.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no device or no room.
    pub fn new(config: &ModelConfig, seed: u64) -> Result<Self> {
        let failed = |error: std::io::Error| Error::Internal(format!("cannot make a table: {error}"));
        let weights = weights(config, seed);
        let table = noise::halves(seed, "embedding", config.vocab_size * config.hidden_size, 0.0, 0.02);
        let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
        file.write_all(bytemuck::cast_slice(&table)).map_err(failed)?;
        let embedding = EmbeddingTable::map(file.path(), DType::F16, config.vocab_size, config.hidden_size)?;
        let (backend, _) =
            CudaBackend::new(vec![Gpu::open(0)?], config, Source::Host(&weights), embedding.clone())?;
        let devices = backend.devices().clone();
        let context = lock(&devices).primary.gpu().context.clone();
        let events = [Event::with_time(&context)?, Event::with_time(&context)?];
        let planner = || {
            let model = tokenizer::synthetic(config.vocab_size);
            Planner::new(Tokenizer::from_sentencepiece(&model, "synthetic".as_ref())?, config.clone())
        };
        let options = EncoderOptions::new();
        let cuda = Encoder::of(Box::new(backend), planner()?, "random", options.clone());
        let cpu = CpuBackend::new(config, weights, Box::new(embedding), None)?;
        let cpu = Encoder::of(Box::new(cpu), planner()?, "random", options);
        Ok(Self { cuda, cpu, devices, events })
    }

    /// The model on the device.
    pub fn cuda(&self) -> &Encoder {
        &self.cuda
    }

    /// The same model on the CPU.
    pub fn cpu(&self) -> &Encoder {
        &self.cpu
    }

    /// Brings pixels to the device, for [`Encode::time_from_pixels`]: those of even groups, those of odd ones.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub fn set_pixels(&self, sets: [&[RgbView<'_>]; 2]) -> Result<()> {
        let arena = &mut lock(&self.devices).primary;
        for pictures in sets {
            arena.begin_group()?;
            for (place, picture) in pictures.iter().enumerate() {
                arena.enqueue_image(place, &mut Decoded::of(*picture), Resample::default())?;
            }
        }
        arena.uploads.synchronize()
    }

    /// Fills `slots` of a sequence on the device, `times` times, from pixels that are there, and returns the time
    /// that took on the device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails; [`Error::Argument`] if the sequence lies elsewhere.
    pub fn time_from_pixels(
        &self,
        slots: &[Slot],
        sequence: &SequenceBuffer<'_>,
        times: u64,
    ) -> Result<Duration> {
        let (address, pitch) = sequence
            .device_address()
            .ok_or_else(|| Error::argument("the sequence is not on the device", "Encode into one that is"))?;
        let place = |slot: &Slot| {
            let first = DevicePtr::new(address).add(slot.offset * pitch);
            vec![SlotRows { first, pitch: pitch as i64, rows: slot.len as i32, pad: 0 }]
        };
        let places: Vec<Vec<SlotRows>> = slots.iter().map(place).collect();
        let arena = &mut lock(&self.devices).primary;
        let sizes = group_sizes(places.len(), 1, arena.group_size());
        let Self { events: [start, end], .. } = self;
        start.record(&arena.compute)?;
        for _ in 0..times {
            let mut rest = places.as_slice();
            for &size in &sizes {
                let (group, after) = rest.split_at(size);
                rest = after;
                arena.begin_group()?;
                arena.end_group(group, None)?;
            }
        }
        end.record(&arena.compute)?;
        elapsed(start, end)
    }
}

/// Random weights of sizes that keep activations within fp16 and attention from being flat.
fn weights(config: &ModelConfig, seed: u64) -> VisionWeights {
    let ModelConfig { width, mlp_width, projector_width, hidden_size, tokens, .. } = *config;
    let made = std::cell::Cell::new(0);
    let halves = |count: usize, mean: f32, deviation: f32| {
        made.set(made.get() + 1);
        noise::halves(seed, &format!("weight {}", made.get()), count, mean, deviation)
    };
    let linear = |n: usize, k: usize, gain: f32| LinearWeights {
        weight: halves(n * k, 0.0, gain / (k as f32).sqrt()),
        bias: halves(n, 0.0, 0.1),
    };
    let norm = || NormWeights { weight: halves(width, 1.0, 0.2), bias: halves(width, 0.0, 0.1) };
    let layer = |_| LayerWeights {
        norm1: norm(),
        qkv: linear(3 * width, width, 1.5),
        out: linear(width, width, 0.7),
        norm2: norm(),
        fc1: linear(mlp_width, width, 1.5),
        fc2: linear(width, mlp_width, 0.7),
    };
    VisionWeights {
        class_embedding: halves(width, 0.0, 0.5),
        patch_embedding: linear(width, config.patch_len(), 1.0).weight,
        position_embedding: halves(tokens * width, 0.0, 0.3),
        pre_norm: norm(),
        layers: (0..config.layers).map(layer).collect(),
        projector_hidden: linear(projector_width, width, 1.5),
        projector_out: linear(hidden_size, projector_width, 1.0),
    }
}
