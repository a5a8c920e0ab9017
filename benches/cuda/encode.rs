//! Whole encodes.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use half::f16;
use imagehere::config::ModelConfig;
use imagehere::cuda::bench::{Encode, groups};
use imagehere::image::{ImageSource, RgbView};
use imagehere::prompt::{Request, SequencePlan};
use imagehere::sequence::SequenceBuffer;

use crate::suite::{Suite, bytes};

const WORKS: &str = "a device that works";

/// Operations of the matrix products of one image.
fn operations(config: &ModelConfig) -> f64 {
    let ModelConfig { patches: p, tokens: t, width: c, mlp_width: f, .. } = *config;
    let (inner, hidden) = (config.projector_width, config.hidden_size);
    let layer = t * (4 * c * c + 2 * c * f) + 2 * t * t * c;
    2.0 * (p * c * config.patch_len() + config.layers * layer + p * inner * (c + hidden)) as f64
}

/// A model and pictures for it: those of even groups, then those of odd ones.
struct Model {
    encode: Encode,
    pictures: Vec<Vec<u8>>,
    features: Vec<Vec<f16>>, // [P, H] of each
    side: usize,
}

impl Model {
    /// Makes both and compares with the CPU.
    fn new(suite: &Suite) -> Self {
        let side = suite.config.image_size;
        let encode = Encode::new(&suite.config, suite.seed).expect(WORKS);
        let most = suite.images.iter().map(|&images| groups(images)[0]).max().unwrap_or(1);
        let picture = |i: usize| bytes(suite.seed + i as u64, 3 * side * side);
        let pictures: Vec<_> = (0..2 * most).map(picture).collect();
        let mut model = Self { encode, pictures, features: vec![], side };
        let sources: Vec<ImageSource<'_>> = model.views(0..2 * most).map(Into::into).collect();
        let features = model.encode.cuda().features(&sources).expect(WORKS);
        let expected = model.encode.cpu().features(&sources[..1]).expect("a CPU that works");
        assert_alike(features[0].as_slice(), expected[0].as_slice(), suite.config.hidden_size);
        drop(sources);
        model.features = features.iter().map(|features| features.as_slice().to_vec()).collect();
        model
    }

    fn views(&self, range: std::ops::Range<usize>) -> impl Iterator<Item = RgbView<'_>> {
        let side = self.side;
        self.pictures[range]
            .iter()
            .map(move |rgb| RgbView::new(rgb, side as u32, side as u32, 3 * side).expect("a picture"))
    }

    fn plan(&self, images: usize) -> SequencePlan {
        let request = Request::new("<ImageHere>".repeat(images) + "Compare.").image_count(images);
        self.encode.cuda().plan(&request).expect("a marker per image")
    }

    /// Picture `k`, round and round, of a call that begins with picture `first`.
    fn images(&self, first: usize, count: usize) -> Vec<ImageSource<'_>> {
        let all: Vec<_> = self.views(0..self.pictures.len()).collect();
        (first..first + count).map(|k| all[k % all.len()].into()).collect()
    }

    /// The rows of slot `k`.
    fn rows<'r>(&self, plan: &SequencePlan, all: &'r [f16], k: usize) -> &'r [f16] {
        let (slot, hidden) = (plan.slots[k], self.encode.cuda().config().hidden_size);
        &all[slot.offset * hidden..(slot.offset + slot.len) * hidden]
    }

    /// An encode into a sequence on the device, checked: every row is there, and each image has the bits that it has
    /// alone.
    fn encode_into(&self, images: usize) -> (SequencePlan, SequenceBuffer<'static>) {
        let plan = self.plan(images);
        let cuda = self.encode.cuda();
        let mut sequence = cuda.device_sequence().expect(WORKS);
        cuda.encode_into(&plan, &self.images(0, images), &mut sequence).expect(WORKS);
        sequence.verify().expect("a complete sequence");
        let all = sequence.to_host().expect(WORKS);
        for k in 0..images {
            let same = self.rows(&plan, &all, k) == self.features[k % self.features.len()];
            assert!(same, "image {k} of {images} has other bits than with others");
        }
        (plan, sequence)
    }

    /// Brings all pictures to the device, where an encode leaves its own.
    fn set_pixels(&self) {
        let all: Vec<_> = self.views(0..self.pictures.len()).collect();
        let (even, odd) = all.split_at(all.len() / 2);
        self.encode.set_pixels([even, odd]).expect(WORKS);
    }

    /// Checks that slots filled from pixels on the device hold, group by group, one set of pictures or the other.
    fn check_from_pixels(&self, plan: &SequencePlan, sequence: &SequenceBuffer<'_>) {
        let all = sequence.to_host().expect(WORKS);
        let (mut k, half) = (0, self.features.len() / 2);
        for group in groups(plan.slots.len()) {
            let holds =
                |first: usize| (0..group).all(|i| self.rows(plan, &all, k + i) == self.features[first + i]);
            assert!(holds(0) || holds(half), "images {k}.. of {} have other bits", plan.slots.len());
            k += group;
        }
    }
}

