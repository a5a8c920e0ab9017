//! What the tests of `imagehere::checkpoint` have in common.

#![allow(dead_code, reason = "each test file uses a part")]

use std::path::Path;

use half::f16;
use imagehere::Category;
use imagehere::checkpoint::weights::{LinearWeights, NormWeights, VisionWeights};
use imagehere::checkpoint::{Checkpoint, EmbeddingTable, RangePolicy};

use crate::checkpoint_support::*;

/// Opens a directory that has to be refused, and returns the message.
pub fn refusal(dir: &Path) -> String {
    let error = Checkpoint::open(dir).expect_err("this checkpoint must be refused");
    assert_eq!(error.category(), Category::Checkpoint, "{error}");
    error.to_string()
}

#[track_caller]
pub fn assert_names(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
}

/// Checks every field against the values that were written.
pub fn assert_weights(weights: &VisionWeights, model: &[Named]) {
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

pub fn assert_embedding(table: &EmbeddingTable, model: &[Named]) {
    let expected = find(model, "model.tok_embeddings.weight").rounded();
    let hidden = table.hidden();
    let mut row = vec![f16::NAN; hidden];
    for id in (0..table.rows()).rev() {
        table.gather_row(id as u32, &mut row).unwrap();
        assert_eq!(row, &expected[id * hidden..(id + 1) * hidden], "row {id}");
    }
}

pub fn assert_reads(dir: &Path, model: &[Named]) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (weights, report) = checkpoint.vision_weights(RangePolicy::Refuse).unwrap();
    assert_weights(&weights, model);
    assert_eq!(report.saturated(), 0);
    assert_embedding(&checkpoint.embedding(), model);
}
