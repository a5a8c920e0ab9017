//! The whole tower against the CPU's.

use half::f16;

use super::*;
use crate::backend::{Observer, TokenEmbeddings};
use crate::cpu::CpuBackend;
use crate::cuda::fusions;
use crate::cuda::linear::SlotRows;
use crate::cuda::linear::tests::Slots;
use crate::cuda::testkit::{Bench, Model, Random, bits, least_cosine, poison, relative_l2, wide};
use crate::image::RgbImage;
use crate::sequence::RowsMut;

/// Grid 5: T = 26.
fn model() -> Model {
    Model::random((5, 4, 128, 2, 200, 104, 72), 5)
}

/// An embedding that nobody asks.
#[derive(Debug)]
struct NoTable(usize);

impl TokenEmbeddings for NoTable {
    fn rows(&self) -> usize {
        300
    }

    fn hidden(&self) -> usize {
        self.0
    }

    fn gather_row(&self, _: u32, _: &mut [f16]) -> Result<()> {
        unreachable!("no text here")
    }
}

/// What the CPU makes of pictures: each stage, `[images, …]`, and the features, `[images · P, H]`.
struct OnCpu {
    stages: Vec<(Stage, Vec<f16>)>,
    features: Vec<f16>,
}

fn on_cpu(pictures: &[RgbImage], model: Model) -> OnCpu {
    let Model { config, weights } = model;
    let (patches, hidden) = (config.patches, config.hidden_size);
    let backend = CpuBackend::new(&config, weights, Box::new(NoTable(hidden)), Some(1)).unwrap();
    let mut features = poison(pictures.len() * patches * hidden);
    let targets = features.chunks_exact_mut(patches * hidden);
    let targets = targets.map(|rows| vec![RowsMut::new(rows, hidden, hidden)]).collect();
    let views: Vec<_> = pictures.iter().map(RgbImage::view).collect();
    let mut stages: Vec<(Stage, Vec<f16>)> = Vec::new();
    let mut trace = |_: usize, stage: Stage, values: &[f16]| match stages.last_mut() {
        Some((last, all)) if *last == stage => all.extend_from_slice(values),
        _ => stages.push((stage, values.to_vec())),
    };
    let mut observer = Observer { trace: Some(&mut trace), ..Observer::default() };
    backend.encode_images(&views, targets, &mut observer).unwrap();
    OnCpu { stages, features }
}

fn pictures(count: usize) -> Vec<RgbImage> {
    let mut random = Random::new(77);
    let side = model().config.image_size;
    let mut picture = || (0..3 * side * side).map(|_| random.below(256) as u8).collect();
    (0..count).map(|_| RgbImage { width: side as u32, height: side as u32, data: picture() }).collect()
}

/// Model and workspace on the device, and a place for features.
struct OnGpu {
    bench: Bench,
    model: Model,
    weights: DeviceWeights,
    workspace: Workspace,
    fusions: Fusions,
}

impl OnGpu {
    fn new(images: usize) -> Self {
        Self::with(images, Fusions::ALL, model())
    }

    fn with(images: usize, fusions: Fusions, model: Model) -> Self {
        let bench = Bench::new();
        let mut weights = DeviceWeights::upload(&bench.stream, &model.config, &model.weights).unwrap();
        let kernel = &bench.gpu.kernels.fold;
        let fusions = fusions::fold(&bench.stream, kernel, &mut weights, &model.config, fusions).unwrap();
        let workspace = Workspace::if_room(&bench.stream, &model.config, images).unwrap().unwrap();
        Self { bench, model, weights, workspace, fusions }
    }

    /// Puts patches, as the CPU cuts them, where the tower expects them.
    fn upload(&self, patches: &[f16], images: usize) {
        let one = patches.len() / images;
        for (i, patches) in patches.chunks_exact(one).enumerate() {
            let to = self.workspace.patches_of(i).unwrap();
            self.bench.stream.upload_rows_and_wait(to.span, to.pitch, patches, to.columns).unwrap();
        }
    }

