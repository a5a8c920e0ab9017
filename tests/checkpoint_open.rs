//! Opening checkpoint directories: both formats, shards, the Hub's cache, sizes, names and dtypes.

#[path = "checkpoint_support/asserts.rs"]
mod asserts;
mod checkpoint_support;

use asserts::*;
use checkpoint_support::*;
use imagehere::checkpoint::Checkpoint;
use imagehere::{Error, WarningKind};

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
