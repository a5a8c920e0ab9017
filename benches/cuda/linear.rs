//! The layers of the tower, each with its epilogue, in the kernel that the tower takes or in a given one.

use std::cell::OnceCell;

use criterion::{BenchmarkId, Criterion};
use half::f16;
use imagehere::cuda::bench::{Epilogue, Launch, Linear, Norms, Rows, Variant, groups, predictions};

use crate::kernels::{Case, Cost, Fields, Part, dot, measure};
use crate::suite::Suite;

/// A layer: rows of an image, K, N.
#[derive(Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    rows: usize,
    k: usize,
    n: usize,
}

pub fn shapes(suite: &Suite) -> [Shape; 7] {
    let config = &suite.config;
    let (c, f, p, t) = (config.width, config.mlp_width, config.patches, config.tokens);
    let shape = |name, rows, k, n| Shape { name, rows, k, n };
    [
        shape("patch_embedding", p, config.patch_len(), c),
        shape("qkv", t, c, 3 * c),
        shape("out", t, c, c),
        shape("fc1", t, c, f),
        shape("fc2", t, f, c),
        shape("projector_hidden", p, c, config.projector_width),
        shape("projector_out", p, config.projector_width, config.hidden_size),
    ]
}

impl Shape {
    pub fn cost(&self, images: usize) -> Cost {
        let (m, k, n) = (images * self.rows, self.k, self.n);
        let extra = if self.name == "out" || self.name == "fc2" { m * n } else { 0 };
        let moved = m * k + n * k + n + extra + m * n;
        Cost { operations: 2.0 * (m * n * k) as f64, bytes: 2.0 * moved as f64 }
    }
}

/// What the cases of one shape share.
pub struct Made<'s> {
    fields: &'s Fields<'s>,
    pub shape: Shape,
    /// Rows of K that is no multiple of 8 are padded, and what is between them must be zero.
    padded: OnceCell<(Rows, Vec<f16>)>,
    /// On Hopper, where they are folded.
    norms: Option<Norms>,
}

impl<'s> Made<'s> {
    pub fn new(fields: &'s Fields<'s>, shape: Shape) -> Self {
        Self { fields, shape, padded: OnceCell::new(), norms: fields.norms() }
    }

    /// The `set`-th of many layers with data of their own.
    pub fn case(&self, set: usize, images: usize, variant: Option<Variant>) -> Case<'_> {
        let (fields, Shape { name, rows, k, n }) = (self.fields, self.shape);
        let config = &fields.suite.config;
        let (p, t) = (config.patches, config.tokens);
        let embeds = name == "patch_embedding";
        // Hopper's last layer stores no class rows: the projector reads whole rows.
        let skips = name == "projector_hidden" && self.norms.is_none();
        let m = images * rows;
        let input = fields.inputs.part(set, if skips { images * t } else { m }, k);
        let weight = if k % 8 == 0 {
            fields.weights.part(set, n, k)
        } else {
            let (device, host) = self.padded.get_or_init(|| padded_weight(fields, n, k));
            Part { rows: *device, host }
        };
        let bias = fields.weights.part(set + 1, 1, n);
        let rows_out = if embeds { images * t } else { m };
        let out = fields.output(set, rows_out, n);
        let extra = fields.inputs.part(set + 7, if embeds { t } else { m }, n);
        let epilogue = match name {
            "patch_embedding" => Epilogue::Embed { out, positions: extra.rows, patches: p },
            "qkv" => Epilogue::Bias { out },
            "fc1" => Epilogue::QuickGelu { out },
            "projector_hidden" => Epilogue::Gelu { out },
            "projector_out" => {
                let slot = |i: usize| out.window(i * p * out.pitch(), p, n).expect("a slot");
                let slots: Vec<Rows> = (0..images).map(slot).collect();
                let slots = fields.suite.machine.slots(&slots).expect("room for a table");
                Epilogue::Scatter { slots, patches: p }
            }
            _ => Epilogue::Residual { out, residual: extra.rows },
        };
        let bias_at = fields.weights.host.len() - bias.host.len();
        let layer = Linear {
            input: input.rows,
            without_class: skips.then_some(p),
            weight: weight.rows,
            bias: bias.rows,
            epilogue,
            norms: self.norms.map(|norms| norms.with_bias_at(bias_at)),
            variant,
        };
        fields.case(Launch::Linear(layer), out, (rows_out, n), move |row, column| {
            let sum = |row: usize| dot(input.row(row, k), weight.row(column, k));
            let bias = bias.host[column].to_f64();
            let extra = |row: usize| extra.row(row, n)[column].to_f64();
            match name {
                "patch_embedding" if row % t == 0 => bias + extra(0),
                "patch_embedding" => sum(row / t * p + row % t - 1) + extra(row % t),
                "fc1" => quick_gelu(sum(row) + bias),
                "projector_hidden" if skips => gelu(sum(row / p * t + row % p + 1) + bias),
                "projector_hidden" => gelu(sum(row) + bias),
                "out" | "fc2" => sum(row) + bias + extra(row),
                _ => sum(row) + bias,
            }
        })
    }
}

