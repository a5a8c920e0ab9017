//! Launches `kernels/linear_sm90.cu`: the linear layers on Hopper.
//!
//! Which tile: [`choose`], from what was measured (`tiles.txt`, or the file that `IMAGEHERE_CUDA_TILES` names), else
//! from a model of what an H200's multiprocessor can do. All tiles give the same bits.

use std::fmt;
use std::sync::Arc;

use half::f16;

use super::{Arguments, Epilogue, Input, Layer, LinearArgs, RowPart, arguments, input_rows};
use crate::config::LAYER_NORM_EPS;
use crate::cuda::driver::{DevicePtr, Module, Stream, TensorMap};
use crate::cuda::launch::{Entry, Kernel, contract, int, launch, parameters};
use crate::cuda::matrix::VECTOR;
use crate::error::{Error, Result};

/// `LinearSm90Args` in linear_sm90.cuh, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearSm90Args {
    linear: LinearArgs,
    partials: DevicePtr<RowPart>,
    column_sums: DevicePtr<f32>,
    bias32: DevicePtr<f32>,
    partials_out: DevicePtr<RowPart>,
    eps: f32,
    drop: i32,
}

parameters! {
    /// Of all entries of linear_sm90.cu.
    pub(crate) struct LinearSm90Parameters {
        a: TensorMap,
        w: TensorMap,
        args: LinearSm90Args,
    }
}

/// A tile of the output, and how two warp groups share the work on it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Two tiles take turns, one for each warp group; else both share one.
    pub(crate) pingpong: bool,
    /// Blocks, one below the other, that share what they read of W.
    pub(crate) cluster: usize,
}

impl fmt::Debug for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let turns = if self.pingpong { "_pp" } else { "" };
        let shared = if self.cluster > 1 { "_c2" } else { "" };
        write!(f, "{}x{}{turns}{shared}", self.rows, self.columns)
    }
}

/// Columns of K in a stage of the ring, and its stages at most.
const DEPTH: usize = 64;
const STAGES: usize = 6;
/// Shared memory of a block, in bytes: what there is; where the swizzle begins; an mbarrier for everything.
const SHARED: usize = 232_448;
const ALIGNMENT: usize = 1024;
const BARRIERS: usize = (2 * STAGES + 6) * 8;

impl Tile {
    /// Stages of its ring.
    const fn stages(self) -> usize {
        let stages = (SHARED - self.beside()) / self.stage_bytes();
        if stages < STAGES { stages } else { STAGES }
    }

    const fn stage_bytes(self) -> usize {
        (self.rows + self.columns) * DEPTH * size_of::<f16>()
    }

    /// Shared memory beside the ring: 8 bytes for each row and column, twice.
    const fn beside(self) -> usize {
        ALIGNMENT + 2 * (self.rows + self.columns) * 8 + BARRIERS
    }

    /// Shared memory of a block, in bytes.
    pub(crate) const fn shared_bytes(self) -> usize {
        self.beside() + self.stages() * self.stage_bytes()
    }

    /// Tiles of an output; with a cluster the last row of them may lie outside of it.
    pub(crate) fn count(self, m: usize, n: usize) -> usize {
        m.div_ceil(self.rows).next_multiple_of(self.cluster) * n.div_ceil(self.columns)
    }

    /// Blocks that go through `tiles` of them on a device of so many multiprocessors.
    pub(crate) fn blocks(self, m: usize, n: usize, multiprocessors: usize) -> usize {
        let at_once = multiprocessors / self.cluster * self.cluster;
        self.count(m, n).min(at_once.max(self.cluster))
    }
}

/// What becomes of the sums: the kinds that entries are made for, in the order of `Epilogue::index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Bias,
    QuickGelu,
    Gelu,
    Residual,
    Embed,
    Scatter,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] =
        [Self::Bias, Self::QuickGelu, Self::Gelu, Self::Residual, Self::Embed, Self::Scatter];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Bias => "bias",
            Self::QuickGelu => "quick_gelu",
            Self::Gelu => "gelu",
            Self::Residual => "residual",
            Self::Embed => "embed",
            Self::Scatter => "scatter",
        }
    }
}

/// A kernel of linear_sm90.cu.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Variant {
    pub(crate) kind: Kind,
    pub(crate) tile: Tile,
    pub(crate) entry: Entry,
}

