use half::f16;

use super::*;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::testkit::{Array, Bench, Random, bits, erfc, poison, ulps, wide};

/// M, K, N: no multiples of a tile, then some that are. K wraps the ring of 4 · 32 more than twice in the
/// last.
const SHAPES: [(usize, usize, usize); 7] =
    [(1, 8, 1), (5, 72, 100), (64, 64, 64), (17, 588, 130), (131, 300, 70), (128, 128, 256), (70, 333, 129)];

const BOTH: [Tile; 2] = [Tile::Large, Tile::Small];

/// Left between rows; nobody writes there.
pub(crate) const MARK: f16 = f16::from_bits(0x7e55);

/// What goes in, on the host and on the device.
pub(crate) struct Case {
    pub(crate) bench: Bench,
    pub(crate) m: usize,
    pub(crate) n: usize,
    x: Vec<f16>,                // [M, K]
    weight: Vec<f16>,           // [N, K]
    pub(crate) bias: Vec<f16>,  // [N]
    pub(crate) extra: Vec<f16>, // [M, N]
    pub(crate) input: Matrix,
    pub(crate) layer: Layer,
    _memory: [Array; 3],
}

impl Case {
    pub(crate) fn new((m, k, n): (usize, usize, usize)) -> Self {
        let mut random = Random::new((m * 31 + k * 7 + n) as u64);
        let x = random.halves(m * k, 0.1, 1.0);
        let weight = random.halves(n * k, 0.0, 0.5 / (k as f64).sqrt());
        let bias = random.halves(n, 0.0, 0.5);
        let extra = random.halves(m * n, 0.0, 1.0);
        let bench = Bench::new();
        // Padding must be zero in w and finite in a, up to a multiple of 8; beyond it is nobody's business.
        let pitch = k.next_multiple_of(8);
        let (x_memory, input) = bench.matrix(&x, k, pitch, f16::from_f32(9.0));
        let (w_memory, matrix) = bench.matrix(&weight, k, pitch, f16::ZERO);
        let bias_memory = bench.array(&bias);
        let layer = Layer { weight: matrix, bias: bias_memory.span(), norm: None };
        Self { bench, m, n, x, weight, bias, extra, input, layer, _memory: [x_memory, w_memory, bias_memory] }
    }

    /// x Wᵀ in f64, and the sum of magnitudes that bounds the error of f32.
    pub(crate) fn exact(&self) -> Vec<(f64, f64)> {
        let k = self.weight.len() / self.n;
        let (x, weight) = (wide(&self.x), wide(&self.weight));
        let dot = |x: &[f64], w: &[f64]| {
            let terms = x.iter().zip(w).map(|(x, w)| x * w);
            terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
        };
        let rows = x.chunks_exact(k);
        rows.flat_map(|x| weight.chunks_exact(k).map(move |w| dot(x, w)).collect::<Vec<_>>()).collect()
    }

    /// Runs it into `[rows, N]` of poison and reads that.
    #[track_caller]
    pub(crate) fn run(
        &self,
        rows: usize,
        pitch: usize,
        epilogue: impl Fn(&Matrix) -> Result<()>,
    ) -> Vec<f16> {
        let (memory, out) = self.bench.matrix(&poison(rows * self.n), self.n, pitch, MARK);
        epilogue(&out).unwrap();
        self.bench.rows(&memory, &out, MARK)
    }

    fn enqueue(&self, tile: Tile, epilogue: &Epilogue<'_>) -> Result<()> {
        let linear = &self.bench.gpu.kernels.linear;
        linear.enqueue_in(&self.bench.stream, tile, Input::All(&self.input), &self.layer, epilogue)
    }

    /// `acc + bias`, the plainest.
    fn plain(&self, tile: Tile) -> Vec<f16> {
        self.run(self.m, self.n, |out| self.enqueue(tile, &Epilogue::Bias(out)))
    }
}

/// Half a unit in the last place, and what f32 sums of `size` may lose.
#[track_caller]
pub(crate) fn assert_near(y: f16, expected: f64, size: f64, what: &str) {
    let error = (y.to_f64() - expected).abs();
    let bound = 0.5 * 2f64.powi(-10) * expected.abs() + 2f64.powi(-25) + 2e-6 * (1.0 + size);
    assert!(ulps(y, expected) <= 0.5 || error <= bound, "{what}: {y}, not {expected}");
}

/// What an epilogue makes of the exact sum and `extra`.
pub(crate) type Finish = fn(f64, f64) -> f64;

