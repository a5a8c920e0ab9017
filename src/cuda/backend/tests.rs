//! The whole job on the emulated device, against the CPU's.

use half::f16;
use rayon::prelude::*;

use super::*;
use crate::Encoder;
use crate::checkpoint::{Checkpoint, RangePolicy};
use crate::cuda::blocks::STEP;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::testkit::{Random, bits, images, least_cosine, provide_device, relative_l2, wide};
use crate::encoder::EncoderOptions;
use crate::image::room::Room as _;
use crate::image::{ImageSource, Resample, RgbImage};
use crate::packing::PackedPlan;
use crate::prompt::{Planner, Request, SequencePlan};
use crate::synth::{self, DType, Format, Preset, SynthOptions};
use crate::tokenizer::Tokenizer;

/// A small checkpoint, open on both devices.
struct Both {
    cpu: Encoder,
    cuda: Encoder,
    dir: tempfile::TempDir,
}

impl Both {
    fn new(dtype: DType, options: &EncoderOptions) -> Self {
        provide_device();
        let dir = tempfile::tempdir().unwrap();
        let options_of_synth = SynthOptions { dtype, format: Format::Safetensors, ..SynthOptions::default() };
        synth::write(Preset::Tiny, &options_of_synth, dir.path().join("model")).unwrap();
        let cpu = options.clone().device(crate::backend::Device::Cpu);
        let cpu = Encoder::open_with(dir.path().join("model"), cpu).unwrap();
        let cuda = on_gpus(&[0], &dir.path().join("model"), options);
        Self { cpu, cuda, dir }
    }

    fn plan(&self, prompt: &str, images: usize) -> SequencePlan {
        self.cpu.plan(&Request::new(prompt).image_count(images)).unwrap()
    }
}

/// Opens a directory on devices of the tests.
pub(crate) fn on_gpus(ordinals: &[usize], dir: &std::path::Path, options: &EncoderOptions) -> Encoder {
    with_devices(ordinals, dir, options).0
}

/// As [`on_gpus`], with a look at the devices.
fn with_devices(ordinals: &[usize], dir: &std::path::Path, options: &EncoderOptions) -> (Encoder, Shared) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let planner = Planner::new(Tokenizer::from_dir(dir).unwrap(), checkpoint.config().clone()).unwrap();
    let weights = checkpoint.stored_weights().unwrap();
    let source = Source::Stored(&weights, RangePolicy::Refuse);
    let gpus = ordinals.iter().map(|&ordinal| Gpu::open_with(ordinal, images()).unwrap()).collect();
    let (backend, _) = CudaBackend::new(gpus, checkpoint.config(), source, checkpoint.embedding()).unwrap();
    let devices = backend.devices().clone();
    (Encoder::on(Box::new(backend), &checkpoint, planner, options.clone()), devices)
}

/// Pictures of the tower's size and of others: wider, taller, smaller, a pixel.
pub(crate) fn pictures(count: usize) -> Vec<RgbImage> {
    let sizes = [(70, 70), (93, 61), (70, 131), (41, 70), (9, 13), (1, 1), (7, 720), (300, 200)];
    let mut random = Random::new(77);
    let mut picture = |(width, height): (u32, u32)| {
        let data = (0..3 * width * height).map(|_| random.below(256) as u8).collect();
        RgbImage { width, height, data }
    };
    (0..count).map(|i| picture(sizes[i % sizes.len()])).collect()
}

pub(crate) fn sources<P: std::borrow::Borrow<RgbImage>>(pictures: &[P]) -> Vec<ImageSource<'_>> {
    pictures.iter().map(|picture| picture.borrow().into()).collect()
}

/// The same pictures as PNG files.
pub(crate) fn files(pictures: &[RgbImage]) -> Vec<ImageSource<'static>> {
    let file = |picture: &RgbImage| {
        let mut file = Vec::new();
        picture.write_png(&mut file).unwrap();
        file.into()
    };
    pictures.iter().map(file).collect()
}

pub(crate) fn encode<'p>(
    encoder: &Encoder,
    plan: impl Into<PackedPlan<'p>>,
    images: &[ImageSource<'_>],
) -> Vec<f16> {
    let mut sequence = SequenceBuffer::new();
    encoder.encode_into(plan, images, &mut sequence).unwrap();
    sequence.verify().unwrap();
    sequence.to_host().unwrap()
}

/// Compares a sequence with the CPU's: text rows are equal, image rows close; or how they differ.
pub(crate) fn alike(plan: &SequencePlan, hidden: usize, got: &[f16], expected: &[f16]) -> Result<(), String> {
    for (i, (got, expected)) in got.chunks_exact(hidden).zip(expected.chunks_exact(hidden)).enumerate() {
        if !plan.im_mask[i] && bits(got) != bits(expected) {
            return Err(format!("differs: text row {i}"));
        }
    }
    plan.slots.iter().try_for_each(|slot| {
        let rows = slot.offset * hidden..(slot.offset + slot.len) * hidden;
        close(hidden, &got[rows.clone()], &expected[rows]).map_err(|error| format!("{error} in {slot:?}"))
    })
}