    fn tower(&self) -> Tower<'_> {
        let Self { bench, model, weights, workspace, fusions } = self;
        Tower { kernels: &bench.gpu.kernels, config: &model.config, weights, workspace, fusions: *fusions }
    }

    fn enqueue(&self, images: usize, slots: &SlotTable, after: Option<After<'_>>) {
        self.tower().enqueue(&self.bench.stream, images, slots, after).unwrap();
    }
}

#[test]
fn equals_the_cpu_stage_by_stage() {
    for fusions in [
        Fusions::NONE,
        Fusions { layer_norm: true, ..Fusions::NONE },
        Fusions { query_scale: true, ..Fusions::NONE },
        Fusions { class_row: true, ..Fusions::NONE },
        Fusions::ALL,
    ] {
        equals_the_cpu(fusions, model);
    }
    // Rows of no whole vectors: linear layers in the portable kernels, where Hopper's cannot.
    equals_the_cpu(Fusions::ALL, || Model::random((5, 4, 128, 2, 204, 100, 72), 5));
}

fn equals_the_cpu(fusions: Fusions, model: fn() -> Model) {
    let images = 3;
    let cpu = on_cpu(&pictures(images), model());
    let gpu = OnGpu::with(images, fusions, model());
    let (patches, hidden) = (gpu.model.config.patches, gpu.model.config.hidden_size);
    gpu.upload(&cpu.stages[0].1, images);
    let features = gpu.bench.array(&poison(images * patches * hidden));
    let slots: Vec<SlotRows> = (0..images)
        .map(|i| SlotRows {
            first: features.span().ptr().add(i * patches * hidden),
            pitch: hidden as i64,
            rows: patches as i32,
            pad: 0,
        })
        .collect();
    let slots = Slots::new(&gpu.bench, &slots, &[0, 1, 2, 3]);
    let before = gpu.bench.gpu.context.launches();
    let mut stages = cpu.stages.iter();
    gpu.enqueue(
        images,
        &slots.table,
        Some(&mut |stage, matrix| {
            let (expected_stage, expected) = stages.next().unwrap();
            assert_eq!(stage, *expected_stage);
            let mut values = vec![f16::ZERO; matrix.rows * matrix.columns];
            let (shape, stride) = ((matrix.rows, matrix.columns), matrix.columns);
            // SAFETY: there is room for all rows, and the wait is below.
            unsafe {
                gpu.bench.stream.download_rows(
                    matrix.span,
                    matrix.pitch,
                    shape,
                    values.as_mut_ptr(),
                    stride,
                )?
            };
            gpu.bench.stream.synchronize()?;
            let expected = wide(expected);
            let error = relative_l2(&values, &expected);
            // A folded norm rounds weights where the CPU rounds rows: the two errors have nothing in common.
            let bound = if fusions.layer_norm { 1.3e-3 } else { 1e-3 };
            assert!(error <= bound, "{fusions:?}, {stage:?}: {error}");
            Ok(())
        }),
    );
    assert!(stages.next().is_none());
    let per_layer = if gpu.fusions.layer_norm { 5 } else { 7 };
    let launches = 4 + per_layer * gpu.model.config.layers as u64;
    assert!(gpu.bench.gpu.context.launches() - before >= launches, "at least those of this test");
    let values = gpu.bench.read(&features);
    let expected = wide(&cpu.features);
    let (error, cosine) = (relative_l2(&values, &expected), least_cosine(&values, &expected, hidden));
    println!("{fusions:?}: rel-L2 {error:.2e}, cosine {cosine:.6}");
    assert!(error <= 2e-3 && cosine >= 0.9999, "{fusions:?}: rel-L2 {error}, cosine {cosine}");
}

