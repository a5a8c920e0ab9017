//! The CPU backend: the tower in plain Rust and `std::arch`, and the oracle for other devices.
//!
//! ```text
//!   patches ─▶ linear ─▶ layer_norm ─▶ linear ─▶ attention ─▶ linear ─▶ …        tower.rs says in which order
//!               └───── tile, epilogue ───┬────────┘
//!                                      simd      amx │ avx512 │ avx2 │ neon │ portable: chosen once, logged
//! ```
//!
//! `packed` holds the weights as products read them, `operand` what one stage stores for the next, `scratch` the memory
//! under both. Products run in vectors, or, where there is AMX, in tile registers: `linear/tiled`, `attention/tiled`.
//!
//! What holds, and is tested bit by bit: an image's rows do not depend on the batch, its order, or the number
//! of threads; between instruction sets they differ by the rounding of f32 sums.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use half::f16;
use rayon::prelude::*;

use crate::backend::{
    Backend, Job, Observer, Op, Pictures, ProgressFn, Stage, TimingFn, TokenEmbeddings, TraceFn, Work,
};
use crate::checkpoint::weights::{LinearWeights, NormWeights, VisionWeights};
use crate::config::{Frame, HEAD_SIZE, ModelConfig};
use crate::error::{Error, Result};
use crate::image::{RgbImage, RgbView, prepare_range, share_wall};
use crate::sequence::{Place, RowsMut};

mod activation;
mod attention;
#[doc(hidden)]
pub mod bench;
mod epilogue;
mod layer_norm;
mod linear;
mod operand;
mod packed;
pub(crate) mod patches;
mod scratch;
mod simd;
#[cfg(test)]
pub(crate) mod testkit;
mod tile;
mod tower;

use packed::Weights;
pub(crate) use patches::PixelTable;
use simd::Machine;
use tower::{Tower, Watch, Workspace};

/// Rows of the tower in one group of images, at most (a single image may have more). Beyond some thousand
/// rows, larger matrices are no faster, and a group costs `8 · max(3C, F) / C` bytes a row and channel.
const GROUP_ROWS: usize = 4096;

/// Tower, projector and token embedding on the CPU.
///
/// Holds the weights in fp16, packed for its products, and nothing else of their size. Calls may run at the same time; each takes the
/// threads it finds free.
pub struct CpuBackend {
    config: ModelConfig,
    weights: Weights,
    embedding: Box<dyn TokenEmbeddings>,
    machine: Machine,
    pool: Option<rayon::ThreadPool>,
    pixels: PixelTable,
    spare: std::sync::Mutex<Option<Workspace>>, // the last call's memory, for the next
}

impl CpuBackend {
    /// Takes a model's weights and chooses the instruction set.
    ///
    /// `threads` makes a pool of its own of so many; `None` uses rayon's global pool. The environment
    /// variable `IMAGEHERE_CPU_ISA` (`amx`, `avx512`, `avx2`, `neon`, `portable`) overrides the choice of instruction set,
    /// for tests and measurements.
    ///
    /// # Errors
    /// [`Error::Argument`] if `threads` is 0, or if the sizes of `config`, `weights` and `embedding` do not
    /// agree; [`Error::Device`] if the threads cannot be started or the instruction set asked for is absent.
    pub fn new(
        config: &ModelConfig,
        weights: VisionWeights,
        embedding: Box<dyn TokenEmbeddings>,
        threads: Option<usize>,
    ) -> Result<Self> {
        Self::on(Machine::choose()?, config, weights, embedding, threads)
    }

    /// [`CpuBackend::new`] on a given instruction set.
    fn on(
        machine: Machine,
        config: &ModelConfig,
        weights: VisionWeights,
        embedding: Box<dyn TokenEmbeddings>,
        threads: Option<usize>,
    ) -> Result<Self> {
        check(config, &weights, &*embedding)?;
        let pool = threads.map(start_threads).transpose()?;
        let pack = || Weights::new(machine, weights);
        let weights = match &pool {
            Some(pool) => pool.install(pack),
            None => pack(),
        }?;
        let spare = std::sync::Mutex::default();
        let (config, pixels) = (config.clone(), PixelTable::new());
        let backend = Self { config, weights, embedding, machine, pool, pixels, spare };
        tracing::info!(device = backend.describe(), "CPU backend");
        Ok(backend)
    }

