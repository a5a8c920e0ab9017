use half::f16;

use super::*;
use crate::cuda::driver::Span;
use crate::cuda::linear::tests::{Case, Finish, MARK, Slots, assert_near};
use crate::cuda::linear::{MoreOfResidual, PART, SlotRows};
use crate::cuda::matrix::Matrix;
use crate::cuda::testkit::{Random, bits, erfc};

/// M, K, N: more than a tile of some and less than one of others; K wraps the ring of six in the last.
const SHAPES: [(usize, usize, usize); 3] = [(5, 24, 8), (150, 72, 264), (67, 840, 96)];

fn sm90(case: &Case) -> &'static LinearSm90 {
    case.bench.gpu.kernels.linear.sm90.as_ref().expect("the tests' device is Hopper's")
}

/// Variants of a kind.
fn of(kind: Kind) -> impl Iterator<Item = usize> {
    (0..VARIANTS.len()).filter(move |&i| VARIANTS[i].kind == kind)
}

#[test]
fn every_variant_is_near_the_exact_product_and_all_give_the_same_bits() {
    let finishes: [(Kind, Finish); 4] = [
        (Kind::Bias, |sum, _| sum),
        (Kind::QuickGelu, |sum, _| sum / (1.0 + (-1.702 * sum).exp())),
        (Kind::Gelu, |sum, _| 0.5 * sum * erfc(-sum / 2f64.sqrt())),
        (Kind::Residual, |sum, extra| sum + extra),
    ];
    for shape in SHAPES {
        let case = Case::new(shape);
        let (m, n) = (case.m, case.n);
        let exact = case.exact();
        let (_extra, residual) = case.bench.matrix(&case.extra, n, n + 8, MARK);
        for (kind, finish) in finishes {
            let mut first: Option<Vec<f16>> = None;
            for variant in of(kind) {
                let what = format!("{shape:?} {:?}", VARIANTS[variant]);
                let y = case.run(m, n + 16, |out| {
                    let epilogue = match kind {
                        Kind::Bias => Epilogue::Bias(out),
                        Kind::QuickGelu => Epilogue::QuickGelu(out),
                        Kind::Gelu => Epilogue::Gelu(out),
                        _ => Epilogue::Residual { out, residual: &residual, more: MoreOfResidual::default() },
                    };
                    let input = Input::All(&case.input);
                    sm90(&case).enqueue_in(&case.bench.stream, variant, input, &case.layer, &epilogue)
                });
                for (i, (y, (sum, size))) in y.iter().zip(&exact).enumerate() {
                    let expected = finish(sum + case.bias[i % n].to_f64(), case.extra[i].to_f64());
                    assert_near(*y, expected, *size, &format!("{what}, {i}"));
                }
                let first = first.get_or_insert_with(|| y.clone());
                assert_eq!(bits(first), bits(&y), "{what}");
            }
        }
    }
}

#[test]
fn every_variant_embeds_and_scatters() {
    let (images, patches, n) = (3, 25, 264);
    let case = Case::new((images * patches, 592, n));
    let (tokens, exact) = (patches + 1, case.exact());
    let positions = Random::new(5).halves(tokens * n, 0.0, 1.0);
    let (_positions, table) = case.bench.matrix(&positions, n, n + 8, MARK);
    for variant in of(Kind::Embed) {
        let y = case.run(images * tokens, n + 8, |out| {
            let embed = Epilogue::Embed { out, positions: &table, patches };
            sm90(&case).enqueue_in(&case.bench.stream, variant, Input::All(&case.input), &case.layer, &embed)
        });
        for (i, y) in y.iter().enumerate() {
            let (row, column) = (i / n, i % n);
            let (image, token) = (row / tokens, row % tokens);
            let position = positions[token * n + column].to_f64();
            let (sum, size) = match token {
                0 => (case.bias[column].to_f64(), 0.0),
                _ => exact[(image * patches + token - 1) * n + column],
            };
            assert_near(*y, sum + position, size, &format!("{:?}, {i}", VARIANTS[variant]));
        }
    }
    // One slot at an odd place, cut short; image 1 nowhere.
    for variant in of(Kind::Scatter) {
        let sequence = case.bench.array(&vec![MARK; 2 * patches * (n + 3) + 1]);
        let first = sequence.span().ptr().add(1);
        let slot = |at: usize, rows: usize| SlotRows {
            first: first.add(at * (n + 3)),
            pitch: (n + 3) as i64,
            rows: rows as i32,
            pad: 0,
        };
        let slots = Slots::new(&case.bench, &[slot(0, patches), slot(patches, patches - 2)], &[0, 1, 1, 2]);
        let scatter = Epilogue::Scatter { table: &slots.table, patches };
        let input = Input::All(&case.input);
        sm90(&case).enqueue_in(&case.bench.stream, variant, input, &case.layer, &scatter).unwrap();
        let all = case.bench.read(&sequence);
        for (row, line) in all[1..].chunks_exact(n + 3).enumerate() {
            let (image, patch) = (row / patches * 2, row % patches);
            for (column, y) in line.iter().enumerate() {
                if column >= n || (image == 2 && patch >= patches - 2) {
                    assert_eq!(y.to_bits(), MARK.to_bits(), "row {row}, column {column}");
                    continue;
                }
                let (sum, size) = exact[(image * patches + patch) * n + column];
                let expected = sum + case.bias[column].to_f64();
                assert_near(*y, expected, size, &format!("{:?}, row {row}", VARIANTS[variant]));
            }
        }
    }
}

