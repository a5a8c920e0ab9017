//! The whole tower against one written as plainly as the formulas, in f64.

use super::*;
use crate::checkpoint::weights::{LinearWeights, NormWeights, VisionWeights};
use crate::cpu::testkit::{Model, Random, erfc, least_cosine, on_every_machine, poison, relative_l2, wide};

/// What a number goes through before it is stored.
type Rounding = fn(f64) -> f64;

/// Not at all: the exact result.
fn exactly(x: f64) -> f64 {
    x
}

/// As a run in which every operator reads and writes fp16.
fn to_half(x: f64) -> f64 {
    f16::from_f64(x).to_f64()
}

/// `[rows, N]` from `[rows, K]`.
fn linear(x: &[f64], layer: &LinearWeights, store: Rounding) -> Vec<f64> {
    let (weight, bias) = (wide(&layer.weight), wide(&layer.bias));
    let k = weight.len() / bias.len();
    let row = |x: &[f64]| {
        let dots = weight.chunks_exact(k).zip(&bias);
        let dot = |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        dots.map(|(w, b)| store(dot(w) + b)).collect::<Vec<f64>>()
    };
    x.chunks_exact(k).flat_map(row).collect()
}

fn norm(x: &[f64], norm: &NormWeights, store: Rounding) -> Vec<f64> {
    let (weight, bias) = (wide(&norm.weight), wide(&norm.bias));
    let count = weight.len() as f64;
    let mut out = Vec::new();
    for row in x.chunks_exact(weight.len()) {
        let mean = row.iter().sum::<f64>() / count;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count;
        let scale = 1.0 / (variance + 1e-5).sqrt();
        out.extend(row.iter().zip(&weight).zip(&bias).map(|((x, w), b)| store((x - mean) * scale * w + b)));
    }
    out
}

fn attend(qkv: &[f64], tokens: usize, heads: usize, store: Rounding) -> Vec<f64> {
    let width = heads * 64;
    let part =
        |token: usize, which: usize, head: usize| &qkv[(token * 3 + which) * width + head * 64..][..64];
    let mut out = vec![0.0; tokens * width];
    for head in 0..heads {
        for query in 0..tokens {
            // The reference scales the query, which for 64^-½ is exact.
            let score = |key: usize| {
                let pairs = part(query, 0, head).iter().zip(part(key, 1, head));
                store(pairs.map(|(q, k)| q / 8.0 * k).sum::<f64>())
            };
            let scores: Vec<f64> = (0..tokens).map(score).collect();
            let greatest = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - greatest).exp()).sum();
            let row = &mut out[query * width + head * 64..][..64];
            for (key, s) in scores.iter().enumerate() {
                let p = store((s - greatest).exp() / total);
                row.iter_mut().zip(part(key, 2, head)).for_each(|(o, v)| *o += p * v);
            }
            row.iter_mut().for_each(|o| *o = store(*o));
        }
    }
    out
}

fn sum(a: &[f64], b: &[f64], store: Rounding) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| store(a + b)).collect()
}

