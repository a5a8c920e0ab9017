//! `imagehere convert`: the same bits from every kind of checkpoint, the names that others expect, all or nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::f16;
use imagehere::Encoder;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

#[path = "checkpoint_support/mod.rs"]
mod checkpoints;
mod support;
use checkpoints::{Dt, Named, SMALL, TOWER, find, find_mut, small_model};
use support::{Place, Words, names};

/// Name, shape and bits of every tensor of a file.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// Reads a file whose tensors are all fp16.
fn tensors(path: impl AsRef<Path>) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |(name, tensor): (String, safetensors::tensor::TensorView<'_>)| {
        assert_eq!(tensor.dtype(), Dtype::F16, "{name}");
        (name, (tensor.shape().to_vec(), tensor.data().to_vec()))
    };
    file.tensors().into_iter().map(read).collect()
}

/// What a model's tensors have to be, under their own names.
fn rounded(model: &[Named]) -> Tensors {
    let one = |tensor: &Named| {
        let bits = tensor.rounded().iter().flat_map(|value| value.to_le_bytes()).collect();
        (tensor.name.clone(), (tensor.shape.clone(), bits))
    };
    model.iter().map(one).collect()
}

fn convert(from: impl AsRef<Path>, to: impl AsRef<Path>) -> Words {
    Words::new("convert").arg(from.as_ref()).arg("--out").arg(to.as_ref())
}

