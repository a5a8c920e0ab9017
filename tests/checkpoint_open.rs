//! Opening checkpoint directories: both formats, shards, the Hub's cache, sizes, names and dtypes.

mod checkpoint_support;

use std::path::Path;

use checkpoint_support::*;
use half::f16;
use imagehere::checkpoint::weights::{LinearWeights, NormWeights, VisionWeights};
use imagehere::checkpoint::{Checkpoint, EmbeddingTable, RangePolicy};
use imagehere::{Category, Error, WarningKind};

/// Opens a directory that has to be refused, and returns the message.
fn refusal(dir: &Path) -> String {
    let error = Checkpoint::open(dir).expect_err("this checkpoint must be refused");
    assert_eq!(error.category(), Category::Checkpoint, "{error}");
    error.to_string()
}

#[track_caller]
fn assert_names(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

/// Checks every field against the values that were written.
fn assert_weights(weights: &VisionWeights, model: &[Named]) {
    let tower = |part: &str| find(model, &format!("{TOWER}{part}")).rounded();
    let linear = |actual: &LinearWeights, name: &str| {
        assert!(actual.weight == find(model, &format!("{name}.weight")).rounded(), "{name}.weight");
        assert!(actual.bias == find(model, &format!("{name}.bias")).rounded(), "{name}.bias");
    };
    let norm = |actual: &NormWeights, name: &str| {
        assert!(actual.weight == find(model, &format!("{name}.weight")).rounded(), "{name}.weight");
        assert!(actual.bias == find(model, &format!("{name}.bias")).rounded(), "{name}.bias");
    };
    assert!(weights.class_embedding == tower("embeddings.class_embedding"));
    assert!(weights.patch_embedding == tower("embeddings.patch_embedding.weight"));
    assert!(weights.position_embedding == tower("embeddings.position_embedding.weight"));
    norm(&weights.pre_norm, &format!("{TOWER}pre_layrnorm"));
    for (i, layer) in weights.layers.iter().enumerate() {
        let name = |part: &str| format!("{TOWER}encoder.layers.{i}.{part}");
        norm(&layer.norm1, &name("layer_norm1"));
        norm(&layer.norm2, &name("layer_norm2"));
        linear(&layer.out, &name("self_attn.out_proj"));
        linear(&layer.fc1, &name("mlp.fc1"));
        linear(&layer.fc2, &name("mlp.fc2"));
        let stacked = |what: &str| -> Vec<f16> {
            let part = |p: &str| find(model, &name(&format!("self_attn.{p}_proj.{what}"))).rounded();
            ["q", "k", "v"].into_iter().flat_map(part).collect()
        };
        assert!(layer.qkv.weight == stacked("weight"));
        assert!(layer.qkv.bias == stacked("bias"));
    }
    linear(&weights.projector_hidden, "vision_proj.0");
    linear(&weights.projector_out, "vision_proj.2");
}

fn assert_embedding(table: &EmbeddingTable, model: &[Named]) {
    let expected = find(model, "model.tok_embeddings.weight").rounded();
    let hidden = table.hidden();
    let mut row = vec![f16::NAN; hidden];
    for id in (0..table.rows()).rev() {
        table.gather_row(id as u32, &mut row).unwrap();
        assert_eq!(row, &expected[id * hidden..(id + 1) * hidden], "row {id}");
    }
}

fn assert_reads(dir: &Path, model: &[Named]) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (weights, report) = checkpoint.vision_weights(RangePolicy::Refuse).unwrap();
    assert_weights(&weights, model);
    assert_eq!(report.saturated(), 0);
    assert_embedding(&checkpoint.embedding(), model);
}

#[test]
fn both_formats_and_all_dtypes_are_read() {
    for format in ["safetensors", "bin"] {
        for dtype in [Dt::Bf16, Dt::F16, Dt::F32] {
            let model = small_model(SMALL, dtype);
            assert_reads(model_dir(&model, format).path(), &model);
        }
    }
}

