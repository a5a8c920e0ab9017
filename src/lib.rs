//! **imagehere** puts many images into one multimodal LLM sequence.
//!
//! A prompt with `<ImageHere>` markers and as many images become the whole input of InternLM-XComposer2-VL:
//! text rows from the embedding table, and each image's features, from the CLIP tower and the projector,
//! written straight into the rows that its marker reserved. LLaVA-1.5, whose marker is `<image>`, is taken as well: what a
//! family of models is, is a [`Profile`](config::Profile), chosen from the checkpoint's `config.json`.
//!
//! ```text
//!  prompt text ─▶ prompt ───────────────── Slot{offset,len} per image ───────────────────┐
//!                                                                                         ▼
//!  image bytes ─▶ decode ─▶ resize ─▶ patches ─▶ tower ─▶ projector ── writes rows ─▶ sequence buffer [L, H]
//!                 RGB8      490×490   [P,588]    [T,C]    [P,H]         (no copy)     ├ text ┤ slot 0 ├ text ┤ slot 1 ┤
//! ```
//!
//! # The map
//!
//! Reading the modules in this order is reading the data's journey; imports point one way, along it.
//!
//! | module | what it knows |
//! |---|---|
//! | [`error`], [`warning`] | what can go wrong, and what to do next |
//! | [`config`] | the numbers of the model, and the profile of its family |
//! | [`checkpoint`] | a Hub-layout directory: files mapped, names and shapes checked, weights as fp16 |
//! | [`tokenizer`] | text to ids |
//! | [`prompt`] | template and markers to a [`SequencePlan`](prompt::SequencePlan): integers alone |
//! | [`packing`] | several plans laid end to end |
//! | [`image`] | files to RGB8, any size to the tower's |
//! | [`sequence`] | the buffer `[L, H]`, who may write which rows, whether all were written |
//! | [`backend`] | the waist: what is asked of a device |
//! | [`cpu`] | the answer in plain Rust: the embedded default, and the oracle of every other |
//! | `cuda` | the answer of NVIDIA GPUs, in kernels of its own: launchers named as the files of `kernels/` |
//! | [`output`] | files that appear whole; sequences to files, and to what engines take |
//! | [`features`] | one image's rows as a value, in a file, in a cache |
//! | [`picture`] | a sequence as a picture for people |
//! | [`encoder`] | the façade |
//! | [`convert`] | what encoding needs of a checkpoint, as fp16 safetensors |
//! | [`synth`] | random checkpoints in the layout of the published ones |
//!
//! # Invariants
//!
//! - `prompt` and `packing` never see a pixel or a device; `image` never sees a prompt.
//! - `sequence` never sees a projector, `cpu` never sees a sequence: it is lent rows. Only `encoder` knows both.
//! - fp16 from end to end: weights, stage outputs, sequence. Sums and statistics are f32.
//! - An image's rows depend on its pixels alone: not on its batch, its place in it, or the number of threads.
//! - Nothing is truncated, padded, resized or reordered silently: an error, or a [`Warning`] that says so.
//! - The library never prints. Warnings are values; logs go to [`tracing`].
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `cli` | yes | the `imagehere` binary |
//! | `cuda` | yes | the CUDA backend; kernels are compiled where there is an nvcc (`kernels/fetch-nvcc`) |
//! | `jpeg-exact` | yes | JPEG byte-equal to Pillow; needs a C compiler |
//!
//! Without default features the library builds without C.
//!
//! # Start here
//!
//! [`Encoder`] has the whole job in one example.

pub mod backend;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "cuda/disabled.rs"]
pub mod cuda;
pub mod encoder;
pub mod error;
pub mod features;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod output;
pub mod packing;
pub mod picture;
pub mod prompt;
pub mod sequence;
pub mod synth;
pub mod tokenizer;
pub mod warning;

/// The version of this crate, as it goes into the files it writes.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

pub use encoder::{EncodeReport, Encoder, EncoderOptions};
pub use error::{Category, Error, ImageProblem, Result};
pub use warning::{Warning, WarningKind};
