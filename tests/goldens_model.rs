//! The model against transformers, stage by stage, and the prompt against SentencePiece.
//!
//! One suite for every device: on the CPU, and on a GPU (the emulated one, or the machine's own). A GPU is held
//! to the CPU's bounds, and to the CPU's own error besides.
//!
//! The goldens and how they were made: `tests/goldens/model/make.py`. The `.bin` checkpoints lie beside it as
//! `torch.save` wrote them; safetensors checkpoints are written here from a formula, and hashed to show that they
//! are the ones that transformers ran on.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use imagehere::backend::{Device, Stage};
use imagehere::encoder::{Encoder, EncoderOptions};
use imagehere::features::Features;
use imagehere::image::ImageSource;
use imagehere::prompt::{Bos, Meta, Planner, Request};
use imagehere::sequence::SequenceBuffer;
use imagehere::tokenizer::Tokenizer;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use sha2::{Digest, Sha256};

#[cfg(all(feature = "cuda", target_os = "linux"))]
#[path = "support/emulator.rs"]
mod emulator;

/// How far our error may exceed that of transformers' own fp16 run.
const AGAINST_FP16: f64 = 1.1;
/// How far a GPU's error may exceed the CPU's.
const AGAINST_CPU: f64 = 1.5;
/// The smallest cosine between a row of features and the golden's.
const COSINE: f64 = 0.9999;

/// Where the goldens are: beside this file, or where `IMAGEHERE_TEST_GOLDENS` says that they were copied to.
fn folder() -> PathBuf {
    let checkout = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    std::env::var_os("IMAGEHERE_TEST_GOLDENS").map_or_else(checkout, PathBuf::from).join("model")
}

fn goldens() -> Value {
    serde_json::from_slice(&fs::read(folder().join("goldens.json")).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").unwrap();
        out
    })
}

// ------------------------------------------------------------------------------------------ checkpoints

