//! What an encode makes a GPU do, from the emulated driver's log: every launch, copy and allocation.
//!
//! The projector's last linear writes features where they are used, so no byte of a feature is copied after it:
//! not on the device, and to the host only where the sequence itself lies there.

#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::fs;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use imagehere::backend::Device;
use imagehere::encoder::{Encoder, EncoderOptions};
use imagehere::image::{DecodeOptions, ImageSource, RgbImage, decode};
use imagehere::packing::PackedPlan;
use imagehere::prompt::{Meta, Request, SequencePlan};
use imagehere::sequence::SequenceBuffer;
use imagehere::synth::{self, Preset, SynthOptions};
use serde_json::Value;

#[path = "support/emulator.rs"]
mod emulator;

/// Images of a group, at most.
const GROUP: usize = 16;
/// Bytes that every call reads back: what the text rows held that fp16 cannot.
const REPORT: u64 = 16;

/// A tiny model on the emulated device; one at a time, since the log is the device's.
struct Case {
    encoder: Encoder,
    dir: tempfile::TempDir,
    _alone: std::sync::MutexGuard<'static, ()>,
}

impl Case {
    fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        emulator::load();
        let dir = tempfile::tempdir().unwrap();
        synth::write(Preset::Tiny, &SynthOptions::default(), dir.path().join("model")).unwrap();
        let options = EncoderOptions::new().device(Device::Cuda(0));
        let encoder = Encoder::open_with(dir.path().join("model"), options).unwrap();
        Self { encoder, dir, _alone: alone }
    }

    fn plan(&self, prompt: &str) -> SequencePlan {
        let count = prompt.matches("<ImageHere>").count();
        let request = Request::new(prompt).image_count(count).meta_instruction(Meta::None);
        self.encoder.plan(&request).unwrap()
    }

    /// Bytes of a row of a sequence.
    fn row(&self) -> u64 {
        2 * self.encoder.config().hidden_size as u64
    }

    /// Kernels of the captured graph.
    fn nodes(&self) -> usize {
        4 + if self.on_hopper() { 5 } else { 7 } * self.encoder.config().layers
    }

    /// Whether layer norms are in the layers after them, but for the first.
    fn on_hopper(&self) -> bool {
        self.encoder.describe().contains("sm90 kernels")
    }

    /// What the driver logs while `work` is done.
    fn log(&self, work: impl FnOnce()) -> Log {
        let path = self.dir.path().join("log");
        emulator::set("LOG", path.to_str().unwrap());
        work();
        emulator::set("LOG", "");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(&path);
        Log(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    /// What the driver logs while a sequence is filled.
    fn encode<'p>(
        &self,
        plan: impl Into<PackedPlan<'p>>,
        pictures: &[RgbImage],
        sequence: &mut SequenceBuffer<'_>,
    ) -> Log {
        let images: Vec<ImageSource<'_>> = pictures.iter().map(Into::into).collect();
        let plan = plan.into();
        self.log(|| {
            self.encoder.encode_into(plan, &images, sequence).unwrap();
        })
    }
}

/// Pictures that each need both passes of a resize.
fn pictures(count: usize) -> Vec<RgbImage> {
    let picture = |i: usize| {
        let (width, height) = (90 - i as u32, 40 + i as u32);
        let data = (0..3 * width * height).map(|x| (x * (7 + i as u32)) as u8).collect();
        RgbImage { width, height, data }
    };
    (0..count).map(picture).collect()
}

/// The same as PNG files.
fn files(pictures: &[RgbImage]) -> Vec<Vec<u8>> {
    let file = |picture: &RgbImage| {
        let mut file = Vec::new();
        picture.write_png(&mut file).unwrap();
        file
    };
    pictures.iter().map(file).collect()
}

/// True if an address of the host is in memory that the driver pinned.
fn is_pinned(address: u64) -> bool {
    type Get = unsafe extern "C" fn(*mut u32, i32, u64) -> i32;
    const MEMORY_TYPE: i32 = 2;
    const HOST: u32 = 1;
    let mut kind = 0;
    // SAFETY: the driver's function, of this type; a place for one number.
    let done = unsafe {
        emulator::load().get::<Get>("cuPointerGetAttribute").unwrap()(&mut kind, MEMORY_TYPE, address)
    };
    done == 0 && kind == HOST
}

/// Events in the order in which they happened.
struct Log(Vec<Value>);

fn number(event: &Value, key: &str) -> u64 {
    event[key].as_u64().unwrap()
}

impl Log {
    /// Counts events of a kind: "alloc", "free", "host_alloc", "instantiate" …
    fn count(&self, event: &str) -> usize {
        self.0.iter().filter(|line| line["event"] == event).count()
    }

