use half::{bf16, f16};

use super::*;
use crate::cpu::activation::{gelu, quick_gelu};
use crate::cpu::epilogue::{Activation, AddTo, Embed, Output, Scatter, Store};
use crate::cpu::operand::{Operand, Sink};
use crate::cpu::simd::Isa;
use crate::cpu::testkit::{Random, bits, on_every_machine, poison, ulps, wide, with_threads};
use crate::sequence::RowsMut;

/// M, K, N: none of them a multiple of any tile, then some that are; K in one piece, in two, in three.
const SHAPES: [(usize, usize, usize); 8] = [
    (1, 64, 64),
    (5, 64, 100),
    (17, 588, 130),
    (26, 128, 192),
    (50, 1100, 97),
    (13, 2100, 33),
    (131, 300, 260),
    (96, 64, 128),
];

/// x `[M, K]`, weight `[N, K]`, bias `[N]`, something to add to `[M, N]`.
///
/// Of the weights, those of every other 32 columns of Y are bf16, or, where M is even, all.
struct Case {
    m: usize,
    k: usize,
    n: usize,
    x: Vec<f16>,
    weight: Vec<f16>,
    bias: Vec<f16>,
    residual: Vec<f16>,
}

impl Case {
    fn new((m, k, n): (usize, usize, usize)) -> Self {
        let mut random = Random::new((m * 31 + k * 7 + n) as u64);
        let x = random.halves(m * k, 0.1, 1.0);
        let mut weight = random.halves(n * k, 0.0, 0.5 / (k as f64).sqrt());
        for (column, weight) in weight.chunks_exact_mut(k).enumerate() {
            if column / 32 % 2 == 1 || m % 2 == 0 {
                weight.iter_mut().for_each(|w| *w = f16::from_f32(bf16::from_f32(w.to_f32()).to_f32()));
            }
        }
        Self {
            m,
            k,
            n,
            x,
            weight,
            bias: random.halves(n, 0.0, 0.5),
            residual: random.halves(m * n, 0.0, 1.0),
        }
    }

    /// x Wᵀ in f64, and the sum of magnitudes that bounds the error of f32.
    fn exact(&self) -> Vec<(f64, f64)> {
        let (x, weight) = (wide(&self.x), wide(&self.weight));
        let rows = x.chunks_exact(self.k);
        rows.flat_map(|x| {
            weight.chunks_exact(self.k).map(move |w| {
                let terms = x.iter().zip(w).map(|(x, w)| x * w);
                terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
            })
        })
        .collect()
    }

    /// x Wᵀ as the module promises it: one chain of f32 multiply-adds over k, or what `tiles` says.
    fn chain(&self, machine: Machine) -> Vec<f32> {
        if machine.has_tiles() {
            let rows = self.x.chunks_exact(self.k);
            let weight = || self.weight.chunks_exact(self.k);
            return rows.flat_map(|x| weight().map(|w| tile_chain(x, w))).collect();
        }
        let fused =
            machine.isa() != Isa::Portable || cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        let step = |sum: f32, (x, w): (&f16, &f16)| match fused {
            true => x.to_f32().mul_add(w.to_f32(), sum),
            false => x.to_f32() * w.to_f32() + sum,
        };
        let rows = self.x.chunks_exact(self.k);
        let weight = || self.weight.chunks_exact(self.k);
        rows.flat_map(|x| weight().map(|w| x.iter().zip(w).fold(0.0, step))).collect()
    }

    fn store(&self, machine: Machine, activation: Activation) -> Vec<f16> {
        let mut y = poison(self.m * self.n);
        let store = Store { bias: &self.bias, activation, y: sink(&mut y, self.n) };
        product(machine, Rows::all(&self.x, self.k), &self.weight, &store);
        y
    }
}

/// Packs, splits and multiplies: `weight` is `[N, K]`.
fn product(machine: Machine, x: Rows<'_>, weight: &[f16], epilogue: &impl Epilogue) {
    let packed = Packed::new(machine, weight, x.width()).unwrap();
    linear(machine, Operand::default().take_rows(machine, x), &packed, epilogue);
}

/// Rows of fp16 as a sink.
fn sink(y: &mut [f16], width: usize) -> Sink<'_> {
    Sink::Rows(Output::new(y, width))
}

/// One element of a product in the order that `tiles` promises.
fn tile_chain(x: &[f16], w: &[f16]) -> f32 {
    let split = |x: f16| {
        let upper = bf16::from_f32(x.to_f32()).to_f32();
        [upper, x.to_f32() - upper]
    };
    let mut acc = 0.0f32;
    for (x, w) in x.chunks(32).zip(w.chunks(32)) {
        for (a, b) in [(0, 0), (1, 0), (0, 1)] {
            let mut sums = [0.0f32; 2];
            for (k, (x, w)) in x.iter().zip(w).enumerate() {
                sums[k % 2] = split(*x)[a].mul_add(split(*w)[b], sums[k % 2]);
            }
            acc += sums[0] + sums[1];
        }
    }
    acc
}

