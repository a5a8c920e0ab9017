//! The CUDA backend: hand-written kernels for NVIDIA GPUs, from compute capability 8.0 up.
//!
//! ```text
//!   backend       a job of the encoder's: images, text, rows of sequences
//!      └─ peers   one device, or several that share the images; rows: sequences that stay on the first
//!          └─ arena   one device's memory, streams, graphs; pictures, blocks and upload bring images to it
//!
//!   patches ─▶ linear ─▶ layer_norm ─▶ linear ─▶ attention ─▶ linear ─▶ …       tower.rs says in which order
//!      │          └──── matrix ─────────┬────────────┘                          weights.rs what with, and
//!      │                                │                                       fusions, fold what is taken in
//!   resize                           launch      one unsafe function, contracts checked before it
//!                                       │
//!                                    driver      context, streams, memory, modules, graphs
//!                                       │
//!   kernels/x.cu ─ build.rs ─▶ images ──┘        one fat binary per file, none where there was no nvcc
//! ```
//!
//! `x.rs` launches `kernels/x.cu` and checks the contract in its header, in its order; `x/sm90.rs` the kernels of Hopper's
//! own, which `x.rs` prefers where they are loaded. `disabled.rs` is this
//! module's other self, for builds without the feature `cuda`.
//!
//! What holds: stages, rounding points and order of sums are those of [`crate::cpu`], but that a folded layer norm rounds
//! weights where the CPU rounds rows; an image's rows depend
//! on neither its batch nor its place in it nor the tile that was chosen.

#![cfg_attr(not(test), allow(dead_code, reason = "the driver's owners answer what only tests ask"))]

use std::sync::Arc;

use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, RangePolicy};
use crate::error::{Error, Result};
use crate::warning::Warning;

pub(crate) mod arena;
pub(crate) mod attention;
pub(crate) mod backend;
#[doc(hidden)]
pub mod bench;
pub(crate) mod blocks;
pub(crate) mod convert;
pub(crate) mod driver;
pub(crate) mod embed_tokens;
pub(crate) mod fold;
pub(crate) mod fusions;
pub(crate) mod images;
pub(crate) mod launch;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod matrix;
pub(crate) mod patches;
pub(crate) mod peers;
pub(crate) mod pictures;
pub(crate) mod range;
pub(crate) mod resize;
pub(crate) mod rows;
pub(crate) mod tower;
pub(crate) mod upload;
pub(crate) mod verify;
pub(crate) mod weights;

#[cfg(test)]
mod budget;
#[cfg(test)]
mod mutants;
#[cfg(test)]
mod testkit;
#[cfg(test)]
mod tests;

use attention::Attention;
use backend::CudaBackend;
use convert::Convert;
use driver::{Context, Module};
use embed_tokens::EmbedTokens;
use fold::Fold;
use images::Image;
use layer_norm::LayerNorm;
use linear::Linear;
use patches::Patches;
use resize::Resize;
use verify::Verify;
use weights::Source;

/// Names GPU `ordinal`, after checking that this build can use it: `cuda:0 (NVIDIA H200, 9.0, sm90 kernels)`.
///
/// # Errors
/// [`Error::Device`] if this build has no kernels, or if the driver or the device is absent, too old or
/// broken.
pub fn describe(ordinal: usize) -> Result<String> {
    Ok(Gpu::open(ordinal)?.describe())
}

/// Uploads a checkpoint to GPUs, which convert its weights and share the images of a call; sequences lie on the
/// first. Says what deserves a word about the weights.
///
/// # Errors
/// As [`Checkpoint::vision_weights`]; [`Error::Device`] if there is no room, or the driver fails.
pub(crate) fn open_backend(
    gpus: Vec<Gpu>,
    checkpoint: &Checkpoint,
    policy: RangePolicy,
) -> Result<(Box<dyn Backend>, Vec<Warning>)> {
    let embedding = checkpoint.embedding().with_policy(policy);
    let weights = checkpoint.stored_weights()?;
    let source = Source::Stored(&weights, policy);
    let (backend, report) = CudaBackend::new(gpus, checkpoint.config(), source, embedding)?;
    Ok((Box::new(backend), report.warnings()))
}

/// A GPU with all kernels loaded.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) context: Arc<Context>,
    pub(crate) kernels: Kernels,
}

