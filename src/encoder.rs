//! The façade: images in, filled sequence out.
//!
//! The only module that knows both the plan of a sequence and the device that fills it. It hands text rows
//! and slots to the backend as blocks of the sequence buffer; nothing is concatenated, nothing copied after
//! the projector.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use half::f16;

use crate::backend::{Backend, Device, Job, Observer, Op, Pictures, ProgressFn, Stage, Work};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::cpu::CpuBackend;
use crate::cuda;
use crate::error::{Error, Result};
use crate::features::{FeatureCache, FeatureFile, Features};
use crate::image::{DecodeOptions, ImageSource, Resample};
use crate::packing::{Block, Content, PackedPlan};
use crate::prompt::{Planner, Request, SequencePlan};
use crate::sequence::{RowsMut, SequenceBuffer};
use crate::tokenizer::Tokenizer;
use crate::warning::Warning;

mod kept;
mod options;
mod placer;

pub use options::EncoderOptions;

/// A loaded model: plans sequences, encodes images, fills sequences.
///
/// `Send + Sync`; calls from several threads run side by side and share the weights.
///
/// # Examples
/// ```
/// use imagehere::encoder::Encoder;
/// use imagehere::image::RgbView;
/// use imagehere::prompt::Request;
/// use imagehere::sequence::SequenceBuffer;
/// # let dir = tempfile::tempdir().unwrap();
/// # let dir = &dir.path().join("model");
/// # imagehere::synth::write(imagehere::synth::Preset::Tiny, &Default::default(), dir).unwrap();
///
/// let encoder = Encoder::open(dir)?;
/// let request = Request::new("<ImageHere> <ImageHere>What changed?").image_count(2);
/// let plan = encoder.plan(&request)?;
///
/// let (before, after) = (vec![0; 60 * 40 * 3], vec![255; 60 * 40 * 3]);
/// let images = [
///     RgbView::new(&before, 60, 40, 180).unwrap().into(),
///     RgbView::new(&after, 60, 40, 180).unwrap().into(),
/// ];
/// let mut sequence = SequenceBuffer::new();
/// encoder.encode_into(&plan, &images, &mut sequence)?;
/// sequence.verify()?;
/// assert_eq!(sequence.len(), plan.input_ids.len());
/// # Ok::<(), imagehere::Error>(())
/// ```
#[derive(Debug)]
pub struct Encoder {
    planner: Planner,
    backend: Box<dyn Backend>,
    pool: Option<rayon::ThreadPool>,
    decode: DecodeOptions,
    resample: Resample,
    cache: Option<FeatureCache>,
    fingerprint: Arc<str>,
    warnings: Vec<Warning>,
    of_weights: Vec<Warning>, // those of `warnings` that were noticed while weights were loaded
}

/// What an encode did.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct EncodeReport {
    /// Wall time of decoding. It overlaps with resizing; the two are told apart by their share of the work. Where a call
    /// has more images than run together, the later ones are decoded while the first are encoded, and the times overlap.
    pub decode: Duration,
    /// Wall time of resizing.
    pub resize: Duration,
    /// Wall time of tower, projector and text rows.
    pub encode: Duration,
    /// Images that went through the tower: each once, however many slots it fills.
    pub images_encoded: usize,
    /// Images that a [`FeatureCache`] had instead; of several with the same pixels, one is counted, here or above.
    pub images_cached: usize,
    /// What went through but deserves a word, image by image.
    pub warnings: Vec<Warning>,
}

impl From<Work> for EncodeReport {
    fn from(work: Work) -> Self {
        let Work { decode, resize, encode, images_encoded, warnings } = work;
        Self { decode, resize, encode, images_encoded, images_cached: 0, warnings }
    }
}

