//! The waist: what the encoder asks of a device, and nothing more.
//!
//! `cpu` answers it in plain Rust; `cuda` will answer it with kernels. No tensor type crosses it, no
//! linear layer, no layer norm: images go in as files or RGB, features come out in rows that the sequence
//! lends. Above it nothing knows a device; below it nothing knows a prompt.

use std::fmt;
use std::ops::ControlFlow;
use std::time::Duration;

use half::f16;

use crate::checkpoint::EmbeddingTable;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::image::{DecodeOptions, ImageSource, Resample};
use crate::sequence::{RowsMut, SequenceBuffer};
use crate::warning::Warning;

mod device;

pub use device::{Device, Ordinals};

/// Where each image's features go: for image `i`, every block of rows it fills.
///
/// A block shorter than **P** takes the first rows and drops the rest (a sequence cut inside an image).
/// An image with no block is decoded and checked, but need not be encoded.
pub type Targets<'a> = Vec<Vec<RowsMut<'a>>>;

/// The images of a call and how they become pixels; decoded by the backend, so that it may overlap that with
/// the work on images already there.
#[derive(Clone, Copy, Debug)]
pub struct Pictures<'a> {
    /// The images, in the order of the call; `[B]`.
    pub sources: &'a [ImageSource<'a>],
    /// How files become RGB8.
    pub decode: &'a DecodeOptions,
    /// Which Pillow the resize equals.
    pub resample: Resample,
}

/// What a call asks of a device: rows of text, rows kept from earlier calls, rows of images.
///
/// All blocks of rows are disjoint, `H` elements wide, and lie where the backend can write.
#[derive(Debug)]
pub struct Job<'a> {
    /// Token ids and the rows that take their embeddings, as many as ids.
    pub texts: Vec<(&'a [u32], RowsMut<'a>)>,
    /// Features `[P, H]` from an earlier call and the rows that take the first of them.
    pub kept: Vec<(&'a [f16], RowsMut<'a>)>,
    /// The images to encode.
    pub pictures: Pictures<'a>,
    /// Where each of them goes; `[B]`.
    pub targets: Targets<'a>,
}

/// What a device did for a [`Job`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Work {
    /// Wall time of decoding.
    pub decode: Duration,
    /// Wall time of resizing; where the device resizes, part of `encode`.
    pub resize: Duration,
    /// Wall time of tower, projector and text rows.
    pub encode: Duration,
    /// Images that went through the tower.
    pub images_encoded: usize,
    /// What went through but deserves a word, image by image.
    pub warnings: Vec<Warning>,
}

/// A device that can turn images and token ids into rows of a sequence.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Names the device and the variant chosen on it, for logs: `cpu (avx512, 2 threads)`.
    fn describe(&self) -> String;

    /// Names what decides the bits of an image's rows: two backends that say the same make the same. Neither the number
    /// of threads nor which GPU of several alike is part of it: `cpu (avx512)`, `cuda (NVIDIA H200, 9.0, sm90 kernels)`.
    fn numerics(&self) -> String {
        // The environment chooses kernels that a description does not name.
        numerics(&self.describe(), &std::env::var("IMAGEHERE_CUDA_FUSIONS").unwrap_or_default())
    }

    /// Fills all rows of a job, each image encoded once, batched, into all its targets; per image `[P, H]`.
    ///
    /// The rows of an image depend on its pixels alone, not on the batch, its order or the number of threads.
    /// Rows outside the job are not touched.
    ///
    /// # Errors
    /// [`Error::Image`] naming the first image that cannot be used: rows in host memory are untouched then.
    /// [`Error::Argument`] if an id is outside the embedding table; [`Error::ValueOutOfRange`] if fp16 cannot
    /// hold a value of a text row; [`Error::Device`] if the device fails. Rows are undefined then.
    fn fill(&self, job: Job<'_>, observer: &mut Observer<'_>) -> Result<Work>;

    /// Does what else the first call of each number of images would have to do.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    fn warm_up(&self, batch_sizes: &[usize]) -> Result<()> {
        let _ = batch_sizes;
        Ok(())
    }

    /// Makes an empty sequence in the device's own memory, which grows to what is encoded into it.
    ///
    /// # Errors
    /// [`Error::Argument`] if the device has no memory of its own.
    fn device_sequence(&self) -> Result<SequenceBuffer<'static>> {
        Err(no_memory(self.describe()))
    }

    /// Takes memory of the caller's on the device as a sequence: `elements` of fp16 from `address` on, rows
    /// `row_stride` elements apart. What the caller gave to `stream` before an encode is waited for by it.
    ///
    /// # Safety
    /// The memory must be the device's and stay allocated for as long as the sequence lives, and nobody else may
    /// touch it while something is encoded into it; `stream` must be 0 or a stream of the device's primary
    /// context, for as long.
    ///
    /// # Errors
    /// [`Error::Argument`] if the device has no memory of its own.
    unsafe fn wrap_device(
        &self,
        address: u64,
        elements: usize,
        row_stride: usize,
        stream: usize,
    ) -> Result<SequenceBuffer<'static>> {
        let _ = (address, elements, row_stride, stream);
        Err(no_memory(self.describe()))
    }
}

