//! LLaVA-1.5: how its checkpoints are recognised and read, and what its images become. Its numbers, against
//! transformers' own classes, are in `tests/oracle/llava.py`.

#[path = "checkpoint_support/asserts.rs"]
mod asserts;
mod checkpoint_support;

use std::path::Path;

use asserts::*;
use checkpoint_support::*;
use imagehere::checkpoint::Checkpoint;
use imagehere::config::{LLAVA, XCOMPOSER2};
use imagehere::convert::{self, ConvertOptions, Layout};
use imagehere::features::FeatureCache;
use imagehere::image::{ImageSource, RgbImage};
use imagehere::prompt::{Planner, Request, SegmentKind};
use imagehere::sequence::SequenceBuffer;
use imagehere::synth::{self, Preset, SynthOptions};
use imagehere::{Encoder, EncoderOptions, Error};
use serde_json::{Value, json};

/// Tower, projector and table as transformers 4 calls them, 5 saves them, and as the modules of either are called.
const NAMES: [[&str; 3]; 4] = [
    ["vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.embed_tokens."],
    ["vision_tower.", "multi_modal_projector.", "language_model.model.embed_tokens."],
    [
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.language_model.embed_tokens.",
    ],
    ["model.vision_tower.", "model.multi_modal_projector.", "model.language_model.embed_tokens."],
];

/// A tower of three blocks, of which features come through two.
const DEEP: Small = Small { layers: 3, ..SMALL };

fn rename(name: &str, [tower, projector, embedding]: [&str; 3]) -> String {
    let of_projector = |part: &str| part.replace("0.", "linear_1.").replace("2.", "linear_2.");
    name.strip_prefix(TOWER)
        .map(|part| format!("{tower}{part}"))
        .or_else(|| Some(format!("{projector}{}", of_projector(name.strip_prefix("vision_proj.")?))))
        .or_else(|| Some(format!("{embedding}{}", name.strip_prefix("model.tok_embeddings.")?)))
        .unwrap()
}

fn renamed(model: &[Named], names: [&str; 3]) -> Vec<Named> {
    model.iter().map(|tensor| Named { name: rename(&tensor.name, names), ..tensor.clone() }).collect()
}

fn llava_config(sizes: Small) -> Value {
    json!({
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": sizes.vocab - 1,
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {
            "hidden_size": sizes.hidden, "max_position_embeddings": 4096, "model_type": "llama",
            "num_hidden_layers": 31, "num_attention_heads": 7, "vocab_size": sizes.vocab,
        },
        "vision_config": {
            "hidden_size": sizes.width, "image_size": sizes.grid * sizes.patch, "intermediate_size": sizes.mlp,
            "model_type": "clip_vision_model", "num_attention_heads": sizes.width / 64,
            "num_hidden_layers": sizes.layers, "patch_size": sizes.patch,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    })
}

fn llava_dir(model: &[Named], config: &Value) -> tempfile::TempDir {
    let dir = model_dir(model, "safetensors");
    write_config(dir.path(), config);
    dir
}

/// What a directory is refused with whose `config.json` has another value under a key.
fn with_config(key: &str, value: Value) -> String {
    let mut config = llava_config(DEEP);
    match key.split_once('.') {
        Some((outer, inner)) => config[outer][inner] = value,
        None => config[key] = value,
    }
    refusal(llava_dir(&renamed(&small_model(DEEP, Dt::F16), NAMES[0]), &config).path())
}

#[test]
fn every_spelling_of_the_names_is_read_without_the_last_block() {
    let model = small_model(DEEP, Dt::Bf16);
    let last = format!("{TOWER}encoder.layers.2.");
    let used: Vec<Named> = model.iter().filter(|tensor| !tensor.name.starts_with(&last)).cloned().collect();
    for names in NAMES {
        for stored in [&model, &used] {
            let mut stored = renamed(stored, names);
            stored.push(Named::zeros(&format!("{}post_layernorm.weight", names[0]), Dt::Bf16, &[64]));
            stored.push(Named::zeros("lm_head.weight", Dt::Bf16, &[40, 48]));
            let dir = llava_dir(&stored, &llava_config(DEEP));
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert_weights(&checkpoint.vision_weights(Default::default()).unwrap().0, &used);
            assert_embedding(&checkpoint.embedding(), &used);
            let config = checkpoint.config();
            assert_eq!(config.profile, &LLAVA);
            assert_eq!((config.layers, config.patches, config.image_size), (2, 9, 6));
            assert_eq!((config.max_length, config.max_position_embeddings), (None, Some(4096)));
            assert_eq!(serde_json::to_value(config).unwrap()["profile"], "llava-1.5");
        }
    }
}

#[test]
fn shards_are_read() {
    let model = renamed(&small_model(DEEP, Dt::F32), NAMES[1]);
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), &model, "safetensors", false);
    write_config(dir.path(), &llava_config(DEEP));
    assert_eq!(Checkpoint::open(dir.path()).unwrap().config().layers, 2);
}

