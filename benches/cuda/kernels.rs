//! Launches by themselves.

use criterion::{BenchmarkId, Criterion, Throughput};
use half::{bf16, f16};
use imagehere::config::ModelConfig;
use imagehere::cuda::bench::{
    Attention, Blocks, Launch, Machine, Norms, Picture, Recording, Rows, Tokens, groups, halves,
};
use imagehere::image::{Resample, RgbView, resize::resize};

use crate::suite::{Suite, bytes};

/// One launch, what clears its result, and what panics unless the result is right.
pub struct Case<'a> {
    pub launch: Launch,
    pub poison: Box<dyn Fn() + 'a>,
    pub check: Box<dyn Fn() + 'a>,
}

/// What an iteration costs.
#[derive(Clone, Copy, Default)]
pub struct Cost {
    pub operations: f64,
    pub bytes: f64,
}

impl Cost {
    /// Iterations for half a millisecond at about the best that a device can do, and no more than cover its caches.
    pub fn iterations(&self, tiny: bool) -> usize {
        let seconds = (self.operations / 4e14).max(self.bytes / 3e12);
        if tiny { 2 } else { (5e-4 / seconds).clamp(2.0, 32.0) as usize }
    }

    fn throughput(&self) -> Throughput {
        let (elements, bytes) = (self.operations as u64, self.bytes as u64);
        if elements == 0 {
            Throughput::Bytes(bytes)
        } else {
            Throughput::ElementsAndBytes { elements, bytes }
        }
    }
}

/// Noise on both sides.
pub struct Noise {
    device: Rows, // [1, count]
    pub host: Vec<f16>,
}

/// Rows of it.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    pub rows: Rows,
    pub host: &'a [f16], // from the first element on
}

impl Part<'_> {
    pub fn row(&self, i: usize, columns: usize) -> &[f16] {
        &self.host[i * self.rows.pitch()..][..columns]
    }
}

impl Noise {
    fn new(machine: &Machine, seed: u64, count: usize, deviation: f32) -> Self {
        let host = halves(seed, count, deviation);
        Self { device: machine.rows(&host, count).expect("room for noise"), host }
    }

    /// `[rows, columns]`, the `i`-th of as many as there are; then they overlap.
    pub fn part(&self, i: usize, rows: usize, columns: usize) -> Part<'_> {
        let at = place(self.host.len(), i, rows, columns);
        Part { rows: self.device.window(at, rows, columns).expect("noise enough"), host: &self.host[at..] }
    }
}

/// Where the `i`-th `[rows, columns]` of `count` elements begins.
fn place(count: usize, i: usize, rows: usize, columns: usize) -> usize {
    let len = rows * columns.next_multiple_of(8);
    (i * len % (count - len + 1)) / 8 * 8
}

/// Where inputs come from and outputs go.
pub struct Fields<'s> {
    pub suite: &'s Suite,
    pub inputs: Noise,
    pub weights: Noise,
    outputs: Rows,
    norms: std::cell::OnceCell<Norms>,
}

impl<'s> Fields<'s> {
    pub fn new(suite: &'s Suite) -> Self {
        let (machine, seed) = (&suite.machine, suite.seed);
        let (many, few) = if suite.tiny { (1 << 18, 1 << 17) } else { (1 << 27, 1 << 26) };
        Self {
            suite,
            inputs: Noise::new(machine, seed, many, 1.0),
            weights: Noise::new(machine, seed + 1, few, 0.03),
            outputs: machine.room(many).expect("room for results"),
            norms: std::cell::OnceCell::new(),
        }
    }

    /// What Hopper's layers have beside their products, where they run.
    pub fn norms(&self) -> Option<Norms> {
        let make = || {
            // No bias begins later; no layer with a norm has more rows and columns.
            let biases = &self.weights.host[..self.weights.host.len().min(1 << 18)];
            let config = &self.suite.config;
            let elements = 16 * config.tokens * config.width.max(config.mlp_width);
            self.suite.machine.norms(biases, elements).expect("room for statistics")
        };
        self.suite.machine.is_hopper().then(|| *self.norms.get_or_init(make))
    }

    pub fn output(&self, i: usize, rows: usize, columns: usize) -> Rows {
        let count = if self.suite.tiny { 1 << 18 } else { 1 << 27 };
        self.outputs.window(place(count, i, rows, columns), rows, columns).expect("room for results")
    }

