use half::f16;

use super::*;
use crate::cpu::testkit::{Random, on_every_machine};

#[test]
fn chooses_the_best_unless_told() {
    use Isa::*;
    let table: [(&[Isa], Option<&str>, Option<Isa>); 10] = [
        (&Isa::ALL, None, Some(Amx)),
        (&Isa::ALL, Some("avx512"), Some(Avx512)),
        (&[Avx512, Avx2, Portable], None, Some(Avx512)),
        (&[Avx2, Portable], None, Some(Avx2)),
        (&[Portable], None, Some(Portable)),
        (&[Neon, Portable], None, Some(Neon)),
        (&[Avx512, Avx2, Portable], Some("avx2"), Some(Avx2)),
        (&[Avx512, Avx2, Portable], Some("portable"), Some(Portable)),
        (&[Avx2, Portable], Some("avx512"), None),
        (&[Avx2, Portable], Some("AVX2"), None),
    ];
    for (has, wish, chosen) in table {
        assert_eq!(choose(|isa| has.contains(&isa), wish).ok(), chosen, "{has:?} {wish:?}");
    }
}

#[test]
fn refuses_what_the_cpu_has_not() {
    let has = |isa| matches!(isa, Isa::Avx2 | Isa::Portable);
    let error = choose(has, Some("avx512")).unwrap_err();
    assert_eq!(error.category(), crate::Category::Device);
    let text = error.to_string();
    assert!(text.contains("IMAGEHERE_CPU_ISA=avx512") && text.contains("one of avx2, portable"), "{text}");
}

#[test]
fn portable_is_always_there() {
    assert!(Machine::detect(Isa::Portable).is_some());
    on_every_machine(|machine| assert!(Machine::detect(machine.isa()).is_some()));
}

/// Applies a lane-wise function to a slice whose length is a multiple of every lane count.
struct Map<'a, F>(&'a [f32], F);

trait LaneOp {
    fn apply<S: Simd>(&self, s: S, x: S::V) -> S::V;
}

impl<F: LaneOp> Kernel for Map<'_, F> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.0.len()];
        for (x, y) in self.0.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
            // SAFETY: both have LANES elements.
            unsafe { s.store(y.as_mut_ptr(), self.1.apply(s, s.load(x.as_ptr()))) };
        }
        out
    }
}

macro_rules! lane_op {
    ($name:ident, $s:ident, $x:ident => $e:expr) => {
        struct $name;
        impl LaneOp for $name {
            #[inline(always)]
            fn apply<S: Simd>(&self, $s: S, $x: S::V) -> S::V {
                $e
            }
        }
    };
}

lane_op!(Arithmetic, s, x => {
    let three = s.splat(3.0);
    s.sub(s.div(s.mul(s.add(x, three), x), three), s.mul_add(x, three, s.splat(0.5)))
});
lane_op!(Clamp, s, x => s.min(s.splat(2.0), s.max(s.splat(-1.0), x)));
lane_op!(Round, s, x => s.round(x));
lane_op!(Scale, s, x => s.mul_pow2(s.splat(-1.25), x));

#[test]
fn lanes_do_what_scalars_do() {
    let mut random = Random::new(1);
    let mut xs: Vec<f32> = (0..320).map(|_| (20.0 * random.normal()) as f32).collect();
    xs[..8].copy_from_slice(&[0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.0]);
    on_every_machine(|machine| {
        for (x, y) in xs.iter().zip(machine.vectorize(Map(&xs, Arithmetic))) {
            let expected = (x + 3.0) * x / 3.0 - (x * 3.0 + 0.5);
            assert!((y - expected).abs() <= 1e-4 * (1.0 + x * x), "{machine:?} {x}: {y}, not {expected}");
        }
        let clamped: Vec<f32> = xs.iter().map(|x| x.clamp(-1.0, 2.0)).collect();
        assert_eq!(machine.vectorize(Map(&xs, Clamp)), clamped);
        let rounded: Vec<f32> = xs.iter().map(|x| x.round_ties_even()).collect();
        assert_eq!(machine.vectorize(Map(&xs, Round)), rounded);
        let scaled: Vec<f32> = rounded.iter().map(|n| -1.25 * n.exp2()).collect();
        assert_eq!(machine.vectorize(Map(&rounded, Scale)), scaled);
        let nan = machine.vectorize(Map(&[f32::NAN; 16], Clamp));
        assert!(nan.iter().all(|x| x.is_nan()), "{machine:?} loses NaN: {nan:?}");
    });
}

