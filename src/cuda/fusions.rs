//! What Hopper's kernels need not do by launches of their own, because weights or other kernels have taken it in.
//!
//! ```text
//!   layer_norm    γ is in the weights of qkv and fc1; whoever stores a row of hidden leaves its statistics, and the next
//!                 linear layer applies mean and deviation to its sums: 2 launches and 4 passes over hidden less per layer
//!   query_scale   1/8 is in the queries' weights: exact, but for weights so small that an eighth is subnormal
//!   class_row     the last layer stores no class rows: the projector reads whole rows of patches, by bulk copies
//! ```
//!
//! All are on where there are kernels for them; `IMAGEHERE_CUDA_FUSIONS` names those that shall be, or `none`. What each
//! does to time and to the error is in `benches/NOTES.md`.

use super::driver::{DeviceMemory, Span, Stream};
use super::fold::{Fold, Folding};
use super::layer_norm::Norm;
use super::linear::{FoldedNorm, Layer, PART};
use super::matrix::VECTOR;
use super::weights::DeviceWeights;
use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// The environment variable that chooses.
const VARIABLE: &str = "IMAGEHERE_CUDA_FUSIONS";

/// Which of them are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fusions {
    pub(crate) layer_norm: bool,
    pub(crate) query_scale: bool,
    pub(crate) class_row: bool,
}

impl Fusions {
    pub(crate) const NONE: Self = Self { layer_norm: false, query_scale: false, class_row: false };
    pub(crate) const ALL: Self = Self { layer_norm: true, query_scale: true, class_row: true };

    /// Those that the environment asks for, or all.
    ///
    /// # Errors
    /// [`Error::Argument`] for a word that names none.
    pub(crate) fn from_environment() -> Result<Self> {
        std::env::var(VARIABLE).map_or(Ok(Self::ALL), |words| Self::parse(&words))
    }

    fn parse(words: &str) -> Result<Self> {
        let mut fusions = Self::NONE;
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "all" => fusions = Self::ALL,
                "none" => fusions = Self::NONE,
                "layer_norm" => fusions.layer_norm = true,
                "query_scale" => fusions.query_scale = true,
                "class_row" => fusions.class_row = true,
                _ => {
                    return Err(Error::argument(
                        format!("{VARIABLE} names no fusion `{word}`"),
                        "Give `all`, `none`, or some of `layer_norm`, `query_scale`, `class_row`, with commas",
                    ));
                }
            }
        }
        Ok(fusions)
    }

    /// Those of them that a model's sizes allow.
    pub(crate) fn of(self, config: &ModelConfig) -> Self {
        // Layers that Hopper's kernels do not take run in the portable ones, which fold nothing.
        let folds = config.mlp_width.is_multiple_of(VECTOR) && config.width.is_multiple_of(PART);
        Self { layer_norm: self.layer_norm && folds, ..self }
    }
}

/// Takes norms and scales into uploaded weights, in place, and waits for that; says what was done. Without room for a
/// norm in fp16 (a product of γ and a weight beyond 65504), norms stay what they are.
///
/// # Errors
/// [`Error::Device`] if there is no room or the driver fails.
pub(crate) fn fold(
    stream: &Stream,
    kernel: &Fold,
    weights: &mut DeviceWeights,
    config: &ModelConfig,
    fusions: Fusions,
) -> Result<Fusions> {
    let mut fusions = fusions.of(config);
    if !fusions.layer_norm && !fusions.query_scale {
        return Ok(fusions);
    }
    let numbers =
        weights.layers.iter().map(|layer| layer.qkv.weight.rows + layer.fc1.weight.rows).sum::<usize>();
    let context = stream.context();
    let memory = DeviceMemory::new(context, (2 * numbers + 1) * size_of::<f32>(), "what is left of norms")?;
    // SAFETY: kept beside the weights, which whoever holds them keeps for as long as anything is enqueued.
    let span = unsafe { memory.span() };
    stream.fill(span, 0)?;
    let span: Span<f32> = span.cast()?;
    let beyond = span.slice(2 * numbers..2 * numbers + 1)?.cast::<u32>()?;
    let scaled = if fusions.query_scale { (config.width, 0.125) } else { (0, 1.0) };

    // Twice: first to learn whether fp16 holds the products.
    for dry in [true, false] {
        let mut at = 0;
        for layer in &mut weights.layers {
            let mut one = |linear: &mut Layer, norm: &Norm, scaled: (usize, f32)| {
                let n = linear.weight.rows;
                let folded = FoldedNorm {
                    column_sums: span.slice(at..at + n)?,
                    bias: span.slice(at + n..at + 2 * n)?,
                };
                at += 2 * n;
                let norm = fusions.layer_norm.then_some((norm, folded));
                if norm.is_some() || scaled.0 > 0 {
                    kernel.enqueue(stream, &Folding { layer: linear, norm, scaled, beyond }, dry)?;
                }
                if !dry {
                    linear.norm = norm.map(|(_, folded)| folded);
                }
                Ok::<_, Error>(())
            };
            one(&mut layer.qkv, &layer.norm1, scaled)?;
            one(&mut layer.fc1, &layer.norm2, (0, 1.0))?;
        }
        if dry {
            let mut count = [0];
            stream.download_and_wait(beyond, &mut count)?;
            if count[0] > 0 {
                tracing::info!(
                    elements = count[0],
                    "layer norms stay apart: fp16 does not hold their products"
                );
                fusions.layer_norm = false;
            }
        }
    }
    stream.synchronize()?;
    weights.keep(memory);
    Ok(fusions)
}

#[cfg(test)]
mod tests;
