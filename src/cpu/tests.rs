//! The backend as the encoder sees it: images in, rows of a sequence out.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::cpu::testkit::{Model, Random, bits, on_every_machine, poison};
use crate::image::{DecodeOptions, ImageSource, Resample, RgbImage};

/// An embedding table whose row `id` is `id + column / 64`, and which counts what it is asked.
#[derive(Debug)]
struct Table {
    rows: usize,
    hidden: usize,
    asked: AtomicUsize,
}

impl TokenEmbeddings for Table {
    fn rows(&self) -> usize {
        self.rows
    }

    fn hidden(&self) -> usize {
        self.hidden
    }

    fn gather_row(&self, id: u32, out: &mut [f16]) -> Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if id as usize >= self.rows {
            return Err(Error::argument(format!("no token {id}"), "Use another"));
        }
        out.iter_mut().enumerate().for_each(|(i, x)| *x = f16::from_f32(id as f32 + i as f32 / 64.0));
        Ok(())
    }
}

fn table(model: &Model) -> Box<dyn TokenEmbeddings> {
    Box::new(Table { rows: 300, hidden: model.config.hidden_size, asked: AtomicUsize::new(0) })
}

/// Grid 5: T = 26, no multiple of anything.
fn model() -> Model {
    Model::random((5, 4, 128, 2, 200, 96, 72), 5)
}

fn backend(machine: Machine, threads: usize) -> CpuBackend {
    let Model { config, weights } = model();
    let table = table(&Model { config: config.clone(), weights: VisionWeights::default() });
    CpuBackend::on(machine, &config, weights, table, Some(threads)).unwrap()
}

/// Random pictures of the tower's size.
fn pictures(count: usize) -> Vec<RgbImage> {
    let mut random = Random::new(77);
    let side = model().config.image_size;
    let mut picture = || (0..3 * side * side).map(|_| random.below(256) as u8).collect();
    (0..count).map(|_| RgbImage { width: side as u32, height: side as u32, data: picture() }).collect()
}

/// Encodes into one block per image, `[images · P, H]`.
fn encode(backend: &CpuBackend, pictures: &[&RgbImage]) -> Vec<f16> {
    let (rows, hidden) = (backend.config.patches, backend.config.hidden_size);
    let mut features = poison(pictures.len() * rows * hidden);
    let blocks = features.chunks_exact_mut(rows * hidden);
    let targets = blocks.map(|block| vec![RowsMut::new(block, hidden, hidden)]).collect();
    let views: Vec<RgbView<'_>> = pictures.iter().map(|picture| picture.view()).collect();
    backend.encode_images(&views, targets, &mut Observer::default()).unwrap();
    features
}

#[test]
fn names_its_device() {
    on_every_machine(|machine| {
        let name = machine.isa().name();
        assert_eq!(backend(machine, 2).describe(), format!("cpu ({name}, 2 threads)"));
        assert_eq!(backend(machine, 1).describe(), format!("cpu ({name}, 1 thread)"));
    });
}

#[test]
fn an_image_does_not_depend_on_batch_order_or_threads() {
    let pictures = pictures(4);
    let all: Vec<&RgbImage> = pictures.iter().collect();
    on_every_machine(|machine| {
        let one = backend(machine, 1);
        let each: Vec<Vec<u16>> = all.iter().map(|picture| bits(&encode(&one, &[picture]))).collect();
        assert!(each.windows(2).all(|pair| pair[0] != pair[1]), "different pictures, different features");
        for threads in [1, 2, 3, 5] {
            let backend = backend(machine, threads);
            for order in [vec![0, 1, 2, 3], vec![3, 1, 0, 2], vec![2, 2], vec![1, 0, 0, 0, 3]] {
                let batch: Vec<&RgbImage> = order.iter().map(|&i| all[i]).collect();
                let expected: Vec<u16> = order.iter().flat_map(|&i| each[i].clone()).collect();
                let same = bits(&encode(&backend, &batch)) == expected;
                assert!(same, "{machine:?}, {threads} threads, order {order:?}");
            }
        }
    });
}