/// Compares image rows with the CPU's.
pub(crate) fn close(hidden: usize, got: &[f16], expected: &[f16]) -> Result<(), String> {
    let expected = wide(expected);
    let (error, cosine) = (relative_l2(got, &expected), least_cosine(got, &expected, hidden));
    if error <= 2e-3 && cosine >= 0.9999 {
        return Ok(());
    }
    Err(format!("differs: rel-L2 {error:e}, cosine {cosine}"))
}

#[test]
fn sequences_are_those_of_the_cpu() {
    for (dtype, rule) in
        [(DType::Bf16, Resample::Pillow), (DType::F16, Resample::Pillow13), (DType::F32, Resample::Pillow)]
    {
        let both = Both::new(dtype, &EncoderOptions::new().resample(rule));
        let pictures = pictures(8);
        let plan = both.plan(&"A <ImageHere>, <ImageHere> and <ImageHere><ImageHere>; ".repeat(2), 8);
        let hidden = both.cpu.config().hidden_size;
        let [on_cpu, on_cuda] =
            [&both.cpu, &both.cuda].map(|encoder| encode(encoder, &plan, &sources(&pictures)));
        alike(&plan, hidden, &on_cuda, &on_cpu).unwrap();
    }
}

#[test]
fn bits_do_not_depend_on_batch_position_or_group() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let hidden = both.cuda.config().hidden_size;
    let pictures = pictures(14); // more than a group
    let images = sources(&pictures);
    let one = both.plan("<ImageHere>", 1);
    let rows = |plan: &SequencePlan, filled: &[f16], k: usize| {
        let slot = plan.slots[k];
        bits(&filled[slot.offset * hidden..(slot.offset + slot.len) * hidden])
    };
    let alone: Vec<Vec<u16>> = images
        .iter()
        .map(|image| rows(&one, &encode(&both.cuda, &one, std::slice::from_ref(image)), 0))
        .collect();
    for order in [vec![0, 1], vec![3, 2, 1], (0..14).collect(), (0..14).rev().collect::<Vec<usize>>()] {
        let plan = both.plan(&"<ImageHere>".repeat(order.len()), order.len());
        let batch: Vec<_> = order.iter().map(|&i| images[i].clone()).collect();
        for _ in 0..2 {
            let filled = encode(&both.cuda, &plan, &batch); // captured, then replayed
            for (k, &i) in order.iter().enumerate() {
                assert!(rows(&plan, &filled, k) == alone[i], "image {i} in {order:?}");
            }
        }
    }
}

#[test]
fn files_are_as_their_pixels_however_few_blocks_there_are() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let (cuda, devices) = with_devices(&[0], &both.dir.path().join("model"), &EncoderOptions::new());
    let pictures = pictures(14); // more than a group
    let images = files(&pictures);
    let plan = both.plan(&"<ImageHere>".repeat(14), 14);
    let expected = encode(&both.cuda, &plan, &sources(&pictures));
    for blocks in [0, 3, 4, 30] {
        lock(&devices).bound_pool(blocks * STEP);
        let pool = lock(&devices).pool().clone();
        for round in 0..2 {
            assert!(
                bits(&encode(&cuda, &plan, &images)) == bits(&expected),
                "{blocks} blocks, round {round}"
            );
            let (count, bytes) = pool.size();
            assert!(count <= blocks.min(14) && bytes == count * STEP, "{count} blocks of {bytes} bytes");
            assert!(count > 0 || blocks == 0);
        }
        // All of them are somewhere else: nobody waits for them.
        let _held: Vec<_> = std::iter::from_fn(|| pool.lend(1)).collect();
        assert!(bits(&encode(&cuda, &plan, &images)) == bits(&expected), "{blocks} blocks, none free");
    }
}

#[test]
fn an_image_of_several_sequences_is_encoded_once_into_all_its_slots() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let pictures = pictures(3);
    let (first, second) =
        (both.plan("a <ImageHere> b <ImageHere>", 2), both.plan("<ImageHere><ImageHere> c", 2));
    let mut packed = PackedPlan::new();
    packed.push(&first, [2, 0]).unwrap();
    packed.push(&second, [0, 1]).unwrap();
    let mut sequence = both.cuda.device_sequence().unwrap();
    let report = both.cuda.encode_into(packed.clone(), &sources(&pictures), &mut sequence).unwrap();
    assert_eq!(report.images_encoded, 3);
    sequence.verify().unwrap();
    let expected = encode(&both.cuda, packed, &sources(&pictures));
    assert_eq!(bits(&sequence.to_host().unwrap()), bits(&expected));
}

