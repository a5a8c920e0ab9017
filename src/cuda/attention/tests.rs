use half::f16;

use super::*;
use crate::cuda::testkit::{Bench, Random, bits, poison, relative_l2, wide};

/// softmax(Q Kᵀ / 8) V of one image, in f64.
pub(super) fn exact(qkv: &[f16], tokens: usize, heads: usize) -> Vec<f64> {
    let (qkv, width) = (wide(qkv), heads * HEAD_SIZE);
    let part = |token: usize, part: usize, head: usize| {
        &qkv[token * 3 * width + part * width + head * HEAD_SIZE..][..HEAD_SIZE]
    };
    let mut out = vec![0.0; tokens * width];
    for (token, row) in out.chunks_exact_mut(width).enumerate() {
        for (head, out) in row.chunks_exact_mut(HEAD_SIZE).enumerate() {
            let dot = |key: usize| -> f64 {
                part(token, 0, head).iter().zip(part(key, 1, head)).map(|(q, k)| q * k).sum::<f64>() / 8.0
            };
            let scores: Vec<f64> = (0..tokens).map(dot).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            for (key, score) in scores.iter().enumerate() {
                let p = (score - most).exp() / total;
                out.iter_mut().zip(part(key, 2, head)).for_each(|(out, v)| *out += p * v);
            }
        }
    }
    out
}

/// Runs it over `images` and reads the rows.
fn run(
    bench: &Bench,
    queries: Queries,
    qkv: &[f16],
    images: usize,
    tokens: usize,
    heads: usize,
    pad: usize,
) -> Vec<f16> {
    let (rows, width) = (images * tokens, heads * HEAD_SIZE);
    // What lies between the rows is none of its business.
    let (_qkv, matrix) = bench.matrix(qkv, 3 * width, 3 * width + pad, f16::NAN);
    let (memory, out) = bench.matrix(&poison(rows * width), width, width + pad, f16::INFINITY);
    bench.gpu.kernels.attention.enqueue_in(&bench.stream, queries, &out, &matrix, tokens).unwrap();
    bench.rows(&memory, &out, f16::INFINITY)
}

#[test]
fn is_near_the_formula() {
    let bench = Bench::new();
    // One key; less than a tile of keys; exactly one; a few more; three tiles and several blocks of queries.
    for (images, tokens, heads, pad) in
        [(1, 1, 1, 0), (2, 17, 2, 8), (1, 112, 1, 0), (2, 129, 3, 0), (1, 240, 1, 8)]
    {
        let width = heads * HEAD_SIZE;
        let mut random = Random::new((tokens * heads) as u64);
        let qkv = random.halves(images * tokens * 3 * width, 0.0, 1.5);
        let many = run(&bench, Queries::Many, &qkv, images, tokens, heads, pad);
        let few = run(&bench, Queries::Few, &qkv, images, tokens, heads, pad);
        assert_eq!(bits(&many), bits(&few), "{tokens} tokens");
        let parts = few.chunks_exact(tokens * width).zip(qkv.chunks_exact(tokens * 3 * width));
        for (image, (out, qkv)) in parts.enumerate() {
            let error = relative_l2(out, &exact(qkv, tokens, heads));
            assert!(error <= 1e-3, "{tokens} tokens, {heads} heads, image {image}: {error}");
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let bench = Bench::new();
    let (tokens, heads) = (120, 1);
    let mut qkv = Random::new(3).halves(tokens * 3 * HEAD_SIZE, 0.0, 30.0);
    // A key in the last tile that many queries like best by far.
    for i in 0..HEAD_SIZE {
        let sum: f32 = (0..tokens).map(|t| qkv[t * 3 * HEAD_SIZE + i].to_f32().signum()).sum();
        qkv[(tokens - 1) * 3 * HEAD_SIZE + HEAD_SIZE + i] = f16::from_f32(40.0 * sum.signum());
    }
    let out = run(&bench, Queries::Few, &qkv, 1, tokens, heads, 0);
    let error = relative_l2(&out, &exact(&qkv, tokens, heads));
    assert!(error <= 1e-3, "{error}");
}

#[test]
fn an_image_does_not_depend_on_its_neighbours() {
    let bench = Bench::new();
    let (images, tokens, heads) = (3, 33, 2);
    let len = tokens * 3 * heads * HEAD_SIZE;
    let qkv = Random::new(9).halves(images * len, 0.0, 1.0);
    let together = run(&bench, Queries::Many, &qkv, images, tokens, heads, 0);
    for (qkv, together) in qkv.chunks_exact(len).zip(together.chunks_exact(tokens * heads * HEAD_SIZE)) {
        assert_eq!(bits(&run(&bench, Queries::Few, qkv, 1, tokens, heads, 0)), bits(together));
    }
}

#[test]
fn the_blocks_that_are_done_first() {
    // The tower's 1226 tokens and 16 heads on 132 multiprocessors.
    for (images, queries) in [(1, Queries::Few), (8, Queries::Many), (12, Queries::Many)] {
        assert_eq!(choose_queries(1226, 16 * images, 132), queries, "{images} images");
    }
    assert_eq!(choose_queries(26, 2, 132), Queries::Few);
}

#[test]
fn refuses_what_breaks_the_contract() {
    let bench = Bench::new();
    let (_qkv, qkv) = bench.poisoned(10, 192, 192);
    let (_out, out) = bench.poisoned(10, 64, 64);
    let refuse = |out: Matrix, qkv: Matrix, tokens: usize, expected: &str| {
        let result = bench.gpu.kernels.attention.enqueue_in(&bench.stream, Queries::Few, &out, &qkv, tokens);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("launch of attention") && error.contains(expected), "{error}");
    };
    refuse(out, qkv, 3, "10 rows, 3 an image");
    refuse(out, qkv, 0, "10 rows, 0 an image");
    refuse(out, Matrix { columns: 191, ..qkv }, 5, "qkv has 191 columns");
    refuse(Matrix { columns: 63, ..out }, qkv, 5, "63 channels in heads of 64");
    refuse(Matrix { rows: 5, ..out }, qkv, 5, "10 rows of qkv, 5 of out");
    refuse(Matrix { rows: 5, pitch: 65, ..out }, qkv, 5, "not 16 bytes aligned");
}
