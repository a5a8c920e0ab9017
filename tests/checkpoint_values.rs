//! What comes out of a checkpoint: weights, rows of the embedding table, counts, the fingerprint.

#[path = "checkpoint_support/asserts.rs"]
mod asserts;
mod checkpoint_support;

use std::path::Path;

use asserts::*;
use checkpoint_support::*;
use half::f16;
use imagehere::Category;
use imagehere::checkpoint::{Checkpoint, RangePolicy};

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