#[test]
fn the_callers_memory_is_filled_in_place_and_nothing_else_is_touched() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let hidden = both.cuda.config().hidden_size;
    let pictures = pictures(2);
    let plan = both.plan("a <ImageHere> b <ImageHere>", 2);
    let expected = encode(&both.cuda, &plan, &sources(&pictures));
    let gpu = Gpu::open_with(0, images()).unwrap();
    let stream = crate::cuda::driver::Stream::new(&gpu.context).unwrap();
    let mark = 0x5555;
    for (stride, before) in [(hidden, 0), (hidden + 3, 1), (hidden + 8, 5)] {
        let elements = (plan.len() + 2) * stride;
        let memory = DeviceMemory::new(&gpu.context, 2 * (before + elements), "a test").unwrap();
        // SAFETY: the memory outlives its use below.
        let all = unsafe { memory.span() }.cast::<f16>().unwrap();
        stream.fill_16(all, mark).unwrap();
        let address = all.ptr().address() + 2 * before as u64;
        // SAFETY: the memory is ours and outlives the sequence; so does the stream.
        let mut sequence =
            unsafe { both.cuda.wrap_device(address, elements, stride, stream.raw() as usize).unwrap() };
        both.cuda.encode_into(&plan, &sources(&pictures), &mut sequence).unwrap();
        let report = sequence.verify().unwrap();
        assert_eq!(report.slots.len(), 2);
        assert_eq!(sequence.device_address(), Some((address, stride)));
        assert_eq!(bits(&sequence.to_host().unwrap()), bits(&expected));
        drop(sequence);
        let mut found = vec![f16::ZERO; before + elements];
        stream.download_and_wait(all, &mut found).unwrap();
        for (i, value) in found.iter().enumerate() {
            let inside = i >= before && (i - before) / stride < plan.len() && (i - before) % stride < hidden;
            assert_eq!(value.to_bits() == mark, !inside, "element {i}");
        }
    }
}

#[test]
fn verify_on_the_device_finds_what_the_host_finds() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let pictures = pictures(2);
    let plan = both.plan("a <ImageHere> b <ImageHere>", 2);
    let mut sequence = both.cuda.device_sequence().unwrap();
    assert!(sequence.verify().unwrap_err().to_string().contains("nothing was encoded"));
    both.cuda.encode_into(&plan, &sources(&pictures), &mut sequence).unwrap();
    let mut on_host = SequenceBuffer::new();
    both.cuda.encode_into(&plan, &sources(&pictures), &mut on_host).unwrap();
    let (device, host) = (sequence.verify().unwrap(), on_host.verify().unwrap());
    for (device, host) in device.slots.iter().zip(&host.slots) {
        assert_eq!((device.image, device.slot), (host.image, host.slot));
        assert!((device.mean_norm / host.mean_norm - 1.0).abs() < 1e-5, "{device:?}, {host:?}");
    }
    let (address, stride) = sequence.device_address().unwrap();
    let gpu = Gpu::open_with(0, images()).unwrap();
    let stream = crate::cuda::driver::Stream::new(&gpu.context).unwrap();
    let spoil = |row: usize, channel: usize, value: f16| {
        let at = address + 2 * (row * stride + channel) as u64;
        // SAFETY: an element of the sequence, which nothing is enqueued for.
        let span = unsafe { crate::cuda::driver::Span::new(DevicePtr::new(at), 1) };
        stream.upload_and_wait(span, &[value]).unwrap();
    };
    let row = plan.slots[1].offset + 3;
    spoil(row, 5, f16::INFINITY);
    let problem = sequence.verify().unwrap_err().to_string();
    assert!(problem.contains(&format!("row {row} (image 1) holds inf in channel 5")), "{problem}");
    spoil(2, 7, crate::sequence::POISON);
    let problem = sequence.verify().unwrap_err().to_string();
    assert!(problem.contains("row 2 (text) was not written"), "{problem}");
}

#[test]
fn staged_use_places_features_without_encoding_again() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let pictures = pictures(2);
    let features = both.cuda.features(&sources(&pictures)).unwrap();
    let plan = both.plan("<ImageHere> and <ImageHere>, together", 2);
    let expected = encode(&both.cuda, &plan, &sources(&pictures));
    let mut on_device = both.cuda.device_sequence().unwrap();
    for sequence in [&mut SequenceBuffer::new(), &mut on_device] {
        both.cuda.place_into(&plan, &features, sequence).unwrap();
        sequence.verify().unwrap();
        assert_eq!(bits(&sequence.to_host().unwrap()), bits(&expected));
    }
}

