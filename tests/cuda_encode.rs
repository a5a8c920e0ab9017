//! `imagehere encode` on a GPU: the same file as on the CPU but for the last bits of image rows, and the same
//! words about what is wrong.
//!
//! The GPU is the emulated one, found through LD_LIBRARY_PATH as a user would do it: see tests/emu/README.md.

#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::fs;
use std::path::PathBuf;

use bytemuck::cast_slice;
use half::f16;
use imagehere::synth::{self, Preset, SynthOptions};
use safetensors::SafeTensors;
use serde_json::Value;

mod support;
use support::{Ended, Place, Words, emulated};

/// Where and how a sequence was encoded.
struct Encoded {
    report: Value,
    bytes: Vec<u8>,
}

/// The tiny model and pictures for it.
struct Case {
    place: Place,
}

impl Case {
    fn new() -> Self {
        Self { place: Place::new() }
    }

    /// Noise of this size as PNG; its path.
    fn noise(&self, width: u32, height: u32) -> PathBuf {
        let mut state = u64::from(width * 1000 + height) | 1;
        let image = image::RgbImage::from_fn(width, height, |_, _| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            image::Rgb([24, 32, 40].map(|shift| (state >> shift) as u8))
        });
        let path = self.place.path(&format!("{width}x{height}.png"));
        image.save_with_format(&path, image::ImageFormat::Png).unwrap();
        path
    }

    /// One picture for each way to the tower's size: larger, smaller, one pass alone, none.
    fn pictures(&self) -> Vec<PathBuf> {
        [(93, 61), (41, 20), (70, 33), (70, 70)].map(|(width, height)| self.noise(width, height)).into()
    }

    /// `encode` of as many pictures as the prompt has markers, without an output yet.
    fn words(&self, prompt: &str) -> Words {
        let count = prompt.matches("<ImageHere>").count();
        let words = self.place.on_model("encode", prompt);
        if count == 0 {
            words
        } else {
            words.arg("--image").args(self.pictures().into_iter().cycle().take(count))
        }
    }

    /// Runs `words` on a device; what failed has left nothing behind.
    fn run(&self, words: &Words, device: &str, settings: &[(&str, &str)]) -> Ended {
        let words = words.clone().arg("--out").arg(self.place.path("s")).args(["--device", device]);
        let ended = Ended::of(emulated(&words.0, settings).output().unwrap());
        assert_eq!(self.place.path("s").exists(), ended.code == 0, "{ended:#?}");
        let hidden = self.place.names().into_iter().filter(|name| name.starts_with('.'));
        assert_eq!(hidden.collect::<Vec<_>>(), [""; 0], "something was left behind");
        ended
    }

    fn encode(&self, words: &Words, device: &str, settings: &[(&str, &str)]) -> Encoded {
        let report = self.run(&words.clone().arg("--json"), device, settings).json();
        let bytes = fs::read(self.place.path("s")).unwrap();
        fs::remove_file(self.place.path("s")).unwrap();
        Encoded { report, bytes }
    }

    /// What a command that must fail says, the emulated device's own report aside; nothing else happens.
    #[track_caller]
    fn refusal(&self, words: &Words, device: &str, settings: &[(&str, &str)], parts: &[&str]) -> String {
        let mut ended = self.run(words, device, settings);
        ended.stderr =
            ended.stderr.lines().filter(|line| !line.starts_with("emulated device: planted")).collect();
        ended.mistake(parts)
    }
}

/// A tensor's values.
fn values<T: bytemuck::Pod>(file: &SafeTensors<'_>, name: &str) -> Vec<T> {
    bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data())
}

