use half::f16;

use super::*;
use crate::cpu::epilogue::Output;
use crate::cpu::testkit::{Random, bits, on_every_machine, poison, wide, with_threads};

/// softmax(Q Kᵀ / 8) V in f64, all of it at once.
fn exact(qkv: &[f16], tokens: usize, heads: usize) -> Vec<f64> {
    let width = heads * HEAD_SIZE;
    let qkv = wide(qkv);
    let mut out = vec![f64::NAN; qkv.len() / 3];
    for (image, qkv) in qkv.chunks_exact(tokens * 3 * width).enumerate() {
        for head in 0..heads {
            let part = |token: usize, which: usize| {
                &qkv[(token * 3 + which) * width + head * HEAD_SIZE..][..HEAD_SIZE]
            };
            for query in 0..tokens {
                let q = part(query, 0);
                let dot = |key: usize| q.iter().zip(part(key, 1)).map(|(q, k)| q * k).sum::<f64>() / 8.0;
                let scores: Vec<f64> = (0..tokens).map(dot).collect();
                let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
                let total: f64 = p.iter().sum();
                let row = &mut out[(image * tokens + query) * width + head * HEAD_SIZE..][..HEAD_SIZE];
                row.fill(0.0);
                for (key, p) in p.iter().enumerate() {
                    row.iter_mut().zip(part(key, 2)).for_each(|(o, v)| *o += p / total * v);
                }
            }
        }
    }
    out
}

fn run(machine: Machine, qkv: &[f16], tokens: usize, heads: usize) -> Vec<f16> {
    let mut out = poison(qkv.len() / 3);
    attention(machine, qkv, tokens, heads, &Sink::Rows(Output::new(&mut out, heads * HEAD_SIZE)));
    out
}

#[track_caller]
fn assert_near(machine: Machine, out: &[f16], expected: &[f64], greatest: f64, what: &str) {
    for (i, (out, expected)) in out.iter().zip(expected).enumerate() {
        // Half an ulp of fp16, and f32's error of a weighted mean of values up to `greatest`.
        let allowed = 0.5 * 2f64.powi(-10) * expected.abs() + 2f64.powi(-25) + 3e-6 * greatest;
        let error = (out.to_f64() - expected).abs();
        assert!(error <= allowed, "{machine:?} {what}, element {i}: {out}, not {expected}");
    }
}

#[test]
fn equals_the_formula() {
    for (images, tokens, heads) in
        [(2, 5, 2), (1, 17, 3), (2, 26, 1), (1, 50, 2), (1, 512, 1), (1, 513, 1), (1, 1, 1)]
    {
        let qkv = Random::new(tokens as u64).halves(images * tokens * 3 * heads * HEAD_SIZE, 0.1, 1.0);
        let expected = exact(&qkv, tokens, heads);
        on_every_machine(|machine| {
            let out = run(machine, &qkv, tokens, heads);
            assert_near(machine, &out, &expected, 5.0, &format!("T = {tokens}"));
        });
    }
}

#[test]
fn equals_the_formula_at_full_length() {
    let tokens = 1226;
    let qkv = Random::new(3).halves(tokens * 3 * HEAD_SIZE, 0.0, 1.0);
    let expected = exact(&qkv, tokens, 1);
    on_every_machine(|machine| {
        assert_near(machine, &run(machine, &qkv, tokens, 1), &expected, 5.0, "T = 1226")
    });
}

#[test]
fn survives_scores_that_overflow_an_exponential() {
    // Scores of some hundreds, of both signs, greatest in the first, a middle and the last block of keys.
    let tokens = 1100;
    for peak in [3, 700, 1099] {
        let mut qkv = Random::new(peak as u64).halves(tokens * 3 * HEAD_SIZE, 0.0, 6.0);
        for i in 0..HEAD_SIZE {
            let q = qkv[i].to_f32();
            qkv[(peak * 3 + 1) * HEAD_SIZE + i] = f16::from_f32(4.0 * q);
        }
        let expected = exact(&qkv, tokens, 1);
        on_every_machine(|machine| {
            let out = run(machine, &qkv, tokens, 1);
            // Scores of 1000 have an ulp of 6e-5 in f32: that much may a weight be off.
            assert_near(machine, &out, &expected, 24.0 * 40.0, &format!("peak at {peak}"));
        });
    }
}

#[test]
fn a_row_depends_on_its_image_alone() {
    let (images, tokens, heads) = (3, 38, 2);
    let row = 3 * heads * HEAD_SIZE;
    let qkv = Random::new(11).halves(images * tokens * row, 0.0, 1.0);
    on_every_machine(|machine| {
        let whole = with_threads(1, || run(machine, &qkv, tokens, heads));
        for threads in [2, 3, 5, 16] {
            let again = with_threads(threads, || run(machine, &qkv, tokens, heads));
            assert_eq!(bits(&again), bits(&whole), "{machine:?}, {threads} threads");
        }
        let images = qkv.chunks_exact(tokens * row).zip(whole.chunks_exact(tokens * row / 3));
        for (qkv, out) in images {
            assert_eq!(bits(&run(machine, qkv, tokens, heads)), bits(out), "{machine:?}");
        }
    });
}

#[test]
fn queries_split_over_threads_give_the_same_bits() {
    // One head and 16 threads: tasks share it.
    let qkv = Random::new(12).halves(700 * 3 * HEAD_SIZE, 0.0, 1.0);
    on_every_machine(|machine| {
        let whole = with_threads(1, || run(machine, &qkv, 700, 1));
        let split = with_threads(16, || run(machine, &qkv, 700, 1));
        assert_eq!(bits(&whole), bits(&split), "{machine:?}");
    });
}

#[test]
fn what_is_not_finite_stays_visible() {
    let tokens = 40;
    let good = Random::new(13).halves(tokens * 3 * HEAD_SIZE, 0.0, 1.0);
    for bad in [f16::NAN, f16::INFINITY] {
        on_every_machine(|machine| {
            let expected = run(machine, &good, tokens, 1);
            // In a query: its row. In a key: every row. In a value: its channel of every row.
            let mut qkv = good.clone();
            qkv[7 * 3 * HEAD_SIZE] = bad;
            let out = run(machine, &qkv, tokens, 1);
            for (i, (out, expected)) in
                out.chunks_exact(HEAD_SIZE).zip(expected.chunks_exact(HEAD_SIZE)).enumerate()
            {
                match i {
                    7 => assert!(out.iter().all(|x| !x.is_finite()), "{machine:?}"),
                    _ => assert_eq!(bits(out), bits(expected), "{machine:?}"),
                }
            }
            let mut qkv = good.clone();
            qkv[(9 * 3 + 2) * HEAD_SIZE + 5] = bad;
            let out = run(machine, &qkv, tokens, 1);
            assert!(out.chunks_exact(HEAD_SIZE).all(|row| !row[5].is_finite() && row[6].is_finite()));
            let mut qkv = good.clone();
            qkv[(9 * 3 + 1) * HEAD_SIZE] = f16::NAN;
            assert!(run(machine, &qkv, tokens, 1).iter().all(|x| x.is_nan()), "{machine:?}");
        });
    }
}