/// Sums and maxima of consecutive vectors.
struct Reduce<'a>(&'a [f32]);

impl Kernel for Reduce<'_> {
    type Output = Vec<(usize, f32, f32)>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let vectors = self.0.chunks_exact(S::LANES);
        vectors
            .map(|x| {
                // SAFETY: `x` has LANES elements.
                let x = unsafe { s.load(x.as_ptr()) };
                (S::LANES, s.reduce_add(x), s.reduce_max(x))
            })
            .collect()
    }
}

#[test]
fn reductions_take_every_lane() {
    let mut random = Random::new(2);
    // Integers, so that every order of the sum gives the same.
    let xs: Vec<f32> = (0..320).map(|_| (100.0 * random.normal()).round() as f32).collect();
    on_every_machine(|machine| {
        let reduced = machine.vectorize(Reduce(&xs));
        let lanes = reduced[0].0;
        for (x, (_, sum, max)) in xs.chunks_exact(lanes).zip(reduced) {
            assert_eq!(sum, x.iter().sum::<f32>());
            assert_eq!(max, x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    });
}

/// Every fp16 to f32 and back.
struct RoundTrip<'a>(&'a [f16]);

impl Kernel for RoundTrip<'_> {
    type Output = (Vec<f32>, Vec<f16>);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let (mut wide, mut back) = (vec![f32::NAN; self.0.len()], vec![f16::NAN; self.0.len()]);
        let ys = wide.chunks_exact_mut(S::LANES).zip(back.chunks_exact_mut(S::LANES));
        for (x, (y, z)) in self.0.chunks_exact(S::LANES).zip(ys) {
            let v = s.load_f16_slice(x);
            // SAFETY: `y` has LANES elements.
            unsafe { s.store(y.as_mut_ptr(), v) };
            s.store_f16_slice(z, v);
        }
        (wide, back)
    }
}

#[test]
fn every_fp16_survives() {
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    on_every_machine(|machine| {
        let (wide, back) = machine.vectorize(RoundTrip(&all));
        for ((x, y), z) in all.iter().zip(wide).zip(back) {
            if x.is_nan() {
                assert!(y.is_nan() && z.is_nan());
            } else {
                assert_eq!((x.to_f32().to_bits(), x.to_bits()), (y.to_bits(), z.to_bits()), "{machine:?}");
            }
        }
    });
}

/// Rounds f32 to fp16, in slices of every length up to `MAX_LANES`.
struct Narrow<'a>(&'a [f32]);

impl Kernel for Narrow<'_> {
    type Output = Vec<f16>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f16> {
        let mut out = vec![f16::NAN; self.0.len()];
        for (x, y) in self.0.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
            let mut whole = [0.0; MAX_LANES];
            whole[..x.len()].copy_from_slice(x);
            // SAFETY: `whole` has MAX_LANES elements.
            s.store_f16_slice(y, unsafe { s.load(whole.as_ptr()) });
        }
        out
    }
}

#[test]
fn narrowing_rounds_to_nearest_even_and_keeps_to_its_slice() {
    let mut random = Random::new(3);
    let mut xs: Vec<f32> =
        (0..999).map(|_| (random.normal() * 8f64.powf(6.0 * random.normal())) as f32).collect();
    // Ties, the edge of overflow, subnormals.
    let special = [1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 65519.9, 65520.0, -1e9, 3e-8, 2.99e-8, -0.0];
    xs[..8].copy_from_slice(&special);
    on_every_machine(|machine| {
        for len in [999, 998, 997, 33, 31, 17, 15, 9, 7, 5, 3, 1] {
            let narrow = machine.vectorize(Narrow(&xs[..len]));
            for (x, y) in xs.iter().zip(narrow) {
                assert_eq!(f16::from_f32(*x).to_bits(), y.to_bits(), "{machine:?} {x}");
            }
        }
    });
}

