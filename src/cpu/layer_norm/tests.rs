use half::f16;

use super::*;
use crate::cpu::testkit::{Random, bits, on_every_machine, poison, ulps, wide, with_threads};

/// The formula, in f64.
fn exact(norm: &NormWeights, x: &[f16]) -> Vec<f64> {
    let width = norm.weight.len();
    let (weight, bias) = (wide(&norm.weight), wide(&norm.bias));
    let mut out = Vec::new();
    for row in wide(x).chunks_exact(width) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (variance + 1e-5).sqrt();
        out.extend(row.iter().zip(weight.iter().zip(&bias)).map(|(x, (w, b))| (x - mean) * scale * w + b));
    }
    out
}

fn to_rows(machine: Machine, norm: &NormWeights, x: &[f16], y: &mut [f16]) {
    layer_norm(machine, norm, x, &Sink::Rows(Output::new(y, norm.weight.len())));
}

fn random_norm(random: &mut Random, width: usize) -> NormWeights {
    NormWeights { weight: random.halves(width, 1.0, 0.3), bias: random.halves(width, 0.0, 0.2) }
}

#[test]
fn equals_the_formula() {
    for (rows, width) in [(1, 64), (5, 128), (17, 192), (33, 1024), (16, 320)] {
        let mut random = Random::new(width as u64);
        let norm = random_norm(&mut random, width);
        let x = random.halves(rows * width, 0.7, 2.0);
        let expected = exact(&norm, &x);
        on_every_machine(|machine| {
            let mut y = poison(x.len());
            to_rows(machine, &norm, &x, &mut y);
            for (y, expected) in y.iter().zip(&expected) {
                // Half an ulp of the result, and f32's error of the two terms that make it.
                let error = (y.to_f64() - expected).abs();
                assert!(ulps(*y, *expected) <= 0.51 || error < 4e-6, "{machine:?}: {y}, not {expected}");
            }
            let mut again = x.clone();
            layer_norm_in_place(machine, &norm, &mut again);
            assert_eq!(bits(&again), bits(&y));
        });
    }
}

#[test]
fn a_tiny_variance_and_a_far_mean_cost_nothing() {
    // Variance 1e-5, beside which ε = 1e-5 is no trifle; and a mean of 30 deviations, where E[x²] − mean²
    // would lose three digits.
    for (mean, deviation) in [(0.0, 1e-5f64.sqrt()), (30.0, 1.0), (30.0 * 0.01, 0.01), (-300.0, 10.0)] {
        let mut random = Random::new(7);
        let norm = random_norm(&mut random, 1024);
        let x = random.halves(20 * 1024, mean, deviation);
        let expected = exact(&norm, &x);
        on_every_machine(|machine| {
            let mut y = poison(x.len());
            to_rows(machine, &norm, &x, &mut y);
            for (y, expected) in y.iter().zip(&expected) {
                let error = (y.to_f64() - expected).abs();
                assert!(ulps(*y, *expected) <= 0.52 || error < 2e-5, "{machine:?}: {y}, not {expected}");
            }
        });
    }
}

#[test]
fn a_constant_row_gives_the_bias() {
    let norm = random_norm(&mut Random::new(8), 128);
    on_every_machine(|machine| {
        let mut y = vec![f16::from_f32(3.0); 128];
        layer_norm_in_place(machine, &norm, &mut y);
        assert_eq!(bits(&y), bits(&norm.bias));
    });
}

#[test]
fn rows_do_not_depend_on_their_neighbours_or_the_threads() {
    let mut random = Random::new(9);
    let norm = random_norm(&mut random, 128);
    let x = random.halves(50 * 128, 0.0, 1.0);
    on_every_machine(|machine| {
        let mut whole = poison(x.len());
        with_threads(1, || to_rows(machine, &norm, &x, &mut whole));
        for threads in [2, 3, 5] {
            let mut y = poison(x.len());
            with_threads(threads, || to_rows(machine, &norm, &x, &mut y));
            assert_eq!(bits(&y), bits(&whole));
        }
        for (x, y) in x.chunks_exact(128).zip(whole.chunks_exact(128)) {
            let mut alone = poison(128);
            to_rows(machine, &norm, x, &mut alone);
            assert_eq!(bits(&alone), bits(y));
        }
    });
}