/// The stages of one image, in the order in which they are shown, and the features last.
fn reference(model: &Model, patches: &[f16], store: Rounding) -> Vec<(Stage, Vec<f64>)> {
    let (config, weights) = (&model.config, &model.weights);
    let mut stages = vec![(Stage::Patches, wide(patches))];
    let no_bias = vec![f16::ZERO; config.width];
    let embedding = LinearWeights { weight: weights.patch_embedding.clone(), bias: no_bias };
    let mut hidden = wide(&weights.class_embedding);
    hidden.extend(linear(&wide(patches), &embedding, store));
    let hidden = sum(&hidden, &wide(&weights.position_embedding), store);
    let mut hidden = norm(&hidden, &weights.pre_norm, store);
    stages.push((Stage::Embedded, hidden.clone()));
    for (i, layer) in weights.layers.iter().enumerate() {
        let qkv = linear(&norm(&hidden, &layer.norm1, store), &layer.qkv, store);
        let mixed = attend(&qkv, config.tokens, config.heads, store);
        hidden = sum(&hidden, &linear(&mixed, &layer.out, store), store);
        let inner = linear(&norm(&hidden, &layer.norm2, store), &layer.fc1, store);
        let inner: Vec<f64> = inner.iter().map(|x| store(x / (1.0 + (-1.702 * x).exp()))).collect();
        hidden = sum(&hidden, &linear(&inner, &layer.fc2, store), store);
        stages.push((Stage::Layer(i), hidden.clone()));
    }
    let inner = linear(&hidden[config.width..], &weights.projector_hidden, store);
    let gelu = |x: &f64| store(0.5 * x * erfc(-x * std::f64::consts::FRAC_1_SQRT_2));
    let inner: Vec<f64> = inner.iter().map(gelu).collect();
    stages.push((Stage::ProjectorHidden, inner.clone()));
    stages.push((FEATURES, linear(&inner, &weights.projector_out, store)));
    stages
}

/// Stands for the features in the list of stages.
const FEATURES: Stage = Stage::Layer(usize::MAX);

/// Collects what the tower shows.
#[derive(Default)]
struct Seen {
    stages: Vec<(Stage, Vec<f16>)>,
    steps: usize,
}

impl Watch for Seen {
    fn stage<'v>(&mut self, stage: Stage, values: impl FnOnce() -> Cow<'v, [f16]>) {
        self.stages.push((stage, values().to_vec()));
    }

    fn step(&mut self) {
        self.steps += 1;
    }
}

/// Runs the tower on one image and returns its stages, the features last.
fn run(machine: Machine, model: &Model, workspace: &mut Workspace, pixels: &[f16]) -> Seen {
    let config = &model.config;
    let mut features = poison(config.patches * config.hidden_size);
    let block = [RowsMut::new(&mut features, config.hidden_size, config.hidden_size)];
    let mut seen = Seen::default();
    let cut = |patches: &mut [f16]| patches.copy_from_slice(pixels);
    let weights = Weights::new(machine, model.weights.clone()).unwrap();
    let tower = Tower { machine, config, weights: &weights };
    tower.run_blocks(workspace, 1, cut, &mut seen);
    tower.project(workspace, vec![&block], &mut seen);
    assert_eq!(seen.steps, steps(config));
    seen.stages.push((FEATURES, features));
    seen
}

#[test]
fn every_stage_is_near_the_exact_tower() {
    // Grid, patch, width, layers, MLP, projector, H: T = 5, 17, 26, 50; nothing a multiple of a tile.
    let sizes = [
        (2, 14, 64, 2, 256, 192, 160),
        (4, 7, 128, 3, 200, 100, 66),
        (5, 14, 192, 2, 520, 130, 34),
        (7, 4, 64, 24, 256, 64, 128),
    ];
    for (seed, size) in sizes.into_iter().enumerate() {
        let model = Model::random(size, seed as u64);
        let config = &model.config;
        let pixels = Random::new(90 + seed as u64).halves(config.patches * config.patch_len(), 0.0, 1.0);
        let exact = reference(&model, &pixels, exactly);
        let plain = reference(&model, &pixels, to_half);
        on_every_machine(|machine| {
            let seen = run(machine, &model, &mut Workspace::default(), &pixels);
            assert_eq!(seen.stages.len(), exact.len());
            for ((seen, exact), plain) in seen.stages.iter().zip(&exact).zip(&plain) {
                assert_eq!(seen.0, exact.0);
                let stage = seen.0;
                let width = exact.1.len() / (seen.1.len() / width_of(config, stage));
                let error = relative_l2(&seen.1, &exact.1);
                let cosine = least_cosine(&seen.1, &exact.1, width);
                let plain: Vec<f16> = plain.1.iter().map(|x| f16::from_f64(*x)).collect();
                let plain = relative_l2(&plain, &exact.1);

                assert!(
                    error <= 2e-3 && cosine >= 0.9999,
                    "{machine:?} {size:?} {stage:?}: {error:e}, {cosine}"
                );
                // Fewer roundings than a run that stores every operator's output in fp16: no greater error.
                assert!(
                    error <= 1.02 * plain + 1e-7,
                    "{machine:?} {size:?} {stage:?}: {error:e} > {plain:e}"
                );
            }
        });
        // In memory with another image's leftovers, the same.
        let machine = Machine::all()[0];
        let mut workspace = Workspace::default();
        let first = run(machine, &model, &mut workspace, &pixels).stages;
        let other: Vec<f16> = pixels.iter().map(|x| -*x).collect();
        run(machine, &model, &mut workspace, &other);
        assert_eq!(run(machine, &model, &mut workspace, &pixels).stages, first);
    }
}