#[test]
fn every_epilogue_is_near_the_exact_product() {
    let finishes: [(&str, Finish); 4] = [
        ("bias", |sum, _| sum),
        ("quick_gelu", |sum, _| sum / (1.0 + (-1.702 * sum).exp())),
        ("gelu", |sum, _| 0.5 * sum * erfc(-sum / 2f64.sqrt())),
        ("residual", |sum, extra| sum + extra),
    ];
    for shape in SHAPES {
        let case = Case::new(shape);
        let (m, n) = (case.m, case.n);
        let exact = case.exact();
        let (_extra, residual) = case.bench.matrix(&case.extra, n, n + 3, MARK);
        for tile in BOTH {
            // Rows that vectors fit, and rows that they do not.
            for pitch in [n.next_multiple_of(8), n + 5] {
                for (name, finish) in finishes {
                    let y = case.run(m, pitch, |out| {
                        let epilogue = match name {
                            "bias" => Epilogue::Bias(out),
                            "quick_gelu" => Epilogue::QuickGelu(out),
                            "gelu" => Epilogue::Gelu(out),
                            _ => Epilogue::Residual { out, residual: &residual, more: Default::default() },
                        };
                        case.enqueue(tile, &epilogue)
                    });
                    for (i, (y, (sum, size))) in y.iter().zip(&exact).enumerate() {
                        let expected = finish(sum + case.bias[i % n].to_f64(), case.extra[i].to_f64());
                        assert_near(*y, expected, *size, &format!("{shape:?} {tile:?} {name} {pitch}, {i}"));
                    }
                }
            }
        }
    }
}

#[test]
fn both_tiles_and_any_neighbours_give_the_same_bits() {
    for shape in SHAPES {
        let case = Case::new(shape);
        assert_eq!(bits(&case.plain(Tile::Large)), bits(&case.plain(Tile::Small)), "{shape:?}");
    }
    let case = Case::new((70, 333, 129));
    let whole = case.plain(Tile::Large);
    for (first, rows) in [(0, 1), (1, 7), (63, 2), (69, 1)] {
        let part = case.input.rows(first, rows).unwrap();
        for tile in BOTH {
            let y = case.run(rows, case.n, |out| {
                let linear = &case.bench.gpu.kernels.linear;
                let stream = &case.bench.stream;
                linear.enqueue_in(stream, tile, Input::All(&part), &case.layer, &Epilogue::Bias(out))
            });
            assert_eq!(bits(&y), bits(&whole[first * case.n..(first + rows) * case.n]), "rows {first}..");
        }
    }
}

#[test]
fn adds_to_the_residual_in_place() {
    let case = Case::new((131, 300, 70));
    for tile in BOTH {
        for pitch in [72, 75] {
            let (_other, residual) = case.bench.matrix(&case.extra, case.n, pitch, MARK);
            let apart = case.run(case.m, pitch, |out| {
                case.enqueue(tile, &Epilogue::Residual { out, residual: &residual, more: Default::default() })
            });
            let (memory, out) = case.bench.matrix(&case.extra, case.n, pitch, MARK);
            case.enqueue(tile, &Epilogue::Residual { out: &out, residual: &out, more: Default::default() })
                .unwrap();
            assert_eq!(bits(&case.bench.rows(&memory, &out, MARK)), bits(&apart));
        }
    }
}

