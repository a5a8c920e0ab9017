//! Linear layers, `out = epilogue(a · Wᵀ)`: launches `kernels/linear_sm80.cu`, and on Hopper `linear_sm90.cu` ([`sm90`]).
//!
//! Two portable tiles, 128×128 and 64×64, give the same bits: [`choose_tile`] takes the one that is done first. Layers
//! that Hopper's kernels do not take (rows of no whole vectors) run in the portable ones there too.

use std::sync::Arc;

use half::f16;

use self::sm90::LinearSm90;
use super::driver::{DevicePtr, Module, Pod, Span, Stream, Zeroable};
use super::launch::{Entry, Kernel, broken, contract, int, launch, parameters};
use super::matrix::Matrix;
use crate::error::Result;

pub(crate) mod sm90;

/// Where rows 0..`rows` of an image go, and how far apart; one block of a sequence (`SlotRows` in
/// linear.cuh).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotRows {
    /// The element of the first row and channel 0.
    pub(crate) first: DevicePtr<f16>,
    /// Elements from one row to the next.
    pub(crate) pitch: i64,
    /// Rows; those of the image beyond are dropped.
    pub(crate) rows: i32,
    /// Nothing.
    pub(crate) pad: i32,
}

// SAFETY: integers without padding.
unsafe impl Zeroable for SlotRows {}
// SAFETY: as above.
unsafe impl Pod for SlotRows {}

/// The slots of a batch, on the device: `slots[begin[b]..begin[b + 1]]` are those of image `b`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotTable {
    pub(crate) slots: Span<SlotRows>,
    pub(crate) begin: Span<i32>, // [B + 1]
}

/// `LinearArgs` in linear.cuh, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearArgs {
    out: DevicePtr<f16>,
    a: DevicePtr<f16>,
    w: DevicePtr<f16>,
    bias: DevicePtr<f16>,
    extra: DevicePtr<f16>,
    slots: DevicePtr<SlotRows>,
    slot_begin: DevicePtr<i32>,
    m: i32,
    n: i32,
    k: i32,
    a_pitch: i32,
    w_pitch: i32,
    extra_pitch: i32,
    out_pitch: i64,
    group: i32,
    a_skip: i32,
}

parameters! {
    /// All entries of linear_sm80.cu take one struct.
    pub(crate) struct LinearParameters {
        args: LinearArgs,
    }
}

/// Of 16 columns of a row: their mean, and the sum of squares about it (`RowPart` in linear_sm90.cuh).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowPart {
    pub(crate) mean: f32,
    pub(crate) squares: f32,
}

// SAFETY: numbers without padding.
unsafe impl Zeroable for RowPart {}
// SAFETY: as above.
unsafe impl Pod for RowPart {}

/// Columns of a [`RowPart`].
pub(crate) const PART: usize = 16;

/// A block's part of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tile {
    /// 128 rows, 128 outputs.
    Large,
    /// 64 rows, 64 outputs.
    Small,
}

impl Tile {
    /// Rows and outputs of a tile.
    pub(crate) const fn side(self) -> usize {
        match self {
            Self::Large => 128,
            Self::Small => 64,
        }
    }
}