#[test]
fn drops_class_rows_and_leaves_statistics() {
    let (images, tokens, n) = (4, 17, 96);
    let case = Case::new((images * tokens, 72, n));
    let (_extra, residual) = case.bench.matrix(&case.extra, n, n, MARK);
    let run = |variant: usize, more: MoreOfResidual| {
        let rows = images * (tokens - usize::from(more.drop > 0));
        case.run(rows, n, |out| {
            let epilogue = Epilogue::Residual { out, residual: &residual, more };
            sm90(&case).enqueue_in(
                &case.bench.stream,
                variant,
                Input::All(&case.input),
                &case.layer,
                &epilogue,
            )
        })
    };
    for variant in of(Kind::Residual) {
        let whole = run(variant, MoreOfResidual::default());
        let kept = whole.chunks_exact(n).enumerate().filter(|(row, _)| row % tokens != 0);
        let kept: Vec<f16> = kept.flat_map(|(_, row)| row.to_vec()).collect();
        let room = case.bench.array(&vec![f16::NAN; kept.len() / PART * 4]);
        let parts: Span<RowPart> = room.span().cast().unwrap();
        let y = run(variant, MoreOfResidual { parts: Some(parts), drop: tokens });
        assert_eq!(bits(&y), bits(&kept), "{:?}", VARIANTS[variant]);
        let mut found = vec![RowPart { mean: 0.0, squares: 0.0 }; parts.len()];
        case.bench.stream.download_and_wait(parts, &mut found).unwrap();
        for (part, of) in found.iter().zip(y.chunks_exact(PART)) {
            let mean = of.iter().map(|x| x.to_f64()).sum::<f64>() / PART as f64;
            let squares = of.iter().map(|x| (x.to_f64() - mean).powi(2)).sum::<f64>();
            assert!(
                (f64::from(part.mean) - mean).abs() <= 1e-6
                    && (f64::from(part.squares) - squares).abs() <= 1e-5
            );
        }
    }
}

/// No faster choice among the variants, none of another kind, and every tile of the output is some block's: the kernel's
/// test sees to that for any number of blocks that the clusters divide.
#[test]
fn chooses_the_cheapest_tile() {
    let shapes = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (1024, 592), (4096, 4096), (72, 8)];
    for kind in Kind::ALL {
        for images in 1..=16 {
            for (n, k) in shapes {
                for multiprocessors in [1, 2, 114, 132] {
                    let m = 1226 * images;
                    let chosen = VARIANTS[choose(kind, m, n, k, multiprocessors)];
                    assert_eq!(chosen.kind, kind);
                    let cost = |tile| cost(kind, tile, m, n, k, multiprocessors);
                    assert!(of(kind).all(|i| cost(chosen.tile) <= cost(VARIANTS[i].tile)));
                    let blocks = chosen.tile.blocks(m, n, multiprocessors);
                    assert!(blocks >= 1 && blocks.is_multiple_of(chosen.tile.cluster));
                    assert!(blocks <= multiprocessors.max(chosen.tile.cluster));
                    assert!(blocks <= chosen.tile.count(m, n));
                }
            }
        }
    }
    // What gpu.md's table of waves asks for: N = 1024 in narrower tiles where few images leave the device idle.
    let side = |kind, m, n, k| VARIANTS[choose(kind, m, n, k, 132)].tile;
    assert!(side(Kind::Residual, 1226, 1024, 1024).columns < 208);
    assert_eq!(side(Kind::Bias, 8 * 1226, 3072, 1024).columns, 256);
}