    /// Pieces of work that were done: "launch", "copy", "fill", "graph".
    fn done(&self, what: &str) -> impl Iterator<Item = &Value> {
        self.0.iter().filter(move |line| line["event"] == "run" && line["what"] == what)
    }

    /// Names of the kernels that ran, by graphs (`true`) or by themselves.
    fn kernels(&self, by_graph: bool) -> Vec<&str> {
        let wanted = self.done("launch").filter(|line| (line["graph"] != 0) == by_graph);
        wanted.map(|line| line["kernel"].as_str().unwrap()).collect()
    }

    /// Copies of a kind: "HtoD", "DtoH", "DtoD", "peer".
    fn copies(&self, kind: &str) -> Vec<&Value> {
        self.done("copy").filter(|line| line["kind"] == kind).collect()
    }

    /// Copies and fills of which one side is in this part of the device's memory.
    fn touching(&self, memory: &Range<u64>) -> Vec<&Value> {
        let inside = |line: &Value, key: &str| line[key].as_u64().is_some_and(|at| memory.contains(&at));
        let moves = self.done("copy").chain(self.done("fill"));
        moves.filter(|line| inside(line, "src") || inside(line, "dst")).collect()
    }

    /// What was done after the last kernel that writes features.
    fn after_the_projector(&self) -> Self {
        let is_scatter = |line: &Value| {
            line["event"] == "run" && line["kernel"].as_str().is_some_and(|k| is_linear(k, "scatter"))
        };
        let last = self.0.iter().rposition(is_scatter).unwrap();
        Self(self.0[last + 1..].to_vec())
    }
}

