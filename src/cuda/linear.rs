//! Launches `kernels/linear_sm80.cu`: `out = epilogue(a · Wᵀ)`, every linear layer of tower and projector.
//!
//! Two tiles, 128×128 and 64×64, give the same bits: [`choose_tile`] takes the one that is done first.

use std::sync::Arc;

use half::f16;

use super::driver::{DevicePtr, Module, Pod, Span, Stream, Zeroable};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use super::matrix::Matrix;
use crate::error::Result;

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
    Residual { out: &'a Matrix, residual: &'a Matrix },
    /// `acc + position`, after a class row per image of `patches` rows; the layer's bias is the class
    /// embedding.
    Embed { out: &'a Matrix, positions: &'a Matrix, patches: usize },
    /// `acc + bias` to every slot of the row's image of `patches` rows.
    Scatter { table: &'a SlotTable, patches: usize },
}

impl Epilogue<'_> {
    /// Its place among the entries.
    const fn index(&self) -> usize {
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
}

/// A layer's weights on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layer {
    /// `[N, K]`; columns up to the pitch are zero.
    pub(crate) weight: Matrix,
    /// `[N]`
    pub(crate) bias: Span<f16>,
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
}

impl Linear {
    /// Finds all entries in linear_sm80's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        let pair =
            |[large, small]: [Entry; 2]| Ok([Kernel::load(module, large)?, Kernel::load(module, small)?]);
        Ok(Self { kernels: ENTRIES.into_iter().map(pair).collect::<Result<_>>()? })
    }

    /// Enqueues a layer, in the tile that is done first on the stream's device.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        input: Input<'_>,
        layer: &Layer,
        epilogue: &Epilogue<'_>,
    ) -> Result<()> {
        let rows = input_rows(input);
        let tile = choose_tile(rows, layer.weight.rows, stream.context().multiprocessors() as usize);
        self.enqueue_in(stream, tile, input, layer, epilogue)
    }

    /// Enqueues a layer in a given tile.
    pub(crate) fn enqueue_in(
        &self,
        stream: &Stream,
        tile: Tile,
        input: Input<'_>,
        layer: &Layer,
        epilogue: &Epilogue<'_>,
    ) -> Result<()> {
        let kernel = &self.kernels[epilogue.index()][usize::from(tile == Tile::Small)];
        let args = arguments(kernel.name(), input, layer, epilogue)?;
        let tiles = input_rows(input).div_ceil(tile.side()) * layer.weight.rows.div_ceil(tile.side());
        if tiles == 0 {
            return Ok(());
        }
        // SAFETY: `arguments` checked the contract; spans and matrices vouch for the memory.
        unsafe { launch(stream, kernel, [tiles, 1, 1], &LinearParameters { args }) }
    }
}

/// Rows that go in after skipping.
fn input_rows(input: Input<'_>) -> usize {
    match input {
        Input::All(a) => a.rows,
        Input::WithoutClass(a, patches) => a.rows / (patches + 1) * patches,
    }
}

/// Checks the launch contract in the order of linear.cuh, and fills in the arguments.
fn arguments(name: &str, input: Input<'_>, layer: &Layer, epilogue: &Epilogue<'_>) -> Result<LinearArgs> {
    let (a, skip) = match input {
        Input::All(a) => (a, None),
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
    let mut group = skip;
    let mut to = |out: &Matrix, rows: usize| {
        out.check(name, "out")?;
        contract!(name, (out.rows, out.columns) == (rows, n), "out is {out:?}, not [{rows}, {n}]");
        (args.out, args.out_pitch) = (out.span.ptr(), out.pitch as i64);
        Ok(())
    };
    match *epilogue {
        Epilogue::Bias(out) | Epilogue::QuickGelu(out) | Epilogue::Gelu(out) => to(out, m)?,
        Epilogue::Residual { out, residual } => {
            to(out, m)?;
            residual.check(name, "residual")?;
            contract!(name, (residual.rows, residual.columns) == (m, n), "residual is {residual:?}");
            let same = residual.span.ptr() == out.span.ptr();
            contract!(
                name,
                !same || residual.pitch == out.pitch,
                "residual {residual:?} in place of {out:?}"
            );
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
    Ok(args)
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