/// An activation of one number.
struct Once(Activation, f32);

impl Kernel for Once {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let x = s.splat(self.1);
        s.reduce_max(match self.0 {
            Activation::None => x,
            Activation::QuickGelu => quick_gelu(s, x),
            Activation::Gelu => gelu(s, x),
        })
    }
}

#[test]
fn is_near_the_exact_product() {
    for shape in SHAPES {
        let case = Case::new(shape);
        let exact = case.exact();
        on_every_machine(|machine| {
            let y = case.store(machine, Activation::None);
            for (i, (y, (sum, size))) in y.iter().zip(&exact).enumerate() {
                let expected = sum + case.bias[i % case.n].to_f64();
                let error = (y.to_f64() - expected).abs();
                // What tiles leave out is 2^-16 of a term at most.
                let terms = if machine.has_tiles() { 2f64.powi(-16) } else { 1e-6 };
                assert!(
                    ulps(*y, expected) <= 0.5 || error < 0.5 * 2f64.powi(-10) * expected.abs() + terms * size,
                    "{machine:?} {shape:?}, element {i}: {y}, not {expected}"
                );
            }
        });
    }
}

#[test]
fn is_one_chain_of_multiply_adds() {
    for shape in SHAPES {
        let case = Case::new(shape);
        on_every_machine(|machine| {
            let chain = case.chain(machine);
            for activation in [Activation::None, Activation::QuickGelu, Activation::Gelu] {
                let y = case.store(machine, activation);
                for (i, (y, sum)) in y.iter().zip(&chain).enumerate() {
                    let v = machine.vectorize(Once(activation, sum + case.bias[i % case.n].to_f32()));
                    let expected = f16::from_f32(v);
                    assert_eq!(y.to_bits(), expected.to_bits(), "{machine:?} {shape:?} {activation:?} {i}");
                }
            }
            let mut y = case.residual.clone();
            let add = AddTo { bias: &case.bias, y: Output::new(&mut y, case.n) };
            product(machine, Rows::all(&case.x, case.k), &case.weight, &add);
            for (i, (y, sum)) in y.iter().zip(&chain).enumerate() {
                let expected = case.residual[i].to_f32() + (sum + case.bias[i % case.n].to_f32());
                assert_eq!(y.to_bits(), f16::from_f32(expected).to_bits(), "{machine:?} {shape:?} {i}");
            }
        });
    }
}

#[test]
fn a_row_does_not_depend_on_the_others_or_the_threads() {
    let case = Case::new((53, 1030, 140));
    on_every_machine(|machine| {
        let whole = with_threads(1, || case.store(machine, Activation::QuickGelu));
        for threads in [2, 3, 5, 16] {
            let again = with_threads(threads, || case.store(machine, Activation::QuickGelu));
            assert_eq!(bits(&again), bits(&whole), "{machine:?}, {threads} threads");
        }
        for first in [0, 1, 7, 30] {
            for rows in [1, 2, 11, 23] {
                let part = Case {
                    m: rows,
                    x: case.x[first * case.k..(first + rows) * case.k].to_vec(),
                    weight: case.weight.clone(),
                    bias: case.bias.clone(),
                    residual: Vec::new(),
                    ..case
                };
                let part = part.store(machine, Activation::QuickGelu);
                let same = &whole[first * case.n..(first + rows) * case.n];
                assert_eq!(bits(&part), bits(same), "{machine:?}, rows {first}..{}", first + rows);
            }
        }
    });
}

#[test]
fn more_rows_than_a_chunk() {
    // Three chunks, the last one shorter; columns fewer than a panel.
    let case = Case::new((2 * TASK_ROWS + 5, 64, 3));
    on_every_machine(|machine| {
        let chain = case.chain(machine);
        let y = case.store(machine, Activation::None);
        for (i, (y, sum)) in y.iter().zip(&chain).enumerate() {
            let expected = f16::from_f32(sum + case.bias[i % case.n].to_f32());
            assert_eq!(y.to_bits(), expected.to_bits(), "{machine:?} {i}");
        }
    });
}

#[test]
fn no_rows_are_no_work() {
    let weight = vec![f16::ONE; 64 * 8];
    let store = Store { bias: &[f16::ONE; 8], activation: Activation::None, y: sink(&mut [], 8) };
    on_every_machine(|machine| {
        product(machine, Rows::all(&[], 64), &weight, &store);
    });
}

