//! Two emulated devices, in processes of their own, against one.

use half::f16;
use serde_json::Value;

use super::super::*;
use crate::Encoder;
use crate::cuda::backend::tests::{encode, files, on_gpus, pictures, sources};
use crate::cuda::driver::{DeviceMemory, Stream};
use crate::cuda::testkit::{self, bits, emulated_pending, load_emulator, logged, set_emulated};
use crate::encoder::EncoderOptions;
use crate::image::{ImageSource, RgbImage};
use crate::packing::PackedPlan;
use crate::prompt::{Request, SequencePlan};
use crate::sequence::SequenceBuffer;
use crate::synth::{self, Preset, SynthOptions};

/// Runs one of the tests below with two devices that reach one another, and with two that do not.
fn with_and_without_peer_access(test: &str, seeds: &[&str]) {
    for &seed in seeds {
        for no_peer in ["0", "1"] {
            let environment = [("EMU_DEVICES", "2"), ("EMU_NO_PEER", no_peer), ("EMU_SEED", seed)];
            testkit::in_child(&format!("cuda::peers::tests::emulated::{test}"), &environment);
        }
    }
}

/// A small checkpoint, open on one device and on two.
struct Pair {
    one: Encoder,
    two: Encoder,
    reach: bool,
    _dir: tempfile::TempDir,
}

impl Pair {
    fn new() -> Self {
        load_emulator();
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        synth::write(Preset::Tiny, &SynthOptions::default(), &model).unwrap();
        let [one, two] =
            [&[0][..], &[0, 1]].map(|ordinals| on_gpus(ordinals, &model, &EncoderOptions::new()));
        let reach = std::env::var("EMU_NO_PEER").unwrap() == "0";
        Self { one, two, reach, _dir: dir }
    }

    fn plan(&self, prompt: &str, images: usize) -> SequencePlan {
        self.one.plan(&Request::new(prompt).image_count(images)).unwrap()
    }

    /// Copies between devices for so many slots that the second has filled.
    fn copies(&self, slots: usize) -> usize {
        if self.reach { 0 } else { slots }
    }
}

/// What ran, in a log.
fn ran(log: &[Value]) -> impl Iterator<Item = &Value> {
    log.iter().filter(|line| line["event"] == "run")
}

/// Copies between devices in a log.
fn copies(log: &[Value]) -> usize {
    ran(log).filter(|line| line["kind"] == "peer").count()
}

/// Launches of the projector's last layer in a log, by device.
fn scatters(log: &[Value]) -> [usize; 2] {
    let scatter = |line: &&Value| line["kernel"].as_str().is_some_and(|name| name.contains("scatter"));
    [0, 1].map(|device| ran(log).filter(scatter).filter(|line| line["device"] == device).count())
}