/// Transposes one block at an odd place of a larger matrix.
struct Transpose<'a>(&'a [f16], usize);

impl Kernel for Transpose<'_> {
    type Output = (usize, Vec<f32>);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let mut to = vec![f32::NAN; 23 * MAX_LANES];
        // SAFETY: 16 rows of 16 elements, 37 and 23 apart, fit into what the test hands over and into `to`.
        unsafe { s.transpose_f16(self.0.as_ptr().add(self.1), 37, to.as_mut_ptr(), 23) };
        (S::LANES, to)
    }
}

#[test]
fn transposes_and_touches_nothing_else() {
    let from = Random::new(4).halves(37 * 17, 0.0, 1.0);
    on_every_machine(|machine| {
        for start in [0, 1, 20, 37] {
            let (lanes, to) = machine.vectorize(Transpose(&from, start));
            for (i, value) in to.iter().enumerate() {
                let (c, r) = (i / 23, i % 23);
                if c < lanes && r < lanes {
                    assert_eq!(*value, from[start + r * 37 + c].to_f32());
                } else {
                    assert!(value.is_nan());
                }
            }
        }
    });
}

/// 16 rows of 32 fp16: transposed as pairs, and the first two zipped.
struct Pairs<'a>(&'a [[f16; 32]; 16]);

impl Kernel for Pairs<'_> {
    type Output = ([f16; 512], [f16; 32]);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let (mut transposed, mut zipped) = ([f16::NAN; 512], [f16::NAN; 32]);
        s.transpose_pairs(&self.0.each_ref(), &mut transposed);
        let [even, odd] = [0, 1].map(|row| self.0[row].first_chunk().unwrap());
        s.zip_f16(even, odd, &mut zipped);
        (transposed, zipped)
    }
}

#[test]
fn pairs_go_where_they_belong() {
    let mut bits = 0;
    let rows = [[(); 32]; 16].map(|row| {
        row.map(|()| {
            bits += 77;
            f16::from_bits(bits)
        })
    });
    on_every_machine(|machine| {
        let (transposed, zipped) = machine.vectorize(Pairs(&rows));
        for (i, x) in transposed.iter().enumerate() {
            let (pair, row, odd) = (i / 32, i % 32 / 2, i % 2);
            assert_eq!(x.to_bits(), rows[row][2 * pair + odd].to_bits(), "{machine:?} {i}");
        }
        for (i, x) in zipped.iter().enumerate() {
            assert_eq!(x.to_bits(), rows[i % 2][i / 2].to_bits(), "{machine:?} {i}");
        }
    });
}

/// Two vectors, split: what the halves add up to.
struct SplitPairs<'a>(&'a [f32]);

impl Kernel for SplitPairs<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let value = |bits: u16| half::bf16::from_bits(bits).to_f32();
        let pairs = self.0.chunks_exact(S::NR).flat_map(|x| {
            let (mut upper, mut lower) = ([0; 2 * MAX_LANES], [0; 2 * MAX_LANES]);
            // SAFETY: two vectors of `x`, and room for as many of each half.
            unsafe {
                let x = [s.load(x.as_ptr()), s.load(x.as_ptr().add(S::LANES))];
                s.store_split_pair(upper.as_mut_ptr(), lower.as_mut_ptr(), x);
            }
            (0..S::NR).map(move |i| value(upper[i]) + value(lower[i]))
        });
        pairs.collect()
    }
}

#[test]
fn halves_of_a_pair_add_up() {
    let mut random = Random::new(5);
    let mut xs: Vec<f32> = (0..640).map(|_| (8.0 * random.normal()).exp() as f32).collect();
    xs[..4].copy_from_slice(&[0.0, 1.0, 2f32.powi(-126), 1.0 - f32::EPSILON / 2.0]);
    on_every_machine(|machine| {
        for (x, sum) in xs.iter().zip(machine.vectorize(SplitPairs(&xs))) {
            let error = (f64::from(sum) - f64::from(*x)).abs();
            assert!(error <= 2f64.powi(-16) * f64::from(*x), "{machine:?} {x:e}: {sum:e}");
        }
    });
}
