use half::f16;

use super::*;
use crate::cpu::simd::{Kernel, MAX_LANES};
use crate::cpu::testkit::{erfc, on_every_machine, ulps};

/// Applies an activation to f32.
struct Apply<'a> {
    xs: &'a [f32],
    op: Op,
}

#[derive(Clone, Copy)]
enum Op {
    Exp2,
    QuickGelu,
    Gelu,
}

impl Kernel for Apply<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.xs.len()];
        for (x, y) in self.xs.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
            // SAFETY: both have LANES elements.
            unsafe {
                let x = s.load(x.as_ptr());
                let v = match self.op {
                    Op::Exp2 => exp2(s, x),
                    Op::QuickGelu => quick_gelu(s, x),
                    Op::Gelu => gelu(s, x),
                };
                s.store(y.as_mut_ptr(), v);
            }
        }
        out
    }
}

fn exact_gelu(x: f64) -> f64 {
    0.5 * x * erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
}

fn exact_quick_gelu(x: f64) -> f64 {
    x / (1.0 + (-1.702 * x).exp())
}

#[test]
fn exp2_is_accurate_over_its_range() {
    let mut xs: Vec<f32> = (0..400_000).map(|i| -126.0 + 252.0 * i as f32 / 400_000.0).collect();
    xs.extend([0.0, -0.0, 0.5, -0.5, 126.0, -126.0, 1.0, -1.0].repeat(2));
    on_every_machine(|machine| {
        let mut worst: f64 = 0.0;
        for (x, y) in xs.iter().zip(machine.vectorize(Apply { xs: &xs, op: Op::Exp2 })) {
            worst = worst.max((f64::from(y) / f64::from(*x).exp2() - 1.0).abs());
        }
        assert!(worst < 1.5e-7, "{machine:?}: {worst:e}");
    });
}

#[test]
fn exp2_saturates_and_keeps_nan() {
    let xs = [f32::NEG_INFINITY, -1e30, -127.0, 127.0, 1e30, f32::INFINITY, f32::NAN, 0.0].repeat(2);
    on_every_machine(|machine| {
        let ys = machine.vectorize(Apply { xs: &xs, op: Op::Exp2 });
        let (low, high) = (2f32.powi(-126), 2f32.powi(126));
        for (y, bound) in ys.iter().zip([low, low, low, high, high, high]) {
            assert!((y / bound - 1.0).abs() < 2e-7, "{machine:?}: {y:e}, not {bound:e}");
        }
        assert!(ys[6].is_nan() && (ys[7] - 1.0).abs() < 2e-7);
    });
}

/// Sweeps all finite fp16; returns the worst error in fp16 ulps and, for results ≥ 1e-30, relative in f32.
fn sweep(machine: crate::cpu::simd::Machine, op: Op, exact: fn(f64) -> f64) -> (f64, f64) {
    let xs: Vec<f32> =
        (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).map(f16::to_f32).collect();
    assert!(xs.len().is_multiple_of(MAX_LANES));
    let ys = machine.vectorize(Apply { xs: &xs, op });
    let (mut in_ulps, mut relative) = (0f64, 0f64);
    for (x, y) in xs.iter().zip(ys) {
        let expected = exact(f64::from(*x));
        in_ulps = in_ulps.max(ulps(f16::from_f32(y), expected));
        if expected.abs() > 1e-30 {
            relative = relative.max((f64::from(y) / expected - 1.0).abs());
        }
    }
    (in_ulps, relative)
}

#[test]
fn quick_gelu_of_every_fp16() {
    on_every_machine(|machine| {
        let (in_ulps, relative) = sweep(machine, Op::QuickGelu, exact_quick_gelu);
        assert!(in_ulps < 0.501 && relative < 4e-6, "{machine:?}: {in_ulps} ulp, {relative:e}");
    });
}

#[test]
fn gelu_of_every_fp16() {
    on_every_machine(|machine| {
        let (in_ulps, relative) = sweep(machine, Op::Gelu, exact_gelu);
        assert!(in_ulps < 0.501 && relative < 4e-6, "{machine:?}: {in_ulps} ulp, {relative:e}");
    });
}

#[test]
fn both_are_accurate_near_zero() {
    let xs: Vec<f32> =
        (0..16_000).map(|i| i as f32 / 8000.0 - 1.0).filter(|x| *x != 0.0).chain([0.5]).collect();
    on_every_machine(|machine| {
        for (op, exact) in [(Op::Gelu, exact_gelu as fn(f64) -> f64), (Op::QuickGelu, exact_quick_gelu)] {
            for (x, y) in xs.iter().zip(machine.vectorize(Apply { xs: &xs, op })) {
                let error = (f64::from(y) / exact(f64::from(*x)) - 1.0).abs();
                assert!(error < 5e-7, "{machine:?} {x}: {error:e}");
            }
        }
    });
}

#[test]
fn the_two_activations_are_not_one_another() {
    // Nor is gelu its tanh form: at 2, 1.954597 and not 1.954500.
    let xs = [2.0; MAX_LANES];
    on_every_machine(|machine| {
        let exact = machine.vectorize(Apply { xs: &xs, op: Op::Gelu })[0];
        let quick = machine.vectorize(Apply { xs: &xs, op: Op::QuickGelu })[0];
        assert!((exact - 1.954_499_7).abs() < 1e-6, "{exact}");
        assert!((quick - 1.935_650_4).abs() < 1e-5, "{quick}");
    });
}

#[test]
fn what_is_not_finite_stays_so() {
    let xs = [f32::NAN, f32::INFINITY].repeat(8);
    on_every_machine(|machine| {
        for op in [Op::QuickGelu, Op::Gelu] {
            let ys = machine.vectorize(Apply { xs: &xs, op });
            assert!(ys[0].is_nan() && ys[1] == f32::INFINITY);
        }
    });
}
