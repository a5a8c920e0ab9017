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

use std::borrow::Cow;

use half::f16;

use super::attention::attention;
use super::epilogue::{Activation, AddTo, Embed, Output, Scatter, Store};
use super::layer_norm::{layer_norm, layer_norm_in_place};
use super::linear::linear;
use super::operand::{Operand, Rows, Sink};
use super::packed::{Layer, Weights};
use super::scratch::Scratch;
use super::simd::Machine;
use crate::backend::{Op, Stage};
use crate::config::ModelConfig;
use crate::sequence::RowsMut;

/// Memory for the stages of one group, kept from layer to layer and from group to group.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    hidden: Scratch, // [B · T, C], the residual stream
    mixed: Operand,  // [B · T, C], after a norm, or after attention
    wide: Operand,   // [B · P, 3 · patch²], [B · T, 3C], [B · T, F] or [B · P, projector width]
}

/// What the tower tells while it runs.
pub(crate) trait Watch {
    /// A stage is done for the group: `values` gives the images one after the other, as many elements each.
    fn stage<'v>(&mut self, stage: Stage, values: impl FnOnce() -> Cow<'v, [f16]>);
    /// One of [`steps`] is done.
    fn step(&mut self);
    /// An op is done for the group, the one after the op told before.
    fn op(&mut self, _: Op) {}
    /// Whether nobody wants the result any more.
    fn stopped(&self) -> bool {
        false
    }
}

/// Steps that a [`Tower`] reports: each block, and the projector.
pub(crate) fn steps(config: &ModelConfig) -> usize {
    config.layers + 1
}

/// Tower and projector, packed for `machine`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tower<'a> {
    pub(crate) machine: Machine,
    pub(crate) config: &'a ModelConfig,
    pub(crate) weights: &'a Weights,
}

impl Tower<'_> {
    /// Takes the B images that `cut` writes as patches through all blocks; what they come to stays in `workspace`, for
    /// [`Tower::project`].
    ///
    /// `cut` gets `[B, P, 3 · patch²]` to fill. Leaves early, with nothing of use, where [`Watch::stopped`] says so.
    pub(crate) fn run_blocks(
        self,
        workspace: &mut Workspace,
        images: usize,
        cut: impl FnOnce(&mut [f16]),
        watch: &mut impl Watch,
    ) {
        let Self { machine, config, weights } = self;
        let ModelConfig { tokens, patches, width, heads, mlp_width, .. } = *config;
        let rows = images * tokens;
        let Workspace { hidden, mixed, wide } = workspace;
        let hidden: &mut [f16] = hidden.take(rows * width);

        let pixels = wide.rows_mut(images * patches, config.patch_len()); // [B · P, 3 · patch²]
        cut(pixels);
        watch.op(Op::Patches);
        watch.stage(Stage::Patches, || (&*pixels).into());
        for hidden in hidden.chunks_exact_mut(tokens * width) {
            let class = weights.class_embedding.iter().zip(&weights.position_embedding);
            for (hidden, (class, position)) in hidden.iter_mut().zip(class) {
                *hidden = f16::from_f32(class.to_f32() + position.to_f32());
            }
        }
        let positions = &weights.position_embedding;
        let embed = Embed { positions, tokens, y: Output::new(hidden, width) };
        let pixels = mixed.take_rows(machine, Rows::all(pixels, config.patch_len()));
        linear(machine, pixels, &weights.patch_embedding, &embed);
        watch.op(Op::PatchEmbedding);
        layer_norm_in_place(machine, &weights.pre_norm, hidden);
        watch.op(Op::PreNorm);
        watch.stage(Stage::Embedded, || (&*hidden).into());

        for (i, layer) in weights.layers.iter().enumerate() {
            if watch.stopped() {
                return;
            }
            let Layer { norm1, qkv, out, norm2, fc1, fc2 } = layer;
            layer_norm(machine, norm1, hidden, &mixed.sink(machine, rows, width));
            watch.op(Op::Norm1);
            let mixture = wide.rows_mut(rows, 3 * width); // [B · T, 3C]
            let y = Sink::Rows(Output::new(mixture, 3 * width));
            let to_qkv = Store { bias: &qkv.bias, activation: Activation::None, y };
            linear(machine, mixed.input(machine, rows, width), &qkv.weight, &to_qkv);
            watch.op(Op::Qkv);
            attention(machine, mixture, tokens, heads, &mixed.sink(machine, rows, width));
            watch.op(Op::Attention);
            let residual = AddTo { bias: &out.bias, y: Output::new(hidden, width) };
            linear(machine, mixed.input(machine, rows, width), &out.weight, &residual);
            watch.op(Op::AttentionOut);

            layer_norm(machine, norm2, hidden, &mixed.sink(machine, rows, width));
            watch.op(Op::Norm2);
            let y = wide.sink(machine, rows, mlp_width); // [B · T, F]
            let to_mlp = Store { bias: &fc1.bias, activation: Activation::QuickGelu, y };
            linear(machine, mixed.input(machine, rows, width), &fc1.weight, &to_mlp);
            watch.op(Op::Fc1);
            let residual = AddTo { bias: &fc2.bias, y: Output::new(hidden, width) };
            linear(machine, wide.input(machine, rows, mlp_width), &fc2.weight, &residual);
            watch.op(Op::Fc2);
            watch.stage(Stage::Layer(i), || (&*hidden).into());
            watch.step();
        }
    }

    /// Writes the features of the images that went through [`Tower::run_blocks`] last into all their targets: a list of
    /// blocks for each of them.
    pub(crate) fn project(
        self,
        workspace: &mut Workspace,
        targets: Vec<&[RowsMut<'_>]>,
        watch: &mut impl Watch,
    ) {
        let Self { machine, config, weights } = self;
        let ModelConfig { tokens, patches, width, projector_width, .. } = *config;
        let images = targets.len();
        let Workspace { hidden, mixed, wide } = workspace;
        let hidden: &[f16] = hidden.get(images * tokens * width);

        let y = wide.sink(machine, images * patches, projector_width); // [B · P, projector width]
        let bias = &weights.projector_hidden.bias;
        let to_inner = Store { bias, activation: Activation::Gelu, y };
        let features = mixed.take_rows(machine, Rows::without_class(hidden, width, tokens));
        linear(machine, features, &weights.projector_hidden.weight, &to_inner);
        watch.op(Op::ProjectorHidden);
        watch.stage(Stage::ProjectorHidden, || wide.to_rows(machine, images * patches, projector_width));
        let inner = wide.input(machine, images * patches, projector_width);
        let scatter = Scatter { bias: &weights.projector_out.bias, patches, targets };
        linear(machine, inner, &weights.projector_out.weight, &scatter);
        watch.op(Op::ProjectorOut);
        watch.step();
    }
}

#[cfg(test)]
mod tests;