#[test]
fn what_config_does_not_say_is_what_transformers_would_take() {
    let mut config = llava_config(DEEP);
    for key in ["projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy"] {
        config.as_object_mut().unwrap().remove(key);
    }
    config["text_config"] = json!({});
    config["vision_config"] = json!({ "num_hidden_layers": 3 });
    let dir = llava_dir(&renamed(&small_model(DEEP, Dt::F16), NAMES[0]), &config);
    let config = Checkpoint::open(dir.path()).unwrap().config().clone();
    assert_eq!((config.layers, config.max_position_embeddings), (2, Some(2048)));
}

#[test]
fn a_config_of_no_profile_is_told_what_was_expected_and_found() {
    for (path, value, words) in [
        (
            "model_type",
            json!("llava_next"),
            ["\"llava_next\"", "\"internlmxcomposer2\" (InternLM-XComposer2-VL)"],
        ),
        ("model_type", json!("llava_next"), ["`model_type`", "\"llava\" (LLaVA-1.5)"]),
        ("model_type", json!(7), ["`model_type` is 7", "is expected"]),
        ("vision_feature_layer", json!(-1), ["`vision_feature_layer` is -1", "LLaVA-1.5 has -2"]),
        ("vision_feature_layer", json!([-2, -5]), ["`vision_feature_layer` is [-2,-5]", "has -2"]),
        ("vision_feature_select_strategy", json!("full"), ["is \"full\"", "has \"default\""]),
        ("projector_hidden_act", json!("gelu_new"), ["is \"gelu_new\"", "has \"gelu\""]),
        (
            "vision_config.model_type",
            json!("siglip_vision_model"),
            ["siglip_vision_model", "\"clip_vision_model\""],
        ),
        (
            "vision_config.hidden_act",
            json!("gelu"),
            ["`vision_config.hidden_act` is \"gelu\"", "\"quick_gelu\""],
        ),
        ("vision_config.layer_norm_eps", json!(1e-6), ["`vision_config.layer_norm_eps`", "has 1e-5"]),
        (
            "text_config.model_type",
            json!("mistral"),
            ["`text_config.model_type` is \"mistral\"", "\"llama\""],
        ),
        ("mm_vision_tower", json!("openai/clip-vit-large-patch14-336"), ["has no such key", "llava-hf"]),
        ("multimodal_projector_bias", json!(false), ["`multimodal_projector_bias` is false", "has true"]),
    ] {
        assert_names(&with_config(path, value), &[&["config.json"], &words[..]].concat());
    }
}

