//! The waist: what the encoder asks of a device, and nothing more.
//!
//! `cpu` answers it in plain Rust; `cuda` will answer it with kernels. No tensor type crosses it, no
//! linear layer, no layer norm: images go in as decoded RGB, features come out in rows that the sequence
//! lends. Above it nothing knows a device; below it nothing knows a prompt.

use std::fmt;
use std::str::FromStr;

use half::f16;

use crate::checkpoint::EmbeddingTable;
use crate::error::{Error, Result};
use crate::image::RgbView;
use crate::sequence::RowsMut;

/// Where to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The first GPU if there is a usable one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU with this ordinal.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let ordinal = |n: &str| n.parse().ok().map(Self::Cuda);
        match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(ordinal),
        }
        .ok_or_else(|| {
            Error::argument(format!("`{text}` is no device"), "Use auto, cpu, cuda or cuda:N, as in cuda:1")
        })
    }
}

/// Where each image's features go: for image `i`, every block of rows it fills.
///
/// A block shorter than **P** takes the first rows and drops the rest (a sequence cut inside an image).
/// An image with no block need not be encoded.
pub type Targets<'a> = Vec<Vec<RowsMut<'a>>>;

/// A device that can turn images and token ids into rows of a sequence.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Names the device and the variant chosen on it, for logs: `cpu (avx512, 2 threads)`.
    fn describe(&self) -> String;

    /// Writes the embedding of `ids[i]` to row `i`; shape `[ids.len(), H]`.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] if an id is outside the table;
    /// [`crate::Error::ValueOutOfRange`] if fp16 cannot hold a value of a row.
    fn embed_tokens(&self, ids: &[u32], rows: &mut RowsMut<'_>) -> Result<()>;

    /// Encodes images, batched, into all their targets; per image `[P, H]`.
    ///
    /// Images arrive resized: `image_size` pixels square. The rows of an image depend on its pixels alone,
    /// not on the batch, its order or the number of threads. Rows outside the targets are not touched.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the device fails. Targets are then undefined.
    fn encode_images(
        &self,
        images: &[RgbView<'_>],
        targets: Targets<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<()>;
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
    /// Called now and then with the work done, from 0 to 1.
    pub progress: Option<&'a mut (dyn FnMut(f32) + Send)>,
    /// Called with each stage's output of each image, in order; makes the run slower.
    pub trace: Option<&'a mut TraceFn<'a>>,
}

/// Receives a stage's output: the image's index, the stage, and the values, row-major.
pub type TraceFn<'a> = dyn FnMut(usize, Stage, &[f16]) + Send + 'a;

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
