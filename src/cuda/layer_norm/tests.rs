use half::f16;

use super::*;
use crate::cuda::testkit::{Bench, Random, bits, poison, relative_l2, wide};

const MARK: f16 = f16::from_bits(0x7e55);

/// In f64.
fn exact(x: &[f16], weight: &[f16], bias: &[f16]) -> Vec<f64> {
    let (x, weight, bias) = (wide(x), wide(weight), wide(bias));
    let count = weight.len() as f64;
    let row = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / count;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        let scale = 1.0 / (variance + f64::from(LAYER_NORM_EPS)).sqrt();
        let parts = x.iter().zip(weight.iter().zip(&bias));
        parts.map(|(x, (w, b))| (x - mean) * scale * w + b).collect::<Vec<_>>()
    };
    x.chunks_exact(weight.len()).flat_map(row).collect()
}

/// Weights of `width` channels on the device, and on the host.
fn norm(bench: &Bench, width: usize) -> (Norm, [Vec<f16>; 2], [crate::cuda::testkit::Array; 2]) {
    let mut random = Random::new(width as u64);
    let host = [random.halves(width, 1.0, 0.2), random.halves(width, 0.0, 0.1)];
    let memory = [bench.array(&host[0]), bench.array(&host[1])];
    let norm = Norm { weight: memory[0].span(), bias: memory[1].span() };
    (norm, host, memory)
}

#[test]
fn is_near_the_formula() {
    let bench = Bench::new();
    for (rows, width, pitch) in
        [(1, 64, 64), (5, 128, 136), (9, 104, 112), (6, 1024, 1024), (3, 8, 24), (2, 1112, 1120)]
    {
        let (norm, [weight, bias], _memory) = norm(&bench, width);
        let x = Random::new((rows * width) as u64).halves(rows * width, 0.5, 2.0);
        let (_x, from) = bench.matrix(&x, width, pitch, MARK);
        let (memory, to) = bench.matrix(&poison(rows * width), width, pitch, MARK);
        bench.gpu.kernels.layer_norm.enqueue(&bench.stream, &to, &from, &norm).unwrap();
        let y = bench.rows(&memory, &to, MARK);
        let error = relative_l2(&y, &exact(&x, &weight, &bias));
        assert!(error <= 4e-4, "{rows} rows of {width}: {error}");

        // In place.
        let (memory, both) = bench.matrix(&x, width, pitch, MARK);
        bench.gpu.kernels.layer_norm.enqueue(&bench.stream, &both, &both, &norm).unwrap();
        assert_eq!(bits(&bench.rows(&memory, &both, MARK)), bits(&y));
    }
}

#[test]
fn small_variance_and_large_mean() {
    let bench = Bench::new();
    let width = 1024;
    let (norm, [weight, bias], _memory) = norm(&bench, width);
    let mut random = Random::new(11);
    // Variance near epsilon; mean of 30 deviations; a constant row.
    let mut x = random.halves(width, 0.0, 1e-5f64.sqrt());
    x.extend(random.halves(width, 60.0, 2.0));
    x.extend(vec![f16::from_f32(3.0); width]);
    let (_x, from) = bench.matrix(&x, width, width, MARK);
    let (memory, to) = bench.poisoned(3, width, width);
    bench.gpu.kernels.layer_norm.enqueue(&bench.stream, &to, &from, &norm).unwrap();
    let y = bench.read(&memory);
    for (y, expected) in y.chunks_exact(width).zip(exact(&x, &weight, &bias).chunks_exact(width)) {
        let error = relative_l2(y, expected);
        assert!(error <= 4e-4, "{error}");
    }
}

#[test]
fn refuses_what_breaks_the_contract() {
    let bench = Bench::new();
    let (norm, _host, _memory) = norm(&bench, 64);
    let (_x, x) = bench.poisoned(4, 64, 64);
    let refuse = |y: Matrix, x: Matrix, expected: &str| {
        let result = bench.gpu.kernels.layer_norm.enqueue(&bench.stream, &y, &x, &norm);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("launch of layer_norm") && error.contains(expected), "{error}");
    };
    refuse(Matrix { rows: 3, ..x }, x, "from");
    let long = Matrix { rows: 5, ..x };
    refuse(long, long, "does not fit");
    let wide = Matrix { rows: 2, columns: 72, pitch: 72, ..x };
    refuse(wide, wide, "72 channels, 64 weights");
    let odd = Matrix { rows: 2, columns: 60, ..x };
    refuse(odd, odd, "60 channels are no multiple of 8");
    let odd = Matrix { rows: 2, pitch: 65, ..x };
    refuse(odd, odd, "not 16 bytes aligned");
}