pub fn layer<'c>(case: &'c Case<'_>) -> &'c Linear {
    match &case.launch {
        Launch::Linear(layer) => layer,
        other => unreachable!("{other:?} is no linear layer"),
    }
}

/// A weight whose rows have zeros between them, on both sides.
fn padded_weight(fields: &Fields<'_>, n: usize, k: usize) -> (Rows, Vec<f16>) {
    let values = fields.weights.host[..n * k].to_vec();
    let rows = fields.suite.machine.rows(&values, k).expect("room for a weight");
    let mut host = vec![f16::ZERO; n * rows.pitch()];
    for (row, values) in host.chunks_exact_mut(rows.pitch()).zip(values.chunks_exact(k)) {
        row[..k].copy_from_slice(values);
    }
    (rows, host)
}

fn quick_gelu(x: f64) -> f64 {
    x / (1.0 + (-1.702 * x).exp())
}

/// With tanh: differs from the exact one by less than 5e-4, and serves to find a wrong layer, not a wrong ulp.
fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh())
}

/// All layers of a call with so many images, in the kernels that the tower takes; says which.
pub fn all<'s>(suite: &Suite, fields: &dyn Fn() -> &'s Fields<'s>, c: &mut Criterion, images: usize) {
    for shape in shapes(suite) {
        let made = OnceCell::new();
        let make = |set: usize, images: usize| {
            let made: &Made<'_> = made.get_or_init(|| Made::new(fields(), shape));
            made.case(set, images, None)
        };
        let split = groups(images);
        let id = BenchmarkId::new(shape.name, images);
        let says = || {
            let cases = split.iter().map(|&images| make(0, images));
            let cuts: Vec<_> = cases
                .map(|case| {
                    let variant = suite.machine.chosen(layer(&case)).expect("a layer");
                    (variant.to_string(), suite.machine.cut(layer(&case), variant))
                })
                .collect();
            let mut tiles: Vec<&str> = cuts.iter().map(|(variant, _)| variant.as_str()).collect();
            tiles.dedup();
            let (useful, room) =
                cuts.iter().fold((0.0, 0.0), |(u, r), (_, cut)| (u + cut.useful, r + cut.room));
            println!("kernel of linear/{}/{images}: {:.4} {}", shape.name, useful / room, tiles.join(", "));
        };
        measure(suite, c, "linear", id, &split, |images| shape.cost(images), &make, &says);
    }
}

/// What the model of `src/cuda/linear/sm90.rs` takes for the tower's layers on 132 multiprocessors, as a table. Needs
/// no device.
pub fn model() {
    println!("| layer | B | M, N, K | tile | waves | useful | us | TFLOP/s | next best |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for (name, epilogue, rows, n, k) in [
        ("patch embedding", "embed", 1225, 1024, 588),
        ("qkv", "bias", 1226, 3072, 1024),
        ("out", "residual", 1226, 1024, 1024),
        ("fc1", "quick_gelu", 1226, 4096, 1024),
        ("fc2", "residual", 1226, 1024, 4096),
        ("projector 1", "gelu", 1225, 4096, 1024),
        ("projector 2", "scatter", 1225, 4096, 4096),
    ] {
        for images in [1, 2, 4, 8, 12, 16] {
            let m = images * rows;
            let all = predictions(epilogue, [m, n, k], 132);
            let (best, us) = (&all[0], |i: usize| all[i].seconds * 1e6);
            let rate = 2e-12 * (m * n * k) as f64 / best.seconds;
            let useful = 100.0 * best.cut.useful / best.cut.room;
            let next = format!("{} +{:.0} %", all[1].tile, 100.0 * (us(1) / us(0) - 1.0));
            println!(
                "| {name} | {images} | {m}, {n}, {k} | {} | {} | {useful:.0} % | {:.1} | {rate:.0} | {next} |",
                best.tile,
                best.cut.waves,
                us(0)
            );
        }
    }
}