#[test]
fn two_devices_give_the_bits_of_one() {
    with_and_without_peer_access("child_gives_the_bits_of_one", &["0"]);
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_gives_the_bits_of_one() {
    let pair = Pair::new();
    let name = pair.two.describe();
    assert!(name.starts_with("cuda:0 (") && name.contains(" + cuda:1 ("), "{name}");
    pair.two.warm_up(&[0, 1, 2, 5, 14, 36]).unwrap();
    for (count, of_second, groups) in
        [(0, 0, [0, 0]), (1, 0, [1, 0]), (2, 1, [1, 1]), (5, 2, [1, 1]), (14, 7, [1, 1]), (36, 18, [2, 2])]
    {
        let pictures = pictures(count);
        let plan = pair.plan(&format!("some {}", "<ImageHere> and ".repeat(count)), count);
        let expected = encode(&pair.one, &plan, &sources(&pictures));
        let mut found = Vec::new();
        let log = logged(|| found = encode(&pair.two, &plan, &sources(&pictures)));
        assert!(bits(&found) == bits(&expected), "{count} images");
        assert_eq!((copies(&log), scatters(&log)), (pair.copies(of_second), groups), "{count} images");
        assert!(log.iter().all(|line| line["event"] != "instantiate"), "{count} images are warm");

        // Decoded into one pool, uploaded by both.
        let files = files(&pictures);
        let log = logged(|| found = encode(&pair.two, &plan, &files));
        assert!(bits(&found) == bits(&expected), "{count} files");
        assert!(log.iter().all(|line| line["event"] != "host_alloc"), "{count} files are warm");
    }
    // Pictures of the tower's size and no text: so few uploads that none waits for the primary's poison.
    let pictures = pictures(1);
    let features = |encoder: &Encoder| encoder.features(&[(&pictures[0]).into(), (&pictures[0]).into()]);
    for (of_two, of_one) in features(&pair.two).unwrap().iter().zip(&features(&pair.one).unwrap()) {
        assert!(bits(of_two.as_slice()) == bits(of_one.as_slice()));
    }

    // No room, on whichever device asks first or second: smaller groups there, the same bits.
    let large = RgbImage { width: 800, height: 600, data: vec![77; 3 * 800 * 600] };
    let plan = pair.plan("<ImageHere><ImageHere><ImageHere>", 3);
    let images = vec![ImageSource::from(&large); 3];
    let expected = encode(&pair.one, &plan, &images);
    let mut found = Vec::new();
    set_emulated("FAIL", "alloc:1,alloc:3");
    let log = logged(|| found = encode(&pair.two, &plan, &images));
    set_emulated("FAIL", "");
    assert_eq!(log.iter().filter(|line| line["event"] == "alloc" && line["address"] == 0).count(), 2);
    assert!(bits(&found) == bits(&expected));

    // A call that panics half-way leaves work behind; whoever comes next waits for it.
    let plan = pair.plan("<ImageHere><ImageHere><ImageHere><ImageHere>", 4);
    let images = vec![ImageSource::from(&pictures[0]); 4];
    let expected = encode(&pair.one, &plan, &images);
    let mut sequence = pair.two.device_sequence().unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut panic = |_: f32| -> std::ops::ControlFlow<()> { panic!("on purpose") };
        pair.two.encode_watched(&plan, &images, &mut sequence, &mut panic)
    }));
    assert!(panicked.is_err() && emulated_pending() > 0);
    drop(sequence);
    assert_eq!(emulated_pending(), 0, "something writes to memory that is gone");
    assert!(bits(&encode(&pair.two, &plan, &images)) == bits(&expected));
}