/// Answers lines `IMAGES SAMPLES` on stdin: that many times from pixels, fresh ones for each line, in seconds. So
/// others on the same device can take turns.
pub fn rounds(suite: &Suite) {
    let model = Model::new(suite);
    let mut filled = HashMap::new();
    println!("{}", serde_json::json!({ "ready": true }));
    for (i, line) in (1..).zip(std::io::stdin().lines()) {
        let line = line.expect("text");
        let (images, samples) = line.split_once(' ').expect("two numbers");
        let (images, samples): (usize, usize) = (images.parse().unwrap(), samples.parse().unwrap());
        let fresh = |k: usize| bytes(suite.seed + 1000 * i + k as u64, 3 * model.side * model.side);
        let pictures: Vec<_> = (0..model.pictures.len()).map(fresh).collect();
        let side = model.side;
        let view = |rgb| RgbView::new(rgb, side as u32, side as u32, 3 * side).expect("a picture");
        let all: Vec<_> = pictures.iter().map(|rgb: &Vec<u8>| view(rgb)).collect();
        let (plan, sequence) = filled.entry(images).or_insert_with(|| model.encode_into(images));
        let (even, odd) = all.split_at(all.len() / 2);
        model.encode.set_pixels([even, odd]).expect(WORKS);
        let time = |_| model.encode.time_from_pixels(&plan.slots, sequence, 1).expect(WORKS).as_secs_f64();
        let seconds: Vec<f64> = (0..samples).map(time).collect();
        println!("{}", serde_json::json!({ "seconds": seconds }));
    }
}

/// Relative error of all, and the least cosine of a row.
fn assert_alike(got: &[f16], expected: &[f16], hidden: usize) {
    let dot = |a: &[f16], b: &[f16]| a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>();
    let wrong: f64 = got.iter().zip(expected).map(|(a, b)| (a.to_f64() - b.to_f64()).powi(2)).sum();
    let error = (wrong / dot(expected, expected)).sqrt();
    let rows = got.chunks_exact(hidden).zip(expected.chunks_exact(hidden));
    let cosine = rows.map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).fold(1.0, f64::min);
    println!("features against the CPU's: rel-L2 {error:.2e}, least cosine of a row {cosine:.6}");
    assert!(error <= 5e-3 && cosine >= 0.9999, "rel-L2 {error:e}, cosine {cosine}");
}

/// Encodes by number of images, if the command line asks for them.
pub fn all(suite: &Suite, c: &mut Criterion) {
    let model = OnceCell::new();
    let model = || model.get_or_init(|| Model::new(suite));
    let mut group = c.benchmark_group("encode");
    if !suite.tiny {
        group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_millis(1400));
    }
    for &images in suite.images {
        let throughput = Throughput::Elements((images as f64 * operations(&suite.config)) as u64);
        group.throughput(throughput);
        let mut filled = None;
        group.bench_function(BenchmarkId::new("from_pixels", images), |b| {
            let model = model();
            let (plan, sequence) = filled.get_or_insert_with(|| {
                let (plan, mut sequence) = model.encode_into(images);
                // Others into the same slots, so that what is not written is found.
                let others = model.images(1, images);
                model.encode.cuda().encode_into(&plan, &others, &mut sequence).expect(WORKS);
                model.set_pixels();
                model.encode.time_from_pixels(&plan.slots, &sequence, 1).expect(WORKS);
                model.check_from_pixels(&plan, &sequence);
                (plan, sequence)
            });
            b.iter_custom(|times| model.encode.time_from_pixels(&plan.slots, sequence, times).expect(WORKS));
            model.check_from_pixels(plan, sequence);
        });
        let mut filled = None;
        group.bench_function(BenchmarkId::new("encode_into", images), |b| {
            let model = model();
            let (plan, sequence) = filled.get_or_insert_with(|| model.encode_into(images));
            let calls: Vec<_> = (0..2).map(|set| model.images(set * images, images)).collect();
            b.iter_custom(|times| {
                let start = Instant::now();
                for call in 0..times as usize {
                    model.encode.cuda().encode_into(&*plan, &calls[call % 2], sequence).expect(WORKS);
                }
                start.elapsed()
            });
            sequence.verify().expect("a complete sequence");
        });
    }
    group.finish();
}