/// Elements in a row of a stage.
fn width_of(config: &ModelConfig, stage: Stage) -> usize {
    match stage {
        Stage::Patches => config.patch_len(),
        Stage::ProjectorHidden => config.projector_width,
        FEATURES => config.hidden_size,
        _ => config.width,
    }
}

#[test]
fn every_weight_counts() {
    // A model in which one tensor is disturbed gives other features: none is left out.
    let size = (2, 4, 64, 2, 96, 80, 48);
    let pixels = Random::new(4).halves(4 * 48, 0.0, 1.0);
    let machine = Machine::all()[0];
    let mut workspace = Workspace::default();
    let features = |workspace: &mut Workspace, model: &Model| {
        run(machine, model, workspace, &pixels).stages.pop().map(|(_, features)| features).unwrap()
    };
    let base = features(&mut workspace, &Model::random(size, 1));
    type Pick = fn(&mut VisionWeights) -> &mut Vec<f16>;
    let tensors: [(&str, Pick); 21] = [
        ("class embedding", |w| &mut w.class_embedding),
        ("patch embedding", |w| &mut w.patch_embedding),
        ("position embedding", |w| &mut w.position_embedding),
        ("pre-norm weight", |w| &mut w.pre_norm.weight),
        ("pre-norm bias", |w| &mut w.pre_norm.bias),
        ("norm1 weight", |w| &mut w.layers[1].norm1.weight),
        ("norm1 bias", |w| &mut w.layers[1].norm1.bias),
        ("qkv weight", |w| &mut w.layers[1].qkv.weight),
        ("qkv bias", |w| &mut w.layers[1].qkv.bias),
        ("out weight", |w| &mut w.layers[1].out.weight),
        ("out bias", |w| &mut w.layers[1].out.bias),
        ("norm2 weight", |w| &mut w.layers[1].norm2.weight),
        ("norm2 bias", |w| &mut w.layers[1].norm2.bias),
        ("fc1 weight", |w| &mut w.layers[1].fc1.weight),
        ("fc1 bias", |w| &mut w.layers[1].fc1.bias),
        ("fc2 weight", |w| &mut w.layers[1].fc2.weight),
        ("fc2 bias", |w| &mut w.layers[1].fc2.bias),
        ("projector hidden weight", |w| &mut w.projector_hidden.weight),
        ("projector hidden bias", |w| &mut w.projector_hidden.bias),
        ("projector out weight", |w| &mut w.projector_out.weight),
        ("projector out bias", |w| &mut w.projector_out.bias),
    ];
    for (name, pick) in tensors {
        let mut model = Model::random(size, 1);
        // The last third: values of the qkv, the last patch's position.
        let tensor = pick(&mut model.weights);
        let last = tensor.len() - tensor.len() / 3;
        tensor[last..].iter_mut().for_each(|x| *x = f16::from_f32(x.to_f32() + 0.5));
        assert_ne!(features(&mut workspace, &model), base, "{name}");
    }
}