/// Whether a kernel is a linear layer with this epilogue, of whatever family and tile.
fn is_linear(kernel: &str, epilogue: &str) -> bool {
    let name = kernel.strip_prefix("linear_").unwrap_or_default();
    name.strip_prefix("sm90_").unwrap_or(name).starts_with(epilogue)
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn features_on_the_device_are_never_copied() {
    let case = Case::new();
    let pictures = pictures(3);
    let (first, second) = (case.plan("a<ImageHere>b<ImageHere>"), case.plan("<ImageHere><ImageHere>c"));
    let mut packed = PackedPlan::new(); // image 0 fills two slots
    packed.push(&first, [2, 0]).unwrap();
    packed.push(&second, [0, 1]).unwrap();
    let mut sequence = case.encoder.device_sequence().unwrap();
    for round in 0..2 {
        let log = case.encode(packed.clone(), &pictures, &mut sequence);
        let (address, stride) = sequence.device_address().unwrap();
        let rows = (first.len() + second.len()) as u64;
        assert_eq!(2 * stride as u64, case.row());
        let memory = address..address + rows * case.row();

        assert!(log.kernels(true).last().is_some_and(|kernel| is_linear(kernel, "scatter")));
        let after = log.after_the_projector();
        assert_eq!(after.done("launch").count() + after.done("fill").count(), 0, "round {round}");
        let copies: Vec<&Value> = after.done("copy").collect();
        assert_eq!(copies.len(), 1, "round {round}: {copies:?}");
        assert_eq!((&copies[0]["kind"], number(copies[0], "bytes")), (&"DtoH".into(), REPORT));

        // Nor before it: only kernels write the sequence, and the poison that shows what nobody wrote.
        assert_eq!((log.copies("DtoD").len(), log.copies("peer").len()), (0, 0));
        assert_eq!(log.copies("DtoH").len(), 1, "all that comes back is the report");
        let touching = log.touching(&memory);
        assert_eq!(touching.len(), 1, "{touching:?}");
        assert_eq!((&touching[0]["what"], number(touching[0], "bytes")), (&"fill".into(), rows * case.row()));
    }
    sequence.verify().unwrap();
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn a_sequence_on_the_host_is_read_back_once_and_nothing_else_is() {
    let case = Case::new();
    let plan = case.plan("a<ImageHere>b<ImageHere>");
    let log = case.encode(&plan, &pictures(2), &mut SequenceBuffer::new());
    assert_eq!((log.copies("DtoD").len(), log.copies("peer").len()), (0, 0));
    let back: u64 = log.copies("DtoH").iter().map(|copy| number(copy, "bytes")).sum();
    assert_eq!(back, REPORT + plan.len() as u64 * case.row());
    let after = log.after_the_projector();
    assert_eq!(after.done("launch").count(), 0);
    assert_eq!(after.copies("DtoH").len(), after.done("copy").count());
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn one_graph_runs_for_each_group_of_images() {
    let case = Case::new();
    let mut sequence = case.encoder.device_sequence().unwrap();
    let mut graphs = 0;
    for (count, groups, captures) in
        [(0, 0, 0), (1, 1, 1), (1, 1, 0), (5, 1, 1), (GROUP + 1, 2, 2), (5, 1, 0)]
    {
        let plan = case.plan(&format!("text{}", "<ImageHere>".repeat(count)));
        let log = case.encode(&plan, &pictures(count), &mut sequence);
        assert_eq!(log.done("graph").count(), groups, "{count} images");
        assert_eq!(log.count("instantiate"), captures, "{count} images");
        graphs += captures;

        let by_graph = log.kernels(true);
        assert_eq!(by_graph.len(), groups * case.nodes(), "{count} images: {by_graph:?}");
        for graph in by_graph.chunks(case.nodes()) {
            let (first, last) = (graph[0], graph[graph.len() - 1]);
            assert!(is_linear(first, "embed") && is_linear(last, "scatter"), "{graph:?}");
            let count = |is: &dyn Fn(&str) -> bool| graph.iter().filter(|name| is(name)).count();
            let layers = case.encoder.config().layers;
            let norms = if case.on_hopper() { 1 } else { 1 + 2 * layers };
            assert_eq!(count(&|kernel| kernel == "layer_norm"), norms, "{graph:?}");
            assert_eq!(count(&|kernel| kernel.starts_with("attention")), layers, "{graph:?}");
            assert_eq!(count(&|kernel| is_linear(kernel, "residual")), 2 * layers, "{graph:?}");
        }
        // Outside: the text rows of a call; of each image two passes of its resize, and its patches.
        let mut outside = log.kernels(false);
        outside.sort_unstable();
        let mut expected = vec!["embed_tokens_bf16"];
        expected.extend(vec!["patches"; count]);
        expected.extend(vec!["resize_horizontal"; count]);
        expected.extend(vec!["resize_vertical"; count]);
        assert_eq!(outside, expected, "{count} images");
    }
    assert_eq!(graphs, 4, "1, 5, 9 and 8 images");
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn a_call_like_an_earlier_one_allocates_nothing() {
    let case = Case::new();
    let pictures = pictures(4);
    let plan = case.plan("a<ImageHere>b<ImageHere>c<ImageHere><ImageHere>");
    let smaller = case.plan("a<ImageHere>");
    let mut on_device = case.encoder.device_sequence().unwrap();
    let mut on_host = SequenceBuffer::new();
    for sequence in [&mut on_device, &mut on_host] {
        let first = case.encode(&plan, &pictures, sequence);
        assert!(first.count("alloc") > 0, "rows and images need a place at first");
        for (plan, pictures) in [(&plan, &pictures[..]), (&smaller, &pictures[1..2]), (&plan, &pictures[..])]
        {
            let log = case.encode(plan, pictures, sequence);
            for event in ["alloc", "free", "host_alloc"] {
                assert_eq!(log.count(event), 0, "{event}");
            }
        }
        let again = case.encode(&plan, &pictures, sequence);
        assert_eq!(again.count("instantiate"), 0);
    }
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn a_file_goes_up_by_one_copy_from_where_it_was_decoded() {
    let case = Case::new();
    let side = case.encoder.config().image_size as u32;
    let square = RgbImage { width: side, height: side, data: vec![99; 3 * (side * side) as usize] };
    let exif = include_bytes!("goldens/image/exif_6.jpg"); // turned on the way
    let turned = decode::decode(0, &exif.into(), &DecodeOptions::default()).unwrap().into_image();
    let plan = case.plan("a<ImageHere>");
    let mut sequence = case.encoder.device_sequence().unwrap();
    let mut pinned = 0;
    for seed in ["0", "1", "2", "3"] {
        emulator::set("SEED", seed);
        for picture in [pictures(1).remove(0), square.clone(), turned.clone()] {
            let file = if picture == turned {
                exif.to_vec()
            } else {
                files(std::slice::from_ref(&picture)).remove(0)
            };
            let (width, height) = (u64::from(picture.width), u64::from(picture.height));
            for round in 0..2 {
                let from_pixels = case.encode(&plan, std::slice::from_ref(&picture), &mut sequence);
                let expected = sequence.to_host().unwrap();
                let log = case.log(|| {
                    case.encoder.encode_into(&plan, &[file.clone().into()], &mut sequence).unwrap();
                });
                assert!(sequence.to_host().unwrap() == expected, "{width}x{height}");

                let of_image = |copy: &&&Value| number(copy, "bytes") == 3 * width * height;
                let copies = log.copies("HtoD");
                let whole: Vec<_> = copies.iter().filter(of_image).collect();
                assert_eq!(whole.len(), 1, "{copies:?}");
                assert_eq!(number(whole[0], "rows"), height);
                assert!(is_pinned(number(whole[0], "src")));
                // Nothing else goes up that would not go up for pixels.
                assert_eq!(copies.len(), from_pixels.copies("HtoD").len());
                let allocations = [log.count("alloc"), log.count("free")];
                assert_eq!(allocations, [0; 2], "what pixels needed is there");
                pinned += log.count("host_alloc");
                assert!(round == 0 || log.count("host_alloc") == 0, "the second call pins nothing");
            }
        }
    }
    emulator::set("SEED", "0");
    assert_eq!(pinned, 2, "two blocks: the image as stored and turned upright");
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn pixels_that_are_lent_go_up_in_bands_that_a_slot_of_the_ring_takes() {
    let case = Case::new();
    let (width, height) = (5000, 1200);
    let data: Vec<u8> = (0..3 * width * height).map(|x| (x * 7 / 300) as u8).collect();
    let picture = RgbImage { width, height, data };
    let file = files(std::slice::from_ref(&picture)).remove(0);
    let plan = case.plan("<ImageHere>");
    let mut sequence = case.encoder.device_sequence().unwrap();
    let log = case.encode(&plan, &[picture], &mut sequence);
    let large = |copy: &&&Value| number(copy, "bytes") > 1 << 20;
    let bytes: Vec<u64> = log.copies("HtoD").iter().filter(large).map(|copy| number(copy, "bytes")).collect();
    assert!(bytes.len() > 1 && bytes.iter().all(|&bytes| bytes <= 16 << 20), "{bytes:?}");
    assert_eq!(bytes.iter().sum::<u64>(), 3 * u64::from(width * height));
    assert_eq!(log.count("host_alloc"), 0, "the ring is there");

    let expected = sequence.to_host().unwrap();
    case.encoder.encode_into(&plan, &[file.into()], &mut sequence).unwrap();
    assert!(sequence.to_host().unwrap() == expected, "as a file, which goes up whole");
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn after_warming_up_files_find_their_memory_pinned() {
    let case = Case::new();
    let log = case.log(|| case.encoder.warm_up(&[4]).unwrap());
    assert_eq!(log.count("host_alloc"), 4);
    let pictures = pictures(4);
    let files = files(&pictures);
    let images: Vec<ImageSource<'_>> = files.iter().map(|file| file.as_slice().into()).collect();
    let plan = case.plan("<ImageHere><ImageHere><ImageHere><ImageHere>");
    let mut sequence = case.encoder.device_sequence().unwrap();
    for _ in 0..3 {
        let log = case.log(|| {
            case.encoder.encode_into(&plan, &images, &mut sequence).unwrap();
        });
        assert_eq!(log.count("host_alloc"), 0);
        for picture in &pictures {
            let bytes = picture.data.len() as u64;
            let copies = log.copies("HtoD");
            let whole: Vec<_> = copies.iter().filter(|copy| number(copy, "bytes") == bytes).collect();
            assert_eq!(whole.len(), 1, "{copies:?}");
            assert!(is_pinned(number(whole[0], "src")));
        }
    }
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn after_warming_up_the_first_call_captures_nothing() {
    let case = Case::new();
    let log = case.log(|| case.encoder.warm_up(&[1, 3, 100]).unwrap());
    assert_eq!(log.count("instantiate"), 4, "100 are groups of 15 and 14");
    let mut sequence = case.encoder.device_sequence().unwrap();
    for count in [1, 3] {
        let log = case.encode(&case.plan(&"<ImageHere>".repeat(count)), &pictures(count), &mut sequence);
        assert_eq!(log.count("instantiate") + log.count("capture"), 0, "{count} images");
    }
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn features_kept_from_an_earlier_call_go_up_once_and_nothing_comes_back() {
    let case = Case::new();
    let pictures = pictures(2);
    let images: Vec<ImageSource<'_>> = pictures.iter().map(Into::into).collect();
    let features = case.encoder.features(&images).unwrap();
    let plan = case.plan("a<ImageHere>b<ImageHere>");
    let mut sequence = case.encoder.device_sequence().unwrap();
    let log = case.log(|| case.encoder.place_into(&plan, &features, &mut sequence).unwrap());
    assert_eq!(log.kernels(false), ["embed_tokens_bf16"], "no image is encoded");
    assert_eq!(log.kernels(true), [""; 0]);
    let (address, _) = sequence.device_address().unwrap();
    let memory = address..address + plan.len() as u64 * case.row();
    let placed: u64 = log
        .copies("HtoD")
        .iter()
        .filter(|copy| memory.contains(&number(copy, "dst")))
        .map(|copy| number(copy, "bytes"))
        .sum();
    let rows: usize = plan.slots.iter().map(|slot| slot.len).sum();
    assert_eq!(placed, rows as u64 * case.row());
    assert_eq!(log.copies("DtoH").len(), 1);
}