#[test]
fn several_groups_are_as_one() {
    // More images than one group of GROUP_ROWS takes.
    let pictures = pictures(3);
    let backend = backend(Machine::all()[0], 2);
    let count = 2 * GROUP_ROWS / backend.config.tokens + 3;
    let batch: Vec<&RgbImage> = (0..count).map(|i| &pictures[i * i % 3]).collect();
    let each: Vec<Vec<f16>> = pictures.iter().map(|picture| encode(&backend, &[picture])).collect();
    let features = encode(&backend, &batch);
    for (i, block) in features.chunks_exact(each[0].len()).enumerate() {
        assert_eq!(bits(block), bits(&each[i * i % 3]), "image {i}");
    }
}

/// Fills two rows of text, then each image, from `sources`; returns all rows and what came of it.
fn fill(
    backend: &CpuBackend,
    sources: &[ImageSource<'_>],
    observer: &mut Observer<'_>,
) -> (Vec<f16>, Result<Work>) {
    let (rows, hidden) = (backend.config.patches, backend.config.hidden_size);
    let mut sequence = poison((2 + sources.len() * rows) * hidden);
    let (text, blocks) = sequence.split_at_mut(2 * hidden);
    let blocks = blocks.chunks_exact_mut(rows * hidden);
    let targets = blocks.map(|block| vec![RowsMut::new(block, hidden, hidden)]).collect();
    let decode = DecodeOptions::default();
    let pictures = Pictures { sources, decode: &decode, resample: Resample::Pillow };
    let texts = vec![([7, 8].as_slice(), RowsMut::new(text, hidden, hidden))];
    let done = backend.fill(Job { texts, kept: vec![], pictures, targets }, observer);
    (sequence, done)
}

/// So many images that the last is not in the first group.
fn more_than_a_group(backend: &CpuBackend) -> usize {
    GROUP_ROWS / backend.config.tokens + 1
}

#[test]
fn a_bad_image_of_a_later_group_stops_the_first_before_it_writes() {
    let pictures = pictures(1);
    for threads in [1, 2] {
        let backend = backend(Machine::all()[0], threads);
        let count = more_than_a_group(&backend);
        let mut sources: Vec<ImageSource<'_>> = (1..count).map(|_| pictures[0].view().into()).collect();
        sources.push(ImageSource::Bytes(b"no image".into()));
        let (sequence, done) = fill(&backend, &sources, &mut Observer::default());
        let error = done.unwrap_err().to_string();
        assert!(error.contains(&format!("image {}", count - 1)), "{error}");
        let untouched = poison(sequence.len());
        assert_eq!(bits(&sequence), bits(&untouched), "{threads} threads");
    }
}

#[cfg(unix)]
#[test]
fn images_of_later_groups_are_decoded_while_the_first_is_encoded() {
    let pictures = pictures(2);
    let backend = backend(Machine::all()[0], 2);
    let count = more_than_a_group(&backend);
    // A pipe that gives the last image when the tower has made a step.
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("last.png");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut sources: Vec<ImageSource<'_>> = (1..count).map(|_| pictures[0].view().into()).collect();
    sources.push(pipe.as_path().into());
    let (step, stepped) = std::sync::mpsc::channel();
    let mut progress = |_: f32| {
        let _ = step.send(());
        ControlFlow::Continue(())
    };
    let mut observer = Observer { progress: Some(&mut progress), ..Observer::default() };
    let (sequence, done) = std::thread::scope(|scope| {
        let (pipe, last) = (&pipe, &pictures[1]);
        scope.spawn(move || {
            let overlapped = stepped.recv_timeout(std::time::Duration::from_secs(60)).is_ok();
            last.write_png(std::fs::File::create(pipe).unwrap()).unwrap();
            assert!(overlapped, "the tower waits for the last image");
        });
        fill(&backend, &sources, &mut observer)
    });
    assert_eq!(done.unwrap().images_encoded, count);
    let each: Vec<Vec<f16>> = pictures.iter().map(|picture| encode(&backend, &[picture])).collect();
    let text = 2 * backend.config.hidden_size;
    for (i, block) in sequence[text..].chunks_exact(each[0].len()).enumerate() {
        assert_eq!(bits(block), bits(&each[usize::from(i + 1 == count)]), "image {i}");
    }
    assert!(sequence[..text].iter().all(|x| x.is_finite()), "text");
}

#[test]
fn fills_every_target_and_touches_nothing_else() {
    let pictures = pictures(3);
    let backend = backend(Machine::all()[0], 2);
    let (patches, hidden) = (backend.config.patches, backend.config.hidden_size);
    let each: Vec<Vec<f16>> = pictures.iter().map(|picture| encode(&backend, &[picture])).collect();
    let mark = f16::from_f32(-9.0);
    let stride = hidden + 3;
    // Rows: 2 of text, image 1, 1 of text, image 0 cut after 7, image 1 again. Image 2 goes nowhere.
    let lengths = [2, patches, 1, 7, patches];
    let mut buffer = vec![mark; lengths.iter().sum::<usize>() * stride];
    let mut blocks = Vec::new();
    let mut rest = buffer.as_mut_slice();
    for rows in lengths {
        let (block, after) = rest.split_at_mut(rows * stride);
        blocks.push(block);
        rest = after;
    }
    let [_, first, _, cut, second] = blocks.try_into().unwrap();
    let rows = |block| RowsMut::new(block, hidden, stride);
    let targets = vec![vec![rows(cut)], vec![rows(first), rows(second)], vec![]];
    let views: Vec<RgbView<'_>> = pictures.iter().map(RgbImage::view).collect();
    let mut seen = Vec::new();
    let mut trace = |image: usize, _: Stage, _: &[f16]| seen.push(image);
    let mut job = Observer { trace: Some(&mut trace), ..Observer::default() };
    backend.encode_images(&views, targets, &mut job).unwrap();
    assert!(!seen.contains(&2), "an image without a target is not encoded");

    let nothing = vec![mark; patches * hidden];
    let text = |rows: usize| nothing[..rows * hidden].to_vec();
    let expected =
        [text(2), each[1].clone(), text(1), each[0][..7 * hidden].to_vec(), each[1].clone()].concat();
    for (i, row) in buffer.chunks_exact(stride).enumerate() {
        assert_eq!(bits(&row[..hidden]), bits(&expected[i * hidden..][..hidden]), "row {i}");
        assert!(row[hidden..].iter().all(|x| *x == mark), "between the rows");
    }
}

#[test]
fn shows_each_stage_of_each_image_in_order() {
    let pictures = pictures(2);
    let backend = backend(Machine::all()[0], 2);
    let config = backend.config.clone();
    let mut features = poison(2 * config.patches * config.hidden_size);
    let blocks = features.chunks_exact_mut(config.patches * config.hidden_size);
    let targets =
        blocks.map(|block| vec![RowsMut::new(block, config.hidden_size, config.hidden_size)]).collect();
    let views: Vec<RgbView<'_>> = pictures.iter().map(RgbImage::view).collect();
    let (mut seen, mut steps) = (Vec::new(), Vec::new());
    let mut trace = |image: usize, stage: Stage, values: &[f16]| {
        assert!(values.iter().all(|x| x.is_finite()));
        seen.push((image, stage, values.len()));
    };
    let mut progress = |done: f32| {
        steps.push(done);
        ControlFlow::Continue(())
    };
    let mut job = Observer { trace: Some(&mut trace), progress: Some(&mut progress), ..Observer::default() };
    backend.encode_images(&views, targets, &mut job).unwrap();
    let hidden = config.tokens * config.width;
    let stages = [
        (Stage::Patches, config.patches * config.patch_len()),
        (Stage::Embedded, hidden),
        (Stage::Layer(0), hidden),
        (Stage::Layer(1), hidden),
        (Stage::ProjectorHidden, config.patches * config.projector_width),
    ];
    let expected: Vec<_> =
        stages.iter().flat_map(|&(stage, len)| [(0, stage, len), (1, stage, len)]).collect();
    assert_eq!(seen, expected);
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]) && steps.last() == Some(&1.0), "{steps:?}");
}