const fn variant(
    name: &'static str,
    kind: Kind,
    rows: usize,
    columns: usize,
    flags: (bool, usize),
) -> Variant {
    let tile = Tile { rows, columns, pingpong: flags.0, cluster: flags.1 };
    let entry = Entry::new(name, 384, tile.shared_bytes() as u32).programmatic().cluster(tile.cluster as u32);
    Variant { kind, tile, entry }
}

/// Two groups at one tile; at a tile each; the same by two blocks that share W.
const ONE: (bool, usize) = (false, 1);
const ONE_SHARED: (bool, usize) = (false, 2);
const TURNS_SHARED: (bool, usize) = (true, 2);

/// Every kernel of linear_sm90.cu.
pub(crate) const VARIANTS: &[Variant] = &[
    variant("linear_sm90_bias_64x192_pp_c2", Kind::Bias, 64, 192, TURNS_SHARED),
    variant("linear_sm90_bias_64x240_pp_c2", Kind::Bias, 64, 240, TURNS_SHARED),
    variant("linear_sm90_bias_64x256_pp_c2", Kind::Bias, 64, 256, TURNS_SHARED),
    variant("linear_sm90_bias_128x240", Kind::Bias, 128, 240, ONE),
    variant("linear_sm90_bias_128x256", Kind::Bias, 128, 256, ONE),
    variant("linear_sm90_bias_128x256_c2", Kind::Bias, 128, 256, ONE_SHARED),
    variant("linear_sm90_quick_gelu_64x256_pp_c2", Kind::QuickGelu, 64, 256, TURNS_SHARED),
    variant("linear_sm90_quick_gelu_128x128_pp_c2", Kind::QuickGelu, 128, 128, TURNS_SHARED),
    variant("linear_sm90_quick_gelu_128x160_pp_c2", Kind::QuickGelu, 128, 160, TURNS_SHARED),
    variant("linear_sm90_quick_gelu_128x256", Kind::QuickGelu, 128, 256, ONE),
    variant("linear_sm90_quick_gelu_128x256_c2", Kind::QuickGelu, 128, 256, ONE_SHARED),
    variant("linear_sm90_gelu_64x224_pp_c2", Kind::Gelu, 64, 224, TURNS_SHARED),
    variant("linear_sm90_gelu_64x256_pp_c2", Kind::Gelu, 64, 256, TURNS_SHARED),
    variant("linear_sm90_gelu_128x160_pp_c2", Kind::Gelu, 128, 160, TURNS_SHARED),
    variant("linear_sm90_residual_64x176_pp_c2", Kind::Residual, 64, 176, TURNS_SHARED),
    variant("linear_sm90_residual_64x192_pp_c2", Kind::Residual, 64, 192, TURNS_SHARED),
    variant("linear_sm90_residual_64x208_pp_c2", Kind::Residual, 64, 208, TURNS_SHARED),
    variant("linear_sm90_residual_64x256_pp_c2", Kind::Residual, 64, 256, TURNS_SHARED),
    variant("linear_sm90_residual_128x128_pp_c2", Kind::Residual, 128, 128, TURNS_SHARED),
    variant("linear_sm90_residual_128x176_c2", Kind::Residual, 128, 176, ONE_SHARED),
    variant("linear_sm90_residual_128x208", Kind::Residual, 128, 208, ONE),
    variant("linear_sm90_residual_128x208_c2", Kind::Residual, 128, 208, ONE_SHARED),
    variant("linear_sm90_embed_64x192_pp_c2", Kind::Embed, 64, 192, TURNS_SHARED),
    variant("linear_sm90_embed_64x208_pp_c2", Kind::Embed, 64, 208, TURNS_SHARED),
    variant("linear_sm90_embed_64x256_pp_c2", Kind::Embed, 64, 256, TURNS_SHARED),
    variant("linear_sm90_scatter_64x256_pp_c2", Kind::Scatter, 64, 256, TURNS_SHARED),
    variant("linear_sm90_scatter_128x160_pp_c2", Kind::Scatter, 128, 160, TURNS_SHARED),
    variant("linear_sm90_scatter_128x256", Kind::Scatter, 128, 256, ONE),
    variant("linear_sm90_scatter_128x256_c2", Kind::Scatter, 128, 256, ONE_SHARED),
];