#[test]
fn memory_of_an_earlier_call_does_not_show() {
    let large = Case::new((40, 1100, 70));
    let small = Case::new((3, 70, 5));
    on_every_machine(|machine| {
        crate::cpu::scratch::with_scratch(1 << 20, |scratch| scratch.fill(f32::NAN));
        for case in [&large, &small, &large] {
            let mut y = poison(case.m * case.n);
            let store = Store { bias: &case.bias, activation: Activation::None, y: sink(&mut y, case.n) };
            product(machine, Rows::all(&case.x, case.k), &case.weight, &store);
            assert_eq!(bits(&y), bits(&case.store(machine, Activation::None)));
        }
    });
}

#[test]
fn embeds_patches_below_the_class_token() {
    let (images, tokens) = (3, 5);
    let case = Case::new((images * (tokens - 1), 588, 72));
    let positions = Random::new(5).halves(tokens * case.n, 0.0, 1.0);
    on_every_machine(|machine| {
        let chain = case.chain(machine);
        let mut y = vec![f16::from_f32(-7.0); images * tokens * case.n];
        let embed = Embed { positions: &positions, tokens, y: Output::new(&mut y, case.n) };
        product(machine, Rows::all(&case.x, case.k), &case.weight, &embed);
        for (i, y) in y.iter().enumerate() {
            let (row, column) = (i / case.n, i % case.n);
            let (image, token) = (row / tokens, row % tokens);
            let expected = match token {
                0 => f16::from_f32(-7.0), // the class token's row is not touched
                _ => {
                    let sum = chain[(image * (tokens - 1) + token - 1) * case.n + column];
                    f16::from_f32(sum + positions[token * case.n + column].to_f32())
                }
            };
            assert_eq!(y.to_bits(), expected.to_bits(), "{machine:?}, image {image}, token {token}");
        }
    });
}

#[test]
fn takes_the_rows_after_each_class_token() {
    let (images, tokens) = (3, 6);
    let case = Case::new((images * tokens, 64, 40));
    on_every_machine(|machine| {
        let all = case.store(machine, Activation::Gelu);
        let rows = Rows::without_class(&case.x, case.k, tokens);
        assert_eq!(rows.count(), images * (tokens - 1));
        let mut y = poison(rows.count() * case.n);
        let store = Store { bias: &case.bias, activation: Activation::Gelu, y: sink(&mut y, case.n) };
        product(machine, rows, &case.weight, &store);
        let kept = all.chunks_exact(case.n).enumerate().filter(|(row, _)| row % tokens != 0);
        let expected: Vec<f16> = kept.flat_map(|(_, row)| row.to_vec()).collect();
        assert_eq!(bits(&y), bits(&expected));
    });
}

#[test]
fn scatters_into_every_target_and_nowhere_else() {
    let (images, patches) = (3, 9);
    let case = Case::new((images * patches, 80, 50));
    let stride = case.n + 6; // a caller's buffer with room between its rows
    let mark = f16::from_f32(-3.0);
    on_every_machine(|machine| {
        let plain = case.store(machine, Activation::None);
        // Image 0 twice, once in full and once cut after 4 rows; image 1 nowhere; image 2 longer than it is.
        let mut buffer = vec![mark; (patches + 4 + patches + 2) * stride];
        let (first, rest) = buffer.split_at_mut(patches * stride);
        let (second, third) = rest.split_at_mut(4 * stride);
        let mut targets = [
            vec![RowsMut::new(first, case.n, stride), RowsMut::new(second, case.n, stride)],
            vec![],
            vec![RowsMut::new(third, case.n, stride)],
        ];
        assert_eq!(targets[0][1].len(), 4);
        let scatter =
            Scatter { bias: &case.bias, patches, targets: targets.iter().map(Vec::as_slice).collect() };
        product(machine, Rows::all(&case.x, case.k), &case.weight, &scatter);
        drop(scatter);
        targets.iter_mut().for_each(Vec::clear);

        let row = |image: usize, patch: usize| &plain[(image * patches + patch) * case.n..][..case.n];
        let filled = (0..patches).map(|p| row(0, p)).chain((0..4).map(|p| row(0, p)));
        let filled: Vec<&[f16]> = filled.chain((0..patches).map(|p| row(2, p))).collect();
        for (i, line) in buffer.chunks_exact(stride).enumerate() {
            match filled.get(i) {
                Some(row) => assert_eq!(bits(&line[..case.n]), bits(row), "{machine:?}, row {i}"),
                None => assert!(line.iter().all(|x| *x == mark), "row {i} lies beyond the image"),
            }
            assert!(line[case.n..].iter().all(|x| *x == mark), "between the rows");
        }
    });
}

#[test]
fn tasks_are_as_wide_as_threads_allow() {
    for (n, rows, threads, columns) in [
        (1024, 1226, 2, 256),
        (4096, 1226, 16, 256),
        (1024, 1226, 16, 128),
        (1024, 1226, 64, 64),
        (64, 1, 2, 64),
    ] {
        assert_eq!(tiled::task_columns(n, rows, threads), columns, "{n} {rows} {threads}");
    }
}
