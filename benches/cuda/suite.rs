//! Sizes, and what all benchmarks share.

use std::time::Duration;

use criterion::Criterion;
use imagehere::config::ModelConfig;
use imagehere::cpu::bench::full;
use imagehere::cuda::bench::Machine;

use crate::calls::{self, Model};

/// Who is measured, at which sizes.
pub struct Suite {
    pub machine: Machine,
    pub config: ModelConfig,
    pub images: &'static [usize],
    pub tiny: bool,
    pub seed: u64,
}

pub fn main() {
    if std::env::args().any(|word| word == "model") {
        return crate::linear::model(); // needs no device
    }
    let tiny = std::env::var_os("IMAGEHERE_BENCH_TINY").is_some_and(|value| value == "1");
    let machine = match Machine::open() {
        Ok(machine) => machine,
        Err(error) if tiny && cfg!(has_kernels) => panic!("{error}"),
        Err(error) => return println!("skipped: {error}"),
    };
    let seed = match std::env::var("IMAGEHERE_BENCH_SEED") {
        Ok(seed) => seed.parse().expect("IMAGEHERE_BENCH_SEED is a number"),
        Err(_) => std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_nanos() as u64),
    };
    println!("device: {}", machine.describe());
    println!("seed: {seed}");
    let (config, images): (_, &[usize]) =
        if tiny { (small(), &[1, 2, 17]) } else { (alone(full()), &[1, 2, 4, 8, 12, 16, 32]) };
    let suite = Suite { machine, config, images, tiny, seed };
    // Without --bench, as a test, calls in passing.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let dir = words.get(1).map(String::as_str);
    match words.first().map(String::as_str) {
        Some("latency") => return calls::latency(&suite, &Model::new(&suite, dir)),
        Some("rounds") => return crate::encode::rounds(&suite),
        Some("tune") => {
            let images: Vec<usize> =
                words[2..].iter().map(|word| word.parse().expect("a number of images")).collect();
            return crate::tune::tune(&suite, dir.expect("a file to write"), &images);
        }
        Some("files") => return calls::files(&suite, &Model::new(&suite, dir)),
        _ if tiny && !std::env::args().any(|word| word == "--bench") => {
            let model = Model::new(&suite, None);
            calls::latency(&suite, &model);
            calls::files(&suite, &model);
            let tiles = tempfile::NamedTempFile::new().expect("a place for a file");
            crate::tune::tune(&suite, &tiles.path().to_string_lossy(), &[1, 2]);
        }
        _ => {}
    }
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(if tiny { 10 } else { 50 })
        .nresamples(if tiny { 10 } else { 2000 })
        .warm_up_time(Duration::from_millis(if tiny { 1 } else { 60 }))
        .measurement_time(Duration::from_millis(if tiny { 1 } else { 200 }))
        .configure_from_args();
    crate::kernels::all(&suite, &mut criterion);
    crate::encode::all(&suite, &mut criterion);
    criterion.final_summary();
}

/// The model without limits on its sequences, and with a vocabulary that takes no time to make.
fn alone(mut config: ModelConfig) -> ModelConfig {
    config.vocab_size = 1024;
    (config.max_length, config.max_position_embeddings) = (None, None);
    config
}

/// The same in small: 25 patches of 70 pixels, 2 layers.
fn small() -> ModelConfig {
    let mut config = alone(full());
    (config.image_size, config.grid, config.patches, config.tokens) = (70, 5, 25, 26);
    (config.width, config.heads, config.layers) = (128, 2, 2);
    (config.mlp_width, config.projector_width, config.hidden_size) = (192, 192, 136);
    config
}

/// Bytes of noise, the same for the same seed.
pub fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    };
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        bytes.extend(next());
    }
    bytes.truncate(count);
    bytes
}