/// What becomes of an accumulator before it is stored, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Epilogue<'a> {
    /// `acc + bias`.
    Bias(&'a Matrix),
    /// `quick_gelu(acc + bias)`.
    QuickGelu(&'a Matrix),
    /// `gelu(acc + bias)`, exact.
    Gelu(&'a Matrix),
    /// `acc + bias + residual`; the residual may be `out` itself.
    Residual { out: &'a Matrix, residual: &'a Matrix, more: MoreOfResidual },
    /// `acc + position`, after a class row per image of `patches` rows; the layer's bias is the class
    /// embedding.
    Embed { out: &'a Matrix, positions: &'a Matrix, patches: usize },
    /// `acc + bias` to every slot of the row's image of `patches` rows.
    Scatter { table: &'a SlotTable, patches: usize },
}

/// What Hopper's kernel does besides adding a residual.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MoreOfResidual {
    /// Leaves statistics of what it stored, `[rows of out, N / 16]`.
    pub(crate) parts: Option<Span<RowPart>>,
    /// Of every so many rows the first is not stored, the others close ranks; 0: all are stored. `out` is not the
    /// residual then.
    pub(crate) drop: usize,
}

impl Epilogue<'_> {
    /// Its place among the entries.
    pub(crate) const fn index(&self) -> usize {
        match self {
            Self::Bias(_) => 0,
            Self::QuickGelu(_) => 1,
            Self::Gelu(_) => 2,
            Self::Residual { .. } => 3,
            Self::Embed { .. } => 4,
            Self::Scatter { .. } => 5,
        }
    }
}

/// The rows that go in.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Input<'a> {
    /// All of them.
    All(&'a Matrix),
    /// Without the first, the class token's, of every `patches + 1`.
    WithoutClass(&'a Matrix, usize),
    /// All of them as they are before a layer norm, and their statistics, `[M, K / 16]`: the layer has that norm
    /// folded in. Hopper's kernels only.
    BeforeNorm(&'a Matrix, Span<RowPart>),
}

impl<'a> Input<'a> {
    /// Where the rows are.
    const fn matrix(self) -> &'a Matrix {
        match self {
            Self::All(a) | Self::WithoutClass(a, _) | Self::BeforeNorm(a, _) => a,
        }
    }
}

/// A layer's weights on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer {
    /// `[N, K]`; columns up to the pitch are zero.
    pub(crate) weight: Matrix,
    /// `[N]`
    pub(crate) bias: Span<f16>,
    /// A layer norm that is folded in: `weight` is `γ ⊙ W` then (fold.cu).
    pub(crate) norm: Option<FoldedNorm>,
}

/// What is left of a layer norm that a layer's weights have taken in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FoldedNorm {
    /// Of the rounded `γ ⊙ W`, over K, `[N]`.
    pub(crate) column_sums: Span<f32>,
    /// `β Wᵀ + bias`, `[N]`
    pub(crate) bias: Span<f32>,
}

/// Stages of the ring between global memory and the tensor cores, and their depth in K (linear.cuh).
const STAGES: u32 = 4;
const DEPTH: u32 = 32;

const fn entry(name: &'static str, tile: Tile) -> Entry {
    Entry::new(name, 128, STAGES * 2 * tile.side() as u32 * DEPTH * 2)
}

/// Every entry: by epilogue, in the order of [`Epilogue::index`]; large tile, small tile.
pub(crate) const ENTRIES: [[Entry; 2]; 6] = [
    [entry("linear_bias_128x128", Tile::Large), entry("linear_bias_64x64", Tile::Small)],
    [entry("linear_quick_gelu_128x128", Tile::Large), entry("linear_quick_gelu_64x64", Tile::Small)],
    [entry("linear_gelu_128x128", Tile::Large), entry("linear_gelu_64x64", Tile::Small)],
    [entry("linear_residual_128x128", Tile::Large), entry("linear_residual_64x64", Tile::Small)],
    [entry("linear_embed_128x128", Tile::Large), entry("linear_embed_64x64", Tile::Small)],
    [entry("linear_scatter_128x128", Tile::Large), entry("linear_scatter_64x64", Tile::Small)],
];

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct Linear {
    kernels: Vec<[Kernel<LinearParameters>; 2]>, // by epilogue
    pub(crate) sm90: Option<LinearSm90>,
}

impl Linear {
    /// Finds all entries in linear_sm80's module, and in linear_sm90's on Hopper.
    pub(crate) fn load(module: &Arc<Module>, sm90: Option<&Arc<Module>>) -> Result<Self> {
        let pair =
            |[large, small]: [Entry; 2]| Ok([Kernel::load(module, large)?, Kernel::load(module, small)?]);
        Ok(Self {
            kernels: ENTRIES.into_iter().map(pair).collect::<Result<_>>()?,
            sm90: sm90.map(LinearSm90::load).transpose()?,
        })
    }