#[test]
fn dtypes_may_be_mixed_and_other_sizes_are_read() {
    let sizes =
        Small { grid: 5, patch: 4, width: 128, layers: 1, mlp: 200, projector: 24, hidden: 40, vocab: 9 };
    let mut model = small_model(sizes, Dt::Bf16);
    for (i, tensor) in model.iter_mut().enumerate() {
        tensor.dtype = [Dt::Bf16, Dt::F32, Dt::F16][i % 3];
    }
    for format in ["safetensors", "bin"] {
        let dir = model_dir(&model, format);
        write_config(dir.path(), &config_json(sizes));
        assert_reads(dir.path(), &model);
    }
}

#[test]
fn sizes_come_from_shapes_and_never_from_the_llm() {
    let dir = model_dir(&small_model(SMALL, Dt::Bf16), "safetensors");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let config = checkpoint.config();
    assert_eq!((config.image_size, config.patch_size, config.grid), (6, 2, 3));
    assert_eq!((config.patches, config.tokens), (9, 10));
    assert_eq!((config.width, config.heads, config.layers, config.mlp_width), (64, 1, 2, 96));
    assert_eq!((config.projector_width, config.hidden_size, config.vocab_size), (80, 48, 40));
    assert_eq!((config.max_length, config.max_position_embeddings), (Some(4096), Some(32768)));
    assert_eq!(checkpoint.dir(), dir.path());
    assert!(checkpoint.warnings().is_empty());
}

#[test]
fn what_config_does_not_say_is_not_missed() {
    let dir = model_dir(&small_model(SMALL, Dt::F32), "bin");
    write_config(dir.path(), &serde_json::json!({ "quantization_config": null, "max_length": null }));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.config().image_size, 6);
    assert_eq!((checkpoint.config().max_length, checkpoint.config().max_position_embeddings), (None, None));
}

/// Splits a model into a shard with the LLM, and two with the needed tensors.
fn write_shards(dir: &Path, model: &[Named], format: &str, with_llm: bool) {
    let (extension, index) = match format {
        "safetensors" => ("safetensors", "model.safetensors.index.json"),
        _ => ("bin", "pytorch_model.bin.index.json"),
    };
    let llm = [
        Named::zeros("model.layers.0.attention.wqkv.weight", Dt::Bf16, &[4, 4]),
        Named::zeros("model.layers.0.attention.wqkv.Plora_A.weight", Dt::Bf16, &[2, 4]),
    ];
    let names: Vec<String> = (1..=3).map(|i| format!("shard-{i}-of-3.{extension}")).collect();
    let (first, second) = model.split_at(model.len() / 2);
    for (name, part) in names.iter().zip([first, &llm[..], second]) {
        if part[0].name.starts_with("model.layers") && !with_llm {
            continue;
        }
        let bytes = if format == "safetensors" { safetensors_bytes(part) } else { torch_bytes(part) };
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    let lines = [first, &llm[..], second]
        .into_iter()
        .zip(&names)
        .flat_map(|(part, name)| part.iter().map(move |tensor| (tensor.name.as_str(), name.as_str())));
    write_index(&dir.join(index), lines);
    write_config(dir, &config_json(SMALL));
}

#[test]
fn shards_are_read_and_only_those_with_needed_tensors_have_to_be_there() {
    let model = small_model(SMALL, Dt::Bf16);
    for format in ["safetensors", "bin"] {
        for with_llm in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            write_shards(dir.path(), &model, format, with_llm);
            assert_reads(dir.path(), &model);
        }
        let dir = tempfile::tempdir().unwrap();
        write_shards(dir.path(), &model, format, true);
        let extension = if format == "bin" { "bin" } else { "safetensors" };
        std::fs::remove_file(dir.path().join(format!("shard-3-of-3.{extension}"))).unwrap();
        assert_names(&refusal(dir.path()), &["shard-3-of-3", "not there", "index.json", "21 tensors"]);
    }
}