#[test]
fn sizes_that_disagree_name_both_sources() {
    for (path, value, words) in [
        ("vision_config.image_size", json!(336), ["`vision_config.image_size` is 336", "6 pixels"]),
        ("vision_config.patch_size", json!(14), ["`vision_config.patch_size` is 14", "patch_embedding"]),
        ("vision_config.hidden_size", json!(1024), ["`vision_config.hidden_size` is 1024", "64"]),
        ("vision_config.intermediate_size", json!(100), ["is 100", "mlp.fc1.weight` has 96"]),
        ("vision_config.num_attention_heads", json!(2), ["is 2", "1 heads of 64"]),
        (
            "text_config.hidden_size",
            json!(4096),
            ["is 4096", "multi_modal_projector.linear_2.weight` has 48"],
        ),
        ("text_config.vocab_size", json!(32064), ["is 32064", "embed_tokens.weight` has only 40"]),
        ("vision_config.num_hidden_layers", json!(24), ["3 blocks", "`vision_config.num_hidden_layers`"]),
        ("vision_config.num_hidden_layers", json!(2), ["3 blocks", "is 2"]),
        ("vision_config.num_hidden_layers", json!(1), ["is 1", "unused"]),
        ("vision_config.num_hidden_layers", json!(null), ["num_hidden_layers", "not there"]),
        ("vision_config.num_hidden_layers", json!("24"), ["num_hidden_layers", "positive whole number"]),
    ] {
        assert_names(&with_config(path, value), &words);
    }
}

#[test]
fn missing_and_foreign_tensors_are_named() {
    let model = renamed(&small_model(DEEP, Dt::F16), NAMES[0]);
    let without: Vec<Named> =
        model.iter().filter(|tensor| tensor.name != "multi_modal_projector.linear_1.bias").cloned().collect();
    let refused = |model: &[Named]| refusal(llava_dir(model, &llava_config(DEEP)).path());
    assert_names(&refused(&without), &["`multi_modal_projector.linear_1.bias` is missing", "LLaVA-1.5"]);
    let mut with_more = model.clone();
    with_more.push(Named::zeros("multi_modal_projector.linear_3.weight", Dt::F16, &[2]));
    assert_names(&refused(&with_more), &["linear_3.weight", "no part of the LLaVA-1.5 tower"]);
    // The tensors of one family under the config.json of the other.
    let other = small_model(DEEP, Dt::F16);
    assert_names(&refused(&other), &["vision_tower.vision_model.encoder.layers.0", "missing"]);
    let dir = model_dir(&model, "safetensors");
    assert_names(
        &refusal(dir.path()),
        &["`vit.vision_tower.vision_model.", "missing, but there is `vision_tower."],
    );
}

#[test]
fn the_preprocessor_beside_it_has_to_agree() {
    let dir = llava_dir(&renamed(&small_model(DEEP, Dt::F16), NAMES[0]), &llava_config(DEEP));
    let write = |name: &str, value: &Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    let mut processor = json!({
        "crop_size": { "height": 6, "width": 6 },
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3, "size": { "shortest_edge": 6 },
    });
    write("processor_config.json", &json!({ "image_processor": processor }));
    Checkpoint::open(dir.path()).unwrap();
    write("preprocessor_config.json", &processor);
    Checkpoint::open(dir.path()).unwrap();
    processor["size"] = json!({ "shortest_edge": 8 });
    write("preprocessor_config.json", &processor);
    let words = ["preprocessor_config.json", "`size` is {\"shortest_edge\":8}", "has {\"shortest_edge\":6}"];
    assert_names(&refusal(dir.path()), &words);
    std::fs::remove_file(dir.path().join("preprocessor_config.json")).unwrap();
    write("processor_config.json", &json!({ "image_processor": processor }));
    assert_names(&refusal(dir.path()), &["processor_config.json", "`size`"]);
}

fn tiny(dir: &Path) -> Encoder {
    synth::write(Preset::LlavaTiny, &SynthOptions::default(), dir).unwrap();
    Encoder::open(dir).unwrap()
}

fn picture(width: u32, height: u32) -> RgbImage {
    let sample = |i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8;
    RgbImage { width, height, data: (0..3 * width * height).map(sample).collect() }
}

/// Columns `left..left + 70` of an image that is 70 pixels high.
fn cut(image: &RgbImage, left: usize) -> RgbImage {
    let rows = (0..70).flat_map(|y| image.view().row(y)[3 * left..3 * (left + 70)].to_vec());
    RgbImage { width: 70, height: 70, data: rows.collect() }
}