#[test]
fn every_variant_is_a_pair_once_and_within_the_device() {
    assert!(VARIANTS.len() <= 48);
    for (i, variant) in VARIANTS.iter().enumerate() {
        let same = |other: &Variant| other.kind == variant.kind && other.tile == variant.tile;
        assert_eq!(VARIANTS.iter().filter(|other| same(other)).count(), 1, "{variant:?}");
        assert_eq!(variant.entry.name, format!("linear_sm90_{}_{:?}", variant.kind.name(), variant.tile));
        assert!(variant.tile.shared_bytes() <= SHARED && variant.tile.stages() >= 4, "{i}");
    }
    for kind in Kind::ALL {
        assert!(of(kind).next().is_some(), "{kind:?}");
    }
}

#[test]
fn measured_tiles_come_first() {
    let text = "# none\nbias 1226 3072 1024 128x240 # why\n\nscatter 1 2 3 64x256_pp_c2\n";
    let choices = parse(text).unwrap();
    assert_eq!(choices[0].shape, [1226, 3072, 1024]);
    assert_eq!(VARIANTS[choices[0].variant].entry.name, "linear_sm90_bias_128x240");
    assert_eq!(VARIANTS[choices[1].variant].entry.name, "linear_sm90_scatter_64x256_pp_c2");
    for wrong in ["bias 1 2 3", "bias 1 2 3 7x7", "gelu 1 2 3 128x240", "bias 1 2 x 128x240"] {
        let error = parse(wrong).unwrap_err().to_string();
        assert!(error.contains(wrong) && error.contains("128x240"), "{error}");
    }
    assert!(parse(MEASURED).is_ok());
}

#[test]
fn refuses_what_breaks_the_contract() {
    let case = Case::new((34, 32, 16));
    let (_memory, out) = case.bench.poisoned(34, 16, 16);
    let (_other, kept) = case.bench.poisoned(32, 16, 16);
    let room = case.bench.array(&vec![f16::NAN; 34 * 2 * 4]);
    let parts: Span<RowPart> = room.span().cast().unwrap();
    let refuse = |input: Input<'_>, layer: Layer, epilogue: &Epilogue<'_>, expected: &str| {
        let error = case.bench.gpu.kernels.linear.enqueue(&case.bench.stream, input, &layer, epilogue);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("launch of linear_sm90_") && error.contains(expected), "{error}");
    };
    let (a, layer) = (case.input, case.layer);
    let all = Input::All(&a);
    let numbers = case.bench.array(&[f16::ZERO; 64]);
    let numbers: Span<f32> = numbers.span().cast().unwrap();
    let norm = crate::cuda::linear::FoldedNorm { column_sums: numbers, bias: numbers };
    let folded = Layer { norm: Some(norm), ..layer };
    let before = Input::BeforeNorm(&a, parts);
    refuse(before, layer, &Epilogue::Bias(&out), "into a layer with the norm None");
    refuse(all, folded, &Epilogue::Bias(&out), "into a layer with the norm Some");
    refuse(before, folded, &Epilogue::Gelu(&out), "folded into");
    refuse(
        Input::BeforeNorm(&a, parts.slice(0..67).unwrap()),
        folded,
        &Epilogue::Bias(&out),
        "67 statistics of 68",
    );
    let short = crate::cuda::linear::FoldedNorm { bias: numbers.slice(0..15).unwrap(), ..norm };
    refuse(
        before,
        Layer { norm: Some(short), ..layer },
        &Epilogue::Bias(&out),
        "15 column sums and biases of 16",
    );
    let square = Case::new((34, 16, 16));
    let (x, more) = (square.input, MoreOfResidual { parts: None, drop: 17 });
    let on = |out: &Matrix, more, expected: &str| {
        let epilogue = Epilogue::Residual { out, residual: &x, more };
        refuse(Input::All(&x), square.layer, &epilogue, expected);
    };
    on(&out, more, "not [32, 16]");
    on(&kept, MoreOfResidual { drop: 5, ..more }, "the first of 5 of 34 rows");
    on(&kept, MoreOfResidual { drop: 1, ..more }, "the first of 1 of 34 rows");
    on(
        &out,
        MoreOfResidual { parts: Some(parts.slice(0..33).unwrap()), drop: 0 },
        "room for 33 statistics of 34",
    );
    // Rows of no whole vectors go to the portable kernels, which know nothing of norms.
    let portable = &case.bench.gpu.kernels.linear;
    let narrow = Matrix { rows: 15, ..layer.weight };
    let error = portable.enqueue(
        &case.bench.stream,
        before,
        &Layer { weight: narrow, ..folded },
        &Epilogue::Bias(&out),
    );
    assert!(error.unwrap_err().to_string().contains("launch of linear_bias_"));
}