#[test]
fn an_index_and_its_shards_have_to_agree() {
    let model = small_model(SMALL, Dt::Bf16);
    let dir = tempfile::tempdir().unwrap();
    write_shards(dir.path(), &model, "safetensors", true);
    // The last needed tensor is said to lie in the first shard.
    let index = dir.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&text).unwrap();
    value["weight_map"]["model.tok_embeddings.weight"] = "shard-1-of-3.safetensors".into();
    std::fs::write(&index, value.to_string()).unwrap();
    assert_names(&refusal(dir.path()), &["shard-1-of-3", "model.tok_embeddings.weight", "index.json"]);

    value["weight_map"].as_object_mut().unwrap().remove("vision_proj.2.bias");
    std::fs::write(&index, value.to_string()).unwrap();
    assert_names(&refusal(dir.path()), &["index.json", "`vision_proj.2.bias` is missing"]);

    for broken in ["{", "[]", r#"{"metadata":{}}"#, r#"{"weight_map":{"a":3}}"#] {
        std::fs::write(&index, broken).unwrap();
        assert_names(&refusal(dir.path()), &["no index of shards"]);
    }
}

#[test]
fn an_index_that_names_another_directory_is_refused() {
    let model = small_model(SMALL, Dt::Bf16);
    let outside = model_dir(&model, "safetensors");
    let stolen = outside.path().join("model.safetensors");
    for name in
        ["../x.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", stolen.to_str().unwrap()]
    {
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), &config_json(SMALL));
        let lines = model.iter().map(|tensor| (tensor.name.as_str(), name));
        write_index(&dir.path().join("model.safetensors.index.json"), lines);
        assert_names(&refusal(dir.path()), &["index.json", "plain file name", name]);
    }
}

#[cfg(unix)]
#[test]
fn the_hubs_cache_of_links_is_read() {
    use std::os::unix::fs::symlink;
    let model = small_model(SMALL, Dt::Bf16);
    for format in ["safetensors", "bin"] {
        let cache = tempfile::tempdir().unwrap();
        let blobs = cache.path().join("blobs");
        let snapshot = cache.path().join("snapshots/c67bd06");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::create_dir_all(&snapshot).unwrap();
        write_shards(&blobs, &model, format, false);
        // Every file of a snapshot is a link to a blob named by its hash; the missing shard's hangs.
        for (i, entry) in std::fs::read_dir(&blobs).unwrap().enumerate() {
            let name = entry.unwrap().file_name();
            std::fs::rename(blobs.join(&name), blobs.join(format!("{i:040x}"))).unwrap();
            symlink(format!("../../blobs/{i:040x}"), snapshot.join(name)).unwrap();
        }
        assert_reads(&snapshot, &model);

        std::fs::remove_file(std::fs::canonicalize(snapshot.join("config.json")).unwrap()).unwrap();
        assert_names(&refusal(&snapshot), &["config.json", "link to ../../blobs/", "does not exist"]);
    }
}

#[test]
fn safetensors_are_preferred_and_it_is_said() {
    let model = small_model(SMALL, Dt::F32);
    let dir = model_dir(&model, "safetensors");
    std::fs::write(dir.path().join("pytorch_model.bin"), b"not looked at").unwrap();
    assert_reads(dir.path(), &model);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let [warning] = checkpoint.warnings() else { panic!("{:?}", checkpoint.warnings()) };
    assert_eq!(warning.kind, WarningKind::Checkpoint);
    assert_names(&warning.message, &["safetensors", "pytorch_model.bin"]);
}