#[test]
fn embeds_patches_below_the_class_token() {
    for (images, patches, n, pitch) in [(3, 4, 72, 72), (1, 1, 64, 67), (5, 25, 130, 136)] {
        let case = Case::new((images * patches, 588, n));
        let tokens = patches + 1;
        let positions = Random::new(5).halves(tokens * n, 0.0, 1.0);
        let (_positions, table) = case.bench.matrix(&positions, n, pitch, MARK);
        let exact = case.exact();
        for tile in BOTH {
            let y = case.run(images * tokens, pitch, |out| {
                case.enqueue(tile, &Epilogue::Embed { out, positions: &table, patches })
            });
            for (i, y) in y.iter().enumerate() {
                let (row, column) = (i / n, i % n);
                let (image, token) = (row / tokens, row % tokens);
                let position = positions[token * n + column].to_f64();
                let what = format!("{tile:?}, image {image}, token {token}, column {column}");
                match token {
                    0 => assert_near(*y, case.bias[column].to_f64() + position, 0.0, &what),
                    _ => {
                        let (sum, size) = exact[(image * patches + token - 1) * n + column];
                        assert_near(*y, sum + position, size, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn takes_the_rows_after_each_class_token() {
    for (images, patches) in [(3, 5), (2, 64), (1, 1)] {
        let tokens = patches + 1;
        let case = Case::new((images * tokens, 64, 40));
        let all = case.plain(Tile::Large);
        let kept = all.chunks_exact(case.n).enumerate().filter(|(row, _)| row % tokens != 0);
        let expected: Vec<f16> = kept.flat_map(|(_, row)| row.to_vec()).collect();
        for tile in BOTH {
            let y = case.run(images * patches, case.n, |out| {
                let input = Input::WithoutClass(&case.input, patches);
                let linear = &case.bench.gpu.kernels.linear;
                linear.enqueue_in(&case.bench.stream, tile, input, &case.layer, &Epilogue::Bias(out))
            });
            assert_eq!(bits(&y), bits(&expected), "{tile:?}");
        }
    }
}

#[test]
fn scatters_into_every_slot_and_nowhere_else() {
    let (images, patches) = (3, 9);
    for (n, stride) in [(50, 56), (17, 17), (130, 133)] {
        let case = Case::new((images * patches, 80, n));
        let plain = case.plain(Tile::Large);
        let row = |image: usize, patch: usize| &plain[(image * patches + patch) * n..][..n];
        // Image 0 twice, once in full and once cut after 4 rows; image 1 nowhere; image 2 longer than it is.
        // The sequence begins one element after an aligned address.
        let lengths = [(0, patches), (0, 4), (2, patches + 2)];
        let rows: usize = lengths.iter().map(|(_, rows)| rows).sum();
        let begin = [0, 2, 2, 3];
        for tile in BOTH {
            let sequence = case.bench.array(&vec![MARK; rows * stride + 1]);
            let mut first = sequence.span().ptr().add(1);
            let slots = lengths.map(|(_, rows)| {
                let slot = SlotRows { first, pitch: stride as i64, rows: rows as i32, pad: 0 };
                first = first.add(rows * stride);
                slot
            });
            let table = Slots::new(&case.bench, &slots, &begin);
            case.enqueue(tile, &Epilogue::Scatter { table: &table.table, patches }).unwrap();
            let all = case.bench.read(&sequence);
            assert_eq!(all[0].to_bits(), MARK.to_bits());
            let filled = (0..patches).map(|p| row(0, p)).chain((0..4).map(|p| row(0, p)));
            let filled: Vec<&[f16]> = filled.chain((0..patches).map(|p| row(2, p))).collect();
            for (i, line) in all[1..].chunks_exact(stride).enumerate() {
                match filled.get(i) {
                    Some(row) => assert_eq!(bits(&line[..n]), bits(row), "{tile:?}, row {i}"),
                    None => assert!(line.iter().all(|x| x.to_bits() == MARK.to_bits()), "row {i}"),
                }
                assert!(line[n..].iter().all(|x| x.to_bits() == MARK.to_bits()), "between the rows");
            }
        }
    }
}

/// A slot table on the device.
pub(crate) struct Slots {
    pub(crate) table: SlotTable,
    _memory: [DeviceMemory; 2],
}

impl Slots {
    pub(crate) fn new(bench: &Bench, slots: &[SlotRows], begin: &[i32]) -> Self {
        let memory = [size_of_val(slots), size_of_val(begin)]
            .map(|bytes| DeviceMemory::new(&bench.gpu.context, bytes, "a slot table").unwrap());
        // SAFETY: the memory is kept beside the spans.
        let [rows, places] = [0, 1].map(|i| unsafe { memory[i].span() });
        let table = SlotTable { slots: rows.cast().unwrap(), begin: places.cast().unwrap() };
        bench.stream.upload_and_wait(table.slots, slots).unwrap();
        bench.stream.upload_and_wait(table.begin, begin).unwrap();
        Self { table, _memory: memory }
    }
}

#[test]
fn refuses_what_breaks_the_contract() {
    let case = Case::new((5, 72, 100));
    let (_memory, out) = case.bench.poisoned(5, 100, 100);
    let refuse = |input: Matrix, layer: Layer, epilogue: &Epilogue<'_>, expected: &str| {
        let linear = &case.bench.gpu.kernels.linear;
        let result = linear.enqueue(&case.bench.stream, Input::All(&input), &layer, epilogue);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("launch of linear_") && error.contains(expected), "{error}");
    };
    let bias = Epilogue::Bias(&out);
    let (a, layer) = (case.input, case.layer);
    refuse(Matrix { columns: 71, ..a }, layer, &bias, "a has 71 columns, w has 72");
    refuse(Matrix { pitch: 71, ..a }, layer, &bias, "a does not fit");
    refuse(Matrix { rows: 6, ..a }, layer, &bias, "a does not fit");
    refuse(Matrix { rows: 4, pitch: 73, ..a }, layer, &bias, "not 16 bytes aligned");
    let short = Span::slice(layer.bias, 0..99).unwrap();
    refuse(a, Layer { bias: short, ..layer }, &bias, "bias has 99 elements of 100");
    refuse(a, layer, &Epilogue::Bias(&Matrix { rows: 4, ..out }), "not [5, 100]");
    let narrow = Matrix { columns: 64, ..out };
    let residual = Epilogue::Residual { out: &out, residual: &narrow, more: Default::default() };
    refuse(a, layer, &residual, "residual is");
    refuse(a, layer, &Epilogue::Embed { out: &out, positions: &out, patches: 3 }, "5 rows in images of 3");
}

#[test]
fn the_tile_that_is_done_first() {
    // The tower's shapes on 132 multiprocessors: rows of 1 and 8 images, outputs.
    for (m, n, tile) in [
        (1226, 1024, Tile::Large),
        (8 * 1226, 3072, Tile::Large),
        (8 * 1226, 4096, Tile::Large),
        (26, 4096, Tile::Small),
        (1, 1, Tile::Small),
        (100, 100, Tile::Small),
    ] {
        assert_eq!(choose_tile(m, n, 132), tile, "{m} rows, {n} outputs");
    }
    assert_eq!(choose_tile(0, 64, 0), Tile::Large, "nothing to do, nothing to choose");
}