    /// Enqueues a layer, in the tile that is done first on the stream's device.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        input: Input<'_>,
        layer: &Layer,
        epilogue: &Epilogue<'_>,
    ) -> Result<()> {
        if let Some(sm90) = self.sm90.as_ref().filter(|_| LinearSm90::takes(input, layer, epilogue)) {
            return sm90.enqueue(stream, input, layer, epilogue);
        }
        let rows = input_rows(input);
        let tile = choose_tile(rows, layer.weight.rows, stream.context().multiprocessors() as usize);
        self.enqueue_in(stream, tile, input, layer, epilogue)
    }

    /// Enqueues a layer in a given portable tile.
    pub(crate) fn enqueue_in(
        &self,
        stream: &Stream,
        tile: Tile,
        input: Input<'_>,
        layer: &Layer,
        epilogue: &Epilogue<'_>,
    ) -> Result<()> {
        let kernel = &self.kernels[epilogue.index()][usize::from(tile == Tile::Small)];
        let Arguments { linear: args, norm, parts_out, drop } =
            arguments(kernel.name(), input, layer, epilogue)?;
        let more = norm.is_some() || parts_out.is_some() || drop > 0;
        contract!(kernel.name(), !more, "norms, statistics and dropped rows are Hopper's");
        let tiles = input_rows(input).div_ceil(tile.side()) * layer.weight.rows.div_ceil(tile.side());
        if tiles == 0 {
            return Ok(());
        }
        // SAFETY: `arguments` checked the contract; spans and matrices vouch for the memory.
        unsafe { launch(stream, kernel, [tiles, 1, 1], &LinearParameters { args }) }
    }
}

/// Rows that go in after skipping.
pub(crate) fn input_rows(input: Input<'_>) -> usize {
    match input {
        Input::All(a) | Input::BeforeNorm(a, _) => a.rows,
        Input::WithoutClass(a, patches) => a.rows / (patches + 1) * patches,
    }
}

/// Checks that `kernel` may leave statistics of a matrix in `parts`.
pub(super) fn room_for_parts(kernel: &str, parts: Span<RowPart>, rows: usize, columns: usize) -> Result<()> {
    contract!(kernel, columns.is_multiple_of(PART), "statistics of {columns} columns, {PART} at a time");
    let (needs, has) = (rows * (columns / PART), parts.len());
    contract!(kernel, has >= needs && parts.ptr().is_aligned(8), "room for {has} statistics of {needs}");
    Ok(())
}

/// What a kernel is told: all of them, and Hopper's.
struct Arguments {
    linear: LinearArgs,
    norm: Option<(Span<RowPart>, FoldedNorm)>,
    parts_out: Option<Span<RowPart>>,
    drop: usize,
}