#[test]
fn disagreements_name_both_sources() {
    let model = || small_model(SMALL, Dt::Bf16);
    let with_config = |key: &str, value: serde_json::Value| {
        let dir = model_dir(&model(), "safetensors");
        let mut config = config_json(SMALL);
        config[key] = value;
        write_config(dir.path(), &config);
        refusal(dir.path())
    };
    let message = with_config("img_size", 490.into());
    assert_names(
        &message,
        &["config.json", "`img_size` is 490", "position_embedding", "10 rows", "6 pixels"],
    );
    let message = with_config("hidden_size", 4096.into());
    assert_names(&message, &["config.json", "`hidden_size` is 4096", "vision_proj.2.weight", "48"]);
    let message = with_config("vocab_size", 92544.into());
    assert_names(
        &message,
        &["config.json", "`vocab_size` is 92544", "model.tok_embeddings.weight", "40 rows"],
    );
    for wrong in [serde_json::json!(-1), 0.into(), "490".into(), 490.5.into(), serde_json::json!([490])] {
        assert_names(
            &with_config("img_size", wrong),
            &["config.json", "`img_size`", "positive whole number"],
        );
    }

    let with_shape = |name: &str, shape: &[usize]| {
        let mut model = model();
        let tensor = find_mut(&mut model, name);
        *tensor = Named::zeros(name, Dt::Bf16, shape);
        refusal(model_dir(&model, "safetensors").path())
    };
    let layer = |part: &str| format!("{TOWER}encoder.layers.1.{part}");
    let message = with_shape(&layer("mlp.fc1.weight"), &[100, 64]);
    assert_names(
        &message,
        &[&layer("mlp.fc1.weight"), "[100, 64]", "[96, 64]", "layers.0.mlp.fc1.weight", "96"],
    );
    let message = with_shape(&layer("self_attn.k_proj.weight"), &[64, 65]);
    assert_names(&message, &["k_proj.weight", "[64, 65]", "[64, 64]", "patch_embedding.weight"]);
    let message = with_shape("model.tok_embeddings.weight", &[40, 50]);
    assert_names(&message, &["model.tok_embeddings.weight", "[40, 50]", "vision_proj.2.weight", "48"]);
    let message = with_shape("vision_proj.0.weight", &[80, 256]);
    assert_names(&message, &["vision_proj.0.weight", "[80, 256]", "64", "4KHD"]);
    let message = with_shape(&format!("{TOWER}embeddings.patch_embedding.weight"), &[64, 3, 2, 3]);
    assert_names(&message, &["patch_embedding.weight", "[64, 3, 2, 3]", "[64, 3, 2, 2]"]);
    let message = with_shape(&format!("{TOWER}embeddings.patch_embedding.weight"), &[64, 1, 2, 2]);
    assert_names(&message, &["[64, 1, 2, 2]", "[64, 3, 2, 2]"]);
    let message = with_shape(&format!("{TOWER}embeddings.patch_embedding.weight"), &[64]);
    assert_names(&message, &["patch_embedding.weight", "[64]"]);
    let message = with_shape(&format!("{TOWER}embeddings.position_embedding.weight"), &[12, 64]);
    assert_names(&message, &["position_embedding.weight", "12 rows", "square"]);

    let narrow = Small { width: 96, ..SMALL };
    let message = refusal(model_dir(&small_model(narrow, Dt::Bf16), "safetensors").path());
    assert_names(&message, &["96 channels", "patch_embedding", "64"]);
}

#[test]
fn a_table_larger_than_the_vocabulary_is_fine() {
    let model = small_model(Small { vocab: 64, ..SMALL }, Dt::Bf16);
    let dir = model_dir(&model, "safetensors"); // config.json says 40
    assert_eq!(Checkpoint::open(dir.path()).unwrap().config().vocab_size, 64);
}

#[test]
fn other_tensors_may_be_there_and_unknown_ones_of_the_tower_may_not() {
    let mut model = small_model(SMALL, Dt::Bf16);
    let needed = model.len();
    model.extend([
        Named::zeros(&format!("{TOWER}post_layernorm.weight"), Dt::Bf16, &[64]),
        Named::zeros(&format!("{TOWER}post_layernorm.bias"), Dt::F64, &[64]),
        Named::zeros(&format!("{TOWER}embeddings.position_ids"), Dt::I64, &[1, 10]),
        Named::zeros("model.layers.0.attention.rotary_emb.inv_freq", Dt::F32, &[8]),
        Named::zeros("model.layers.0.feed_forward.w1.weight", Dt::Bf16, &[4, 4]),
        Named::zeros("output.weight", Dt::Bf16, &[40, 48]),
    ]);
    for format in ["safetensors", "bin"] {
        assert_reads(model_dir(&model, format).path(), &model);
    }
    let lora = "vision_proj.0.lora_A.weight".to_owned();
    let odd = format!("{TOWER}encoder.layers.0.self_attn.q_proj.lora_B.weight");
    let gamma = format!("{TOWER}encoder.layers.1.ls1");
    let padded = format!("{TOWER}encoder.layers.01.layer_norm1.weight");
    for name in [lora, odd, gamma, padded, format!("{TOWER}head.weight")] {
        let mut model = model[..needed].to_vec();
        model.push(Named::zeros(&name, Dt::Bf16, &[2]));
        assert_names(&refusal(model_dir(&model, "bin").path()), &[&name, "no part of"]);
    }
}