#[test]
fn features_are_those_of_the_centre() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = tiny(&dir.path().join("model"));
    assert_eq!(encoder.config().profile, &LLAVA);
    let (wide, square) = (picture(101, 70), picture(70, 70));
    let centre = cut(&wide, 15);
    let sources: Vec<ImageSource<'_>> = vec![(&wide).into(), (&centre).into(), (&square).into()];
    let features = encoder.features(&sources).unwrap();
    assert_eq!(features[0].as_slice(), features[1].as_slice());
    assert_ne!(features[0].as_slice(), features[2].as_slice());
    let off = encoder.features(&[(&cut(&wide, 16)).into()]).unwrap();
    assert_ne!(features[0].as_slice(), off[0].as_slice());

    // The same by every way there is.
    let (set, report) = encoder.feature_set(&sources, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
    assert_eq!(report.images_encoded, 2); // two of the three are one square
    let traced = encoder.trace(&sources[0], &mut |_, _| ()).unwrap();
    let cache = FeatureCache::open(dir.path().join("cache")).unwrap();
    let cached =
        Encoder::open_with(dir.path().join("model"), EncoderOptions::new().feature_cache(cache)).unwrap();
    let plan = encoder.plan(&Request::new("<image>\nWhat?").raw(true).image_count(1)).unwrap();
    let slot = plan.slots[0];
    assert_eq!(slot.len, encoder.config().patches);
    let mut rows = vec![set.features()[0].clone(), traced];
    for encoder in [&encoder, &cached, &cached] {
        let mut sequence = SequenceBuffer::new();
        let report = encoder.encode_into(&plan, &sources[..1], &mut sequence).unwrap();
        assert_eq!(report.images_encoded + report.images_cached, 1);
        sequence.verify().unwrap();
        let hidden = encoder.config().hidden_size;
        let filled = &sequence.as_slice().unwrap()[slot.offset * hidden..][..slot.len * hidden];
        rows.push(encoder.adopt_features(filled.to_vec()).unwrap());
    }
    for made in rows {
        assert_eq!(made.as_slice(), features[0].as_slice());
    }
}

#[test]
fn an_image_that_cannot_be_used_is_named_and_nothing_written() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = tiny(&dir.path().join("model"));
    let good = picture(80, 90);
    let plan = encoder.plan(&Request::new("<image><image>").raw(true).image_count(2)).unwrap();
    let mut memory = vec![half::f16::ONE; plan.len() * encoder.config().hidden_size];
    let mut sequence = SequenceBuffer::wrap(&mut memory, encoder.config().hidden_size);
    let broken = ImageSource::from(&b"no image"[..]);
    let error = encoder.encode_into(&plan, &[(&good).into(), broken], &mut sequence).unwrap_err();
    assert!(matches!(error, Error::Image { .. }) && error.to_string().contains("image 1"), "{error}");
    drop(sequence);
    assert!(memory.iter().all(|&value| value == half::f16::ONE));
}

#[test]
fn features_of_one_rule_are_refused_for_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = tiny(&dir.path().join("llava"));
    synth::write(Preset::Tiny, &SynthOptions::default(), dir.path().join("tiny")).unwrap();
    let other = Encoder::open(dir.path().join("tiny")).unwrap();
    assert_eq!(other.config().profile, &XCOMPOSER2);
    assert!(encoder.preprocessing().to_string().contains("fit centre-crop"));
    assert!(!other.preprocessing().to_string().contains("fit")); // as it always was
    let image = picture(70, 70);
    let features = encoder.features(&[(&image).into()]).unwrap();
    let plan = other.plan(&Request::new("<ImageHere>").raw(true).image_count(1)).unwrap();
    let error = other.place_into(&plan, &features, &mut SequenceBuffer::new()).unwrap_err();
    assert!(error.to_string().contains("checkpoint"), "{error}");
}

