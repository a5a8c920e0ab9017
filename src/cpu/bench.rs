//! What `benches/tower.rs` measures: single stages, and the machine's own limit. Not part of the API.

use half::f16;

use super::attention;
use super::epilogue::{Activation, Output, Store};
use super::layer_norm;
use super::linear;
use super::operand::{self, Operand, Rows, Sink};
use super::packed::Packed;
use super::scratch::with_scratch;
use super::simd::{Kernel, Machine, Simd, tiles};
use crate::checkpoint::weights::NormWeights;
use crate::config::{HEAD_SIZE, ModelConfig};
use crate::error::Result;

/// The sizes of InternLM-XComposer2-VL-7B: 490 pixels, P = 1225, C = 1024, 24 layers.
pub fn full() -> ModelConfig {
    ModelConfig {
        image_size: 490,
        patch_size: 14,
        grid: 35,
        patches: 1225,
        tokens: 1226,
        width: 1024,
        heads: 16,
        layers: 24,
        mlp_width: 4096,
        projector_width: 4096,
        hidden_size: 4096,
        vocab_size: 92544,
        max_length: Some(4096),
        max_position_embeddings: Some(32768),
        profile: &crate::config::XCOMPOSER2,
    }
}

/// The stages on one instruction set, on the current rayon pool.
#[derive(Debug)]
pub struct Stages {
    machine: Machine,
}

impl Stages {
    /// Chooses the instruction set as the backend does.
    ///
    /// # Errors
    /// As [`super::CpuBackend::new`].
    pub fn new() -> Result<Self> {
        Ok(Self { machine: Machine::choose()? })
    }

    /// Returns the instruction set's name.
    pub fn isa(&self) -> &'static str {
        self.machine.isa().name()
    }

    /// Packs `weight`, `[N, K]`, for a layer.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is no memory for it.
    pub fn layer(&self, weight: &[f16], bias: &[f16], quick_gelu: bool) -> Result<Layer> {
        let activation = if quick_gelu { Activation::QuickGelu } else { Activation::None };
        let weight = Packed::new(self.machine, weight, weight.len() / bias.len())?;
        Ok(Layer { weight, bias: bias.to_vec(), activation })
    }

    /// Stores `x`, `[M, K]`, as the stage before a layer would have.
    pub fn input(&self, x: &[f16], width: usize) -> Stored {
        let mut stored = Stored { operand: Operand::default(), rows: x.len() / width, width };
        let sink = stored.operand.sink(self.machine, stored.rows, width);
        operand::store_rows(self.machine, Rows::all(x, width), &sink);
        stored
    }

    /// `y = quick_gelu(x Wᵀ + b)` or without the activation; `x` `[M, K]`, `y` `[M, N]`.
    pub fn linear(&self, x: &Stored, layer: &Layer, y: &mut [f16]) {
        let y = Sink::Rows(Output::new(y, layer.bias.len()));
        let store = Store { bias: &layer.bias, activation: layer.activation, y };
        linear::linear(self.machine, x.operand.input(self.machine, x.rows, x.width), &layer.weight, &store);
    }

    /// `qkv` `[B · T, 3C]` to `out` `[B · T, C]`.
    pub fn attention(&self, qkv: &[f16], tokens: usize, heads: usize, out: &mut [f16]) {
        let out = Sink::Rows(Output::new(out, heads * HEAD_SIZE));
        attention::attention(self.machine, qkv, tokens, heads, &out);
    }

    /// `x` to `y`, both `[rows, C]`.
    pub fn layer_norm(&self, norm: &NormWeights, x: &[f16], y: &mut [f16]) {
        layer_norm::layer_norm(self.machine, norm, x, &Sink::Rows(Output::new(y, norm.weight.len())));
    }

    /// Runs `steps` multiply-adds on each of 24 vectors on every thread, as fast as they go.
    ///
    /// Returns the floating point operations done: over the time taken, what the FMA units can do.
    pub fn multiply_adds(&self, steps: usize) -> f64 {
        let machine = self.machine;
        let lanes: Vec<usize> = rayon::broadcast(|_| machine.vectorize(MultiplyAdds { steps }));
        lanes.iter().map(|&lanes| 2.0 * lanes as f64 * 24.0 * steps as f64).sum()
    }

    /// Runs `steps` products of 32 × 32 by 32 × 32 numbers in tile registers on every thread, as fast as they go; each is
    /// three of the hardware's.
    ///
    /// Returns the floating point operations done, 0 where there are no tiles.
    pub fn tile_products(&self, steps: usize) -> f64 {
        let machine = self.machine;
        rayon::broadcast(|_| machine.vectorize(Products { steps })).into_iter().sum()
    }
}

/// Products of tiles, their operands in the L1 cache. Not zeros: those take less power, and so go a fifth faster.
struct Products {
    steps: usize,
}

impl Kernel for Products {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f64 {
        if !S::TILES {
            return 0.0;
        }
        // Eight blocks, which are both operands: 32 KiB.
        const BLOCKS: usize = 8;
        const OPERAND: usize = BLOCKS * tiles::SPLIT / 2; // in f32
        let calls = self.steps.div_ceil(BLOCKS);
        with_scratch(OPERAND + tiles::ACC, |scratch| {
            let (operand, acc) = scratch.split_at_mut(OPERAND);
            acc.fill(0.0);
            let operand: &mut [u16] = bytemuck::cast_slice_mut(operand);
            for (i, x) in operand.iter_mut().enumerate() {
                // Any sign and significand, of 1 to 2.
                *x = 0x3f80 | (((i * 40503) >> 4) & 0x807f) as u16;
            }
            let operand = operand.as_ptr();
            s.with_tiles(
                #[inline(always)]
                || {
                    for _ in 0..calls {
                        // SAFETY: BLOCKS blocks, and the accumulators of one tile.
                        unsafe {
                            s.add_products::<3>(
                                BLOCKS,
                                (operand, operand),
                                acc.as_mut_ptr(),
                                false,
                                |_, _| {},
                            )
                        };
                    }
                },
            );
        });
        (calls * BLOCKS * 2 * tiles::PANEL.pow(3)) as f64
    }
}

/// A linear layer, packed.
#[derive(Debug)]
pub struct Layer {
    weight: Packed,
    bias: Vec<f16>,
    activation: Activation,
}

/// The input of a linear layer, as the layer reads it.
#[derive(Debug)]
pub struct Stored {
    operand: Operand,
    rows: usize,
    width: usize,
}

/// Independent chains of multiply-adds, in registers.
struct MultiplyAdds {
    steps: usize,
}

impl Kernel for MultiplyAdds {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        // As many chains as the tile has.
        let chains = S::MR * 2;
        let mut sums = [s.splat(0.0); 24];
        let (x, y) = (s.splat(std::hint::black_box(0.999_999)), s.splat(std::hint::black_box(0.5)));
        for _ in 0..self.steps * 24 / chains {
            for sum in &mut sums[..chains] {
                *sum = s.mul_add(*sum, x, y);
            }
        }
        let mut total = s.splat(0.0);
        for sum in sums {
            total = s.add(total, sum);
        }
        std::hint::black_box(s.reduce_add(total));
        S::LANES
    }
}