#[test]
fn missing_tensors_are_named_with_a_guess() {
    let model = small_model(SMALL, Dt::Bf16);
    let without =
        |name: &str| -> Vec<Named> { model.iter().filter(|tensor| tensor.name != name).cloned().collect() };
    for tensor in &model {
        let message = refusal(model_dir(&without(&tensor.name), "safetensors").path());
        assert_names(&message, &[&tensor.name, "missing"]);
    }
    let first = |tensor: &Named| tensor.name.contains("layers.0.");
    let gap: Vec<Named> = model.iter().filter(|tensor| !first(tensor)).cloned().collect();
    assert_names(&refusal(model_dir(&gap, "bin").path()), &["block 0 is missing", "block 1"]);

    let mut wrapped = model.clone();
    wrapped.iter_mut().for_each(|tensor| tensor.name = format!("module.{}", tensor.name));
    assert_names(&refusal(model_dir(&wrapped, "bin").path()), &["missing", "there is `module.vit."]);

    let other = [Named::zeros("transformer.wte.weight", Dt::F32, &[2])];
    assert_names(
        &refusal(model_dir(&other, "bin").path()),
        &["missing", "1 others", "transformer.wte.weight"],
    );
}

#[test]
fn other_dtypes_are_refused_by_name_where_needed() {
    let cases = [
        (Dt::F64, "F64", "torch.float64"),
        (Dt::I64, "I64", "torch.int64"),
        (Dt::Fp8, "F8_E4M3", "torch.float8_e4m3fn"),
    ];
    for (dtype, safetensors, torch) in cases {
        for (format, name) in [("safetensors", safetensors), ("bin", torch)] {
            let mut model = small_model(SMALL, Dt::Bf16);
            find_mut(&mut model, "vision_proj.2.weight").dtype = dtype;
            let error = Checkpoint::open(model_dir(&model, format).path()).unwrap_err();
            assert!(matches!(error, Error::DType { .. }), "{error:?}");
            assert_names(&error.to_string(), &["`vision_proj.2.weight`", name, "bf16, f16 and f32"]);
        }
        // Where the tensor is not needed, its dtype does not matter.
        let mut model = small_model(SMALL, Dt::Bf16);
        model.push(Named::zeros("model.layers.0.feed_forward.w1.weight", dtype, &[4, 4]));
        for format in ["safetensors", "bin"] {
            assert_reads(model_dir(&model, format).path(), &model);
        }
    }
}

#[test]
fn quantised_checkpoints_have_their_own_message() {
    let model = small_model(SMALL, Dt::Bf16);
    let dir = model_dir(&model, "safetensors");
    let mut config = config_json(SMALL);
    config["quantization_config"] = serde_json::json!({ "quant_method": "gptq", "bits": 4 });
    write_config(dir.path(), &config);
    assert_names(&refusal(dir.path()), &["config.json", "quantised by gptq", "original checkpoint"]);

    let names = [
        ("model.layers.0.attention.wqkv.linear.qweight", "GPTQ"),
        ("model.layers.0.attention.wo.qzeros", "AWQ"),
        ("model.layers.0.feed_forward.w1.weight.absmax", "bitsandbytes"),
        ("model.layers.0.feed_forward.w1.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.feed_forward.w1.SCB", "bitsandbytes"),
        ("model.layers.0.feed_forward.w1.weight_scale", "fp8"),
    ];
    for (name, method) in names {
        for format in ["safetensors", "bin"] {
            let mut model = model.clone();
            model.push(Named::zeros(name, Dt::F32, &[2]));
            assert_names(&refusal(model_dir(&model, format).path()), &["quantised", name, method]);
        }
    }

    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("gptq_model-4bit-128g.safetensors"), safetensors_bytes(&model)).unwrap();
    assert_names(&refusal(dir.path()), &["quantised", "gptq_model-4bit-128g.safetensors"]);
}

