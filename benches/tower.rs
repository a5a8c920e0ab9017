//! The stages of the CPU tower at the real model's sizes, one image, and a whole encode.
//!
//! Throughput counts floating point operations (an "element" is one), so that `Gelem/s` reads as GFLOP/s; `fma_peak`
//! is what the machine's multiply-add units reach with nothing to load, the roof of the others; `tile_peak`, on CPUs with
//! AMX, what its tiles reach with operands in L1. Results are checked against f64 before anything is timed.
//!
//! `encode/tiny` makes its own checkpoint. `encode/model` runs on the directory that `IMAGEHERE_BENCH_MODEL` names,
//! such as one from `imagehere synth vl-7b-vision`.

use std::env;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use imagehere::Encoder;
use imagehere::checkpoint::weights::NormWeights;
use imagehere::cpu::bench::{Stages, full};
use imagehere::image::RgbView;
use imagehere::prompt::Request;
use imagehere::sequence::SequenceBuffer;
use imagehere::synth::{self, Preset, SynthOptions};

/// Noise of about the given size, the same at every run.
fn noise(len: usize, size: f32, seed: u32) -> Vec<f16> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).map(|_| f16::from_f32(next() * size)).collect()
}

/// Checks one element in every few hundred against f64.
fn check(name: &str, got: &[f16], expected: impl Fn(usize) -> f64) {
    for i in (0..got.len()).step_by(997) {
        let (got, expected) = (got[i].to_f64(), expected(i));
        assert!(
            (got - expected).abs() <= 2e-3 * expected.abs().max(1.0),
            "{name}[{i}]: {got}, not {expected}"
        );
    }
}

fn dot(a: &[f16], b: &[f16]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
}

fn stages(c: &mut Criterion) {
    let config = full();
    let stages = Stages::new().expect("this machine runs one");
    println!("instruction set: {}", stages.isa());
    let (t, width) = (config.tokens, config.width);

    let mut group = c.benchmark_group("machine");
    const STEPS: usize = 1 << 20;
    group.throughput(Throughput::Elements(stages.multiply_adds(STEPS) as u64));
    group.sample_size(20);
    group.bench_function("fma_peak", |b| b.iter(|| stages.multiply_adds(STEPS)));
    let flop = stages.tile_products(STEPS >> 6);
    if flop > 0.0 {
        group.throughput(Throughput::Elements(flop as u64));
        group.bench_function("tile_peak", |b| b.iter(|| stages.tile_products(STEPS >> 6)));
    }
    group.finish();

    let mut group = c.benchmark_group("linear");
    group.sample_size(10);
    let layers = [
        ("qkv", width, 3 * width, false),
        ("out", width, width, false),
        ("fc1_quick_gelu", width, config.mlp_width, true),
        ("fc2", config.mlp_width, width, false),
    ];
    for (name, k, n, quick_gelu) in layers {
        let (x, weight) = (noise(t * k, 1.0, 1), noise(n * k, 0.05, 2)); // [T, K], [N, K]
        let (bias, mut y) = (noise(n, 0.1, 3), vec![f16::NAN; t * n]); // [N], [T, N]
        let layer = stages.layer(&weight, &bias, quick_gelu).expect("room for a layer");
        let stored = stages.input(&x, k);
        stages.linear(&stored, &layer, &mut y);
        check(name, &y, |i| {
            let sum = dot(&x[i / n * k..][..k], &weight[i % n * k..][..k]) + bias[i % n].to_f64();
            if quick_gelu { sum / (1.0 + (-1.702 * sum).exp()) } else { sum }
        });
        group.throughput(Throughput::Elements(2 * (t * n * k) as u64));
        group.bench_function(name, |b| b.iter(|| stages.linear(black_box(&stored), &layer, &mut y)));
    }
    group.finish();

    let qkv = noise(t * 3 * width, 1.0, 4); // [T, 3C]
    let mut out = vec![f16::NAN; t * width]; // [T, C]
    stages.attention(&qkv, t, config.heads, &mut out);
    check("attention", &out, |i| {
        let (row, head, channel) = (i / width, i % width / 64, i % 64);
        let part = |token: usize, which: usize| &qkv[(token * 3 + which) * width + head * 64..][..64];
        let scores: Vec<f64> =
            (0..t).map(|key| dot(part(row, 0), part(key, 1)) / 8.0).map(f64::exp).collect();
        let sum: f64 = scores.iter().sum();
        scores.iter().enumerate().map(|(key, p)| p / sum * part(key, 2)[channel].to_f64()).sum()
    });
    let mut group = c.benchmark_group("attention");
    group.sample_size(10);
    group.throughput(Throughput::Elements(4 * (t * t * width) as u64));
    group
        .bench_function("490px", |b| b.iter(|| stages.attention(black_box(&qkv), t, config.heads, &mut out)));
    group.finish();

    let norm = NormWeights { weight: noise(width, 1.0, 5), bias: noise(width, 0.1, 6) };
    let x = noise(t * width, 3.0, 7); // [T, C]
    stages.layer_norm(&norm, &x, &mut out);
    check("layer_norm", &out, |i| {
        let row: Vec<f64> = x[i / width * width..][..width].iter().map(|x| x.to_f64()).collect();
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let scale = norm.weight[i % width].to_f64() / (variance + 1e-5).sqrt();
        (row[i % width] - mean) * scale + norm.bias[i % width].to_f64()
    });
    let mut group = c.benchmark_group("layer_norm");
    group.throughput(Throughput::Bytes(4 * (t * width) as u64));
    group.bench_function("490px", |b| b.iter(|| stages.layer_norm(&norm, black_box(&x), &mut out)));
    group.finish();
}

fn encodes(c: &mut Criterion) {
    let place = tempfile::tempdir().expect("room for a small checkpoint");
    let tiny = place.path().join("tiny");
    synth::write(Preset::Tiny, &SynthOptions::default(), &tiny).expect("room for a small checkpoint");
    let mut models = vec![("tiny", tiny)];
    models.extend(env::var_os("IMAGEHERE_BENCH_MODEL").map(|dir| ("model", dir.into())));

    let mut group = c.benchmark_group("encode");
    group.sample_size(10);
    for (name, dir) in models {
        group.bench_function(format!("{name}/open"), |b| b.iter(|| Encoder::open(&dir)));
        let encoder = Encoder::open(dir).expect("a checkpoint");
        let side = encoder.config().image_size;
        for count in [1, 2, 4, 8] {
            let pixels: Vec<Vec<u8>> = (0..count)
                .map(|i| (0..3 * side * side).map(|p| (p * (7 + i) % 251) as u8).collect())
                .collect();
            let images: Vec<_> = pixels
                .iter()
                .map(|pixels| {
                    RgbView::new(pixels, side as u32, side as u32, 3 * side).expect("a square").into()
                })
                .collect();
            let request = Request::new("<ImageHere>".repeat(count)).image_count(count);
            let plan = encoder.plan(&request).expect("a marker per image");
            let mut sequence = SequenceBuffer::new();
            encoder.encode_into(&plan, &images, &mut sequence).expect("a good encode");
            sequence.verify().expect("a complete sequence");
            group.throughput(Throughput::Elements(count as u64)); // images
            group.bench_function(format!("{name}/{count}"), |b| {
                b.iter(|| encoder.encode_into(&plan, &images, &mut sequence));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, stages, encodes);
criterion_main!(benches);