#[test]
fn calls_at_the_same_time_do_not_meet() {
    let pictures = pictures(4);
    let backend = backend(Machine::all()[0], 2);
    let each: Vec<Vec<u16>> = pictures.iter().map(|picture| bits(&encode(&backend, &[picture]))).collect();
    std::thread::scope(|scope| {
        for i in 0..4 {
            let (backend, pictures, each) = (&backend, &pictures, &each);
            scope.spawn(move || {
                for round in 0..5 {
                    let (a, b) = (i, (i + round) % 4);
                    let features = bits(&encode(backend, &[&pictures[a], &pictures[b]]));
                    assert!(features == [each[a].as_slice(), &each[b]].concat(), "thread {i}, round {round}");
                }
            });
        }
    });
}

#[test]
fn works_on_the_global_pool() {
    let Model { config, weights } = model();
    let table = table(&model());
    let global = CpuBackend::on(Machine::all()[0], &config, weights, table, None).unwrap();
    let pictures = pictures(1);
    let own = backend(Machine::all()[0], 1);
    assert_eq!(bits(&encode(&global, &[&pictures[0]])), bits(&encode(&own, &[&pictures[0]])));
}

#[test]
fn no_images_are_no_work() {
    let backend = backend(Machine::all()[0], 1);
    assert!(encode(&backend, &[]).is_empty());
}

