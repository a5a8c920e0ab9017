//! What the tests of the CPU's ops share: random numbers, comparisons, every instruction set.

use half::f16;

use super::simd::Machine;
use crate::checkpoint::weights::{LayerWeights, LinearWeights, NormWeights, VisionWeights};
use crate::config::ModelConfig;

/// A small generator: the same numbers on every machine.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform in [0, 1).
    pub(crate) fn uniform(&mut self) -> f64 {
        // xorshift64*, its upper 53 bits
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normal with mean 0 and deviation 1.
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// fp16 of the given mean and deviation.
    pub(crate) fn halves(&mut self, count: usize, mean: f64, deviation: f64) -> Vec<f16> {
        (0..count).map(|_| f16::from_f64(mean + deviation * self.normal())).collect()
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.uniform() * end as f64) as usize
    }
}

/// `count` fp16 that no result may leave in place.
pub(crate) fn poison(count: usize) -> Vec<f16> {
    vec![f16::NAN; count]
}

/// The values in f64.
pub(crate) fn wide(values: &[f16]) -> Vec<f64> {
    values.iter().map(|v| v.to_f64()).collect()
}

/// |a − b| / |b| over all elements.
#[track_caller]
pub(crate) fn relative_l2(a: &[f16], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a.to_f64() - b).powi(2)).sum();
    let norm: f64 = b.iter().map(|b| b * b).sum();
    (difference / norm).sqrt()
}

/// The least cosine of any row.
pub(crate) fn least_cosine(a: &[f16], b: &[f64], width: usize) -> f64 {
    let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
    rows.map(|(a, b)| {
        let dot: f64 = a.iter().zip(b).map(|(a, b)| a.to_f64() * b).sum();
        let aa: f64 = a.iter().map(|a| a.to_f64().powi(2)).sum();
        let bb: f64 = b.iter().map(|b| b * b).sum();
        dot / (aa * bb).sqrt()
    })
    .fold(f64::INFINITY, f64::min)
}

/// How far `a` is from `b`, in units of the last place of fp16 at `b`; infinite for what is not finite.
pub(crate) fn ulps(a: f16, b: f64) -> f64 {
    let exponent = if b == 0.0 { -14 } else { (b.abs().log2().floor() as i32).max(-14) };
    let error = (a.to_f64() - b).abs() / 2f64.powi(exponent - 10);
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Bits, for comparisons that NaN and −0 do not blur.
pub(crate) fn bits(values: &[f16]) -> Vec<u16> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Runs `test` on every instruction set of this machine.
pub(crate) fn on_every_machine(test: impl Fn(Machine)) {
    let machines = Machine::all();
    assert!(!machines.is_empty());
    machines.into_iter().for_each(test);
}

/// Runs `work` on a pool of `threads`.
pub(crate) fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// A small model with random weights.
pub(crate) struct Model {
    pub(crate) config: ModelConfig,
    pub(crate) weights: VisionWeights,
}

impl Model {
    /// `size`: grid, patch, width, layers, MLP width, projector width, H.
    pub(crate) fn random(size: (usize, usize, usize, usize, usize, usize, usize), seed: u64) -> Self {
        let (grid, patch_size, width, layers, mlp_width, projector_width, hidden_size) = size;
        let config = ModelConfig {
            image_size: grid * patch_size,
            patch_size,
            grid,
            patches: grid * grid,
            tokens: grid * grid + 1,
            width,
            heads: width / 64,
            layers,
            mlp_width,
            projector_width,
            hidden_size,
            vocab_size: 300,
            max_length: None,
            max_position_embeddings: None,
            profile: &crate::config::XCOMPOSER2,
        };
        let mut random = Random::new(1000 + seed);
        let mut linear = |n: usize, k: usize, gain: f64| LinearWeights {
            weight: random.halves(n * k, 0.0, gain / (k as f64).sqrt()),
            bias: random.halves(n, 0.0, 0.1),
        };
        let patch_embedding = linear(width, config.patch_len(), 1.0).weight;
        let projector_hidden = linear(projector_width, width, 1.5);
        let projector_out = linear(hidden_size, projector_width, 1.0);
        let blocks: Vec<_> = (0..layers)
            .map(|_| {
                let (qkv, out) = (linear(3 * width, width, 1.5), linear(width, width, 0.7));
                (qkv, out, linear(mlp_width, width, 1.5), linear(width, mlp_width, 0.7))
            })
            .collect();
        let mut norm =
            || NormWeights { weight: random.halves(width, 1.0, 0.2), bias: random.halves(width, 0.0, 0.1) };
        let pre_norm = norm();
        let layers = blocks
            .into_iter()
            .map(|(qkv, out, fc1, fc2)| LayerWeights { norm1: norm(), qkv, out, norm2: norm(), fc1, fc2 })
            .collect();
        let weights = VisionWeights {
            class_embedding: random.halves(width, 0.0, 0.5),
            patch_embedding,
            position_embedding: random.halves(config.tokens * width, 0.0, 0.3),
            pre_norm,
            layers,
            projector_hidden,
            projector_out,
        };
        Self { config, weights }
    }
}

/// erfc in f64, relative error under 1e-13: the series of erf near 0, a continued fraction beyond.
pub(crate) fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.0 {
        // erf x = 2/√π · e^(−x²) · Σ 2ⁿ x^(2n+1) / (1·3·…·(2n+1)): no cancellation
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= 2.0 * x * x / (2.0 * n as f64 + 1.0);
            sum += term;
        }
        return 1.0 - std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum;
    }
    // erfc x = e^(−x²)/√π · 1/(x + ½/(x + 1/(x + 3⁄2/(x + 2/(x + …)))))
    let mut tail = x;
    for n in (1..400).rev() {
        tail = x + 0.5 * n as f64 / tail;
    }
    (-x * x).exp() / (tail * std::f64::consts::PI.sqrt())
}

#[test]
fn erfc_is_right() {
    // Abramowitz and Stegun, table 7.1; erfc(4) and erfc(0.5) to 16 digits.
    for (x, value) in [
        (0.5, 0.479_500_122_186_953_5),
        (1.0, 0.157_299_207_050_285_13),
        (4.0, 1.541_725_790_028_002e-8),
        (-1.0, 1.842_700_792_949_715),
    ] {
        assert!((erfc(x) / value - 1.0).abs() < 1e-13, "erfc({x}) = {}", erfc(x));
    }
    assert!((erfc(1.999_999_999_9) / erfc(2.000_000_000_1) - 1.0).abs() < 2e-9);
}
