//! Weights in the order in which products read them: packed once, kept as fp16.
//!
//! ```text
//!   W [N, K] row-major                    vectors:  [⌈N / NR⌉ panels][K][NR]
//!                                         tiles:    [⌈N / 32⌉ panels][⌈K / 32⌉][2 halves][16 pairs of k][16][2]
//! ```
//!
//! A task reads its panels front to back and makes f32 of them, or pairs of bf16, in its own L2 cache. They are not kept
//! that way: twice the bytes from memory cost more than the conversion, which is 1/M of the products.
//!
//! Columns beyond N, and steps of k beyond K where they come in blocks, are zeros.

use half::f16;
use rayon::prelude::*;

use super::scratch::Scratch;
use super::simd::{Kernel, Machine, Simd, tiles};
use crate::checkpoint::weights::{LayerWeights, LinearWeights, NormWeights, VisionWeights};
use crate::error::{Error, Result};

/// A weight `[N, K]`, packed.
#[derive(Debug)]
pub(crate) struct Packed {
    data: Scratch,
    len: usize,
    n: usize,
    k: usize,
}

impl Packed {
    /// Packs `weight`, `[N, K]`.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no memory for it.
    pub(crate) fn new(machine: Machine, weight: &[f16], k: usize) -> Result<Self> {
        machine.dispatch(Pack { weight, k })
    }

    /// N.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// K.
    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// Elements of one panel.
    #[inline(always)]
    pub(crate) fn panel_len<S: Simd>(k: usize) -> usize {
        match S::TILES {
            true => k.div_ceil(tiles::PANEL) * tiles::BLOCK,
            false => k * S::NR,
        }
    }

    /// All panels, from the first on.
    #[inline(always)]
    pub(crate) fn panels<S: Simd>(&self) -> impl Iterator<Item = &[f16]> {
        self.data.get(self.len).chunks_exact(Self::panel_len::<S>(self.k))
    }
}

/// Columns of a panel.
pub(crate) const fn panel_width<S: Simd>() -> usize {
    if S::TILES { tiles::PANEL } else { S::NR }
}

struct Pack<'a> {
    weight: &'a [f16], // [N, K]
    k: usize,
}

impl Kernel for Pack<'_> {
    type Output = Result<Packed>;

    fn run<S: Simd>(self, _: S) -> Result<Packed> {
        let Self { weight, k } = self;
        assert!(weight.len().is_multiple_of(k), "a weight of whole rows");
        let n = weight.len() / k;
        let width = panel_width::<S>();
        let panel_len = Packed::panel_len::<S>(k);
        let len = n.div_ceil(width) * panel_len;
        let mut data = Scratch::zeroed::<f16>(len).ok_or_else(|| Error::Device {
            device: "cpu".into(),
            problem: format!("there is not enough memory to pack a weight of [{n}, {k}] in fp16"),
            remedy: "Use a machine with more memory, or end other programs".into(),
        })?;
        let panels = data.take::<f16>(len).par_chunks_exact_mut(panel_len);
        panels.zip(weight.par_chunks(width * k)).for_each(|(panel, rows)| match S::TILES {
            true => pack_blocks(rows, k, panel),
            false => pack_columns::<S>(rows, k, panel),
        });
        Ok(Packed { data, len, n, k })
    }
}

/// Steps of k packed at a time: a few cache lines of every row.
const STEPS: usize = 64;

/// Packs rows of W, `[≤ NR, K]`, as `[K][NR]`.
fn pack_columns<S: Simd>(rows: &[f16], k: usize, panel: &mut [f16]) {
    for from in (0..k).step_by(STEPS) {
        let steps = from..k.min(from + STEPS);
        let panel = &mut panel[from * S::NR..steps.end * S::NR];
        for (column, row) in rows.chunks_exact(k).enumerate() {
            for (w, to) in row[steps.clone()].iter().zip(panel.chunks_exact_mut(S::NR)) {
                to[column] = *w;
            }
        }
    }
}

/// Packs rows of W, `[≤ 32, K]`, as blocks.
fn pack_blocks(rows: &[f16], k: usize, panel: &mut [f16]) {
    for (block, to) in panel.chunks_exact_mut(tiles::BLOCK).enumerate() {
        let steps = block * tiles::PANEL..k.min((block + 1) * tiles::PANEL);
        for (column, row) in rows.chunks_exact(k).enumerate() {
            let (pairs, last) = row[steps.clone()].as_chunks::<2>();
            for (i, pair) in pairs.iter().enumerate() {
                let at = tiles::element_of_b(2 * i, column);
                to[at..at + 2].copy_from_slice(pair);
            }
            if let [last] = last {
                to[tiles::element_of_b(2 * pairs.len(), column)] = *last;
            }
        }
    }
}

/// A linear layer.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Packed,
    pub(crate) bias: Vec<f16>, // [N]
}

/// One transformer block of the tower.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) norm1: NormWeights,
    pub(crate) qkv: Linear,
    pub(crate) out: Linear,
    pub(crate) norm2: NormWeights,
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
}

/// [`VisionWeights`], packed.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) class_embedding: Vec<f16>,    // [C]
    pub(crate) patch_embedding: Packed,      // [C, 3 · patch²]
    pub(crate) position_embedding: Vec<f16>, // [T, C]
    pub(crate) pre_norm: NormWeights,
    pub(crate) layers: Vec<Layer>,
    pub(crate) projector_hidden: Linear,
    pub(crate) projector_out: Linear,
}

impl Weights {
    /// Packs all weights, one after the other: each is freed when its packed form is there.
    ///
    /// # Errors
    /// As [`Packed::new`].
    pub(crate) fn new(machine: Machine, weights: VisionWeights) -> Result<Self> {
        let linear = |layer: LinearWeights| {
            let k = layer.weight.len() / layer.bias.len();
            Ok::<_, Error>(Linear { weight: Packed::new(machine, &layer.weight, k)?, bias: layer.bias })
        };
        let pack = |layer: LayerWeights| {
            Ok(Layer {
                norm1: layer.norm1,
                qkv: linear(layer.qkv)?,
                out: linear(layer.out)?,
                norm2: layer.norm2,
                fc1: linear(layer.fc1)?,
                fc2: linear(layer.fc2)?,
            })
        };
        let patch_len = weights.patch_embedding.len() / weights.class_embedding.len();
        Ok(Self {
            class_embedding: weights.class_embedding,
            patch_embedding: Packed::new(machine, &weights.patch_embedding, patch_len)?,
            position_embedding: weights.position_embedding,
            pre_norm: weights.pre_norm,
            layers: weights.layers.into_iter().map(pack).collect::<Result<_>>()?,
            projector_hidden: linear(weights.projector_hidden)?,
            projector_out: linear(weights.projector_out)?,
        })
    }
}