impl Encoder {
    /// Opens a checkpoint directory with the default options.
    ///
    /// # Errors
    /// As [`Encoder::open_with`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(dir, EncoderOptions::default())
    }

    /// Opens a checkpoint directory: maps it, checks it, converts tower and projector to fp16.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::DType`] or [`Error::ValueOutOfRange`] if the directory cannot be used;
    /// [`Error::Device`] if the device is absent.
    pub fn open_with(dir: impl AsRef<Path>, options: EncoderOptions) -> Result<Self> {
        let dir = dir.as_ref();
        let checkpoint = Checkpoint::open(dir)?;
        let planner = Planner::new(Tokenizer::from_dir(dir)?, checkpoint.config().clone())?;
        Self::load(&checkpoint, planner, options)
    }

    /// Loads an opened checkpoint onto a device, for callers that plan before they wait for weights.
    ///
    /// # Errors
    /// [`Error::DType`] or [`Error::ValueOutOfRange`] if a weight cannot be used; [`Error::Device`] if the
    /// device is absent.
    pub fn load(checkpoint: &Checkpoint, planner: Planner, options: EncoderOptions) -> Result<Self> {
        let pool = options.threads.map(thread_pool).transpose()?;
        let open = || open_backend(checkpoint, &options);
        let (backend, warnings) = match &pool {
            Some(pool) => pool.install(open),
            None => open(),
        }?;
        let mut encoder = Self::on(backend, checkpoint, planner, options);
        encoder.pool = pool;
        encoder.warnings.extend_from_slice(&warnings);
        encoder.of_weights = warnings;
        Ok(encoder)
    }

    /// As [`Encoder::load`], without tower and projector: for [`Encoder::place_into`] alone, in host memory. No weight of
    /// theirs is read, and the device, threads and cache of `options` are of no use.
    pub fn load_without_tower(checkpoint: &Checkpoint, planner: Planner, options: EncoderOptions) -> Self {
        let embedding = checkpoint.embedding().with_policy(options.range_policy);
        Self::on(Box::new(placer::Placer::new(embedding)), checkpoint, planner, options)
    }

    /// Joins the parts, on a backend that holds the checkpoint's weights.
    pub(crate) fn on(
        backend: Box<dyn Backend>,
        checkpoint: &Checkpoint,
        planner: Planner,
        options: EncoderOptions,
    ) -> Self {
        tracing::info!(backend = %backend.describe(), "opened {}", checkpoint.dir().display());
        let mut encoder = Self::of(backend, planner, checkpoint.fingerprint(), options);
        encoder.warnings = checkpoint.warnings().to_vec();
        encoder
    }

    /// As [`Encoder::on`], for weights that come from no checkpoint.
    pub(crate) fn of(
        backend: Box<dyn Backend>,
        planner: Planner,
        fingerprint: &str,
        options: EncoderOptions,
    ) -> Self {
        let EncoderOptions { decode, resample, feature_cache, .. } = options;
        Self {
            planner,
            backend,
            pool: None,
            decode,
            resample,
            cache: feature_cache,
            fingerprint: fingerprint.into(),
            warnings: vec![],
            of_weights: vec![],
        }
    }

    /// Returns the sizes of the model.
    pub fn config(&self) -> &ModelConfig {
        self.planner.config()
    }

    /// Returns what was noticed at open.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Returns the fingerprint of the checkpoint, in hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Names the device and the kernels chosen on it.
    pub fn describe(&self) -> String {
        self.install(|| self.backend.describe())
    }

    /// Makes the first call with each of these numbers of images cost what the tenth does.
    ///
    /// On a GPU, a graph is captured for every number of images that run together (up to 16; a larger call is split), and
    /// memory is pinned for as many decoded images of up to 8 MiB, 256 MiB at most; on the CPU there is nothing to do. A
    /// service gives the sizes that it expects, say `&[1, 2, 4, 8, 12, 16]`: others get their graph at their first call.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub fn warm_up(&self, batch_sizes: &[usize]) -> Result<()> {
        self.install(|| self.backend.warm_up(batch_sizes))
    }

    /// Makes an empty sequence in the memory of this encoder's GPU, the first of several: features are written
    /// where they are used.
    ///
    /// # Errors
    /// [`Error::Argument`] if the encoder runs on the CPU.
    pub fn device_sequence(&self) -> Result<SequenceBuffer<'static>> {
        self.backend.device_sequence()
    }

    /// Takes memory that the caller allocated on this encoder's GPU, the first of several, as a sequence to be
    /// filled in place: `elements` of fp16 from `address` on, rows `row_stride` elements apart.
    ///
    /// Work given to `stream` (0 is the default stream) before a call of [`Encoder::encode_into`] is waited for
    /// on the device. The call returns when all rows are there. Rows outside the sequence and elements between
    /// rows are not touched.
    ///
    /// # Errors
    /// [`Error::Argument`] if the encoder runs on the CPU.
    ///
    /// # Safety
    /// The memory must be this device's and stay allocated for as long as the sequence lives; nobody else may
    /// touch it while a call encodes into it; `stream` must be 0 or a stream of the device's primary context
    /// (that of PyTorch and of the CUDA runtime), and stay one for as long.
    pub unsafe fn wrap_device(
        &self,
        address: u64,
        elements: usize,
        row_stride: usize,
        stream: usize,
    ) -> Result<SequenceBuffer<'static>> {
        // SAFETY: the caller's promise.
        unsafe { self.backend.wrap_device(address, elements, row_stride, stream) }
    }

    /// Lays out a sequence: ids, slots, mask. Decodes nothing.
    ///
    /// # Errors
    /// [`Error::MarkerCount`] if markers and images do not match; [`Error::SequenceTooLong`].
    pub fn plan(&self, request: &Request) -> Result<SequencePlan> {
        self.planner.plan(request)
    }

    /// Fills a sequence, or a packing of several: text rows, and each image's features in all its slots.
    ///
    /// `images` are those of the call, in the order of the plan's slots (of the indices given to
    /// [`PackedPlan::push`]). All are decoded before the first row is written, and each is encoded once.
    ///
    /// # Errors
    /// [`Error::Argument`] if the number of images is wrong or a wrapped buffer too small;
    /// [`Error::Image`] naming the first image that cannot be used. Nothing is written then.
    pub fn encode_into<'p>(
        &self,
        plan: impl Into<PackedPlan<'p>>,
        images: &[ImageSource<'_>],
        sequence: &mut SequenceBuffer<'_>,
    ) -> Result<EncodeReport> {
        self.encode_watched(plan, images, sequence, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Encoder::encode_into`], calling `progress` now and then with the work done, from 0 to 1, until it breaks: on
    /// the CPU after each block of the tower, on GPUs after each group of images.
    ///
    /// # Errors
    /// As [`Encoder::encode_into`]; [`Error::Stopped`] if `progress` broke. Rows of a wrapped buffer may have been written
    /// then.
    pub fn encode_watched<'p>(
        &self,
        plan: impl Into<PackedPlan<'p>>,
        images: &[ImageSource<'_>],
        sequence: &mut SequenceBuffer<'_>,
        progress: &mut ProgressFn<'_>,
    ) -> Result<EncodeReport> {
        let packed = plan.into();
        check_image_count(&packed, images.len())?;
        let mut observer = Observer { progress: Some(progress), ..Observer::default() };
        match self.cache {
            Some(_) => self.fill_by_pixels(&packed, images, sequence, &mut observer),
            None => self.fill(&packed, images, &[], sequence, &mut observer),
        }
    }

    /// As [`Encoder::encode_into`], telling `timing` how long each step of the tower took, for a group of images at a time:
    /// for measurements. The CPU tells; GPUs, where steps overlap, do not. No feature cache is asked.
    ///
    /// # Errors
    /// As [`Encoder::encode_into`].
    pub fn encode_timed<'p>(
        &self,
        plan: impl Into<PackedPlan<'p>>,
        images: &[ImageSource<'_>],
        sequence: &mut SequenceBuffer<'_>,
        timing: &mut (dyn FnMut(Op, Duration) + Send),
    ) -> Result<EncodeReport> {
        let packed = plan.into();
        check_image_count(&packed, images.len())?;
        let mut observer = Observer { timing: Some(timing), ..Observer::default() };
        self.fill(&packed, images, &[], sequence, &mut observer)
    }

    /// Encodes images and keeps their features, to be placed later by [`Encoder::place_into`].
    ///
    /// # Errors
    /// [`Error::Image`] naming the first image that cannot be used.
    pub fn features(&self, images: &[ImageSource<'_>]) -> Result<Vec<Features>> {
        match self.cache {
            Some(_) => {
                Ok(self.feature_set(images, &mut |_| ControlFlow::Continue(()))?.0.features().to_vec())
            }
            None => self.encode_features(images, &mut Observer::default()),
        }
    }

    /// Takes rows `[P, H]` that were kept elsewhere, or that other code made with this checkpoint, as an image's features:
    /// that they are is the caller's word.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are not `P * H` elements.
    pub fn adopt_features(&self, rows: Vec<f16>) -> Result<Features> {
        let (patches, hidden) = (self.config().patches, self.config().hidden_size);
        if rows.len() != patches * hidden {
            return Err(Error::argument(
                format!(
                    "{} elements were given as features, but those of an image are [{patches}, {hidden}]",
                    rows.len()
                ),
                "Give the rows of one image",
            ));
        }
        Ok(Features::new(rows, hidden, self.fingerprint.clone()))
    }

    /// Reads a features file that this checkpoint made by this encoder's rules, to be placed by [`Encoder::place_into`].
    ///
    /// # Errors
    /// As [`FeatureFile::open`], [`FeatureFile::check`] and [`FeatureFile::read`].
    pub fn read_features(&self, path: impl AsRef<Path>) -> Result<Vec<Features>> {
        let file = FeatureFile::open(path)?;
        file.check(self.fingerprint(), self.config(), &self.preprocessing())?;
        file.read()
    }

    /// Fills a sequence, or a packing of several, from features kept from earlier calls: no image is encoded.
    ///
    /// # Errors
    /// [`Error::Argument`] if the number of features is wrong, if another checkpoint made them, or if a
    /// wrapped buffer is too small. Nothing is written then.
    pub fn place_into<'p>(
        &self,
        plan: impl Into<PackedPlan<'p>>,
        features: &[Features],
        sequence: &mut SequenceBuffer<'_>,
    ) -> Result<()> {
        let packed = plan.into();
        check_image_count(&packed, features.len())?;
        if let Some(foreign) = features.iter().position(|f| f.fingerprint() != self.fingerprint()) {
            return Err(Error::argument(
                format!(
                    "features {foreign} were made by checkpoint {}, this one is {}",
                    features[foreign].fingerprint(),
                    self.fingerprint
                ),
                "Encode the image again with this checkpoint",
            ));
        }
        self.fill(&packed, &[], features, sequence, &mut Observer::default()).map(|_| ())
    }

    /// Encodes one image and shows every stage's output to `trace`: for tests and for the curious.
    ///
    /// # Errors
    /// [`Error::Image`] if the image cannot be used.
    pub fn trace(
        &self,
        image: &ImageSource<'_>,
        trace: &mut (dyn FnMut(Stage, &[f16]) + Send),
    ) -> Result<Features> {
        let mut show = |_: usize, stage: Stage, values: &[f16]| trace(stage, values);
        let mut observer = Observer { trace: Some(&mut show), ..Observer::default() };
        let mut features = self.encode_features(std::slice::from_ref(image), &mut observer)?;
        features.pop().ok_or_else(|| Error::Internal("one image gave no features".into()))
    }

    /// Encodes images into memory of their own.
    fn encode_features(
        &self,
        images: &[ImageSource<'_>],
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Features>> {
        let ((features, _), _) = self.framed(images, |images| self.encode_squares(images, observer))?;
        Ok(features)
    }

    /// As [`Encoder::encode_features`], of images that the backend may stretch.
    fn encode_squares(
        &self,
        images: &[ImageSource<'_>],
        observer: &mut Observer<'_>,
    ) -> Result<(Vec<Features>, Work)> {
        let (patches, hidden) = (self.config().patches, self.config().hidden_size);
        let mut kept: Vec<Vec<f16>> = images.iter().map(|_| vec![f16::ZERO; patches * hidden]).collect();
        let targets = kept.iter_mut().map(|rows| vec![RowsMut::new(rows, hidden, hidden)]).collect();
        let job = Job { texts: vec![], kept: vec![], pictures: self.pictures(images), targets };
        let work = self.install(|| self.backend.fill(job, observer))?;
        let made = |rows| Features::new(rows, hidden, self.fingerprint.clone());
        Ok((kept.into_iter().map(made).collect(), work))
    }

    /// Fills a packing from images, or, where there are some, from kept features. A buffer of ours that a
    /// failed call had begun is empty afterwards.
    fn fill(
        &self,
        packed: &PackedPlan<'_>,
        images: &[ImageSource<'_>],
        features: &[Features],
        sequence: &mut SequenceBuffer<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<EncodeReport> {
        let fill =
            |images: &[ImageSource<'_>]| self.fill_squares(packed, images, features, sequence, observer);
        let (mut report, seen) = self.framed(images, fill)?;
        report.decode += seen.decode;
        report.resize += seen.resize;
        report.warnings.splice(..0, seen.warnings);
        Ok(report)
    }

    /// As [`Encoder::fill`], from images that the backend may stretch.
    fn fill_squares(
        &self,
        packed: &PackedPlan<'_>,
        images: &[ImageSource<'_>],
        features: &[Features],
        sequence: &mut SequenceBuffer<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<EncodeReport> {
        let (blocks, lent) = self.lay_out(packed, sequence)?;
        let targets = images.iter().map(|_| Vec::new()).collect();
        let mut job = Job { texts: vec![], kept: vec![], pictures: self.pictures(images), targets };
        for (block, rows) in blocks.iter().zip(lent) {
            match &block.content {
                Content::Text(ids) => job.texts.push((ids, rows)),
                Content::Image(image) if features.is_empty() => job.targets[*image].push(rows),
                Content::Image(image) => job.kept.push((features[*image].as_slice(), rows)),
            }
        }
        match self.install(|| self.backend.fill(job, observer)) {
            Ok(work) => {
                for block in &blocks {
                    sequence.mark_written(block.offset..block.offset + block.len);
                }
                Ok(work.into())
            }
            Err(error) => {
                sequence.forget();
                Err(error)
            }
        }
    }

    /// The images of a call, with this encoder's rules for them.
    fn pictures<'a>(&'a self, sources: &'a [ImageSource<'a>]) -> Pictures<'a> {
        Pictures { sources, decode: &self.decode, resample: self.resample }
    }

    /// Prepares the buffer for a packing and lends all its blocks, in order.
    fn lay_out<'s>(
        &self,
        packed: &PackedPlan<'_>,
        sequence: &'s mut SequenceBuffer<'_>,
    ) -> Result<(Vec<Block>, Vec<RowsMut<'s>>)> {
        let config = self.config();
        let blocks = packed.blocks();
        for block in &blocks {
            match &block.content {
                Content::Image(image) if block.len > config.patches => {
                    return Err(Error::argument(
                        format!(
                            "the slot of image {image} has {} rows, an image fills {}",
                            block.len, config.patches
                        ),
                        "Make the plan with this encoder",
                    ));
                }
                Content::Text(ids) => {
                    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
                        return Err(Error::argument(
                            format!(
                                "token id {id} is outside the {} rows of the embedding table",
                                config.vocab_size
                            ),
                            "Make the plan with this checkpoint's tokenizer",
                        ));
                    }
                }
                Content::Image(_) => {}
            }
        }
        sequence.prepare(packed, config.hidden_size)?;
        let lent = sequence.lend(blocks.iter().map(|block| block.offset..block.offset + block.len))?;
        Ok((blocks, lent))
    }

    /// Runs `work` in this encoder's own thread pool, if it has one.
    fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

/// Checks that a call brings as many images as its plans name.
fn check_image_count(packed: &PackedPlan<'_>, given: usize) -> Result<()> {
    let needed = packed.images_needed();
    if given == needed {
        return Ok(());
    }
    Err(Error::argument(
        format!("the plan has slots for {needed} images, but the call brings {given}"),
        "Bring the images that the plan was made for",
    ))
}

/// Builds a pool of `threads` threads.
fn thread_pool(threads: usize) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("imagehere-{i}"))
        .build()
        .map_err(|error| Error::Internal(format!("cannot start {threads} threads: {error}")))
}

/// Opens the device asked for; `auto` takes the CPU where no GPU can be used.
fn open_backend(
    checkpoint: &Checkpoint,
    options: &EncoderOptions,
) -> Result<(Box<dyn Backend>, Vec<Warning>)> {
    let gpus = match options.device {
        Device::Cpu => vec![],
        Device::Cuda(ordinal) => vec![cuda::Gpu::open(ordinal)?],
        Device::CudaSeveral(ordinals) => ordinals.iter().map(cuda::Gpu::open).collect::<Result<_>>()?,
        Device::CudaAll => cuda::Gpu::open_all()?,
        Device::Auto => cuda::Gpu::open(0).map(|gpu| vec![gpu]).unwrap_or_else(|error| {
            tracing::info!(%error, "no GPU can be used, taking the CPU");
            vec![]
        }),
    };
    if !gpus.is_empty() {
        match cuda::open_backend(gpus, checkpoint, options.range_policy) {
            Err(error @ Error::Device { .. }) if options.device == Device::Auto => {
                tracing::warn!(%error, "the GPU cannot take the model, taking the CPU");
            }
            opened => return opened,
        }
    }
    let (weights, report) = checkpoint.vision_weights(options.range_policy)?;
    let embedding = checkpoint.embedding().with_policy(options.range_policy);
    let backend = CpuBackend::new(checkpoint.config(), weights, Box::new(embedding), None)?;
    Ok((Box::new(backend), report.warnings()))
}