#[test]
fn directories_that_hold_no_checkpoint_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    assert_names(&refusal(&dir.path().join("nowhere")), &["nowhere", "no such directory"]);
    assert_names(&refusal(dir.path()), &["config.json", "cannot open"]);
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert_names(&refusal(&file), &["not a directory"]);
    write_config(dir.path(), &config_json(SMALL));
    assert_names(&refusal(dir.path()), &["no weights", "found config.json, file", "model.safetensors"]);
    for broken in ["", "{", "[1]", "null"] {
        std::fs::write(dir.path().join("config.json"), broken).unwrap();
        let word = if broken.is_empty() { "empty" } else { "no JSON object" };
        assert_names(&refusal(dir.path()), &["config.json", word]);
    }
}

#[test]
fn git_lfs_pointers_have_their_own_message() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9980000000\n";
    let model = small_model(SMALL, Dt::Bf16);
    for (format, file) in [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")] {
        for pointer_file in [file, "config.json", "tokenizer.model"] {
            let dir = model_dir(&model, format);
            std::fs::write(dir.path().join(pointer_file), pointer).unwrap();
            assert_names(&refusal(dir.path()), &[pointer_file, "git-lfs pointer", "git lfs pull"]);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("pytorch_model.bin.index.json"), pointer).unwrap();
    assert_names(&refusal(dir.path()), &["index.json", "git-lfs pointer"]);
}

#[test]
fn strided_offset_and_shared_storages_are_gathered() {
    let model = small_model(SMALL, Dt::Bf16);
    // One storage with everything in it, after 5 elements of something else; weights transposed in it, and
    // every tensor wrapped as a parameter in turn.
    let (mut storage, mut views) = (vec![9.0; 5], Vec::new());
    for (i, tensor) in model.iter().enumerate() {
        let mut view = View::dense(tensor, 0);
        view.offset = storage.len();
        view.parameter = i % 2 == 0;
        if let [rows, columns] = tensor.shape[..] {
            view.strides = vec![1, rows];
            for column in 0..columns {
                storage.extend((0..rows).map(|row| tensor.values[row * columns + column]));
            }
        } else {
            storage.extend(&tensor.values);
        }
        views.push(view);
    }
    views.iter_mut().for_each(|view| view.storage_len = storage.len());
    let bytes: Vec<u8> = storage.iter().flat_map(|&value| Dt::Bf16.encode(value)).collect();
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    let archive = archive_bytes(Pickle::state_dict(&views), vec![("0".into(), bytes)]);
    std::fs::write(dir.path().join("pytorch_model.bin"), archive).unwrap();
    assert_reads(dir.path(), &model);
}

#[test]
fn a_view_that_repeats_elements_is_gathered() {
    let mut model = small_model(SMALL, Dt::F32);
    let name = format!("{TOWER}encoder.layers.0.layer_norm1.weight");
    find_mut(&mut model, &name).values.fill(0.75);
    let mut views: Vec<View> = model.iter().enumerate().map(|(i, tensor)| View::dense(tensor, i)).collect();
    let mut storages: Vec<(String, Vec<u8>)> =
        model.iter().enumerate().map(|(i, tensor)| (i.to_string(), tensor.bytes())).collect();
    let at = model.iter().position(|tensor| tensor.name == name).unwrap();
    (views[at].strides, views[at].storage_len) = (vec![0], 1); // torch.ones(1).expand(64)
    storages[at].1.truncate(4);
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("pytorch_model.bin"), archive_bytes(Pickle::state_dict(&views), storages))
        .unwrap();
    assert_reads(dir.path(), &model);
}