#[test]
fn a_prompt_is_vicunas_with_one_bos() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = tiny(&dir.path().join("model"));
    let history = vec![("Hi".to_owned(), "Yo".to_owned())];
    let request = Request::new("<image>\nWhat is <ImageHere>?").image_count(1).history(history);
    let plan = encoder.plan(&request).unwrap();
    assert_eq!(plan.warnings, [], "a marker that is a token of the tokenizer is no control token");
    let texts: Vec<&str> = plan
        .segments
        .iter()
        .filter(|segment| segment.kind == SegmentKind::Text)
        .map(|segment| segment.text.as_str())
        .collect();
    assert_eq!(texts, ["USER: Hi ASSISTANT: Yo USER: ", "\nWhat is <ImageHere>? ASSISTANT:"]);
    let bos = |ids: &[i64]| ids.iter().filter(|&&id| id == 1).count();
    assert_eq!((plan.input_ids[0], bos(&plan.input_ids)), (1, 1));
    assert_eq!(plan.im_mask.iter().filter(|&&inside| inside).count(), encoder.config().patches);

    // BOS stands before an image, too.
    let raw = encoder.plan(&Request::new("<image><image>").raw(true).image_count(2)).unwrap();
    assert_eq!((raw.slots[0].offset, raw.len()), (1, 1 + 2 * encoder.config().patches));
    assert_eq!((raw.input_ids[0], bos(&raw.input_ids)), (1, 1));

    let error = encoder.plan(&Request::new("What?").image_count(1)).unwrap_err().to_string();
    assert_names(&error, &["0 markers `<image>`", "Image 1: <image>; What?"]);
}

/// The rel-L2 of rows and those that were expected.
fn rel_l2(got: &[half::f16], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (got, &want) in got.iter().zip(want) {
        error += (got.to_f64() - f64::from(want)).powi(2);
        norm += f64::from(want).powi(2);
    }
    (error / norm).sqrt()
}