    /// Runs `work` where its parallel parts find the threads of this backend.
    fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => rayon::scope(|_| work()),
        }
    }

    /// Writes the embedding of `ids[i]` to row `i`; shape `[ids.len(), H]`.
    fn embed_tokens(&self, ids: &[u32], rows: &mut RowsMut<'_>) -> Result<()> {
        let hidden = self.config.hidden_size;
        if rows.len() != ids.len() || rows.hidden() != hidden {
            return Err(Error::Internal(format!(
                "{} ids for {} rows of {} elements; H is {hidden}",
                ids.len(),
                rows.len(),
                rows.hidden()
            )));
        }
        let rows = &*rows;
        self.install(|| {
            ids.par_iter().enumerate().with_min_len(8).try_for_each(|(i, &id)| {
                // SAFETY: `row_ptr` vouches for `hidden` elements, borrowed for as long as `rows`; each row is
                // written by one task.
                let row = unsafe { std::slice::from_raw_parts_mut(rows.row_ptr(i), hidden) };
                self.embedding.gather_row(id, row)
            })
        })
    }

    /// Checks images of the tower's size and where they go.
    fn check_images(&self, images: &[RgbView<'_>], targets: &[Vec<RowsMut<'_>>]) -> Result<()> {
        let hidden = self.config.hidden_size;
        if let Some(block) = targets.iter().flatten().find(|block| block.hidden() != hidden) {
            return Err(Error::Internal(format!(
                "target rows of {} elements; H is {hidden}",
                block.hidden()
            )));
        }
        let side = self.config.image_size as u32;
        if let Some(image) = images.iter().find(|image| (image.width(), image.height()) != (side, side)) {
            return Err(Error::Internal(format!(
                "an image of {}x{} pixels; the tower takes {side}x{side}",
                image.width(),
                image.height()
            )));
        }
        Ok(())
    }

    /// Encodes images of the tower's size, batched, into all their targets.
    #[cfg(test)]
    pub(crate) fn encode_images(
        &self,
        images: &[RgbView<'_>],
        targets: crate::backend::Targets<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        if images.len() != targets.len() {
            return Err(Error::Internal(format!(
                "{} images, {} lists of targets",
                images.len(),
                targets.len()
            )));
        }
        let groups = groups(&self.config, &targets);
        self.install(|| self.encode_groups(&groups, images, || Ok(vec![]), &targets, observer))
    }

    /// Encodes images of the tower's size into their targets, a group at a time.
    ///
    /// `lead` are the first images of the call, with all of the first group among them; `meanwhile`, which runs beside the
    /// blocks of that group, gives the others. Features are written when it is done, and none are if it fails or the first
    /// group is stopped.
    fn encode_groups(
        &self,
        groups: &[Vec<usize>],
        lead: &[RgbView<'_>],
        meanwhile: impl FnOnce() -> Result<Vec<RgbImage>> + Send,
        targets: &[Vec<RowsMut<'_>>],
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        self.check_images(lead, targets)?;
        let (grid, patch) = (self.config.grid, self.config.patch_size);
        let patches_len = self.config.patches * self.config.patch_len();
        let tower = Tower { machine: self.machine, config: &self.config, weights: &self.weights };
        let stop = AtomicBool::new(false);
        let mut watcher = Watcher {
            group: &[],
            done: 0,
            all: groups.iter().map(Vec::len).sum::<usize>() * tower::steps(&self.config),
            progress: observer.progress.as_deref_mut(),
            trace: observer.trace.as_deref_mut(),
            timing: observer.timing.as_deref_mut(),
            since: Instant::now(),
            stop: &stop,
        };
        let mut meanwhile = Some(|| meanwhile().inspect_err(|_| stop.store(true, Ordering::Relaxed)));
        let mut others = Vec::new();
        let mut workspace = self.spare.lock().ok().and_then(|mut spare| spare.take()).unwrap_or_default();
        for group in groups {
            watcher.group = group;
            watcher.since = Instant::now();
            let cut = |all: &mut [f16]| {
                for (&i, patches) in group.iter().zip(all.chunks_exact_mut(patches_len)) {
                    let others = || RgbImage::view(&others[i - lead.len()]);
                    self.pixels.cut(lead.get(i).copied().unwrap_or_else(others), grid, patch, patches);
                }
            };
            let mut blocks = || tower.run_blocks(&mut workspace, group.len(), cut, &mut watcher);
            match meanwhile.take() {
                Some(meanwhile) => others = rayon::join(meanwhile, blocks).0?,
                None => blocks(),
            }
            if watcher.stopped() {
                return Err(Error::Stopped);
            }
            let blocks = group.iter().map(|&i| targets[i].as_slice()).collect();
            tower.project(&mut workspace, blocks, &mut watcher);
        }
        if let Ok(mut spare) = self.spare.lock() {
            spare.get_or_insert(workspace);
        }
        meanwhile.map_or(Ok(()), |meanwhile| meanwhile().map(drop))
    }
}

/// The images that go somewhere, by their index in the call, in groups of about equal size that go through the tower
/// together.
fn groups(config: &ModelConfig, targets: &[Vec<RowsMut<'_>>]) -> Vec<Vec<usize>> {
    let is_wanted = |i: &usize| targets[*i].iter().any(|block| !block.is_empty());
    let wanted: Vec<usize> = (0..targets.len()).filter(is_wanted).collect();
    let most = (GROUP_ROWS / config.tokens).max(1);
    let size = wanted.len().div_ceil(wanted.len().div_ceil(most).max(1)).max(1);
    wanted.chunks(size).map(<[usize]>::to_vec).collect()
}

impl fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuBackend").field("config", &self.config).field("device", &self.describe()).finish()
    }
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        let threads = self.pool.as_ref().map_or_else(rayon::current_num_threads, |p| p.current_num_threads());
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu ({}, {threads} thread{plural})", self.machine.isa().name())
    }

    fn fill(&self, job: Job<'_>, observer: &mut Observer<'_>) -> Result<Work> {
        let Job { texts, kept, pictures, targets } = job;
        let lent = texts.iter().map(|(_, rows)| rows).chain(kept.iter().map(|(_, rows)| rows));
        if let Some(rows) = lent.chain(targets.iter().flatten()).find(|rows| rows.place() != Place::Host) {
            return Err(Error::argument(
                format!("the sequence lies in the memory of {:?}, where the CPU cannot write", rows.place()),
                "Give a sequence in host memory, or open the encoder on that device",
            ));
        }
        let groups = groups(&self.config, &targets);
        let all = pictures.sources.len();
        let lead = groups.first().and_then(|group| group.last()).map_or(all, |last| last + 1);
        let prepare = |range| prepare(&pictures, range, self.config.frame());
        self.install(|| {
            let (pixels, mut work) = prepare(0..lead)?;
            let start = Instant::now();
            let mut work_of_others = Work::default();
            let meanwhile = || {
                let (others, work) = prepare(lead..all)?;
                work_of_others = work;
                for (ids, mut rows) in texts {
                    self.embed_tokens(ids, &mut rows)?;
                }
                for (features, mut rows) in kept {
                    let features = features.chunks_exact(self.config.hidden_size).take(rows.len());
                    features.enumerate().for_each(|(i, row)| rows.row_mut(i).copy_from_slice(row));
                }
                Ok(others)
            };
            let views: Vec<RgbView<'_>> = pixels.iter().map(RgbImage::view).collect();
            self.encode_groups(&groups, &views, meanwhile, &targets, observer)?;
            work.decode += work_of_others.decode;
            work.resize += work_of_others.resize;
            work.warnings.extend(work_of_others.warnings);
            work.images_encoded = groups.iter().map(Vec::len).sum();
            work.encode = start.elapsed();
            Ok(work)
        })
    }
}