    /// A case that writes `[rows, columns]` to `out`, which `expected` knows by row and column.
    pub fn case<'a>(
        &'a self,
        launch: Launch,
        out: Rows,
        (rows, columns): (usize, usize),
        expected: impl Fn(usize, usize) -> f64 + 'a,
    ) -> Case<'a> {
        let (machine, what) = (&self.suite.machine, launch.clone());
        Case {
            poison: Box::new(move || machine.poison(out).expect("a device that works")),
            check: Box::new(move || {
                let (got, pitch) = (machine.read(out).expect("a device that works"), out.pitch());
                assert_eq!(got.len(), rows * pitch);
                for (i, row) in got.chunks_exact(pitch).enumerate() {
                    assert!(row[..columns].iter().all(|x| x.is_finite()), "row {i} was not written");
                }
                let step = (rows * columns / 700).max(1) | 1;
                for i in (0..rows * columns).step_by(step) {
                    let (row, column) = (i / columns, i % columns);
                    let (got, expected) = (got[row * pitch + column].to_f64(), expected(row, column));
                    let bound = 1e-3 * (1.0 + expected.abs());
                    assert!(
                        (got - expected).abs() <= bound,
                        "[{row}, {column}] is {got}, not {expected}: {what:?}"
                    );
                }
            }),
            launch,
        }
    }
}

/// Checks the cases of an iteration and records some iterations; says how many.
fn prepare<'m, 'a>(
    suite: &'m Suite,
    split: &[usize],
    cost: Cost,
    make: &dyn Fn(usize, usize) -> Case<'a>,
) -> (Recording<'m>, u64) {
    let machine = &suite.machine;
    let works = "a device that works";
    let iterations = cost.iterations(suite.tiny);
    let all = (0..iterations).flat_map(|_| split.iter().copied()).enumerate();
    let cases: Vec<Case<'a>> = all.map(|(set, images)| make(set, images)).collect();
    // The first and the last of an iteration: groups differ in size at most there.
    for case in [&cases[0], &cases[split.len() - 1]] {
        (case.poison)();
        machine.run(&case.launch).expect(works);
        (case.check)();
    }
    let launches: Vec<Launch> = cases.iter().map(|case| case.launch.clone()).collect();
    let recording = machine.record(&launches).expect(works);
    let last = &cases[cases.len() - 1];
    (last.poison)();
    recording.time(1).expect(works);
    (last.check)();
    (recording, iterations as u64)
}

/// Benchmarks `make(set, images)` over the parts of `split`, if the command line asks for it; then `says` something first.
#[expect(clippy::too_many_arguments, reason = "a benchmark has so many parts")]
pub fn measure<'a>(
    suite: &Suite,
    c: &mut Criterion,
    group: &str,
    id: BenchmarkId,
    split: &[usize],
    cost: impl Fn(usize) -> Cost,
    make: &dyn Fn(usize, usize) -> Case<'a>,
    says: &dyn Fn(),
) {
    let cost = split.iter().map(|&images| cost(images)).fold(Cost::default(), |sum, cost| Cost {
        operations: sum.operations + cost.operations,
        bytes: sum.bytes + cost.bytes,
    });
    let mut group = c.benchmark_group(group);
    group.throughput(cost.throughput());
    let mut prepared = None;
    group.bench_function(id, |b| {
        let (recording, iterations) = prepared.get_or_insert_with(|| {
            says();
            prepare(suite, split, cost, make)
        });
        b.iter_custom(|times| {
            let replays = times.div_ceil(*iterations);
            let time = recording.time(replays).expect("a device that works");
            time.mul_f64(times as f64 / (replays * *iterations) as f64)
        });
    });
    group.finish();
}

/// All kernels. Nothing is made before something is asked for.
pub fn all(suite: &Suite, c: &mut Criterion) {
    let fields = std::cell::OnceCell::new();
    let fields = || fields.get_or_init(|| Fields::new(suite));
    for &images in suite.images {
        crate::linear::all(suite, &fields, c, images);
        others(suite, &fields, c, images);
    }
    resizes(suite, c);
    texts(suite, &fields, c);
}

pub fn dot(a: &[f16], b: &[f16]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
}

pub fn attention_cost(config: &ModelConfig, images: usize) -> Cost {
    let rows = images * config.tokens;
    let (operations, bytes) = (4 * rows * config.tokens * config.width, 8 * rows * config.width);
    Cost { operations: operations as f64, bytes: bytes as f64 }
}