/// What one tile costs, in clocks of a multiprocessor of an H200, and a whole layer by it.
///
/// A model, not a measurement (benches/NOTES.md): tensor cores at the 80 % of their rate that power allows, shared
/// memory at 128 bytes a clock, L2 at 36; the epilogue beside the other group's multiplications where two take turns.
pub(crate) fn cost(kind: Kind, tile: Tile, m: usize, n: usize, k: usize, multiprocessors: usize) -> f64 {
    let (rows, columns) = (tile.rows as f64, tile.columns as f64);
    let area = rows * columns;
    let tensor_cores = area / 128.0 / 0.8; // per 16 of K
    let shared = rows / 64.0 * (64.0 + columns) / 4.0 + (rows + columns) / 4.0;
    let l2 = (rows + columns / tile.cluster as f64) * 32.0 / 36.0;
    let steps = (k.div_ceil(DEPTH) * DEPTH / 16) as f64;
    let multiply = steps * tensor_cores.max(shared).max(l2);
    let per_element = match kind {
        Kind::Bias | Kind::Embed | Kind::Scatter => 0.07,
        Kind::QuickGelu => 0.2,
        Kind::Gelu => 0.37,
        Kind::Residual => 0.1,
    };
    let store = area * per_element + 400.0;
    let waves = tile.count(m, n).div_ceil(multiprocessors.max(1)) as f64;
    match tile.pingpong {
        true => waves * multiply.max(store) + store,
        false => waves * (multiply + store),
    }
}

/// Tiles for shapes that were measured: lines of `epilogue M N K tile`, `#` begins a comment.
const MEASURED: &str = include_str!("tiles.txt");

/// A tile for a shape, by measurement.
#[derive(Clone, Copy, Debug)]
struct Choice {
    kind: Kind,
    shape: [usize; 3], // M, N, K
    variant: usize,
}

fn parse(text: &str) -> Result<Vec<Choice>> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    let choice = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [kind, m, n, k, tile] = words[..] else { return None };
        let kind = Kind::ALL.into_iter().find(|of| of.name() == kind)?;
        let is = |v: &Variant| v.kind == kind && format!("{:?}", v.tile) == tile;
        let shape = [m.parse().ok()?, n.parse().ok()?, k.parse().ok()?];
        Some(Choice { kind, shape, variant: VARIANTS.iter().position(is)? })
    };
    let refuse = |line: &str| {
        Error::argument(
            format!("no `epilogue M N K tile` of this build: {line:?}"),
            "Name an epilogue and a tile that kernels/linear_sm90.cu has, as in `bias 1226 3072 1024 128x240`",
        )
    };
    let wanted = lines.filter(|line| !line.is_empty());
    wanted.map(|line| choice(line).ok_or_else(|| refuse(line))).collect()
}

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct LinearSm90 {
    kernels: Vec<Kernel<LinearSm90Parameters>>, // as VARIANTS
    measured: Vec<Choice>,
}

