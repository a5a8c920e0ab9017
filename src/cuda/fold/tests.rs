use half::f16;

use super::*;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::matrix::Matrix;
use crate::cuda::testkit::{Array, Bench, Random, bits, ulps};

/// What lies between rows.
const MARK: f16 = f16::from_bits(0x7e55);

/// A layer with a norm before it, on the host and on the device.
struct Case {
    bench: Bench,
    weight: Vec<f16>, // [N, K]
    bias: Vec<f16>,   // [N]
    gamma: Vec<f16>,  // [K]
    beta: Vec<f16>,   // [K]
    layer: Layer,
    norm: Norm,
    folded: FoldedNorm,
    beyond: Span<u32>,
    memory: [Array; 4],
    _numbers: DeviceMemory,
}

impl Case {
    fn new(n: usize, k: usize, spread: f64) -> Self {
        let mut random = Random::new((n * 31 + k) as u64);
        let bench = Bench::new();
        let (weight, bias) = (random.halves(n * k, 0.1, 0.5), random.halves(n, 0.0, 1.0));
        let (gamma, beta) = (random.halves(k, 1.0, spread), random.halves(k, 0.0, 1.0));
        let (w, matrix) = bench.matrix(&weight, k, k + 8, MARK);
        let [b, g, of_beta] = [&bias, &gamma, &beta].map(|values| bench.array(values));
        let numbers = DeviceMemory::new(&bench.gpu.context, (2 * n + 1) * 4, "a test").unwrap();
        // SAFETY: kept beside the spans.
        let span: Span<f32> = unsafe { numbers.span() }.cast().unwrap();
        bench.stream.fill(span, 0).unwrap();
        let part = |from: usize, to: usize| span.slice(from..to).unwrap();
        let folded = FoldedNorm { column_sums: part(0, n), bias: part(n, 2 * n) };
        let beyond = part(2 * n, 2 * n + 1).cast().unwrap();
        let layer = Layer { weight: matrix, bias: b.span(), norm: None };
        let norm = Norm { weight: g.span(), bias: of_beta.span() };
        let memory = [w, b, g, of_beta];
        Self { bench, weight, bias, gamma, beta, layer, norm, folded, beyond, memory, _numbers: numbers }
    }

    fn run(&self, with_norm: bool, scaled: (usize, f32), dry: bool) {
        let norm = with_norm.then_some((&self.norm, self.folded));
        let folding = Folding { layer: &self.layer, norm, scaled, beyond: self.beyond };
        self.bench.gpu.kernels.fold.enqueue(&self.bench.stream, &folding, dry).unwrap();
    }

    fn numbers(&self, span: Span<f32>) -> Vec<f32> {
        let mut values = vec![0.0; span.len()];
        self.bench.stream.download_and_wait(span, &mut values).unwrap();
        values
    }

    fn beyond(&self) -> u32 {
        let mut count = [0];
        self.bench.stream.download_and_wait(self.beyond, &mut count).unwrap();
        count[0]
    }
}

#[test]
fn takes_in_norm_and_scale() {
    for (n, k, scaled) in [(5, 8, 2), (3, 264, 0), (9, 1032, 9)] {
        let case = Case::new(n, k, 0.3);
        case.run(true, (scaled, 0.125), false);
        let found = case.bench.rows(&case.memory[0], &case.layer.weight, MARK);
        let (sums, biases) = (case.numbers(case.folded.column_sums), case.numbers(case.folded.bias));
        for row in 0..n {
            let scale = if row < scaled { 0.125 } else { 1.0 };
            let (mut sum, mut bias) = (0.0, case.bias[row].to_f64());
            for column in 0..k {
                let at = row * k + column;
                let w = case.weight[at].to_f64();
                let expected = w * case.gamma[column].to_f64() * scale;
                assert!(ulps(found[at], expected) <= 0.5 + 1e-6, "{at}: {} for {expected}", found[at]);
                sum += found[at].to_f64();
                bias += w * case.beta[column].to_f64();
            }
            assert!((f64::from(sums[row]) - sum).abs() <= 1e-4, "of what was rounded: {} {sum}", sums[row]);
            assert!((f64::from(biases[row]) - bias * scale).abs() <= 1e-3, "{} {bias}", biases[row]);
        }
        assert_eq!(bits(&case.bench.read(&case.memory[1])), bits(&case.bias), "the layer's own bias stays");
        assert_eq!(case.beyond(), 0);
    }
}

#[test]
fn scales_rows_without_a_norm() {
    let case = Case::new(7, 40, 0.3);
    case.run(false, (3, 0.125), false);
    let found = case.bench.rows(&case.memory[0], &case.layer.weight, MARK);
    let biases = case.bench.read(&case.memory[1]);
    for (at, found) in found.iter().enumerate() {
        let scale = if at / 40 < 3 { 0.125 } else { 1.0 };
        assert_eq!(found.to_bits(), f16::from_f64(case.weight[at].to_f64() * scale).to_bits());
    }
    for (row, found) in biases.iter().enumerate() {
        let scale = if row < 3 { 0.125 } else { 1.0 };
        assert_eq!(found.to_bits(), f16::from_f64(case.bias[row].to_f64() * scale).to_bits());
    }
}

#[test]
fn counts_what_fp16_would_not_hold_and_writes_nothing_then() {
    let mut case = Case::new(4, 24, 0.3);
    case.run(true, (0, 1.0), true);
    assert_eq!(case.beyond(), 0);
    // 40000 twice, by 2: beyond; an infinity stays one, and is not counted.
    case.gamma[3] = f16::from_f32(2.0);
    for (at, value) in [(3, 4e4), (2 * 24 + 3, -4e4), (24 + 3, f32::INFINITY)] {
        case.weight[at] = f16::from_f32(value);
    }
    let (w, weight) = case.bench.matrix(&case.weight, 24, 32, MARK);
    let gamma = case.bench.array(&case.gamma);
    case.layer.weight = weight;
    case.norm.weight = gamma.span();
    case.run(true, (0, 1.0), true);
    assert_eq!(case.beyond(), 2);
    assert_eq!(bits(&case.bench.rows(&w, &weight, MARK)), bits(&case.weight));
    assert!(case.numbers(case.folded.column_sums).iter().all(|sum| *sum == 0.0));
}

#[test]
fn refuses_what_breaks_the_contract() {
    let case = Case::new(4, 24, 0.3);
    let refuse = |folding: &Folding<'_>, expected: &str| {
        let error =
            case.bench.gpu.kernels.fold.enqueue(&case.bench.stream, folding, true).unwrap_err().to_string();
        assert!(error.contains("launch of fold_norm") && error.contains(expected), "{error}");
    };
    let layer = case.layer;
    let good = Folding {
        layer: &layer,
        norm: Some((&case.norm, case.folded)),
        scaled: (0, 1.0),
        beyond: case.beyond,
    };
    refuse(&Folding { scaled: (5, 1.0), ..good }, "5 rows, 4 biases of 4");
    let odd = Layer { weight: Matrix { columns: 23, ..layer.weight }, ..layer };
    refuse(&Folding { layer: &odd, ..good }, "a layer of");
    let short = Norm { weight: case.norm.weight.slice(0..23).unwrap(), ..case.norm };
    refuse(&Folding { norm: Some((&short, case.folded)), ..good }, "24 channels, 23 weights");
    let small = FoldedNorm { column_sums: case.folded.column_sums.slice(0..3).unwrap(), ..case.folded };
    refuse(&Folding { norm: Some((&case.norm, small)), ..good }, "room for 3 column sums of 4");
}
