use half::f16;

use super::*;
use crate::cuda::attention::tests::exact;
use crate::cuda::attention::{SCALE, SCALE_OF_DIVIDED};
use crate::cuda::testkit::{Bench, Random, bits, poison, relative_l2};

fn sm90(bench: &Bench) -> &AttentionSm90 {
    bench.gpu.kernels.attention.sm90.as_ref().expect("the tests' device is Hopper's")
}

/// Runs it over images of `tokens` rows and reads the rows. What lies between them is none of its business.
fn run(
    bench: &Bench,
    consumers: Consumers,
    qkv: &[f16],
    tokens: usize,
    heads: usize,
    pad: usize,
    scale: f32,
) -> Vec<f16> {
    let width = heads * HEAD_SIZE;
    let rows = qkv.len() / (3 * width);
    let (_qkv, matrix) = bench.matrix(qkv, 3 * width, 3 * width + pad, f16::NAN);
    let (memory, out) = bench.matrix(&poison(rows * width), width, width + pad, f16::INFINITY);
    sm90(bench).enqueue_in(&bench.stream, consumers, &out, &matrix, tokens, scale).unwrap();
    bench.rows(&memory, &out, f16::INFINITY)
}

#[test]
fn both_are_near_the_formula_and_give_the_same_bits() {
    let bench = Bench::new();
    // One key; less than a tile of keys; exactly one; a few more; three tiles of keys and two of queries.
    for (images, tokens, heads, pad) in
        [(1, 1, 1, 0), (2, 17, 2, 8), (1, 112, 1, 0), (2, 129, 3, 0), (1, 240, 1, 8)]
    {
        let width = heads * HEAD_SIZE;
        let qkv = Random::new((tokens * heads) as u64).halves(images * tokens * 3 * width, 0.0, 1.5);
        let [two, three] =
            Consumers::ALL.map(|consumers| run(&bench, consumers, &qkv, tokens, heads, pad, SCALE));
        assert_eq!(bits(&two), bits(&three), "{tokens} tokens");
        let parts = two.chunks_exact(tokens * width).zip(qkv.chunks_exact(tokens * 3 * width));
        for (image, (out, qkv)) in parts.enumerate() {
            let error = relative_l2(out, &exact(qkv, tokens, heads));
            assert!(error <= 1e-3, "{tokens} tokens, {heads} heads, image {image}: {error}");
        }
    }
}

#[test]
fn an_image_does_not_depend_on_its_neighbours() {
    let bench = Bench::new();
    let (images, tokens, heads) = (3, 33, 2);
    let len = tokens * 3 * heads * HEAD_SIZE;
    let mut qkv = Random::new(9).halves(images * len, 0.0, 1.0);
    qkv[2 * len..].fill(f16::NAN);
    let together = run(&bench, Consumers::Two, &qkv, tokens, heads, 0, SCALE);
    let alone = qkv.chunks_exact(len).zip(together.chunks_exact(tokens * heads * HEAD_SIZE));
    for (qkv, together) in alone.take(2) {
        assert_eq!(bits(&run(&bench, Consumers::Three, qkv, tokens, heads, 0, SCALE)), bits(together));
    }
}

#[test]
fn queries_may_come_divided() {
    let bench = Bench::new();
    let mut qkv = Random::new(4).halves(50 * 3 * HEAD_SIZE, 0.0, 1.5);
    let queries = |qkv: &mut [f16], change: fn(f32) -> f32| {
        for row in qkv.chunks_exact_mut(3 * HEAD_SIZE) {
            row[..HEAD_SIZE].iter_mut().for_each(|q| *q = f16::from_f32(change(q.to_f32())));
        }
    };
    queries(&mut qkv, |q| (q * 64.0).round() / 64.0); // an eighth of which is exact
    let plain = run(&bench, Consumers::Two, &qkv, 50, 1, 0, SCALE);
    queries(&mut qkv, |q| q / 8.0);
    assert_eq!(bits(&run(&bench, Consumers::Two, &qkv, 50, 1, 0, SCALE_OF_DIVIDED)), bits(&plain));
}

#[test]
fn the_blocks_that_are_done_first() {
    // The tower's 1226 tokens and 16 heads on 132 multiprocessors: 112 tasks of 192 queries, or 160 of 128.
    for (images, consumers) in [(1, Consumers::Three), (2, Consumers::Two), (8, Consumers::Two)] {
        assert_eq!(choose(1226, 16 * images, 132), consumers, "{images} images");
    }
    assert_eq!(choose(26, 2, 132), Consumers::Two);
}

#[test]
fn refuses_what_breaks_the_contract() {
    let bench = Bench::new();
    let (_qkv, qkv) = bench.poisoned(10, 192, 192);
    let (_out, out) = bench.poisoned(10, 64, 64);
    let refuse = |out: Matrix, qkv: Matrix, tokens: usize, scale: f32, expected: &str| {
        let result = sm90(&bench).enqueue(&bench.stream, &out, &qkv, tokens, scale);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("launch of attention_sm90") && error.contains(expected), "{error}");
    };
    refuse(out, qkv, 3, SCALE, "10 rows, 3 an image");
    refuse(out, qkv, 0, SCALE, "10 rows, 0 an image");
    refuse(out, Matrix { columns: 191, ..qkv }, 5, SCALE, "qkv has 191 columns");
    refuse(Matrix { columns: 63, ..out }, qkv, 5, SCALE, "63 channels in heads of 64");
    refuse(Matrix { rows: 5, ..out }, qkv, 5, SCALE, "10 rows of qkv, 5 of out");
    refuse(Matrix { rows: 5, pitch: 65, ..out }, qkv, 5, SCALE, "not 16 bytes aligned");
    refuse(out, qkv, 5, 0.0, "scores times 0");
    refuse(out, qkv, 5, f32::NAN, "scores times NaN");
}