/// Checks the launch contract in the order of linear.cuh, then of linear_sm90.cuh, and fills in the arguments.
fn arguments(name: &str, input: Input<'_>, layer: &Layer, epilogue: &Epilogue<'_>) -> Result<Arguments> {
    let (a, skip) = match input {
        Input::All(a) | Input::BeforeNorm(a, _) => (a, None),
        Input::WithoutClass(a, patches) => (a, Some(patches)),
    };
    let (m, n, k) = (input_rows(input), layer.weight.rows, layer.weight.columns);
    a.check(name, "a")?;
    a.check_vectors(name, "a")?;
    layer.weight.check(name, "w")?;
    layer.weight.check_vectors(name, "w")?;
    contract!(name, k > 0, "K is 0");
    contract!(name, a.columns == k, "a has {} columns, w has {k}", a.columns);
    let padded = k.next_multiple_of(8);
    contract!(name, a.pitch >= padded && layer.weight.pitch >= padded, "pitches end before column {padded}");
    contract!(name, layer.bias.len() >= n, "bias has {} elements of {n}", layer.bias.len());
    let mut args = LinearArgs {
        out: DevicePtr::NULL,
        a: a.span.ptr(),
        w: layer.weight.span.ptr(),
        bias: layer.bias.ptr(),
        extra: DevicePtr::NULL,
        slots: DevicePtr::NULL,
        slot_begin: DevicePtr::NULL,
        m: int(name, "M", m)?,
        n: int(name, "N", n)?,
        k: int(name, "K", k)?,
        a_pitch: int(name, "a_pitch", a.pitch)?,
        w_pitch: int(name, "w_pitch", layer.weight.pitch)?,
        extra_pitch: 0,
        out_pitch: 0,
        group: 1,
        a_skip: i32::from(skip.is_some()),
    };
    let norm = match (input, layer.norm) {
        (Input::BeforeNorm(_, parts), Some(norm)) => {
            let folds = matches!(epilogue, Epilogue::Bias(_) | Epilogue::QuickGelu(_));
            contract!(
                name,
                folds && k.is_multiple_of(PART),
                "a norm of {k} channels folded into {epilogue:?}"
            );
            let (needs, has) = (m * (k / PART), parts.len());
            contract!(name, has >= needs && parts.ptr().is_aligned(8), "{has} statistics of {needs}");
            let has = norm.column_sums.len().min(norm.bias.len());
            contract!(name, has >= n, "{has} column sums and biases of {n}");
            Some((parts, norm))
        }
        (Input::All(_) | Input::WithoutClass(..), None) => None,
        _ => return Err(broken(name, format!("{input:?} into a layer with the norm {:?}", layer.norm))),
    };
    let (mut parts_out, mut drop) = (None, 0);
    let mut group = skip;
    let mut to = |out: &Matrix, rows: usize| {
        out.check(name, "out")?;
        contract!(name, (out.rows, out.columns) == (rows, n), "out is {out:?}, not [{rows}, {n}]");
        (args.out, args.out_pitch) = (out.span.ptr(), out.pitch as i64);
        Ok(())
    };
    match *epilogue {
        Epilogue::Bias(out) | Epilogue::QuickGelu(out) | Epilogue::Gelu(out) => to(out, m)?,
        Epilogue::Residual { out, residual, more } => {
            drop = more.drop;
            contract!(
                name,
                drop != 1 && (drop == 0 || m.is_multiple_of(drop)),
                "the first of {drop} of {m} rows"
            );
            let rows = m - m.checked_div(drop).unwrap_or(0);
            to(out, rows)?;
            residual.check(name, "residual")?;
            contract!(name, (residual.rows, residual.columns) == (m, n), "residual is {residual:?}");
            let same = residual.span.ptr() == out.span.ptr();
            contract!(
                name,
                !same || residual.pitch == out.pitch,
                "residual {residual:?} in place of {out:?}"
            );
            contract!(name, !same || drop == 0, "rows of {residual:?} close ranks in place");
            if let Some(parts) = more.parts {
                room_for_parts(name, parts, rows, n)?;
                parts_out = Some(parts);
            }
            args.extra = residual.span.ptr();
            args.extra_pitch = int(name, "extra_pitch", residual.pitch)?;
        }
        Epilogue::Embed { out, positions, patches } => {
            contract!(name, patches > 0 && m.is_multiple_of(patches), "{m} rows in images of {patches}");
            to(out, m / patches * (patches + 1))?;
            positions.check(name, "positions")?;
            let shape = (positions.rows, positions.columns);
            contract!(name, shape == (patches + 1, n), "positions are {positions:?}");
            args.extra = positions.span.ptr();
            args.extra_pitch = int(name, "extra_pitch", positions.pitch)?;
            group = Some(patches);
        }
        Epilogue::Scatter { table, patches } => {
            contract!(name, patches > 0 && m.is_multiple_of(patches), "{m} rows in images of {patches}");
            let begins = table.begin.len();
            contract!(name, begins > m / patches, "{begins} slot ranges for {} images", m / patches);
            (args.slots, args.slot_begin) = (table.slots.ptr(), table.begin.ptr());
            group = Some(patches);
        }
    }
    if let (Some(skip), Some(group)) = (skip, group) {
        contract!(name, skip == group, "images of {skip} rows are read, of {group} written");
    }
    args.group = int(name, "group", group.unwrap_or(1))?;
    Ok(Arguments { linear: args, norm, parts_out, drop })
}

/// Chooses the tile that is done first: by the tiles that the busiest multiprocessor gets, and what one
/// costs.
///
/// A small tile has a quarter of the large one's work and takes 0.47 of its time: by counting, not by
/// measurement (kernels/README.md). Both give the same bits.
pub(crate) fn choose_tile(m: usize, n: usize, multiprocessors: usize) -> Tile {
    let cost = |tile: Tile, percent: usize| {
        let tiles = m.div_ceil(tile.side()) * n.div_ceil(tile.side());
        tiles.div_ceil(multiprocessors.max(1)) * percent
    };
    if cost(Tile::Small, 47) < cost(Tile::Large, 100) { Tile::Small } else { Tile::Large }
}

#[cfg(test)]
pub(crate) mod tests;