#[test]
fn two_devices_fill_sequences_on_the_first() {
    with_and_without_peer_access("child_fills_sequences_on_the_first", &["0", "1", "2"]);
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_fills_sequences_on_the_first() {
    let pair = Pair::new();
    let hidden = pair.one.config().hidden_size;
    let pictures = pictures(3);
    // Image 0 fills two slots; the second device has image 2, which fills two as well.
    let (first, second) =
        (pair.plan("a <ImageHere> b <ImageHere>", 2), pair.plan("<ImageHere><ImageHere><ImageHere> c", 3));
    let mut packed = PackedPlan::new();
    packed.push(&first, [2, 0]).unwrap();
    packed.push(&second, [0, 1, 2]).unwrap();
    let expected = encode(&pair.one, packed.clone(), &sources(&pictures));
    assert!(bits(&encode(&pair.two, packed.clone(), &sources(&pictures))) == bits(&expected));

    let mut sequence = pair.two.device_sequence().unwrap();
    for _ in 0..2 {
        let log = logged(|| {
            let report = pair.two.encode_into(packed.clone(), &sources(&pictures), &mut sequence).unwrap();
            assert_eq!(report.images_encoded, 3);
        });
        assert_eq!(copies(&log), pair.copies(2));
        sequence.verify().unwrap();
        assert!(bits(&sequence.to_host().unwrap()) == bits(&expected));
    }

    let gpu = Gpu::open_with(0, testkit::images()).unwrap();
    let stream = Stream::new(&gpu.context).unwrap();
    let mark = 0x5555;
    for (stride, before) in [(hidden, 0), (hidden + 3, 1), (hidden + 8, 5)] {
        let elements = (packed.total_len() + 2) * stride;
        let memory = DeviceMemory::new(&gpu.context, 2 * (before + elements), "a test").unwrap();
        // SAFETY: the memory outlives its use below.
        let all = unsafe { memory.span() }.cast::<f16>().unwrap();
        // Not waited for here: the call does that.
        stream.fill_16(all, mark).unwrap();
        let address = all.ptr().address() + 2 * before as u64;
        // SAFETY: the memory is ours and outlives the sequence; so does the stream.
        let mut sequence =
            unsafe { pair.two.wrap_device(address, elements, stride, stream.raw() as usize).unwrap() };
        let log = logged(|| {
            pair.two.encode_into(packed.clone(), &sources(&pictures), &mut sequence).unwrap();
        });
        assert_eq!(copies(&log), pair.copies(2), "one a slot, whatever the stride");
        sequence.verify().unwrap();
        assert!(bits(&sequence.to_host().unwrap()) == bits(&expected));
        drop(sequence);
        let mut found = vec![f16::ZERO; before + elements];
        stream.download_and_wait(all, &mut found).unwrap();
        let rows = packed.total_len();
        for (i, value) in found.iter().enumerate() {
            let inside = i >= before && (i - before) / stride < rows && (i - before) % stride < hidden;
            assert_eq!(value.to_bits() == mark, !inside, "element {i}");
        }
    }

    // Memory that peer access does not open.
    let elements = packed.total_len() * hidden;
    let mut address = 0;
    let _sets_the_context = gpu.context.memory().unwrap();
    type Allocate = unsafe extern "C" fn(*mut u64, usize, usize) -> i32;
    // SAFETY: the driver's function, of this type; a place for one address.
    let done =
        unsafe { load_emulator().get::<Allocate>("cuMemAllocAsync").unwrap()(&mut address, 2 * elements, 0) };
    assert_eq!(done, 0);
    // SAFETY: the memory is never freed; the stream is the default one.
    let mut sequence = unsafe { pair.two.wrap_device(address, elements, hidden, 0).unwrap() };
    let log = logged(|| {
        pair.two.encode_into(packed.clone(), &sources(&pictures), &mut sequence).unwrap();
    });
    assert_eq!(copies(&log), 2);
    assert!(bits(&sequence.to_host().unwrap()) == bits(&expected));
}

#[test]
fn what_fails_on_one_of_two_fails_whole() {
    with_and_without_peer_access("child_fails_whole", &["0", "2"]);
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_fails_whole() {
    let pair = Pair::new();
    let hidden = pair.one.config().hidden_size;
    let pictures = pictures(4);
    let plan = pair.plan(&"<ImageHere>".repeat(6), 6);
    let mark = f16::from_bits(0x5555);
    let mut theirs = vec![mark; plan.len() * hidden];
    let good = |i: usize| ImageSource::from(&pictures[i]);
    let bad = || ImageSource::from(&b"no image"[..]);
    // Of two broken ones, the first in the order of the call, whichever device has it.
    for (images, broken) in [
        ([good(0), good(1), good(2), bad(), good(3), good(0)], 3),
        ([good(0), bad(), good(2), bad(), good(3), bad()], 1),
        ([good(0), good(1), good(2), good(3), good(0), bad()], 5),
    ] {
        let mut sequence = SequenceBuffer::wrap(&mut theirs, hidden);
        let error = pair.two.encode_into(&plan, &images, &mut sequence).unwrap_err();
        assert!(matches!(error, Error::Image { index, .. } if index == broken), "{error}");
        assert_eq!(emulated_pending(), 0, "something goes on");
    }
    let images: Vec<_> = (0..6).map(|i| good(i % 4)).collect();
    let expected = encode(&pair.one, &plan, &images);
    assert!(bits(&encode(&pair.two, &plan, &images)) == bits(&expected), "failures leave nothing behind");

    let error = Gpu::open_with(2, testkit::images()).unwrap_err().to_string();
    assert!(error.contains("`cuda:2`") && error.contains("shows 2 devices"), "{error}");
    assert_eq!(Gpu::open_all_with(testkit::images()).unwrap().len(), 2);

    // A kernel of the second device.
    set_emulated("FAIL", "launch:layer_norm:719:1");
    let mut sequence = SequenceBuffer::wrap(&mut theirs, hidden);
    let error = pair.two.encode_into(&plan, &images, &mut sequence).unwrap_err();
    assert_eq!(error.category(), crate::Category::Device);
    assert!(error.to_string().contains("`cuda:1`") && error.to_string().contains("719"), "{error}");
    assert_eq!(emulated_pending(), 0, "something goes on");
    assert!(pair.two.encode_into(&plan, &images, &mut sequence).is_err(), "it does not recover");
    assert!(theirs.iter().all(|x| x.to_bits() == mark.to_bits()), "rows of a call that failed");
    let error = Gpu::open_with(1, testkit::images()).unwrap_err().to_string();
    assert!(error.contains("broke earlier in this process"), "{error}");
    assert_eq!(Gpu::open_all_with(testkit::images()).unwrap().len(), 1, "the one that is left");
    assert!(bits(&encode(&pair.one, &plan, &images)) == bits(&expected), "the first goes on");
}