/// Checks that two files agree: all but image rows bit for bit.
#[track_caller]
fn assert_alike(got: &Encoded, expected: &Encoded) {
    for key in ["length", "input_ids", "slots", "segments", "images_encoded", "warnings", "fingerprint"] {
        assert_eq!(got.report[key], expected.report[key], "{key}");
    }
    let metadata =
        |encoded: &Encoded| SafeTensors::read_metadata(&encoded.bytes).unwrap().1.metadata().clone();
    assert_eq!(metadata(got), metadata(expected));
    let [got, expected] = [got, expected].map(|file| SafeTensors::deserialize(&file.bytes).unwrap());
    assert_eq!(got.len(), expected.len());
    for name in got.names() {
        let (got, expected) = (got.tensor(name).unwrap(), expected.tensor(name).unwrap());
        assert_eq!((got.dtype(), got.shape()), (expected.dtype(), expected.shape()), "{name}");
        assert!(name == "inputs_embeds" || got.data() == expected.data(), "{name}");
    }
    let mask: Vec<u8> = values(&got, "im_mask");
    let hidden = got.tensor("inputs_embeds").unwrap().shape()[2];
    let [got, expected] = [got, expected].map(|file| values::<f16>(&file, "inputs_embeds"));
    let wide = |row: &[f16]| row.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
    let (mut error, mut norm) = (0.0, 0.0);
    for (i, (got, expected)) in got.chunks_exact(hidden).zip(expected.chunks_exact(hidden)).enumerate() {
        if mask[i] == 0 {
            assert!(cast_slice::<_, u16>(got) == cast_slice::<_, u16>(expected), "text row {i}");
            continue;
        }
        let (got, expected) = (wide(got), wide(expected));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let squares = dot(&expected, &expected);
        error += got.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        norm += squares;
        let cosine = dot(&got, &expected) / (dot(&got, &got) * squares).sqrt();
        assert!(cosine >= 0.9999, "row {i}: cosine {cosine}");
    }
    let error = if norm == 0.0 { 0.0 } else { (error / norm).sqrt() };
    println!("image rows: rel-L2 {error:.2e}");
    assert!(error <= 2e-3, "image rows: rel-L2 {error:e}");
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn every_kind_of_gpu_gives_the_cpus_file() {
    let case = Case::new();
    let words = case.words("One:<ImageHere>, two:<ImageHere>, three:<ImageHere><ImageHere>. What changed?");
    let on_cpu = case.encode(&words, "cpu", &[]);
    let mut first: Option<Vec<u8>> = None;
    let kernels = "IMAGEHERE_CUDA_KERNELS";
    for capability in ["8.0", "8.6", "8.9", "9.0"] {
        let encoded = case.encode(&words, "cuda", &[("EMU_CC", capability), (kernels, "sm80")]);
        let name = encoded.report["device"].as_str().unwrap();
        assert!(name.starts_with("cuda:0 (emulated "), "{name}");
        assert!(name.ends_with(&format!(", {capability}, sm80 kernels)")), "{name}");
        assert_alike(&encoded, &on_cpu);
        let first = first.get_or_insert_with(|| encoded.bytes.clone());
        assert!(*first == encoded.bytes, "{capability} gives other bits than 8.0");
    }
    // Hopper's own kernels sum in another order, and round elsewhere where they take in a layer norm.
    for fusions in ["all", "none", "layer_norm", "query_scale,class_row"] {
        let encoded = case.encode(&words, "cuda", &[("EMU_CC", "9.0"), ("IMAGEHERE_CUDA_FUSIONS", fusions)]);
        let name = encoded.report["device"].as_str().unwrap();
        assert!(name.ends_with(", 9.0, sm90 kernels)"), "{name}");
        assert_alike(&encoded, &on_cpu);
    }
}

/// Orders of warps, blocks, streams and graph nodes; work done as late as possible, at odd moments, at once.
/// LLaVA's crop is made on the host, whatever encodes the square.
#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn a_llava_is_encoded_as_on_the_cpu() {
    let case = Case::new();
    synth::write(Preset::LlavaTiny, &SynthOptions::default(), case.place.path("model")).unwrap();
    let words = case.place.on_model("encode", "<image> <image><image> or <image>\nWhich?");
    let words = words.arg("--image").args(case.pictures());
    let expected = case.encode(&words, "cpu", &[]);
    let kept = words.clone().arg("--feature-cache").arg(case.place.path("cache"));
    for capability in ["8.0", "9.0"] {
        for words in [&words, &kept] {
            assert_alike(&case.encode(words, "cuda", &[("EMU_CC", capability)]), &expected);
        }
    }
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn bits_do_not_depend_on_what_happens_when() {
    let case = Case::new();
    let words = case.words("<ImageHere>, <ImageHere> and <ImageHere>");
    let first = case.encode(&words, "cuda", &[("EMU_SEED", "0")]).bytes;
    for seed in ["1", "2", "3", "13", "23"] {
        assert!(case.encode(&words, "cuda", &[("EMU_SEED", seed)]).bytes == first, "seed {seed}");
    }
    let waits = [("EMU_SEED", "4"), ("IMAGEHERE_CUDA_SYNC", "1")];
    assert!(case.encode(&words, "cuda", &waits).bytes == first, "without graphs");
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn layouts_of_every_kind_are_those_of_the_cpu() {
    let case = Case::new();
    let long = format!("<ImageHere>{}<ImageHere>never read", "word ".repeat(1350));
    for (prompt, options) in [
        ("Just text.", &[][..]),
        ("<ImageHere>", &["--raw"]),
        ("<ImageHere><ImageHere>, adjacent", &["--no-meta", "--bos", "first"]),
        (&long, &["--no-meta", "--truncate"]), // in the second image
    ] {
        let words = case.words(prompt).args(options);
        let on_cuda = case.encode(&words, "cuda", &[]);
        assert_alike(&on_cuda, &case.encode(&words, "cpu", &[]));
        if prompt == long {
            let slots = &on_cuda.report["slots"];
            let rows = |i: usize| slots[i][1].as_u64().unwrap() - slots[i][0].as_u64().unwrap();
            assert!(rows(0) == 25 && (1..25).contains(&rows(1)), "{slots}");
        }
    }
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn image_options_reach_the_device() {
    let case = Case::new();
    let words = case.place.on_model("encode", "<ImageHere>").args(["--no-meta", "--image"]);
    let words = words.arg(case.noise(30, 700));
    for rule in ["pillow", "pillow13"] {
        let words = words.clone().args(["--resample", rule]);
        assert_alike(&case.encode(&words, "cuda", &[]), &case.encode(&words, "cpu", &[]));
    }
}

/// 18 MB of pixels: more than a slot of the ring takes.
#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn a_large_file_goes_up_whole() {
    let case = Case::new();
    let words = case.place.on_model("encode", "<ImageHere>").args(["--no-meta", "--image"]);
    let words = words.arg(case.noise(5000, 1200));
    let log = case.place.path("log");
    let on_cuda = case.encode(&words, "cuda", &[("EMU_LOG", log.to_str().unwrap())]);
    assert_alike(&on_cuda, &case.encode(&words, "cpu", &[]));
    let log = fs::read_to_string(log).unwrap();
    let uploads = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).filter_map(|event| {
        (event["event"] == "run" && event["kind"] == "HtoD").then(|| event["bytes"].as_u64().unwrap())
    });
    let large: Vec<u64> = uploads.filter(|bytes| *bytes > 1 << 20).collect();
    assert_eq!(large, [3 * 5000 * 1200], "one copy, of every byte");
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn auto_takes_the_gpu_where_there_is_one() {
    let case = Case::new();
    let words = case.words("<ImageHere>");
    let device = |name, settings: &[_]| case.encode(&words, name, settings).report["device"].clone();
    assert!(device("auto", &[]).as_str().unwrap().starts_with("cuda:0 (emulated"));
    assert!(device("cuda:1", &[("EMU_DEVICES", "2")]).as_str().unwrap().starts_with("cuda:1 (emulated"));
    assert!(device("auto", &[("EMU_DEVICES", "0")]).as_str().unwrap().starts_with("cpu ("));
    assert!(
        device("auto", &[("EMU_MEMORY", "500000")]).as_str().unwrap().starts_with("cpu ("),
        "no room there"
    );
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn a_gpu_that_is_not_there() {
    let case = Case::new();
    let words = case.words("<ImageHere>");
    case.refusal(
        &words,
        "cuda:5",
        &[],
        &["`cuda:5`: there is no such device: the driver shows 1 device.", "Use a smaller number", "`cpu`"],
    );
    case.refusal(&words, "cuda", &[("EMU_DEVICES", "0")], &["NO_DEVICE", "nvidia-smi", "`cpu`"]);
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn what_is_wrong_with_an_image_is_said_as_on_the_cpu() {
    let case = Case::new();
    let good = case.noise(41, 20);
    let whole = fs::read(&good).unwrap();
    for broken in [&b"no image"[..], b"", &whole[..whole.len() / 2]] {
        let broken = case.place.file("broken.png", broken);
        let words = case.place.on_model("encode", "<ImageHere>, <ImageHere>, <ImageHere>");
        let words = words.arg("--image").arg(&good).arg(&broken).arg(&broken);
        let [on_cpu, on_cuda] =
            ["cpu", "cuda"].map(|device| case.refusal(&words, device, &[], &["image 1", "broken.png"]));
        assert_eq!(on_cpu, on_cuda);
    }
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn less_memory_makes_smaller_groups_and_the_same_bits() {
    let case = Case::new();
    let words = case.words(&"<ImageHere>".repeat(7)).arg("--no-meta");
    let first = case.encode(&words, "cuda", &[]);
    let (mut groups, mut later) = (Vec::new(), 0);
    for memory in (1_600_000u32..3_700_000).step_by(100_000) {
        let memory = memory.to_string();
        let ended = case.run(&words.clone().arg("-v"), "cuda", &[("EMU_MEMORY", &memory)]);
        if ended.code != 0 {
            assert!(groups.is_empty(), "less memory was enough: {ended:#?}");
            let error = ended.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
            assert!(ended.code == 2 && error.contains("MiB are free"), "{ended:#?}");
            continue;
        }
        let opened = ended.stderr.lines().find(|line| line.contains("CUDA backend")).unwrap();
        let images: usize =
            opened.split_once("images=").unwrap().1.split(' ').next().unwrap().parse().unwrap();
        assert_eq!(images < 16, ended.stderr.contains("no room for so many images at once"), "{ended:#?}");
        groups.push(images);
        later += usize::from(ended.stderr.contains("trying with smaller groups"));
        assert!(fs::read(case.place.path("s")).unwrap() == first.bytes, "groups of {images}");
        fs::remove_file(case.place.path("s")).unwrap();
    }
    println!("groups of {groups:?}, {later} times smaller ones later");
    assert!(groups.is_sorted() && groups[0] < 4 && groups.contains(&16) && later > 0, "{groups:?}, {later}");
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn no_memory_is_said_with_the_numbers() {
    let case = Case::new();
    let words = case.words("<ImageHere>");
    case.refusal(
        &words,
        "cuda",
        &[("EMU_MEMORY", "500000")],
        &[
            "`cuda:0`: no room for the weights: 0.85 MiB are needed, 0.48 MiB of 0.48 MiB are free.",
            "Free memory on the device",
            "`cpu`",
        ],
    );
    case.refusal(
        &words,
        "cuda",
        &[("EMU_MEMORY", "1550000")],
        &["`cuda:0`: after the weights, one image needs 0.", " of 1.48 MiB are free.", "`cpu`"],
    );
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn a_kernel_that_fails_is_named_when_asked_for() {
    let case = Case::new();
    let words = case.words("<ImageHere>");
    for (kernel, code, name) in [
        ("linear_scatter_64x64", "719", "CUDA_ERROR_LAUNCH_FAILED (719)"),
        ("resize_vertical", "700", "CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        ("embed_tokens_bf16", "700", "CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
    ] {
        let fail = format!("launch:{kernel}:{code}");
        let mut settings = vec![("EMU_FAIL", &*fail), ("IMAGEHERE_CUDA_KERNELS", "sm80")];
        case.refusal(&words, "cuda", &settings, &["`cuda:0`", name, "Run again with IMAGEHERE_CUDA_SYNC=1"]);
        settings.push(("IMAGEHERE_CUDA_SYNC", "1"));
        let parts = ["`cuda:0`", &format!("kernel {kernel} in "), name, "Please report it"];
        case.refusal(&words, "cuda", &settings, &parts);
    }
}