/// Decodes and resizes images of a call in parallel, each once, keeping only the resized pixels.
fn prepare(pictures: &Pictures<'_>, range: Range<usize>, frame: Frame) -> Result<(Vec<RgbImage>, Work)> {
    let start = Instant::now();
    let mut work = Work::default();
    let mut pixels = Vec::with_capacity(range.len());
    for image in prepare_range(pictures.sources, range, frame, pictures.resample, pictures.decode)? {
        pixels.push(image.pixels);
        work.warnings.extend(image.warnings);
        work.decode += image.decode_time;
        work.resize += image.resize_time;
    }
    (work.decode, work.resize) = share_wall(start.elapsed(), work.decode, work.resize);
    Ok((pixels, work))
}

/// Passes on what the tower tells about a group, image by image.
struct Watcher<'a, 'b, 'c> {
    group: &'a [usize], // index in the call of each image
    done: usize,        // steps times images
    all: usize,
    progress: Option<&'b mut ProgressFn<'c>>,
    trace: Option<&'b mut TraceFn<'c>>,
    timing: Option<&'b mut TimingFn<'c>>,
    since: Instant, // when the last op was done
    stop: &'a AtomicBool,
}

impl Watch for Watcher<'_, '_, '_> {
    fn stage<'v>(&mut self, stage: Stage, values: impl FnOnce() -> Cow<'v, [f16]>) {
        if let Some(trace) = &mut self.trace {
            let values = values();
            for (&image, values) in
                self.group.iter().zip(values.chunks_exact(values.len() / self.group.len()))
            {
                trace(image, stage, values);
            }
        }
    }

    fn step(&mut self) {
        self.done += self.group.len();
        let share = self.done as f32 / self.all as f32;
        if self.progress.as_mut().is_some_and(|progress| progress(share).is_break()) && self.done < self.all {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn op(&mut self, op: Op) {
        if let Some(timing) = &mut self.timing {
            let now = Instant::now();
            timing(op, now - self.since);
            self.since = now;
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Starts a pool of `threads`.
fn start_threads(threads: usize) -> Result<rayon::ThreadPool> {
    if threads == 0 {
        return Err(Error::argument(
            "0 threads cannot encode anything",
            "Ask for at least 1, or for the default",
        ));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("imagehere-cpu-{i}"))
        .build()
        .map_err(|error| Error::Device {
            device: "cpu".into(),
            problem: format!("cannot start {threads} threads: {error}"),
            remedy: "Ask for fewer threads".into(),
        })
}

/// Checks that weights and embedding have the sizes of `config`, and that those agree with one another.
fn check(config: &ModelConfig, weights: &VisionWeights, embedding: &dyn TokenEmbeddings) -> Result<()> {
    let refuse = |problem: String| {
        Err(Error::argument(problem, "Take configuration, weights and embedding from one checkpoint"))
    };
    let ModelConfig { image_size, patch_size, grid, patches, tokens, width, heads, .. } = *config;
    let (mlp, projector, hidden) = (config.mlp_width, config.projector_width, config.hidden_size);
    let zero = [image_size, patch_size, width, mlp, projector, hidden].contains(&0);
    if zero || image_size != grid * patch_size || patches != grid * grid || tokens != patches + 1 {
        return refuse(format!(
            "the configuration's sizes contradict one another: {image_size} pixels in {grid}x{grid} patches of \
             {patch_size} pixels, {patches} patches, {tokens} tokens, widths {width}, {mlp}, {projector}, {hidden}"
        ));
    }
    if width != heads * HEAD_SIZE {
        return refuse(format!("the tower is {width} channels wide, but has {heads} heads of {HEAD_SIZE}"));
    }
    if weights.layers.len() != config.layers {
        return refuse(format!("{} layers of weights for {} layers", weights.layers.len(), config.layers));
    }
    if embedding.hidden() != hidden {
        return refuse(format!("embedding rows of {} elements, but H is {hidden}", embedding.hidden()));
    }

    let mut wrong = None;
    let mut expect = |name: String, is: usize, rows: usize, columns: usize| {
        if is != rows * columns && wrong.is_none() {
            wrong = Some(format!("`{name}` has {is} elements, but its shape is [{rows}, {columns}]"));
        }
    };
    let mut expect_norm = |name: String, norm: &NormWeights| {
        expect(format!("{name}.weight"), norm.weight.len(), 1, width);
        expect(format!("{name}.bias"), norm.bias.len(), 1, width);
    };
    expect_norm("pre_norm".into(), &weights.pre_norm);
    for (i, layer) in weights.layers.iter().enumerate() {
        expect_norm(format!("layers[{i}].norm1"), &layer.norm1);
        expect_norm(format!("layers[{i}].norm2"), &layer.norm2);
    }
    let mut expect_linear = |name: String, linear: &LinearWeights, n: usize, k: usize| {
        expect(format!("{name}.weight"), linear.weight.len(), n, k);
        expect(format!("{name}.bias"), linear.bias.len(), 1, n);
    };
    for (i, layer) in weights.layers.iter().enumerate() {
        expect_linear(format!("layers[{i}].qkv"), &layer.qkv, 3 * width, width);
        expect_linear(format!("layers[{i}].out"), &layer.out, width, width);
        expect_linear(format!("layers[{i}].fc1"), &layer.fc1, mlp, width);
        expect_linear(format!("layers[{i}].fc2"), &layer.fc2, width, mlp);
    }
    expect_linear("projector_hidden".into(), &weights.projector_hidden, projector, width);
    expect_linear("projector_out".into(), &weights.projector_out, hidden, projector);
    expect("class_embedding".into(), weights.class_embedding.len(), 1, width);
    expect("patch_embedding".into(), weights.patch_embedding.len(), width, config.patch_len());
    expect("position_embedding".into(), weights.position_embedding.len(), tokens, width);
    wrong.map_or(Ok(()), refuse)
}

#[cfg(test)]
mod tests;