#[test]
fn values_out_of_range_are_refused_or_cut() {
    for format in ["safetensors", "bin"] {
        let mut model = small_model(SMALL, Dt::F32);
        find_mut(&mut model, "vision_proj.0.weight").values[1234] = -70000.0;
        find_mut(&mut model, "vision_proj.0.weight").values[4321] = f32::INFINITY;
        find_mut(&mut model, "model.tok_embeddings.weight").values[7 * 48 + 5] = 1e9;
        let dir = model_dir(&model, format);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();

        let error = checkpoint.vision_weights(RangePolicy::Refuse).unwrap_err();
        assert_eq!(error.category(), Category::Checkpoint);
        assert_names(&error.to_string(), &["`vision_proj.0.weight`[1234]", "-70000", "65504", "Saturate"]);

        let (weights, report) = checkpoint.vision_weights(RangePolicy::Saturate).unwrap();
        assert_eq!(weights.projector_hidden.weight[1234], f16::MIN);
        assert_eq!(weights.projector_hidden.weight[4321], f16::MAX);
        assert_eq!(report.saturated(), 2);
        let [warning] = &report.warnings()[..] else { panic!("{:?}", report.warnings()) };
        assert_names(&warning.message, &["2 of 5120", "vision_proj.0.weight", "65504"]);

        let table = checkpoint.embedding();
        let mut row = vec![f16::ZERO; 48];
        assert!(table.gather_row(6, &mut row).is_ok());
        let error = table.gather_row(7, &mut row).unwrap_err();
        assert_names(&error.to_string(), &["`model.tok_embeddings.weight`[341]", "1000000000", "65504"]);
        let table = table.with_policy(RangePolicy::Saturate);
        table.gather_row(7, &mut row).unwrap();
        assert_eq!((row[5], table.saturated()), (f16::MAX, 1));
    }
}

#[test]
fn a_nan_is_refused_under_both_policies() {
    let mut model = small_model(SMALL, Dt::Bf16);
    find_mut(&mut model, &format!("{TOWER}pre_layrnorm.bias")).values[3] = f32::NAN;
    let checkpoint = Checkpoint::open(model_dir(&model, "bin").path()).unwrap();
    for policy in [RangePolicy::Refuse, RangePolicy::Saturate] {
        let message = checkpoint.vision_weights(policy).unwrap_err().to_string();
        assert_names(&message, &["pre_layrnorm.bias`[3] is NaN", "damaged"]);
    }
}

#[test]
fn the_embedding_table_outlives_its_checkpoint_and_checks_ids() {
    fn assert_shareable<T: Send + Sync + 'static>(_: &T) {}
    let model = small_model(SMALL, Dt::F16);
    let dir = model_dir(&model, "safetensors");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_shareable(&checkpoint);
    let table = checkpoint.embedding();
    assert_shareable(&table);
    drop(checkpoint);
    drop(dir);
    let other = table.clone();
    std::thread::spawn(move || assert_embedding(&other, &small_model(SMALL, Dt::F16))).join().unwrap();
    assert_embedding(&table, &model);

    assert_eq!((table.rows(), table.hidden()), (40, 48));
    let mut row = vec![f16::ZERO; 48];
    let error = table.gather_row(40, &mut row).unwrap_err();
    assert_eq!(error.category(), Category::Input);
    assert_names(&error.to_string(), &["token id 40", "40 rows"]);
    assert!(table.gather_row(u32::MAX, &mut row).is_err());
    assert!(table.gather_row(0, &mut row[..47]).is_err());
}

#[test]
fn the_fingerprint_follows_the_content_and_not_the_files() {
    let model = small_model(SMALL, Dt::Bf16);
    let fingerprint = |dir: &Path| Checkpoint::open(dir).unwrap().fingerprint().to_owned();
    let base = fingerprint(model_dir(&model, "safetensors").path());
    assert!(base.len() == 64 && base.bytes().all(|byte| byte.is_ascii_hexdigit()));
    assert_eq!(fingerprint(model_dir(&model, "bin").path()), base);
    let shards = tempfile::tempdir().unwrap();
    write_shards(shards.path(), &model, "bin", false);
    assert_eq!(fingerprint(shards.path()), base);

    let dir = model_dir(&model, "safetensors");
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let with_json = fingerprint(dir.path());
    std::fs::write(dir.path().join("tokenizer.model"), "{}").unwrap();
    let with_model = fingerprint(dir.path());
    let mut config = config_json(SMALL);
    config["max_length"] = 4097.into();
    write_config(dir.path(), &config);
    let mut fingerprints = vec![base, with_json, with_model, fingerprint(dir.path())];
    let mut changed = model.clone();
    changed[0].values[0] += 0.5;
    fingerprints.push(fingerprint(model_dir(&changed, "safetensors").path()));
    let other_dtype = small_model(SMALL, Dt::F16);
    fingerprints.push(fingerprint(model_dir(&other_dtype, "safetensors").path()));
    fingerprints.sort();
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), 6, "each change shows");
}