/// What is left of a description without ordinals, threads and repetitions; of a GPU, with the fusions asked for.
fn numerics(description: &str, fusions: &str) -> String {
    let mut kinds: Vec<String> = Vec::new();
    for device in description.split(" + ") {
        let (name, details) = device.split_once(" (").unwrap_or((device, ""));
        let kind = name.split(':').next().unwrap_or(name);
        let details = details.strip_suffix(')').unwrap_or(details).split(", ");
        let is_thread = |part: &&str| part.ends_with(" thread") || part.ends_with(" threads");
        let mut details: Vec<&str> = details.filter(|part| !is_thread(part)).collect();
        if kind == "cuda" && !fusions.is_empty() {
            details.push(fusions);
        }
        let kind = format!("{kind} ({})", details.join(", "));
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds.join(" + ")
}

/// The error of a device whose memory is the host's.
fn no_memory(device: String) -> Error {
    Error::argument(
        format!("`{device}` has no memory of its own"),
        "Take a sequence in host memory: SequenceBuffer::new() or SequenceBuffer::wrap()",
    )
}

/// The rows of the token embedding table, in fp16 on demand.
pub trait TokenEmbeddings: fmt::Debug + Send + Sync {
    /// Returns the number of rows: the vocabulary's size.
    fn rows(&self) -> usize;

    /// Returns **H**, the elements of a row.
    fn hidden(&self) -> usize;

    /// Writes the embedding of `id` to `out`, shape `[H]`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if there is no row `id`;
    /// [`crate::Error::ValueOutOfRange`] if fp16 cannot hold a value of it.
    fn gather_row(&self, id: u32, out: &mut [f16]) -> Result<()>;
}

impl TokenEmbeddings for EmbeddingTable {
    fn rows(&self) -> usize {
        self.rows()
    }

    fn hidden(&self) -> usize {
        self.hidden()
    }

    fn gather_row(&self, id: u32, out: &mut [f16]) -> Result<()> {
        self.gather_row(id, out)
    }
}

/// Who watches an encode.
#[derive(Default)]
pub struct Observer<'a> {
    /// Called now and then with the work done, from 0 to 1; says whether to go on.
    pub progress: Option<&'a mut ProgressFn<'a>>,
    /// Called with each stage's output of each image, in order; makes the run slower.
    pub trace: Option<&'a mut TraceFn<'a>>,
    /// Called after each step of a group of images with the time it took; devices that do not know it never call.
    pub timing: Option<&'a mut TimingFn<'a>>,
}

/// Receives the work done, from 0 to 1, and says whether to go on: a break ends the call with [`Error::Stopped`].
pub type ProgressFn<'a> = dyn FnMut(f32) -> ControlFlow<()> + Send + 'a;

/// Receives a stage's output: the image's index, the stage, and the values, row-major.
pub type TraceFn<'a> = dyn FnMut(usize, Stage, &[f16]) + Send + 'a;

/// Receives what was done and how long it took, for a whole group of images.
pub type TimingFn<'a> = dyn FnMut(Op, Duration) + Send + 'a;

/// What the tower and the projector are made of, in order; those of a block come once for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Pixels to normalised patches.
    Patches,
    /// The patch embedding, with class token and positions.
    PatchEmbedding,
    /// The norm before the blocks.
    PreNorm,
    /// A block's norm before attention.
    Norm1,
    /// Queries, keys and values.
    Qkv,
    /// Attention.
    Attention,
    /// The linear layer after attention, and the sum.
    AttentionOut,
    /// A block's norm before the MLP.
    Norm2,
    /// The first layer of the MLP, with its activation.
    Fc1,
    /// The second layer of the MLP, and the sum.
    Fc2,
    /// The projector's first layer, with its activation.
    ProjectorHidden,
    /// The projector's second layer, into the sequence.
    ProjectorOut,
}

