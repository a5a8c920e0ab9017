//! Opening a tokenizer of 92,544 pieces and planning with it: upstream's where it is at hand, else our own.

use std::fs;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use imagehere::config::{ModelConfig, ModelSizes};
use imagehere::prompt::{Planner, Request};
use imagehere::tokenizer::{Tokenizer, synthetic};

/// The model's bytes, and whether they are upstream's.
fn model() -> (Vec<u8>, bool) {
    let upstream = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/tokenizer.model");
    match fs::read(upstream) {
        Ok(bytes) => (bytes, true),
        Err(_) => (synthetic(92_544), false),
    }
}

fn config() -> ModelConfig {
    let sizes = ModelSizes {
        image_size: 490,
        patch_size: 14,
        width: 1024,
        layers: 24,
        mlp_width: 4096,
        projector_width: 4096,
        hidden_size: 4096,
        vocab_size: 92_544,
    };
    ModelConfig::from_sizes(sizes).expect("the sizes of VL-7B")
}

fn bench(c: &mut Criterion) {
    let (bytes, upstream) = model();
    let open = || Tokenizer::from_sentencepiece(&bytes, Path::new("tokenizer.model")).expect("a good model");

    let mut group = c.benchmark_group("tokenizer");
    group.sample_size(20);
    assert_eq!(open().vocab_size(), 92_544);
    group.bench_function("open", |b| b.iter(open));
    let tokenizer = open();
    let text = "Describe the subject of these two pictures, 请描述 🙂. ".repeat(16_384);
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("encode_1mb", |b| b.iter(|| tokenizer.encode(&text)));
    group.finish();

    let planner = Planner::new(tokenizer, config()).expect("they fit");
    let request = Request::new(
        "First picture:<ImageHere>, second picture:<ImageHere>. Describe the subject of these two pictures?",
    )
    .image_count(2);
    let plan = planner.plan(&request).expect("a good request");
    assert_eq!(plan.check(), Ok(()));
    if upstream {
        assert_eq!(plan.len(), 2611);
    }
    c.bench_function("prompt/plan_two_images", |b| b.iter(|| planner.plan(&request)));
}

criterion_group!(benches, bench);
criterion_main!(benches);