/// The `set`-th of many launches of attention with data of their own.
pub fn attention<'a>(fields: &'a Fields<'_>, set: usize, images: usize, blocks: Option<Blocks>) -> Case<'a> {
    let (t, width) = (fields.suite.config.tokens, fields.suite.config.width);
    let qkv = fields.inputs.part(set, images * t, 3 * width);
    let out = fields.output(set, images * t, width);
    let launch = Launch::Attention(Attention { out, qkv: qkv.rows, tokens: t, blocks });
    fields.case(launch, out, (images * t, width), move |row, channel| {
        let (image, head) = (row / t * t, channel / 64 * 64);
        let part = |row: usize, which: usize| &qkv.row(row, 3 * width)[which * width + head..][..64];
        let (mut sum, mut mean) = (0.0, 0.0);
        for key in image..image + t {
            let weight = (dot(part(row, 0), part(key, 1)) / 8.0).exp();
            sum += weight;
            mean += weight * part(key, 2)[channel % 64].to_f64();
        }
        mean / sum
    })
}

/// Attention, layer norm, patches, completeness.
fn others<'s>(suite: &'s Suite, fields: &dyn Fn() -> &'s Fields<'s>, c: &mut Criterion, images: usize) {
    let config = &suite.config;
    let machine = &suite.machine;
    let (p, t, width) = (config.patches, config.tokens, config.width);
    let id = || BenchmarkId::from_parameter(images);

    let cost = |images: usize| attention_cost(config, images);
    let attention = |set: usize, images: usize| attention(fields(), set, images, None);
    let says = || {
        let kernel = |&images: &usize| {
            let case = attention(0, images);
            let Launch::Attention(of) = &case.launch else { unreachable!("made above") };
            suite.machine.chosen_blocks(of).to_string()
        };
        let mut kernels: Vec<String> = groups(images).iter().map(kernel).collect();
        kernels.dedup();
        println!("kernel of attention/{images}: - {}", kernels.join(", "));
    };
    measure(suite, c, "attention", id(), &groups(images), cost, &attention, &says);

    let cost = |images: usize| Cost { operations: 0.0, bytes: 4.0 * (images * t * width) as f64 };
    let layer_norm = |set: usize, images: usize| {
        let fields = fields();
        let input = fields.inputs.part(set, images * t, width);
        let (weight, bias) = (fields.inputs.part(set + 3, 1, width), fields.inputs.part(set + 4, 1, width));
        let out = fields.output(set, images * t, width);
        let (weight_rows, bias_rows) = (weight.rows, bias.rows);
        let launch = Launch::LayerNorm { out, input: input.rows, weight: weight_rows, bias: bias_rows };
        fields.case(launch, out, (images * t, width), move |row, column| {
            let row: Vec<f64> = input.row(row, width).iter().map(|x| x.to_f64()).collect();
            let mean = row.iter().sum::<f64>() / width as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = weight.host[column].to_f64() / (variance + 1e-5).sqrt();
            (row[column] - mean) * scale + bias.host[column].to_f64()
        })
    };
    measure(suite, c, "layer_norm", id(), &groups(images), cost, &layer_norm, &|| ());

    let (side, patch) = (config.image_size, config.patch_size);
    let columns = config.patch_len();
    let cost = |images: usize| Cost {
        operations: 0.0,
        bytes: images as f64 * (3 * side * side + 2 * p * columns) as f64,
    };
    let table = std::cell::OnceCell::new();
    let pictures: [std::cell::OnceCell<(Vec<u8>, Picture)>; 128] =
        std::array::from_fn(|_| Default::default());
    let patches = |set: usize, _: usize| {
        let fields = fields();
        let (table, values) = table.get_or_init(|| machine.pixel_table().expect("room for a table"));
        let (rgb, picture) = pictures[set % pictures.len()].get_or_init(|| {
            let rgb = bytes(suite.seed + set as u64, 3 * side * side);
            let picture = machine.picture(side, side, &rgb).expect("room for a picture");
            (rgb, picture)
        });
        let out = fields.output(set, p, columns);
        let launch = Launch::Patches { out, picture: *picture, table: *table, patch };
        fields.case(launch, out, (p, columns), move |row, column| {
            let (channel, y, x) = (column / (patch * patch), column / patch % patch, column % patch);
            let (y, x) = (row / (side / patch) * patch + y, row % (side / patch) * patch + x);
            values[channel * 256 + usize::from(rgb[(y * side + x) * 3 + channel])].to_f64()
        })
    };
    // One launch an image.
    measure(suite, c, "patches", id(), &vec![1; images], cost, &patches, &|| ());

    let hidden = config.hidden_size;
    let cost = |images: usize| Cost { operations: 0.0, bytes: 2.0 * (images * p * hidden) as f64 };
    let verify = |set: usize, images: usize| {
        let input = fields().inputs.part(set, images * p, hidden);
        let checks = machine.checks(images * p, p).expect("room for checks");
        Case {
            launch: Launch::Verify { rows: input.rows, checks },
            poison: Box::new(|| ()), // made of NaN
            check: Box::new(move || {
                let found = machine.read_checks(checks).expect("a device that works");
                for (slot, found) in found.expect("complete rows").into_iter().enumerate() {
                    let norms = (slot * p..(slot + 1) * p).map(|row| {
                        let row = input.row(row, hidden);
                        dot(row, row).sqrt()
                    });
                    let expected = norms.sum::<f64>() / p as f64;
                    assert!((f64::from(found) - expected).abs() < 1e-4 * expected, "{found}, not {expected}");
                }
            }),
        }
    };
    measure(suite, c, "verify", id(), &groups(images), cost, &verify, &|| ());
}

