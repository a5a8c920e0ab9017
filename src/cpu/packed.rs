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
//! Weights that were bf16 before they became fp16, as those of most checkpoints, are bf16 still: where tiles multiply, a panel
//! of them is kept as bf16, read in place, and takes two products where others take three, for the same bits.
//!
//! Columns beyond N, and steps of k beyond K where they come in blocks, are zeros.

use half::{bf16, f16};
use rayon::prelude::*;

use super::scratch::Scratch;
use super::simd::{Kernel, MAX_LANES, Machine, Simd, tiles};
use crate::checkpoint::weights::{LayerWeights, LinearWeights, NormWeights, VisionWeights};
use crate::error::{Error, Result};

/// A weight `[N, K]`, packed.
#[derive(Debug)]
pub(crate) struct Packed {
    data: Scratch,
    len: usize,
    n: usize,
    k: usize,
    is_bf16: Vec<bool>, // of each panel
}

/// The columns of W that tasks read together.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Panel<'a> {
    /// Of any fp16.
    F16(&'a [f16]),
    /// Of fp16 that are bf16 as well, on machines with tiles.
    Bf16(&'a [bf16]),
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
    pub(crate) fn panels<S: Simd>(&self) -> impl Iterator<Item = Panel<'_>> {
        let panels = self.data.get::<u16>(self.len).chunks_exact(Self::panel_len::<S>(self.k));
        panels.zip(&self.is_bf16).map(|(panel, is_bf16)| match is_bf16 {
            true => Panel::Bf16(bytemuck::cast_slice(panel)),
            false => Panel::F16(bytemuck::cast_slice(panel)),
        })
    }
}

impl Panel<'_> {
    /// Where element `i` is, for prefetching: it need not be one.
    #[inline(always)]
    pub(crate) fn address(self, i: usize) -> *const u8 {
        match self {
            Panel::F16(w) => w.as_ptr().wrapping_add(i).cast(),
            Panel::Bf16(w) => w.as_ptr().wrapping_add(i).cast(),
        }
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

    fn run<S: Simd>(self, s: S) -> Result<Packed> {
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
        let pack = |(panel, rows): (&mut [f16], &[f16])| {
            if !S::TILES {
                pack_columns::<S>(rows, k, panel);
                return false;
            }
            pack_blocks(rows, k, panel);
            let is_bf16 = panel.iter().fold(0, |any, &x| any | beyond_bf16(x)) == 0;
            if is_bf16 {
                s.vectorize(ToBf16(panel));
            }
            is_bf16
        };
        let is_bf16 = panels.zip(weight.par_chunks(width * k)).map(pack).collect();
        Ok(Packed { data, len, n, k, is_bf16 })
    }
}

/// What a bf16, with 8 bits of significand, cannot have of `x`: nothing, if `x` is one.
fn beyond_bf16(x: f16) -> u16 {
    let bits = x.to_bits() & 0x7fff;
    // A normal number has 11 bits, a subnormal one those that it has.
    bits & match bits {
        0x400.. => 7,
        0x200.. => 3,
        0x100.. => 1,
        _ => 0,
    }
}

/// Makes bf16 of fp16 that are, in place.
struct ToBf16<'a>(&'a mut [f16]);

impl Kernel for ToBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut rest = [0; MAX_LANES];
        for x in self.0.chunks_exact_mut(S::LANES) {
            // SAFETY: LANES elements, read and then written; and as many of `rest`.
            unsafe {
                let v = s.load_f16(x.as_ptr());
                s.store_split(x.as_mut_ptr().cast(), rest.as_mut_ptr(), v);
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_every_bf16_among_fp16() {
        for x in (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()) {
            let is_bf16 = bf16::from_f32(x.to_f32()).to_f32() == x.to_f32();
            assert_eq!(beyond_bf16(x) == 0, is_bf16, "{x:e}");
        }
    }
}