/// A product of a norm's weight and a layer's that fp16 does not hold: that norm, and all others, stay layers of their own.
#[test]
fn norms_that_fp16_does_not_hold_stay_apart() {
    fn strained() -> Model {
        let mut model = model();
        // A channel that none of query, key and value asks for, but one of the values, which nothing scales down.
        model.weights.layers[1].norm1.weight[7] = f16::from_f32(6e4);
        let qkv = &mut model.weights.layers[1].qkv.weight;
        qkv.chunks_exact_mut(128).for_each(|row| row[7] = f16::ZERO);
        qkv[300 * 128 + 7] = f16::from_f32(2.0);
        model
    }
    let bench = Bench::new();
    let Model { config, weights } = strained();
    let mut on_device = DeviceWeights::upload(&bench.stream, &config, &weights).unwrap();
    let kernel = &bench.gpu.kernels.fold;
    let done = fusions::fold(&bench.stream, kernel, &mut on_device, &config, Fusions::ALL).unwrap();
    assert_eq!(done, Fusions { layer_norm: false, ..Fusions::ALL });
    for (layer, stored) in on_device.layers.iter().zip(&weights.layers) {
        assert!(layer.qkv.norm.is_none() && layer.fc1.norm.is_none());
        let mut fc1 = vec![f16::NAN; stored.fc1.weight.len()];
        let len = fc1.len();
        bench.stream.download_and_wait(layer.fc1.weight.span.slice(0..len).unwrap(), &mut fc1).unwrap();
        assert_eq!(bits(&fc1), bits(&stored.fc1.weight), "untouched");
    }
}

#[test]
fn a_graph_serves_any_slots_and_an_image_any_place() {
    let count = 3;
    let cpu = on_cpu(&pictures(count), model());
    let patches_len = cpu.stages[0].1.len() / count;
    let gpu = OnGpu::new(count);
    let (patches, hidden) = (gpu.model.config.patches, gpu.model.config.hidden_size);
    let rows = patches * hidden;
    let features = gpu.bench.array(&poison(count * rows));
    let slot = |place: usize| SlotRows {
        first: features.span().ptr().add(place * rows),
        pitch: hidden as i64,
        rows: patches as i32,
        pad: 0,
    };
    // One at a time, without a graph.
    let mut alone = Vec::new();
    for patches in cpu.stages[0].1.chunks_exact(patches_len) {
        gpu.upload(patches, 1);
        let slots = Slots::new(&gpu.bench, &[slot(0)], &[0, 1]);
        gpu.enqueue(1, &slots.table, None);
        alone.push(gpu.bench.read(&features)[..rows].to_vec());
    }
    assert_ne!(bits(&alone[0]), bits(&alone[1]));

    // All at once by a graph, its table rewritten between replays.
    let table = Slots::new(&gpu.bench, &[0, 1, 2].map(slot), &[0, 1, 2, 3]);
    gpu.upload(&cpu.stages[0].1, count);
    let graph = gpu
        .bench
        .stream
        .capture(|| {
            gpu.enqueue(count, &table.table, None);
            Ok(())
        })
        .unwrap();
    for order in [[0, 1, 2], [2, 0, 1]] {
        let slots = Slots::new(&gpu.bench, &order.map(slot), &[0, 1, 2, 3]);
        gpu.bench.stream.copy(table.table.slots, slots.table.slots).unwrap();
        gpu.bench.stream.fill(features.span(), 0x7e).unwrap();
        // SAFETY: all that was captured is still there.
        unsafe { gpu.bench.stream.replay(&graph).unwrap() };
        let all = gpu.bench.read(&features);
        for (image, place) in order.into_iter().enumerate() {
            assert_eq!(bits(&all[place * rows..(place + 1) * rows]), bits(&alone[image]), "image {image}");
        }
    }
}

#[test]
fn refuses_more_images_than_there_is_room_for() {
    let gpu = OnGpu::new(1);
    let slots = Slots::new(&gpu.bench, &[], &[0, 0, 0]);
    let result = gpu.tower().enqueue(&gpu.bench.stream, 2, &slots.table, None);
    assert!(result.unwrap_err().to_string().contains("2 images in a workspace for 1"));
    assert!(gpu.workspace.patches_of(1).is_err());
}