/// Photos of half a megapixel, two and twelve, to the tower's size.
fn resizes(suite: &Suite, c: &mut Criterion) {
    let machine = &suite.machine;
    let side = suite.config.image_size;
    let sizes =
        if suite.tiny { [(80, 61), (93, 131), (160, 120)] } else { [(816, 612), (1632, 1224), (4000, 3000)] };
    for ((width, height), name) in sizes.into_iter().zip(["0.5MP", "2MP", "12MP"]) {
        let cost = |_: usize| {
            // In, between the passes twice, out.
            let moved = 3 * (width * height + 2 * side * height + side * side);
            Cost { operations: 0.0, bytes: moved as f64 }
        };
        // As many as no cache holds, and not many of the large ones.
        let distinct = (150_000_000 / (3 * width * height)).clamp(2, 32);
        let pictures: Vec<_> = (0..distinct).map(|_| std::cell::OnceCell::new()).collect();
        let make = |set: usize, _: usize| {
            let set = set % distinct;
            let (rgb, to, resizing) = pictures[set].get_or_init(|| {
                let rgb = bytes(suite.seed + 100 + set as u64, 3 * width * height);
                let picture = |width: usize, height: usize, rgb: &[u8]| {
                    machine.picture(width, height, rgb).expect("room for a picture")
                };
                let (from, to) =
                    (picture(width, height, &rgb), picture(side, side, &vec![0; 3 * side * side]));
                (rgb, to, machine.resizing(from, to).expect("room for tables"))
            });
            Case {
                launch: Launch::Resize(resizing.clone()),
                poison: Box::new(|| ()), // made of zeros, which noise has few of
                check: Box::new(move || {
                    let view = RgbView::new(rgb, width as u32, height as u32, 3 * width).expect("a picture");
                    let expected = resize(view, side as u32, side as u32, Resample::default());
                    let got = machine.read_picture(*to).expect("a device that works");
                    assert!(got == expected.data, "{width}x{height} to {side}x{side}: other bytes");
                }),
            }
        };
        measure(suite, c, "resize", BenchmarkId::from_parameter(name), &[1], cost, &make, &|| ());
    }
}

/// Text rows, from a table that no cache holds.
fn texts<'s>(suite: &'s Suite, fields: &dyn Fn() -> &'s Fields<'s>, c: &mut Criterion) {
    let hidden = suite.config.hidden_size;
    let (vocabulary, count) = if suite.tiny { (300, 20) } else { (32768, 4096) };
    let cost = |_: usize| Cost { operations: 0.0, bytes: 4.0 * (count * hidden) as f64 };
    let table = std::cell::OnceCell::new();
    let make = |set: usize, _: usize| {
        let fields = fields();
        let (table, tokens): &(Vec<u16>, Tokens) = table.get_or_init(|| {
            let noise = &fields.inputs.host;
            let value = |i: usize| bf16::from_f32(noise[i % noise.len()].to_f32()).to_bits();
            let table: Vec<u16> = (0..vocabulary * hidden).map(value).collect();
            let tokens = suite.machine.tokens(&table, hidden).expect("room for a table");
            (table, tokens)
        });
        let random = bytes(suite.seed + 50 + set as u64, 4 * count);
        let id = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) % vocabulary as u32;
        let ids: Vec<u32> = random.chunks_exact(4).map(id).collect();
        let out = fields.output(set, count, hidden);
        let texts = suite.machine.texts(*tokens, &ids, out).expect("room for a table");
        fields.case(Launch::EmbedTokens(texts), out, (count, hidden), move |row, column| {
            let stored = bf16::from_bits(table[ids[row] as usize * hidden + column]);
            f16::from_f32(stored.to_f32()).to_f64()
        })
    };
    measure(suite, c, "embed_tokens", BenchmarkId::from_parameter(count), &[1], cost, &make, &|| ());
}