/// What transformers' own classes made: see tests/goldens/llava/make.py.
#[test]
fn pixels_features_and_prompts_are_transformers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llava");
    let goldens: Value = serde_json::from_slice(&std::fs::read(dir.join("goldens.json")).unwrap()).unwrap();
    let encoder = Encoder::open(dir.join("model")).unwrap();
    let number = |value: &Value| value.as_u64().unwrap() as u32;
    let pictures = goldens["pictures"].as_array().unwrap();
    let images: Vec<RgbImage> =
        pictures.iter().map(|entry| picture(number(&entry[0]), number(&entry[1]))).collect();
    let sources: Vec<ImageSource<'_>> = images.iter().map(Into::into).collect();
    let (set, _) = encoder.feature_set(&sources, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
    for (note, entry) in set.notes().iter().zip(pictures) {
        assert_eq!(note.pixels, entry[2].as_str().unwrap(), "{}", note.name);
    }

    let digits = goldens["features"].as_str().unwrap();
    let bytes: Vec<u8> =
        (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect();
    let expected: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
    let image = encoder.config().patches * encoder.config().hidden_size;
    let got: Vec<half::f16> =
        set.features()[..expected.len() / image].iter().flat_map(|one| one.as_slice().to_vec()).collect();
    let error = rel_l2(&got, &expected);
    let bound = 1.1 * goldens["fp16"].as_f64().unwrap();
    assert!(error <= bound && error <= 2e-3, "rel-L2 {error:.2e}, where {bound:.2e} is allowed");

    for case in goldens["prompts"].as_array().unwrap() {
        let history: Vec<(String, String)> = serde_json::from_value(case[1].clone()).unwrap();
        let markers = [&case[1], &case[2]].map(|text| text.to_string().matches("<image>").count());
        // The processor's own tokens are live wherever they stand.
        let request = Request::new(case[2].as_str().unwrap())
            .raw(case[0].as_bool().unwrap())
            .history(history)
            .image_count(markers.iter().sum())
            .allow_control_tokens(true);
        let want: Vec<i64> = serde_json::from_value(case[3].clone()).unwrap();
        assert_eq!(encoder.plan(&request).unwrap().input_ids, want, "{}", case[2]);
    }
}

#[test]
fn what_was_converted_encodes_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let encoder = tiny(&dir.path().join("model"));
    let (fp16, clip) = (dir.path().join("fp16"), dir.path().join("clip"));
    let checkpoint = Checkpoint::open(dir.path().join("model")).unwrap();
    convert::write(&checkpoint, ConvertOptions::default(), &fp16).unwrap();
    let converted = Encoder::open(&fp16).unwrap();
    assert_eq!(converted.config(), encoder.config());
    let image = picture(90, 80);
    let [one, other] =
        [&encoder, &converted].map(|encoder| encoder.features(&[(&image).into()]).unwrap().remove(0));
    assert_eq!(one.as_slice(), other.as_slice());

    // For transformers' classes: its own names, and as many blocks as features come through.
    convert::write(&checkpoint, ConvertOptions { layout: Layout::ClipVision, ..Default::default() }, &clip)
        .unwrap();
    let names = |file: &str| {
        let bytes = std::fs::read(clip.join(file)).unwrap();
        let mut names: Vec<String> = safetensors::SafeTensors::deserialize(&bytes)
            .unwrap()
            .names()
            .into_iter()
            .map(str::to_owned)
            .collect();
        names.sort_unstable();
        names
    };
    assert_eq!(names("projector.safetensors"), ["0.bias", "0.weight", "2.bias", "2.weight"]);
    assert_eq!(names("token_embedding.safetensors"), ["weight"]);
    assert!(names("model.safetensors").iter().all(|name| name.starts_with("vision_model.")));
    let config: Value = serde_json::from_slice(&std::fs::read(clip.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["num_hidden_layers"], 2);
}

/// A `tokenizer.json` of five pieces, whose spaces are made by `normalizer` and `pre_tokenizer`.
fn tokenizer_json(normalizer: Value, pre_tokenizer: Value) -> String {
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>"), special(6, "<image>")],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": null,
        "model": { "type": "BPE", "unk_token": "<unk>", "merges": [["▁", "a"]],
                   "vocab": { "<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5 } },
    })
    .to_string()
}

#[test]
fn spaces_in_front_are_where_the_tokenizer_json_has_them() {
    let dir = tempfile::tempdir().unwrap();
    synth::write(Preset::LlavaTiny, &SynthOptions::default(), dir.path()).unwrap();
    let ids = |prompt: &str| -> Vec<i64> {
        let planner = Planner::open(dir.path()).unwrap();
        let images = prompt.matches("<image>").count();
        let request = Request::new(prompt).raw(true).image_count(images);
        planner.plan(&request).unwrap().input_ids.into_iter().filter(|&id| id >= 0).collect()
    };
    let with = |json: String| std::fs::write(dir.path().join("tokenizer.json"), json).unwrap();
    let first = tokenizer_json(
        Value::Null,
        json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false }),
    );
    with(first.clone());
    // A tokenizer.model that wants spaces does not say where; the file beside it does.
    let model = dir.path().join("tokenizer.model");
    let mut bytes = std::fs::read(&model).unwrap();
    bytes.extend([0x1a, 2, 0x18, 1]); // normalizer_spec { add_dummy_prefix: true }
    std::fs::write(&model, &bytes).unwrap();
    for (prompt, want) in [
        ("a<image>a", &[1, 5, 4][..]),
        (" a<image> a", &[1, 5, 5]),
        ("<image>a", &[1, 4]),
        ("a</s>a", &[1, 5, 2, 4]),
        ("</s>a", &[1, 2, 4]),
    ] {
        assert_eq!(ids(prompt), want, "{prompt}");
    }
    with(tokenizer_json(
        json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        ] }),
        Value::Null,
    ));
    for (prompt, want) in
        [("a<image>a", &[1, 5, 5][..]), ("<image>a", &[1, 5]), (" a", &[1, 3, 5]), ("a</s>a", &[1, 5, 2, 5])]
    {
        assert_eq!(ids(prompt), want, "{prompt}");
    }
    // One of several pre-tokenizers: where it would be is not known here.
    let one: Value = serde_json::from_str(&first).unwrap();
    let several = json!({ "type": "Sequence", "pretokenizers": [one["pre_tokenizer"].clone()] });
    with(tokenizer_json(Value::Null, several));
    assert_names(&Planner::open(dir.path()).unwrap_err().to_string(), &["pre-tokenizer", "not supported"]);
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert_names(&Planner::open(dir.path()).unwrap_err().to_string(), &["add_dummy_prefix = true"]);
}