#[test]
fn refuses_targets_that_do_not_fit() {
    let backend = backend(Machine::all()[0], 1);
    let pictures = pictures(1);
    let mut job = Observer::default();
    let error = backend.encode_images(&[pictures[0].view()], vec![], &mut job).unwrap_err();
    assert!(error.to_string().contains("1 images, 0 lists"), "{error}");
    let mut narrow = poison(100);
    let targets = vec![vec![RowsMut::new(&mut narrow, 10, 10)]];
    let error = backend.encode_images(&[pictures[0].view()], targets, &mut job).unwrap_err();
    assert!(error.to_string().contains("rows of 10 elements; H is 72"), "{error}");
}

#[test]
fn embeds_tokens_row_by_row() {
    let backend = backend(Machine::all()[0], 3);
    let hidden = backend.config.hidden_size;
    let ids: Vec<u32> = (0..50).map(|i| i * 37 % 300).collect();
    let mut rows = poison(ids.len() * (hidden + 1));
    backend
        .embed_tokens(&ids, &mut RowsMut::new(&mut rows[..50 * (hidden + 1) - 1], hidden, hidden + 1))
        .unwrap();
    for (row, id) in rows.chunks_exact(hidden + 1).zip(&ids) {
        assert!((0..hidden).all(|i| row[i] == f16::from_f32(*id as f32 + i as f32 / 64.0)));
        assert!(row[hidden].is_nan(), "between the rows");
    }
    let error = backend.embed_tokens(&[1, 300], &mut RowsMut::new(&mut rows, hidden, hidden)).unwrap_err();
    assert!(matches!(error, Error::Internal(_)), "{error}");
    let mut two = RowsMut::new(&mut rows[..2 * hidden], hidden, hidden);
    let error = backend.embed_tokens(&[1, 300], &mut two).unwrap_err();
    assert!(error.to_string().contains("no token 300"), "{error}");
}

#[test]
fn refuses_sizes_that_disagree() {
    let refuse = |spoil: fn(&mut Model), expected: &str| {
        let mut model = model();
        let table = table(&model);
        spoil(&mut model);
        let error = CpuBackend::new(&model.config, model.weights, table, Some(1)).unwrap_err();
        assert_eq!(error.category(), crate::Category::Input);
        assert!(error.to_string().contains(expected), "{error}");
    };
    refuse(|m| m.config.patches = 24, "24 patches, 26 tokens");
    refuse(|m| m.config.patch_size = 0, "patches of 0 pixels");
    refuse(|m| m.config.heads = 3, "128 channels wide, but has 3 heads");
    refuse(|m| m.config.layers = 3, "2 layers of weights for 3 layers");
    refuse(|m| m.config.hidden_size = 71, "embedding rows of 72 elements, but H is 71");
    refuse(
        |m| m.weights.layers[1].fc1.weight.truncate(7),
        "`layers[1].fc1.weight` has 7 elements, but its shape is [200, 128]",
    );
    refuse(|m| m.weights.layers[0].norm2.bias.clear(), "`layers[0].norm2.bias` has 0 elements");
    refuse(|m| m.weights.projector_out.bias.push(f16::ONE), "`projector_out.bias` has 73 elements");
    refuse(|m| m.weights.class_embedding.clear(), "`class_embedding` has 0");
    refuse(
        |m| m.weights.patch_embedding.clear(),
        "`patch_embedding` has 0 elements, but its shape is [128, 48]",
    );
    refuse(|m| m.weights.position_embedding.clear(), "`position_embedding` has 0");

    let Model { config, weights } = model();
    let error = CpuBackend::new(&config, weights, table(&model()), Some(0)).unwrap_err();
    assert!(error.to_string().starts_with("0 threads"), "{error}");
}