impl Gpu {
    /// Opens GPU `ordinal` and loads the kernels of this build.
    ///
    /// # Errors
    /// [`Error::Device`] if this build has no kernels, or if the driver or the device is absent, too old or
    /// broken.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        Self::open_with(ordinal, images::IMAGES)
    }

    /// Opens every GPU that can be used, in the order of their ordinals, and loads the kernels of this build.
    ///
    /// # Errors
    /// [`Error::Device`] if there is none: that of the first.
    pub(crate) fn open_all() -> Result<Vec<Self>> {
        Self::open_all_with(images::IMAGES)
    }

    /// As [`Gpu::open_all`], with the kernels of `images`.
    fn open_all_with(images: &'static [Image]) -> Result<Vec<Self>> {
        let mut gpus = vec![];
        let mut refused = None;
        let count = driver::library::open(0).and_then(|_| driver::context::device_count());
        for ordinal in 0..count.unwrap_or(1).max(1) {
            match Self::open_with(ordinal, images) {
                Ok(gpu) => gpus.push(gpu),
                Err(error) => {
                    tracing::info!(%error, "one GPU less");
                    refused.get_or_insert(error);
                }
            }
        }
        match refused {
            Some(error) if gpus.is_empty() => Err(error),
            _ => Ok(gpus),
        }
    }

    /// Opens GPU `ordinal` and loads the kernels of `images`.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub(crate) fn open_with(ordinal: usize, images: &'static [Image]) -> Result<Self> {
        Self::open_as(ordinal, images, Family::from_environment()?)
    }

    /// As [`Gpu::open_with`], with the kernels of a family.
    fn open_as(ordinal: usize, images: &'static [Image], most: Family) -> Result<Self> {
        if images.is_empty() {
            return Err(driver::device_error(
                ordinal,
                "this build has no CUDA kernels: there was no nvcc when it was made",
                "In the checkout, run `bash kernels/fetch-nvcc` and build again (or let NVCC or CUDA_HOME point to \
                 CUDA 12.8 or later); or use `cpu`",
            ));
        }
        let context = Context::open(ordinal)?;
        let family = if context.capability() == HOPPER { most } else { Family::Portable };
        let kernels = Kernels::load(&context, images, family)?;
        let gpu = Self { context, kernels };
        tracing::info!(device = gpu.describe(), "CUDA kernels loaded");
        Ok(gpu)
    }

    /// Names the device and the kernels: `cuda:0 (NVIDIA H200, 9.0, sm90 kernels)`.
    pub(crate) fn describe(&self) -> String {
        let (major, minor) = self.context.capability();
        let (ordinal, name) = (self.context.ordinal(), self.context.name());
        let family = if self.kernels.linear.sm90.is_some() { "sm90" } else { "sm80" };
        format!("cuda:{ordinal} ({name}, {major}.{minor}, {family} kernels)")
    }
}

/// The compute capability that sm90 kernels are for, and no other.
const HOPPER: (i32, i32) = (9, 0);

/// Whose kernels do the linear layers and attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// For every device from 8.0 on.
    Portable,
    /// For 9.0: wgmma, bulk copies, launches that overlap.
    Hopper,
}

impl Family {
    /// The newest that may be used: `IMAGEHERE_CUDA_KERNELS=sm80` asks for the portable ones on Hopper too.
    ///
    /// # Errors
    /// [`Error::Argument`] for anything but `sm80` and `sm90`.
    fn from_environment() -> Result<Self> {
        match std::env::var("IMAGEHERE_CUDA_KERNELS").as_deref() {
            Ok("sm80") => Ok(Self::Portable),
            Ok("sm90") | Err(_) => Ok(Self::Hopper),
            Ok(other) => Err(Error::argument(
                format!("IMAGEHERE_CUDA_KERNELS is `{other}`"),
                "Give `sm80` for the kernels of every device, or `sm90` for Hopper's where there is one",
            )),
        }
    }
}

/// All kernels, loaded and compared with what Rust takes them for.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) linear: Linear,
    pub(crate) attention: Attention,
    pub(crate) layer_norm: LayerNorm,
    pub(crate) patches: Patches,
    pub(crate) resize: Resize,
    pub(crate) embed_tokens: EmbedTokens,
    pub(crate) convert: Convert,
    pub(crate) fold: Fold,
    pub(crate) verify: Verify,
}

impl Kernels {
    fn load(context: &Arc<Context>, images: &'static [Image], family: Family) -> Result<Self> {
        let module = |name: &str| {
            let image = images.iter().find(|image| image.name == name);
            let image =
                image.ok_or_else(|| Error::Internal(format!("no image of the kernels in {name}.cu")))?;
            Module::load(context, name, image.bytes)
        };
        let on_hopper = |name: &str| (family == Family::Hopper).then(|| module(name)).transpose();
        Ok(Self {
            linear: Linear::load(&module("linear_sm80")?, on_hopper("linear_sm90")?.as_ref())?,
            attention: Attention::load(&module("attention_sm80")?, on_hopper("attention_sm90")?.as_ref())?,
            layer_norm: LayerNorm::load(&module("layer_norm")?)?,
            patches: Patches::load(&module("patches")?)?,
            resize: Resize::load(&module("resize")?)?,
            embed_tokens: EmbedTokens::load(&module("embed_tokens")?)?,
            convert: Convert::load(&module("convert")?)?,
            fold: Fold::load(&module("fold")?)?,
            verify: Verify::load(&module("verify")?)?,
        })
    }
}

/// What each launch of each kernel has in common.
pub(crate) fn entries() -> Vec<launch::Entry> {
    let mut entries = linear::ENTRIES.concat();
    entries.extend(linear::sm90::VARIANTS.iter().map(|variant| variant.entry));
    entries.extend(attention::ENTRIES);
    entries.extend(attention::sm90::ENTRIES);
    entries.extend([layer_norm::ENTRY, patches::ENTRY, fold::ENTRY]);
    entries.extend(resize::ENTRIES);
    entries.extend(embed_tokens::ENTRIES);
    entries.extend(convert::ENTRIES);
    entries.extend(verify::ENTRIES);
    entries
}