#[test]
fn what_fails_writes_nothing() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let hidden = both.cuda.config().hidden_size;
    let pictures = pictures(1);
    let plan = both.plan("a <ImageHere>, <ImageHere>, <ImageHere>", 3);
    let mark = f16::from_bits(0x5555);
    let mut theirs = vec![mark; plan.len() * hidden];
    let images =
        [(&pictures[0]).into(), ImageSource::from(&b"no image"[..]), ImageSource::from(&b"nor this"[..])];
    for _ in 0..3 {
        let mut sequence = SequenceBuffer::wrap(&mut theirs, hidden);
        let error = both.cuda.encode_into(&plan, &images, &mut sequence).unwrap_err();
        assert!(matches!(error, Error::Image { index: 1, .. }), "{error}");
        assert!(sequence.verify().is_err());
    }
    assert!(theirs.iter().all(|x| x.to_bits() == mark.to_bits()));

    let mut on_device = both.cuda.device_sequence().unwrap();
    let error = both.cpu.encode_into(
        &plan,
        &[images[0].clone(), images[0].clone(), images[0].clone()],
        &mut on_device,
    );
    assert_eq!(error.unwrap_err().category(), crate::Category::Input);
    let error = both.cpu.device_sequence().unwrap_err();
    assert!(error.to_string().contains("no memory of its own"), "{error}");
}

#[test]
fn stages_are_shown_as_on_the_cpu() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let pictures = pictures(2);
    let trace = |encoder: &Encoder| {
        let mut seen = Vec::new();
        encoder
            .trace(&(&pictures[1]).into(), &mut |stage, values| seen.push((stage, values.to_vec())))
            .unwrap();
        seen
    };
    let (cpu, cuda) = (trace(&both.cpu), trace(&both.cuda));
    assert_eq!(cpu.len(), cuda.len());
    for ((stage, cpu), (same, cuda)) in cpu.iter().zip(&cuda) {
        assert_eq!((stage, cpu.len()), (same, cuda.len()));
        let error = relative_l2(cuda, &wide(cpu));
        assert!(error <= 1e-3, "{stage:?}: {error:e}");
    }
    assert_eq!(bits(&cpu[0].1), bits(&cuda[0].1), "patches are equal");
}

#[test]
fn calls_from_several_threads_queue() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    let pictures = pictures(4);
    let plan = both.plan("<ImageHere>", 1);
    let each: Vec<Vec<u16>> = sources(&pictures)
        .iter()
        .map(|image| bits(&encode(&both.cuda, &plan, std::slice::from_ref(image))))
        .collect();
    std::thread::scope(|scope| {
        for i in 0..4 {
            let (both, plan, pictures, each) = (&both, &plan, &pictures, &each);
            scope.spawn(move || {
                for round in 0..3 {
                    let k = (i + round) % 4;
                    let image = (&pictures[k]).into();
                    assert!(
                        bits(&encode(&both.cuda, plan, &[image])) == each[k],
                        "thread {i}, round {round}"
                    );
                }
            });
        }
    });
}

/// Does `work` on a thread of its own; a test that would never end fails instead.
fn within_a_minute(what: &str, work: impl FnOnce() + Send + 'static) {
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        work();
        done.send(()).unwrap();
    });
    wait.recv_timeout(std::time::Duration::from_secs(60)).unwrap_or_else(|error| panic!("{what}: {error}"));
}

#[test]
fn calls_from_inside_a_thread_pool_end() {
    let both = Arc::new(Both::new(DType::Bf16, &EncoderOptions::new()));
    let pictures = pictures(5);
    let plan = both.plan(&"<ImageHere>".repeat(5), 5);
    let expected = bits(&encode(&both.cuda, &plan, &sources(&pictures)));
    let files = files(&pictures);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (both, plan, files, expected) = (both.clone(), plan.clone(), files.clone(), expected.clone());
        // While one call has the devices, threads that wait for it take up others; none may wait for itself.
        within_a_minute(&format!("{threads} threads"), move || {
            let call = |_| assert!(bits(&encode(&both.cuda, &plan, &files)) == expected);
            pool.install(|| (0..4).into_par_iter().for_each(call));
        });
    }
}

#[test]
fn warming_up_captures_what_calls_then_replay() {
    let both = Both::new(DType::Bf16, &EncoderOptions::new());
    both.cuda.warm_up(&[1, 2, 100]).unwrap();
    let pictures = pictures(2);
    let plan = both.plan("<ImageHere><ImageHere>", 2);
    let warm = encode(&both.cuda, &plan, &sources(&pictures));
    let cold = Both::new(DType::Bf16, &EncoderOptions::new());
    assert_eq!(bits(&warm), bits(&encode(&cold.cuda, &plan, &sources(&pictures))));
}