#[test]
fn inspect_counts_what_fp16_does() {
    let mut model = small_model(SMALL, Dt::F32);
    let name = format!("{TOWER}encoder.layers.1.mlp.fc2.weight");
    let tensor = find_mut(&mut model, &name);
    tensor.values[0] = 1e-6; // subnormal
    tensor.values[1] = 1e-9; // zero
    tensor.values[2] = 1e6; // too large
    model.push(Named::zeros(&format!("{TOWER}post_layernorm.bias"), Dt::F32, &[64]));
    model.push(Named::new("model.norm.weight", Dt::Bf16, &[2], vec![-300.0, 2.0]));
    model.push(Named::zeros("model.count", Dt::I64, &[3]));
    for format in ["safetensors", "bin"] {
        let dir = model_dir(&model, format);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let report = checkpoint.inspect(false).unwrap();
        assert_eq!((report.tensors, report.needed), (model.len(), model.len() - 3));
        let elements: usize = model[..model.len() - 3].iter().map(|tensor| tensor.values.len()).sum();
        assert_eq!(report.needed_elements, elements as u64);
        assert_eq!(report.dtypes.values().copied().collect::<Vec<_>>().iter().sum::<usize>(), model.len());
        assert_eq!(report.optional, [format!("{TOWER}post_layernorm.bias")]);
        assert_eq!((report.shards.len(), report.shards[0].tensors), (1, model.len()));
        assert!(report.unread.is_empty());

        let group = |name: &str| report.groups.iter().find(|group| group.name == name);
        let fc2 = group(&format!("{TOWER}encoder.layers.*.mlp.fc2.weight")).unwrap();
        assert_eq!((fc2.tensors, fc2.stats.elements), (2, 2 * 64 * 96));
        assert_eq!((fc2.stats.largest, &fc2.largest_in), (1e6, &name));
        assert_eq!((fc2.stats.out_of_range, fc2.stats.nan), (1, 0));
        let all =
            find(&model, &name).values.iter().chain(&find(&model, &name.replace("1.mlp", "0.mlp")).values);
        let tiny =
            all.filter(|value| value.abs() < 2f32.powi(-14) && f16::from_f32(**value) != f16::ZERO).count();
        assert_eq!((fc2.stats.zeroed, fc2.stats.subnormal), (1, tiny as u64));
        assert!(group("model.norm.weight").is_none(), "not needed");

        let report = checkpoint.inspect(true).unwrap();
        let norm = report.groups.iter().find(|group| group.name == "model.norm.weight").unwrap();
        assert_eq!(norm.stats.largest, 300.0);
        let [unread] = &report.unread[..] else { panic!("{:?}", report.unread) };
        assert_eq!((unread.name.as_str(), &unread.shape[..]), ("model.count", &[3][..]));
        let shown = report.to_string();
        assert_names(&shown, &["mlp.fc2.weight", "6 px", "1.0000e6", "model.count", "post_layernorm.bias"]);
        assert!(serde_json::to_value(&report).unwrap()["groups"][0]["largest"].is_number());
    }
}

#[test]
fn inspect_reports_shards_that_are_not_there() {
    let model = small_model(SMALL, Dt::Bf16);
    for with_llm in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        write_shards(dir.path(), &model, "bin", with_llm);
        let report = Checkpoint::open(dir.path()).unwrap().inspect(true).unwrap();
        assert_eq!(report.tensors, model.len() + 2);
        let llm = report.shards.iter().find(|shard| shard.file == "shard-2-of-3.bin").unwrap();
        assert_eq!((llm.bytes.is_some(), llm.tensors, llm.needed), (with_llm, 2, 0));
        let read = report.groups.iter().any(|group| group.name.contains("Plora_A"));
        assert_eq!(read, with_llm);
    }
}