/// The finaliser of SplitMix64.
fn splitmix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The bytes of a tensor, by the formula that `tests/oracle/checkpoint.py` explains.
fn tensor_bytes(seed: u64, name: &str, len: usize, dtype: Dtype, mean: f64, std: f64) -> Vec<u8> {
    let key = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |key: u64, b| (key ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let value = |i: usize| {
        let h = splitmix64(splitmix64(seed + i as u64) ^ key);
        let sum: u64 = (0..4).map(|part| (h >> (16 * part)) & 0xffff).sum();
        (mean + std * ((sum as f64 - 131_070.0) / 37_837.0)) as f32
    };
    match dtype {
        Dtype::BF16 => (0..len).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect(),
        Dtype::F16 => (0..len).flat_map(|i| f16::from_f32(value(i)).to_le_bytes()).collect(),
        Dtype::F32 => (0..len).flat_map(|i| value(i).to_le_bytes()).collect(),
        other => panic!("no golden has {other:?}"),
    }
}

/// One tensor of a golden checkpoint.
struct Weight {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    bytes: Vec<u8>,
}

fn weights(golden: &Value) -> Vec<Weight> {
    let seed = golden["seed"].as_u64().unwrap();
    let one = |row: &Value| {
        let (name, dtype) = (text(&row[0]).to_string(), text(&row[2]));
        let shape: Vec<usize> = list(&row[1]).iter().map(number).collect();
        let dtype = match dtype {
            "BF16" => Dtype::BF16,
            "F16" => Dtype::F16,
            "F32" => Dtype::F32,
            other => panic!("{other}"),
        };
        let (mean, std) = (row[3].as_f64().unwrap(), row[4].as_f64().unwrap());
        let bytes = tensor_bytes(seed, &name, shape.iter().product(), dtype, mean, std);
        Weight { name, shape, dtype, bytes }
    };
    let mut weights: Vec<Weight> = list(&golden["tensors"]).iter().map(one).collect();
    for flavour in list(&golden["flavour"]) {
        strain(&mut weights, text(flavour));
    }
    weights
}

/// What layer norms find hard, as `strain` in `tests/oracle/checkpoint.py` makes it, of bf16.
fn strain(weights: &mut [Weight], flavour: &str) {
    let bias = weights.iter_mut().find(|weight| weight.name.ends_with("pre_layrnorm.bias")).unwrap();
    for (i, bytes) in bias.bytes.chunks_exact_mut(2).enumerate() {
        let value = bf16::from_le_bytes([bytes[0], bytes[1]]);
        let strained = match flavour {
            "far" => bf16::from_f32(value.to_f32() + 30.0),
            "massive" if i % 37 == 5 => bf16::from_f32(300.0),
            "massive" if i % 37 == 23 => bf16::from_f32(-300.0),
            "massive" => value,
            _ => return,
        };
        bytes.copy_from_slice(&strained.to_le_bytes());
    }
}

/// Writes `weights` in `count` shards with an index, or as one file.
fn write_safetensors(directory: &Path, weights: &[Weight], count: usize) {
    let mut weight_map = serde_json::Map::new();
    for (i, part) in weights.chunks(weights.len().div_ceil(count)).enumerate() {
        let file = match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let views = part.iter().map(|w| {
            weight_map.insert(w.name.clone(), file.clone().into());
            (w.name.as_str(), TensorView::new(w.dtype, w.shape.clone(), &w.bytes).unwrap())
        });
        let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        fs::write(directory.join(file), bytes).unwrap();
    }
    if count > 1 {
        let total: usize = weights.iter().map(|w| w.bytes.len()).sum();
        let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

/// Makes the checkpoint directory of a golden.
fn checkpoint(golden: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(folder().join("tokenizer.model"), dir.path().join("tokenizer.model")).unwrap();
    if golden["form"] == "bin" {
        for entry in fs::read_dir(folder().join(text(&golden["name"]))).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    } else {
        fs::write(dir.path().join("config.json"), golden["config"].to_string()).unwrap();
        write_safetensors(dir.path(), &weights(golden), number(&golden["shards"]));
    }
    dir
}

fn open(golden: &Value, device: Device) -> (tempfile::TempDir, Encoder) {
    let dir = checkpoint(golden);
    let encoder = on(dir.path(), device);
    (dir, encoder)
}

/// Opens a checkpoint on a device.
fn on(dir: &Path, device: Device) -> Encoder {
    let options = EncoderOptions::new().device(device);
    Encoder::open_with(dir, options).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// The CPU's encoder beside a GPU's; the CPU needs none.
fn rival(dir: &Path, device: Device) -> Option<Encoder> {
    (device != Device::Cpu).then(|| on(dir, Device::Cpu))
}

fn checkpoint_named<'g>(goldens: &'g Value, name: &str) -> &'g Value {
    list(&goldens["checkpoints"]).iter().find(|golden| golden["name"] == name).unwrap()
}

// ---------------------------------------------------------------------------------------------- numbers

/// A stored f32 tensor: shape and values.
fn stored(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f32>) {
    let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    (view.shape().to_vec(), values)
}

fn rel_l2(got: &[f16], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        let w = f64::from(*w);
        error += (g.to_f64() - w).powi(2);
        norm += w * w;
    }
    (error / norm).sqrt()
}

fn cosine(got: &[f16], want: &[f32]) -> f64 {
    let (mut dot, mut gg, mut ww) = (0.0, 0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        let (g, w) = (g.to_f64(), f64::from(*w));
        dot += g * w;
        gg += g * g;
        ww += w * w;
    }
    dot / (gg * ww).sqrt()
}

/// Checks one stage: within the tolerance, no worse than transformers' own fp16 run, and, for a GPU, not much
/// worse than the CPU, whose values are `cpu`.
fn check_stage(golden: &Value, tolerance: f64, name: &str, got: &[f16], want: &[f32], cpu: Option<&[f16]>) {
    let (error, fp16) = (rel_l2(got, want), golden["fp16_error"][name].as_f64().unwrap());
    let name = format!("{} {name}", text(&golden["name"]));
    println!("{name}: rel-L2 {error:.2e}, transformers' fp16 run {fp16:.2e}");
    assert!(error <= tolerance, "{name}: rel-L2 {error:.2e} > {tolerance:.0e}");
    assert!(
        error <= AGAINST_FP16 * fp16,
        "{name}: rel-L2 {error:.2e}, transformers' own fp16 run strays by {fp16:.2e} only"
    );
    if let Some(cpu) = cpu {
        let cpu = rel_l2(cpu, want);
        println!("{name}: {:.3} times the CPU's {cpu:.2e}", error / cpu);
        assert!(error <= AGAINST_CPU * cpu, "{name}: rel-L2 {error:.2e}, the CPU strays by {cpu:.2e} only");
    }
}

// ------------------------------------------------------------------------------------------------ tests

#[test]
fn the_formula_gives_the_weights_that_transformers_ran_on() {
    for golden in list(&goldens()["checkpoints"]) {
        let mut weights = weights(golden);
        weights.sort_by(|a, b| a.name.cmp(&b.name));
        let mut hasher = Sha256::new();
        weights.iter().for_each(|w| hasher.update(&w.bytes));
        assert_eq!(hex(hasher), text(&golden["sha256"]), "{}", golden["name"]);
    }
}

#[test]
fn sizes_are_read_from_the_tensors() {
    for golden in list(&goldens()["checkpoints"]) {
        let (_dir, encoder) = open(golden, Device::Cpu);
        let (config, sizes) = (encoder.config(), &golden["sizes"]);
        let found = [
            ("width", config.width),
            ("mlp", config.mlp_width),
            ("layers", config.layers),
            ("patch", config.patch_size),
            ("grid", config.grid),
            ("projector", config.projector_width),
            ("hidden", config.hidden_size),
            ("vocab", config.vocab_size),
        ];
        for (name, value) in found {
            assert_eq!(value, number(&sizes[name]), "{} {name}", golden["name"]);
        }
        assert_eq!(config.heads, config.width / 64);
        assert_eq!(config.image_size, config.grid * config.patch_size);
    }
}

/// What every stage gives for one picture, and the features.
fn trace(encoder: &Encoder) -> (HashMap<Stage, Vec<f16>>, Features) {
    let picture = ImageSource::from(folder().join("images/landscape.png"));
    let mut stages = HashMap::new();
    let features = encoder
        .trace(&picture, &mut |stage, values| {
            assert!(stages.insert(stage, values.to_vec()).is_none(), "{stage:?} twice");
        })
        .unwrap();
    (stages, features)
}

fn every_stage_equals_transformers(device: Device) {
    let goldens = goldens();
    let tolerance = goldens["tolerance"].as_f64().unwrap();
    let normalised: Vec<Vec<f32>> = list(&goldens["normalise_table"])
        .iter()
        .map(|channel| list(channel).iter().map(|v| v.as_f64().unwrap() as f32).collect())
        .collect(); // [3][256]
    for golden in list(&goldens["checkpoints"]) {
        let (dir, encoder) = open(golden, device);
        let config = encoder.config();
        let name = text(&golden["name"]);
        let bytes = fs::read(folder().join(format!("{name}.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();

        let (stages, features) = trace(&encoder);
        let rival = rival(dir.path(), device).map(|cpu| trace(&cpu));
        assert_eq!(stages.len(), config.layers + 3, "{name}");

        // Pillow's pixels and one rounding: no tolerance.
        let patches = file.tensor("landscape.patches_u8").unwrap();
        assert_eq!(patches.shape(), [config.patches, config.patch_len()]);
        let area = config.patch_size * config.patch_size;
        for (i, (&u8, got)) in patches.data().iter().zip(&stages[&Stage::Patches]).enumerate() {
            let want = f16::from_f32(normalised[i % config.patch_len() / area][usize::from(u8)]);
            assert_eq!(got.to_bits(), want.to_bits(), "{name} patches[{i}]: {got} is not {want}");
        }

        let layers = (0..config.layers).map(|i| (Stage::Layer(i), format!("landscape.layer.{i}")));
        let others = [
            (Stage::Embedded, "landscape.embedded".to_string()),
            (Stage::ProjectorHidden, "landscape.projector_hidden".to_string()),
        ];
        for (stage, key) in layers.chain(others) {
            let (_, want) = stored(&file, &key);
            let cpu = rival.as_ref().map(|(stages, _)| stages[&stage].as_slice());
            check_stage(golden, tolerance, &key, &stages[&stage], &want, cpu);
        }
        let (_, want) = stored(&file, "landscape.features");
        let cpu = rival.as_ref().map(|(_, features)| features.as_slice());
        check_stage(golden, tolerance, "landscape.features", features.as_slice(), &want, cpu);
    }
}

fn features_of_every_picture_equal_transformers(device: Device) {
    let goldens = goldens();
    let tolerance = goldens["tolerance"].as_f64().unwrap();
    for golden in list(&goldens["checkpoints"]) {
        let (dir, encoder) = open(golden, device);
        let name = text(&golden["name"]);
        let bytes = fs::read(folder().join(format!("{name}.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let pictures: Vec<&str> = list(&goldens["images"]).iter().map(text).collect();
        let sources: Vec<ImageSource<'_>> =
            pictures.iter().map(|picture| folder().join("images").join(picture).into()).collect();
        let rival = rival(dir.path(), device).map(|cpu| cpu.features(&sources).unwrap());
        for (i, (picture, features)) in pictures.iter().zip(encoder.features(&sources).unwrap()).enumerate() {
            let key = format!("{}.features", picture.strip_suffix(".png").unwrap());
            let (shape, want) = stored(&file, &key);
            assert_eq!(shape, [features.len(), features.hidden()]);
            let cpu = rival.as_ref().map(|rival| rival[i].as_slice());
            check_stage(golden, tolerance, &key, features.as_slice(), &want, cpu);
            for (i, want) in want.chunks_exact(features.hidden()).enumerate() {
                let cosine = cosine(features.row(i), want);
                assert!(cosine >= COSINE, "{name} {key}, row {i}: cosine {cosine}");
            }
        }
    }
}

/// The request of a golden prompt.
fn request(case: &Value) -> Request {
    let mut request = Request::new(text(&case["query"])).image_count(number(&case["images"]));
    if let Some(meta) = case["meta"].as_str() {
        request = request.meta_instruction(Meta::Text(meta.to_string()));
    }
    if let Some(turns) = case["history"].as_array() {
        let turn = |turn: &Value| (text(&turn[0]).to_string(), text(&turn[1]).to_string());
        request = request.history(turns.iter().map(turn).collect());
    }
    if case["bos"] == "first" {
        request = request.bos(Bos::First);
    }
    request
        .raw(case["raw"] == true)
        .allow_control_tokens(case["allow_control_tokens"] == true)
        .truncate(!case["cut"].is_null())
}

fn layouts_and_text_rows_equal_the_reference(device: Device) {
    let goldens = goldens();
    let golden = checkpoint_named(&goldens, text(&goldens["layout_model"]));
    let (dir, encoder) = open(golden, device);
    assert_eq!(imagehere::prompt::DEFAULT_META_INSTRUCTION, text(&goldens["default_meta"]));
    let pictures = ["landscape.png", "tall.png"].map(|name| folder().join("images").join(name));
    let features = encoder.features(&pictures.clone().map(ImageSource::from)).unwrap();

    for case in list(&goldens["plans"]) {
        let name = text(&case["name"]);
        let mut config = encoder.config().clone();
        if let Some(cut) = case["cut"].as_u64() {
            config.max_length = Some(cut as usize);
        }
        let planner = Planner::new(Tokenizer::from_dir(dir.path()).unwrap(), config).unwrap();
        let plan = planner.plan(&request(case)).unwrap_or_else(|e| panic!("{name}: {e}"));

        let ids: Vec<i64> = list(&case["input_ids"]).iter().map(|id| id.as_i64().unwrap()).collect();
        assert_eq!(plan.input_ids, ids, "{name}");
        let slots: Vec<[usize; 2]> =
            plan.slots.iter().map(|slot| [slot.offset, slot.offset + slot.len]).collect();
        let want: Vec<[usize; 2]> =
            list(&case["slots"]).iter().map(|slot| [number(&slot[0]), number(&slot[1])]).collect();
        assert_eq!(slots, want, "{name}");
        let mask: Vec<bool> = ids.iter().map(|&id| id < 0).collect();
        assert_eq!(plan.im_mask, mask, "{name}");

        // The sequence itself: text rows bit for bit, image rows those of the features.
        let sources = pictures[..want.len()].iter().map(|path| ImageSource::from(path.clone()));
        let mut sequence = SequenceBuffer::new();
        encoder.encode_into(&plan, &sources.collect::<Vec<_>>(), &mut sequence).unwrap();
        sequence.verify().unwrap();
        let mut hasher = Sha256::new();
        for (i, _) in mask.iter().enumerate().filter(|(_, image)| !**image) {
            sequence.row(i).iter().for_each(|x| hasher.update(x.to_le_bytes()));
        }
        assert_eq!(hex(hasher), text(&case["text_rows_sha256"]), "{name}");
        for ([begin, end], features) in slots.into_iter().zip(&features) {
            for i in begin..end {
                let bits = |row: &[f16]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(sequence.row(i)), bits(features.row(i - begin)), "{name}, row {i}");
            }
        }
    }
}

fn text_rows_that_are_subnormal_in_fp16_are_rounded_once(device: Device) {
    let goldens = goldens();
    let golden = checkpoint_named(&goldens, "safetensors_f32_faint");
    let (_dir, encoder) = open(golden, device);
    let table = weights(golden).into_iter().find(|w| w.name == "model.tok_embeddings.weight").unwrap();
    let stored: Vec<f32> =
        table.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let plan = encoder.plan(&Request::new("How many windows does the house have?")).unwrap();
    let mut sequence = SequenceBuffer::new();
    encoder.encode_into(&plan, &[], &mut sequence).unwrap();
    let hidden = encoder.config().hidden_size;
    let mut subnormal = 0;
    for (i, &id) in plan.input_ids.iter().enumerate() {
        let want = &stored[id as usize * hidden..][..hidden];
        for (got, want) in sequence.row(i).iter().zip(want) {
            assert_eq!(got.to_bits(), f16::from_f32(*want).to_bits(), "row {i}: {want}");
            subnormal += usize::from(!got.is_normal() && got.to_bits() << 1 != 0);
        }
    }
    assert!(subnormal > 1000, "{subnormal} subnormal values");
}

/// The tests that every device must pass, once for each.
macro_rules! on_every_device {
    ($($name:ident),* $(,)?) => {
        mod on_the_cpu {
            $(#[test]
            fn $name() {
                super::$name(super::Device::Cpu);
            })*
        }

        #[cfg(all(feature = "cuda", target_os = "linux"))]
        mod on_a_gpu {
            $(#[test]
            #[cfg_attr(
                not(has_kernels),
                ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc"
            )]
            fn $name() {
                super::emulator::provide();
                super::$name(super::Device::Cuda(0));
            })*
        }
    };
}

on_every_device! {
    every_stage_equals_transformers,
    features_of_every_picture_equal_transformers,
    layouts_and_text_rows_equal_the_reference,
    text_rows_that_are_subnormal_in_fp16_are_rounded_once,
}