impl Op {
    /// All of them, in order.
    pub const ALL: [Self; 12] = [
        Self::Patches,
        Self::PatchEmbedding,
        Self::PreNorm,
        Self::Norm1,
        Self::Qkv,
        Self::Attention,
        Self::AttentionOut,
        Self::Norm2,
        Self::Fc1,
        Self::Fc2,
        Self::ProjectorHidden,
        Self::ProjectorOut,
    ];

    /// Returns the name, as tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Patches => "patches",
            Self::PatchEmbedding => "patch_embedding",
            Self::PreNorm => "pre_norm",
            Self::Norm1 => "norm1",
            Self::Qkv => "qkv",
            Self::Attention => "attention",
            Self::AttentionOut => "attention_out",
            Self::Norm2 => "norm2",
            Self::Fc1 => "fc1",
            Self::Fc2 => "fc2",
            Self::ProjectorHidden => "projector_hidden",
            Self::ProjectorOut => "projector_out",
        }
    }

    /// Returns the floating point operations of its matrix products, two for a multiply-add, for one image and all
    /// blocks; 0 for what has none and is limited by memory.
    pub fn flop(self, config: &ModelConfig) -> u64 {
        let ModelConfig { patches, tokens, width, mlp_width, projector_width, hidden_size, .. } = *config;
        let product = |rows: usize, k: usize, n: usize| 2 * rows as u64 * k as u64 * n as u64;
        let layers = config.layers as u64;
        match self {
            Self::Patches | Self::PreNorm | Self::Norm1 | Self::Norm2 => 0,
            Self::PatchEmbedding => product(patches, config.patch_len(), width),
            Self::Qkv => layers * product(tokens, width, 3 * width),
            // Every query with every key, and every weight with every value.
            Self::Attention => layers * 2 * product(tokens, width, tokens),
            Self::AttentionOut => layers * product(tokens, width, width),
            Self::Fc1 | Self::Fc2 => layers * product(tokens, width, mlp_width),
            Self::ProjectorHidden => product(patches, width, projector_width),
            Self::ProjectorOut => product(patches, projector_width, hidden_size),
        }
    }
}

/// The stages that every backend can show, in order. Shapes are those of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// Normalised patches in im2col layout, `[P, 3·patch²]`, element order channel, y, x.
    Patches,
    /// Class token and patches with positions, after the pre-norm, `[T, C]`.
    Embedded,
    /// The output of transformer block `i` from 0, `[T, C]`.
    Layer(usize),
    /// The projector's hidden layer after its activation, `[P, projector width]`.
    ProjectorHidden,
}

#[cfg(test)]
mod tests {
    use super::{Op, numerics};

    #[test]
    fn the_published_model_takes_941_gflop_an_image() {
        let config = crate::cpu::bench::full();
        let flop: u64 = Op::ALL.iter().map(|op| op.flop(&config)).sum();
        assert_eq!(flop / 1_000_000_000, 941, "{flop}");
        // By hand: 24 layers, T 1226, C 1024.
        assert_eq!(Op::Qkv.flop(&config), 24 * 2 * 1226 * 1024 * 3072);
        assert_eq!(Op::Attention.flop(&config), 24 * 16 * 2 * 2 * 1226 * 1226 * 64);
        assert_eq!(Op::ProjectorOut.flop(&config), 2 * 1225 * 4096 * 4096);
        let names: std::collections::HashSet<_> = Op::ALL.iter().map(|op| op.name()).collect();
        assert_eq!(names.len(), Op::ALL.len());
    }

    #[test]
    fn numerics_are_a_description_without_what_changes_no_bit() {
        let numerics = |description: &str| numerics(description, "");
        assert_eq!(numerics("cpu (avx512, 2 threads)"), "cpu (avx512)");
        assert_eq!(numerics("cpu (portable, 1 thread)"), "cpu (portable)");
        let one = "cuda:1 (NVIDIA H200, 9.0, sm90 kernels)";
        assert_eq!(numerics(one), "cuda (NVIDIA H200, 9.0, sm90 kernels)");
        assert_eq!(numerics(&format!("{one} + {}", one.replace(":1", ":0"))), numerics(one));
        assert_ne!(numerics(&format!("{one} + {}", one.replace("H200", "H100"))), numerics(one));
        assert_eq!(super::numerics("cuda:0 (X, 8.0)", "none"), "cuda (X, 8.0, none)");
        assert_eq!(super::numerics("cpu (avx2, 8 threads)", "none"), "cpu (avx2)");
    }
}