impl LinearSm90 {
    /// Finds all entries in linear_sm90's module.
    ///
    /// # Errors
    /// As [`Kernel::load`]; [`Error::Argument`] and [`Error::Read`] over the file that `IMAGEHERE_CUDA_TILES` names.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        let kernels =
            VARIANTS.iter().map(|variant| Kernel::load(module, variant.entry)).collect::<Result<_>>()?;
        let measured = match std::env::var_os("IMAGEHERE_CUDA_TILES") {
            None => parse(MEASURED)?,
            Some(path) => {
                let path = std::path::PathBuf::from(path);
                let text = std::fs::read_to_string(&path).map_err(|source| Error::Read {
                    action: "read",
                    path,
                    source,
                    remedy: "Let IMAGEHERE_CUDA_TILES name a file of tiles, or unset it".into(),
                })?;
                parse(&text)?
            }
        };
        Ok(Self { kernels, measured })
    }

    /// Whether these kernels take such a layer: rows of whole vectors (linear_sm90.cuh).
    pub(crate) fn takes(input: Input<'_>, layer: &Layer, epilogue: &Epilogue<'_>) -> bool {
        let vectors = |m: &super::Matrix| m.check_vectors("", "").is_ok();
        let places = match *epilogue {
            Epilogue::Bias(out) | Epilogue::QuickGelu(out) | Epilogue::Gelu(out) => vectors(out),
            Epilogue::Residual { out, residual, .. } => vectors(out) && vectors(residual),
            Epilogue::Embed { out, positions, .. } => vectors(out) && vectors(positions),
            Epilogue::Scatter { .. } => true,
        };
        layer.weight.rows.is_multiple_of(VECTOR) && !matches!(input, Input::WithoutClass(..)) && places
    }

    /// Which of [`VARIANTS`] a layer runs in.
    pub(crate) fn choose(&self, kind: Kind, m: usize, n: usize, k: usize, multiprocessors: usize) -> usize {
        let measured = self.measured.iter().find(|choice| choice.kind == kind && choice.shape == [m, n, k]);
        measured.map_or_else(|| choose(kind, m, n, k, multiprocessors), |choice| choice.variant)
    }

    /// Enqueues a layer, in the tile that is done first on the stream's device.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        input: Input<'_>,
        layer: &Layer,
        epilogue: &Epilogue<'_>,
    ) -> Result<()> {
        let kind = Kind::ALL[epilogue.index()];
        let multiprocessors = stream.context().multiprocessors() as usize;
        let (m, n, k) = (input_rows(input), layer.weight.rows, layer.weight.columns);
        self.enqueue_in(stream, self.choose(kind, m, n, k, multiprocessors), input, layer, epilogue)
    }

    /// Enqueues a layer in a given one of [`VARIANTS`].
    pub(crate) fn enqueue_in(
        &self,
        stream: &Stream,
        variant: usize,
        input: Input<'_>,
        layer: &Layer,
        epilogue: &Epilogue<'_>,
    ) -> Result<()> {
        let (kernel, Variant { kind, tile, .. }) = (&self.kernels[variant], VARIANTS[variant]);
        let name = kernel.name();
        contract!(name, kind == Kind::ALL[epilogue.index()], "for {epilogue:?}");
        contract!(
            name,
            Self::takes(input, layer, epilogue),
            "rows of no whole vectors: {layer:?}, {epilogue:?}"
        );
        let Arguments { linear, norm, parts_out, drop } = arguments(name, input, layer, epilogue)?;
        let (m, n) = (linear.m as usize, linear.n as usize);
        if m == 0 || n == 0 {
            return Ok(());
        }
        let args = LinearSm90Args {
            linear,
            partials: norm.map_or(DevicePtr::NULL, |(parts, _)| parts.ptr()),
            column_sums: norm.map_or(DevicePtr::NULL, |(_, norm)| norm.column_sums.ptr()),
            bias32: norm.map_or(DevicePtr::NULL, |(_, norm)| norm.bias.ptr()),
            partials_out: parts_out.map_or(DevicePtr::NULL, |parts| parts.ptr()),
            eps: LAYER_NORM_EPS,
            drop: int(name, "drop", drop)?,
        };
        let (context, k) = (stream.context(), layer.weight.columns);
        let a = input.matrix();
        let parameters = LinearSm90Parameters {
            a: TensorMap::new(context, a.span.ptr(), [k, m], [a.pitch], tile.rows)?,
            w: TensorMap::new(
                context,
                layer.weight.span.ptr(),
                [k, n],
                [layer.weight.pitch],
                tile.columns / tile.cluster,
            )?,
            args,
        };
        let blocks = tile.blocks(m, n, context.multiprocessors() as usize);
        // SAFETY: `arguments` checked the contract; spans and matrices vouch for the memory.
        unsafe { launch(stream, kernel, [blocks, 1, 1], &parameters) }
    }
}

/// The variant of `kind` that the model has done first.
pub(crate) fn choose(kind: Kind, m: usize, n: usize, k: usize, multiprocessors: usize) -> usize {
    let of_kind = VARIANTS.iter().enumerate().filter(|(_, variant)| variant.kind == kind);
    let costs = of_kind.map(|(i, variant)| (i, cost(kind, variant.tile, m, n, k, multiprocessors)));
    costs.min_by(|(_, a), (_, b)| a.total_cmp(b)).map_or(0, |(i, _)| i)
}

#[cfg(test)]
mod tests;