fn json_file(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A place with a checkpoint in `model`.
fn place_with(model: &[Named], format: &str, sharded: bool) -> Place {
    let place = Place::empty();
    let dir = place.path("model");
    fs::create_dir(&dir).unwrap();
    if sharded {
        checkpoints::write_shards(&dir, model, format, false);
    } else {
        checkpoints::write_config(&dir, &checkpoints::config_json(SMALL));
        let (name, bytes) = match format {
            "bin" => ("pytorch_model.bin", checkpoints::torch_bytes(model)),
            _ => ("model.safetensors", checkpoints::safetensors_bytes(model)),
        };
        fs::write(dir.join(name), bytes).unwrap();
    }
    fs::write(dir.join("tokenizer.model"), imagehere::tokenizer::synthetic(SMALL.vocab)).unwrap();
    place
}

#[test]
fn every_kind_of_checkpoint_encodes_to_the_same_bits() {
    let place = Place::empty();
    let images = [place.picture("a.png", 1), place.picture("b.png", 2)];
    let encode = |model: &Path| {
        let words = Words::new("encode").arg("--model").arg(model);
        let words = words.args(["--prompt", "One <ImageHere>, two <ImageHere>: what changed?"]);
        words.arg("--image").args(&images).arg("--out").arg(place.path("s")).run().ok();
        let bytes = fs::read(place.path("s")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        ["inputs_embeds", "im_mask", "input_ids", "slots"]
            .map(|name| file.tensor(name).unwrap().data().to_vec())
    };
    for dtype in ["bf16", "f16", "f32"] {
        let mut files = Vec::new();
        for format in ["bin", "safetensors"] {
            let (model, out) =
                (place.path(&format!("{format}-{dtype}")), place.path(&format!("{format}-{dtype}-16")));
            let synth =
                Words::new("synth").args(["tiny", "--seed", "3", "--format", format, "--dtype", dtype]);
            synth.arg("--out").arg(&model).run().ok();
            let report = convert(&model, &out).arg("--json").run().json();
            assert_eq!(report["fingerprint"], json!(Encoder::open(&out).unwrap().fingerprint()));
            assert_eq!(report["source_fingerprint"], json!(Encoder::open(&model).unwrap().fingerprint()));
            assert_eq!((&report["saturated"], &report["warnings"]), (&json!(0), &json!([])));
            assert_eq!(names(&out), ["config.json", "model.safetensors", "tokenizer.model"]);
            let sizes = names(&out)
                .into_iter()
                .map(|name| (name.clone(), json!(out.join(name).metadata().unwrap().len())));
            assert_eq!(report["files"], Value::Object(sizes.collect()));
            assert!(encode(&model) == encode(&out), "{format} {dtype}");

            // What inspect says of it, and that it is a checkpoint like any other: it converts to itself.
            let inspected = Words::new("inspect").arg(&out).arg("--json").run().json();
            assert_eq!(
                (&inspected["tensors"], &inspected["needed"]),
                (&report["tensors"], &report["tensors"])
            );
            assert_eq!(inspected["dtypes"], json!({ "F16": report["tensors"] }));
            assert_eq!(inspected["needed_elements"], report["parameters"]);
            let again = place.path(&format!("{format}-{dtype}-again"));
            convert(&out, &again).run().ok();
            for name in names(&out) {
                assert!(fs::read(out.join(&name)).unwrap() == fs::read(again.join(&name)).unwrap(), "{name}");
            }
            files.push(fs::read(out.join("model.safetensors")).unwrap());
        }
        assert!(files[0] == files[1], "the same weights make the same bytes");
    }
}

#[test]
fn shards_and_mixed_dtypes_keep_names_shapes_and_nearest_values() {
    for (format, sharded) in [("bin", false), ("bin", true), ("safetensors", false), ("safetensors", true)] {
        for dtype in [Dt::Bf16, Dt::F16, Dt::F32] {
            let mut model = small_model(SMALL, dtype);
            for (tensor, other) in
                model.iter_mut().zip([Dt::F32, Dt::Bf16, Dt::F16].into_iter().cycle()).step_by(5)
            {
                tensor.dtype = other;
            }
            let place = place_with(&model, format, sharded);
            convert(place.path("model"), place.path("out")).run().ok();
            let found = tensors(place.path("out/model.safetensors"));
            assert_eq!(found.keys().collect::<Vec<_>>(), rounded(&model).keys().collect::<Vec<_>>());
            assert!(found == rounded(&model), "{format} {sharded} {dtype:?}");
        }
    }
}

#[test]
fn config_and_tokenizer_files_come_along_and_nothing_else() {
    let place = place_with(&small_model(SMALL, Dt::Bf16), "bin", false);
    let mut config = checkpoints::config_json(SMALL);
    config["torch_dtype"] = json!("bfloat16");
    config["dtype"] = json!("bfloat16");
    config["auto_map"] = json!({ "AutoConfig": "configuration_x.X" });
    let bytes = config.to_string();
    place.file("model/config.json", &bytes);
    for name in ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"] {
        place.file(&format!("model/{name}"), format!("{{\"of\": \"{name}\"}}"));
    }
    place.file("model/modeling_x.py", "import os");
    place.file("model/README.md", "# A model");
    convert(place.path("model"), place.path("out")).run().ok();
    let copied = ["added_tokens.json", "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"];
    for name in copied {
        assert_eq!(
            fs::read(place.path("model").join(name)).unwrap(),
            fs::read(place.path("out").join(name)).unwrap()
        );
    }
    let mut all = [&copied[..], &["config.json", "model.safetensors"]].concat();
    all.sort_unstable();
    assert_eq!(names(&place.path("out")), all);

    config["torch_dtype"] = json!("float16");
    config["dtype"] = json!("float16");
    let written = fs::read_to_string(place.path("out/config.json")).unwrap();
    assert_eq!(written, format!("{config:#}\n"), "every other key, in its place");

    fs::remove_file(place.path("model/tokenizer.model")).unwrap();
    let ended = convert(place.path("model"), place.path("without")).run();
    assert!(ended.stderr.contains("no tokenizer"), "{ended:?}");
    ended.ok();
}

/// What the state dict of transformers' `CLIPVisionModel` has, of a tower of the small model's sizes.
fn clip_vision() -> BTreeMap<String, Vec<usize>> {
    let (c, f) = (SMALL.width, SMALL.mlp);
    let mut all = vec![
        ("embeddings.class_embedding".to_owned(), vec![c]),
        ("embeddings.patch_embedding.weight".to_owned(), vec![c, 3, SMALL.patch, SMALL.patch]),
        ("embeddings.position_embedding.weight".to_owned(), vec![SMALL.grid * SMALL.grid + 1, c]),
    ];
    let mut pair = |name: String, shape: Vec<usize>| {
        all.push((format!("{name}.bias"), vec![shape[0]]));
        all.push((format!("{name}.weight"), shape));
    };
    for norm in ["pre_layrnorm", "post_layernorm"] {
        pair(norm.to_owned(), vec![c]);
    }
    for i in 0..SMALL.layers {
        for (part, shape) in [
            ("self_attn.k_proj", vec![c, c]),
            ("self_attn.v_proj", vec![c, c]),
            ("self_attn.q_proj", vec![c, c]),
            ("self_attn.out_proj", vec![c, c]),
            ("layer_norm1", vec![c]),
            ("mlp.fc1", vec![f, c]),
            ("mlp.fc2", vec![c, f]),
            ("layer_norm2", vec![c]),
        ] {
            pair(format!("encoder.layers.{i}.{part}"), shape);
        }
    }
    all.into_iter().map(|(name, shape)| (format!("vision_model.{name}"), shape)).collect()
}

#[test]
fn the_layout_of_clip_vision_has_the_names_of_transformers() {
    let model = small_model(SMALL, Dt::Bf16);
    let place = place_with(&model, "bin", true);
    let words = convert(place.path("model"), place.path("out")).args(["--layout", "clip-vision"]);
    let report = words.arg("--json").run().json();
    assert_eq!((&report["layout"], &report["fingerprint"]), (&json!("clip-vision"), &Value::Null));
    assert_eq!(
        names(&place.path("out")),
        [
            "config.json",
            "model.safetensors",
            "projector.safetensors",
            "token_embedding.safetensors",
            "tokenizer.model"
        ]
    );

    let tower = tensors(place.path("out/model.safetensors"));
    let shapes =
        tower.iter().map(|(name, (shape, _))| (name.clone(), shape.clone())).collect::<BTreeMap<_, _>>();
    assert_eq!(shapes, clip_vision());
    let mut expected: Tensors = BTreeMap::new();
    for tensor in &model {
        if let Some(name) = tensor.name.strip_prefix("vit.vision_tower.") {
            expected
                .insert(name.to_owned(), rounded(std::slice::from_ref(tensor)).remove(&tensor.name).unwrap());
        }
    }
    for (end, value) in [("weight", f16::ONE), ("bias", f16::ZERO)] {
        let bits = value.to_le_bytes().repeat(SMALL.width);
        expected.insert(format!("vision_model.post_layernorm.{end}"), (vec![SMALL.width], bits));
    }
    assert!(tower == expected);

    let renamed = |names: &[(&str, &str)]| -> Tensors {
        let one = |(new, name): &(&str, &str)| {
            ((*new).to_owned(), rounded(&[find(&model, name).clone()]).remove(*name).unwrap())
        };
        names.iter().map(one).collect()
    };
    let linear =
        ["0.weight", "0.bias", "2.weight", "2.bias"].map(|name| (name, format!("vision_proj.{name}")));
    let linear: Vec<(&str, &str)> = linear.iter().map(|(new, name)| (*new, name.as_str())).collect();
    assert!(tensors(place.path("out/projector.safetensors")) == renamed(&linear));
    let table = [("weight", "model.tok_embeddings.weight")];
    assert!(tensors(place.path("out/token_embedding.safetensors")) == renamed(&table));

    assert_eq!(
        json_file(place.path("out/config.json")),
        json!({
            "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "torch_dtype": "float16",
            "hidden_size": SMALL.width, "intermediate_size": SMALL.mlp, "num_hidden_layers": SMALL.layers,
            "num_attention_heads": SMALL.width / 64, "num_channels": 3, "image_size": SMALL.grid * SMALL.patch,
            "patch_size": SMALL.patch, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
        })
    );
}

#[test]
fn a_post_layernorm_of_the_checkpoints_own_is_kept_where_it_has_a_place() {
    let mut model = small_model(SMALL, Dt::F32);
    let norm = |end: &str, value: f32| {
        Named::new(&format!("{TOWER}post_layernorm.{end}"), Dt::F32, &[SMALL.width], vec![value; SMALL.width])
    };
    model.extend([norm("weight", 1.5), norm("bias", -0.25)]);
    for sharded in [false, true] {
        let place = place_with(&model, "safetensors", sharded);
        convert(place.path("model"), place.path("up")).run().ok();
        assert!(
            !tensors(place.path("up/model.safetensors")).keys().any(|name| name.contains("post_layernorm"))
        );
        convert(place.path("model"), place.path("clip")).args(["--layout", "clip-vision"]).run().ok();
        let tower = tensors(place.path("clip/model.safetensors"));
        for (end, value) in [("weight", 1.5), ("bias", -0.25)] {
            let bits = f16::from_f32(value).to_le_bytes().repeat(SMALL.width);
            assert_eq!(tower[&format!("vision_model.post_layernorm.{end}")].1, bits);
        }
    }
    let last = model.len() - 1;
    model[last] = Named::zeros(&model[last].name.clone(), Dt::F32, &[3]);
    let place = place_with(&model, "safetensors", false);
    let words = convert(place.path("model"), place.path("clip")).args(["--layout", "clip-vision"]);
    words.run().mistake(&["post_layernorm.bias", "[3]", "[64] is needed"]);
    assert_eq!(place.names(), ["model"]);
}

#[test]
fn a_value_beyond_fp16_is_named_or_cut_and_counted() {
    let weight = format!("{TOWER}encoder.layers.1.mlp.fc2.weight");
    for (name, at) in [(weight.as_str(), 77), ("model.tok_embeddings.weight", 1), ("vision_proj.2.bias", 0)] {
        let mut model = small_model(SMALL, Dt::F32);
        find_mut(&mut model, name).values[at] = -70000.0;
        let place = place_with(&model, "safetensors", false);
        let words = convert(place.path("model"), place.path("out"));
        words.run().mistake(&[&format!("`{name}`[{at}] is -70000"), "65504", "--saturate"]);
        assert_eq!(place.names(), ["model"]);

        let ended = words.arg("--saturate").arg("--json").run();
        assert!(ended.stderr.contains("1 of") && ended.stderr.contains("cut to ±65504"), "{ended:?}");
        assert_eq!(ended.json()["saturated"], json!(1));
        find_mut(&mut model, name).values[at] = -65504.0;
        assert!(tensors(place.path("out/model.safetensors")) == rounded(&model));

        find_mut(&mut model, name).values[at] = f32::NAN;
        let place = place_with(&model, "safetensors", false);
        convert(place.path("model"), place.path("out")).arg("--saturate").run().mistake(&[name, "NaN"]);
        assert_eq!(place.names(), ["model"]);
    }
}

#[test]
fn what_is_there_stays_and_the_message_says_what_to_do() {
    let place = Place::new();
    place.file("file", "precious");
    fs::create_dir(place.path("full")).unwrap();
    place.file("full/mine.txt", "precious");
    fs::create_dir(place.path("empty")).unwrap();
    let to = |name: &str| convert(place.path("model"), place.path(name)).run();
    to("full").mistake(&["full", "it is not empty: it holds mine.txt", "is empty or does not exist yet"]);
    to("model").mistake(&["model", "it is not empty", "is empty or does not exist yet"]);
    to("file").mistake(&["it is a file", "is empty or does not exist yet"]);
    to("no/such").mistake(&["there is no directory", "mkdir -p"]);
    convert(place.path("nowhere"), place.path("out")).run().mistake(&["there is no such directory"]);
    convert(place.path("model"), place.path("out"))
        .args(["--layout", "llava"])
        .run()
        .mistake(&["upstream, clip-vision"]);
    let here =
        support::command(&convert(place.path("model"), ".").0).current_dir(place.path("empty")).output();
    support::Ended::of(here.unwrap()).mistake(&["it is the directory that this runs in", "inside it"]);
    assert_eq!(place.names(), ["empty", "file", "full", "model"]);
    let text = to("empty").ok();
    for part in [
        "in fp16",
        "layout upstream",
        "model.safetensors",
        "vision_proj.2.weight",
        "0 values cut",
        "fingerprint",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    Encoder::open(place.path("empty")).unwrap();
}

/// Far more weights than the command may have in memory: a table of 256 MB, most of it a hole in the file.
#[cfg(target_os = "linux")]
#[test]
fn memory_stays_the_same_however_large_the_checkpoint() {
    let (rows, hidden) = (1 << 20, 64);
    let sizes = checkpoints::Small { hidden, vocab: 1, ..SMALL };
    let model = small_model(sizes, Dt::F32);
    let place = Place::empty();
    fs::create_dir(place.path("model")).unwrap();
    let mut config = checkpoints::config_json(sizes);
    config["vocab_size"] = json!(rows);
    checkpoints::write_config(&place.path("model"), &config);
    place.file("model/tokenizer.model", imagehere::tokenizer::synthetic(1000));

    let (mut lines, mut data) = (Vec::new(), Vec::new());
    for tensor in &model[..model.len() - 1] {
        let begin = data.len() as u64;
        data.extend(tensor.bytes());
        lines.push((tensor.name.clone(), "F32", tensor.shape.clone(), begin, data.len() as u64));
    }
    let begin = data.len() as u64;
    let end = begin + (rows * hidden * 4) as u64;
    lines.push(("model.tok_embeddings.weight".to_owned(), "F32", vec![rows, hidden], begin, end));
    let mut bytes = checkpoints::safetensors_header(&lines);
    let length = bytes.len() as u64 + end;
    bytes.extend(data);
    let file = place.file("model/model.safetensors", bytes);
    fs::File::options().write(true).open(file).unwrap().set_len(length).unwrap();

    let report = convert(place.path("model"), place.path("out")).arg("--json").run().json();
    let peak = report["peak_bytes"].as_u64().unwrap();
    assert!(report["bytes"].as_u64().unwrap() > 128 << 20 && peak < 80 << 20, "peak {peak}");
}
