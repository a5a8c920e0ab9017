//! The CLIP tower and the projector, over a group of images at a time.
//!
//! ```text
//!   patches ──▶ patch embedding ──▶ + positions ──▶ pre-norm ──▶ hidden [B · T, C]
//!                                                                  │
//!   per block:  hidden ─ norm1 ─ qkv ─ attention ─ out ─(+)─▶ hidden ─ norm2 ─ fc1 ─ quick_gelu ─ fc2 ─(+)─▶ hidden
//!                                                                  │  (all blocks; no post-norm)
//!   rows 1.. of each image ─ projector hidden ─ gelu ─ projector out ──▶ the rows that the sequence lends
//! ```
//!
//! Images of a group are rows of the same matrices: linear layers and norms do not see where one ends, and
//! attention looks at one at a time. Nothing an image's rows go through depends on their neighbours.
//!
//! # Numerics
//! Weights and what is stored between the stages are fp16, sums and statistics f32, each stored tensor is
//! rounded once. fp16 overflow of a stored value gives an infinity that the sequence's check reports.
//!
//! # Source
//! `transformers`, CLIPVisionModel with `hidden_act` "quick_gelu"; InternLM-XComposer2's `build_mlp.py`.

use half::f16;

use super::attention::attention;
use super::epilogue::{Activation, AddTo, Embed, Output, Scatter, Store};
use super::layer_norm::{layer_norm, layer_norm_in_place};
use super::linear::{Rows, linear};
use super::simd::Machine;
use crate::backend::Stage;
use crate::checkpoint::weights::VisionWeights;
use crate::config::ModelConfig;
use crate::sequence::RowsMut;

/// Memory for the stages of one group, kept from layer to layer and from group to group.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    hidden: Vec<f16>, // [B · T, C], the residual stream
    mixed: Vec<f16>,  // [B · T, C], after a norm, or after attention
    wide: Vec<f16>,   // [B · T, max(3 · patch², 3C, F, projector width)]
}

impl Workspace {
    /// Makes room for `images`.
    fn fit(&mut self, config: &ModelConfig, images: usize) {
        let rows = images * config.tokens;
        let wide = [config.patch_len(), 3 * config.width, config.mlp_width, config.projector_width];
        let wide = wide.into_iter().max().unwrap_or(0);
        for (buffer, width) in
            [(&mut self.hidden, config.width), (&mut self.mixed, config.width), (&mut self.wide, wide)]
        {
            if buffer.len() < rows * width {
                *buffer = vec![f16::ZERO; rows * width];
            }
        }
    }
}

/// What the tower tells while it runs.
pub(crate) trait Watch {
    /// A stage is done for the group: `values` holds the images one after the other, as many elements each.
    fn stage(&mut self, stage: Stage, values: &[f16]);
    /// One of [`steps`] is done.
    fn step(&mut self);
}

/// Steps that [`encode_group`] reports: each block, and the projector.
pub(crate) fn steps(config: &ModelConfig) -> usize {
    config.layers + 1
}

/// Encodes the images that `cut` writes as patches into all their targets.
///
/// `cut` gets `[B, P, 3 · patch²]` to fill; `targets` has a list of blocks for each of the B images.
pub(crate) fn encode_group(
    machine: Machine,
    config: &ModelConfig,
    weights: &VisionWeights,
    workspace: &mut Workspace,
    cut: impl FnOnce(&mut [f16]),
    targets: Vec<&[RowsMut<'_>]>,
    watch: &mut impl Watch,
) {
    let ModelConfig { tokens, patches, width, heads, mlp_width, projector_width, .. } = *config;
    let images = targets.len();
    let rows = images * tokens;
    workspace.fit(config, images);
    let Workspace { hidden, mixed, wide } = workspace;
    let (hidden, mixed) = (&mut hidden[..rows * width], &mut mixed[..rows * width]);

    let pixels = &mut wide[..images * patches * config.patch_len()]; // [B · P, 3 · patch²]
    cut(pixels);
    watch.stage(Stage::Patches, pixels);
    for hidden in hidden.chunks_exact_mut(tokens * width) {
        let class = weights.class_embedding.iter().zip(&weights.position_embedding);
        for (hidden, (class, position)) in hidden.iter_mut().zip(class) {
            *hidden = f16::from_f32(class.to_f32() + position.to_f32());
        }
    }
    let positions = &weights.position_embedding;
    let embed = Embed { positions, tokens, y: Output::new(hidden, width) };
    linear(machine, Rows::all(pixels, config.patch_len()), &weights.patch_embedding, &embed);
    layer_norm_in_place(machine, &weights.pre_norm, hidden);
    watch.stage(Stage::Embedded, hidden);

    for (i, layer) in weights.layers.iter().enumerate() {
        layer_norm(machine, &layer.norm1, hidden, mixed);
        let qkv = &mut wide[..rows * 3 * width]; // [B · T, 3C]
        let to_qkv =
            Store { bias: &layer.qkv.bias, activation: Activation::None, y: Output::new(qkv, 3 * width) };
        linear(machine, Rows::all(mixed, width), &layer.qkv.weight, &to_qkv);
        attention(machine, qkv, tokens, heads, mixed);
        let residual = AddTo { bias: &layer.out.bias, y: Output::new(hidden, width) };
        linear(machine, Rows::all(mixed, width), &layer.out.weight, &residual);

        layer_norm(machine, &layer.norm2, hidden, mixed);
        let mlp = &mut wide[..rows * mlp_width]; // [B · T, F]
        let to_mlp = Store {
            bias: &layer.fc1.bias,
            activation: Activation::QuickGelu,
            y: Output::new(mlp, mlp_width),
        };
        linear(machine, Rows::all(mixed, width), &layer.fc1.weight, &to_mlp);
        let residual = AddTo { bias: &layer.fc2.bias, y: Output::new(hidden, width) };
        linear(machine, Rows::all(mlp, mlp_width), &layer.fc2.weight, &residual);
        watch.stage(Stage::Layer(i), hidden);
        watch.step();
    }

    let inner = &mut wide[..images * patches * projector_width]; // [B · P, projector width]
    let bias = &weights.projector_hidden.bias;
    let to_inner = Store { bias, activation: Activation::Gelu, y: Output::new(inner, projector_width) };
    let features = Rows::without_class(hidden, width, tokens);
    linear(machine, features, &weights.projector_hidden.weight, &to_inner);
    watch.stage(Stage::ProjectorHidden, inner);
    let scatter = Scatter { bias: &weights.projector_out.bias, patches, targets };
    linear(machine, Rows::all(inner, projector_width), &weights.projector_out.weight, &scatter);
    watch.step();
}

#[cfg(test)]
mod tests;
