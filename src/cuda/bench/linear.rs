//! Linear layers for benchmarks: as the tower has them, in the kernel that it takes or in any other that does them.

use std::fmt;

use half::f16;

use super::{Machine, Rows, Slots};
use crate::config::LAYER_NORM_EPS;
use crate::cuda::driver::Span;
use crate::cuda::linear::sm90::{Kind, LinearSm90, VARIANTS, cost};
use crate::cuda::linear::{
    self, FoldedNorm, Input, Layer, MoreOfResidual, PART, RowPart, Tile, choose_tile, input_rows,
};
use crate::error::{Error, Result};

/// Clocks a second at which [`predictions`] become seconds. With the model's 80 % of the tensor cores' rate it is
/// 792 TFLOP/s on 132 multiprocessors; what an H200 runs at under such work is to be measured.
const CLOCK: f64 = 1.83e9;

/// What a linear layer does with its sums; P patches an image.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named as in src/cuda/linear.rs")]
pub enum Epilogue {
    Bias { out: Rows },
    QuickGelu { out: Rows },
    Gelu { out: Rows },
    Residual { out: Rows, residual: Rows },
    Embed { out: Rows, positions: Rows, patches: usize },
    Scatter { slots: Slots, patches: usize },
}

/// One linear layer.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[M, K]`, or more with `without_class`.
    pub input: Rows,
    /// P, where the class row of each image is skipped.
    pub without_class: Option<usize>,
    /// `[N, K]`
    pub weight: Rows,
    /// `[N]`
    pub bias: Rows,
    /// What becomes of the sums.
    pub epilogue: Epilogue,
    /// Norms as Hopper's kernels have them: before bias and quick_gelu, after a residual.
    pub norms: Option<Norms>,
    /// The kernel; the one that the tower takes if there is none.
    pub variant: Option<Variant>,
}

/// What layers have to do for norms that are folded into them, with statistics that change nothing: mean 0,
/// deviation 1. So results are what they are without.
#[derive(Clone, Copy, Debug)]
pub struct Norms {
    given: Span<RowPart>,
    left: Span<RowPart>,
    column_sums: Span<f32>,
    biases: Span<f32>,
    bias_at: usize, // elements
}

impl Norms {
    /// The same for a layer whose bias begins at element `at` of those that this was made from.
    #[must_use]
    pub fn with_bias_at(self, at: usize) -> Self {
        Self { bias_at: at, ..self }
    }

    fn folded(&self, n: usize) -> Result<FoldedNorm> {
        let bias = self.biases.slice(self.bias_at..self.bias_at + n)?;
        Ok(FoldedNorm { column_sums: self.column_sums.slice(0..n)?, bias })
    }
}

/// A kernel that does linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant(Which);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Portable(Tile),
    Hopper(usize), // of VARIANTS
}

impl Variant {
    /// Its tile as `tiles.txt` names it, of a kernel of Hopper's.
    pub fn tile(&self) -> Option<String> {
        match self.0 {
            Which::Portable(_) => None,
            Which::Hopper(i) => Some(format!("{:?}", VARIANTS[i].tile)),
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Which::Portable(tile) => write!(f, "sm80 {0}x{0}", tile.side()),
            Which::Hopper(i) => write!(f, "sm90 {:?}", VARIANTS[i].tile),
        }
    }
}

/// How an output is cut into tiles for a device.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Tiles that the busiest multiprocessor gets.
    pub waves: usize,
    /// Elements of the output.
    pub useful: f64,
    /// Elements that all multiprocessors could have done in so many waves.
    pub room: f64,
}

impl Cut {
    fn new(m: usize, n: usize, [rows, columns]: [usize; 2], count: usize, multiprocessors: usize) -> Self {
        let waves = count.div_ceil(multiprocessors.max(1));
        let room = (waves * multiprocessors.max(1) * rows * columns) as f64;
        Self { waves, useful: (m * n) as f64, room }
    }
}

/// What the model of `src/cuda/linear/sm90.rs` says of a tile.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// As `tiles.txt` names it.
    pub tile: String,
    /// At a clock of 1.83 GHz.
    pub seconds: f64,
    /// How it cuts the output.
    pub cut: Cut,
}

/// All of Hopper's tiles for `[M, N, K]` under an epilogue, the one that the model takes first.
pub fn predictions(epilogue: &str, [m, n, k]: [usize; 3], multiprocessors: usize) -> Vec<Prediction> {
    let of = VARIANTS.iter().filter(|variant| variant.kind.name() == epilogue);
    let mut all: Vec<Prediction> = of
        .map(|variant| {
            let tile = variant.tile;
            let cut = Cut::new(m, n, [tile.rows, tile.columns], tile.count(m, n), multiprocessors);
            let seconds = cost(variant.kind, tile, m, n, k, multiprocessors) / CLOCK;
            Prediction { tile: format!("{tile:?}"), seconds, cut }
        })
        .collect();
    all.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    all
}

impl Linear {
    /// Its epilogue's name, and M, N, K.
    pub fn shape(&self) -> (&'static str, [usize; 3]) {
        let with = |input: Input<'_>, layer: &Layer, epilogue: &linear::Epilogue<'_>| {
            let [n, k] = [layer.weight.rows, layer.weight.columns];
            Ok((Kind::ALL[epilogue.index()].name(), [input_rows(input), n, k]))
        };
        self.with(with).unwrap_or(("", [0; 3]))
    }

    /// Calls `work` with the layer as launchers take it.
    fn with<R>(&self, work: impl FnOnce(Input<'_>, &Layer, &linear::Epilogue<'_>) -> Result<R>) -> Result<R> {
        let Self { input, without_class, weight, bias, epilogue, norms, .. } = self;
        let folds = matches!(epilogue, Epilogue::Bias { .. } | Epilogue::QuickGelu { .. });
        let norms_before = norms.as_ref().filter(|_| folds);
        let input = match (without_class, norms_before) {
            (Some(patches), _) => Input::WithoutClass(&input.0, *patches),
            (None, Some(norms)) => Input::BeforeNorm(&input.0, norms.given),
            (None, None) => Input::All(&input.0),
        };
        let norm = norms_before.map(|norms| norms.folded(weight.0.rows)).transpose()?;
        let layer = Layer { weight: weight.0, bias: bias.0.span, norm };
        let epilogue = match epilogue {
            Epilogue::Bias { out } => linear::Epilogue::Bias(&out.0),
            Epilogue::QuickGelu { out } => linear::Epilogue::QuickGelu(&out.0),
            Epilogue::Gelu { out } => linear::Epilogue::Gelu(&out.0),
            Epilogue::Residual { out, residual } => {
                let more = MoreOfResidual { parts: norms.map(|norms| norms.left), drop: 0 };
                linear::Epilogue::Residual { out: &out.0, residual: &residual.0, more }
            }
            Epilogue::Embed { out, positions, patches } => {
                linear::Epilogue::Embed { out: &out.0, positions: &positions.0, patches: *patches }
            }
            Epilogue::Scatter { slots, patches } => {
                linear::Epilogue::Scatter { table: &slots.0, patches: *patches }
            }
        };
        work(input, &layer, &epilogue)
    }
}

impl Machine {
    /// True if Hopper's kernels do what they can of the tower.
    pub fn is_hopper(&self) -> bool {
        self.gpu.kernels.linear.sm90.is_some()
    }

    /// Makes what folded norms need: for biases among `biases`, and outputs and inputs of up to `elements`.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room.
    pub fn norms(&self, biases: &[f16], elements: usize) -> Result<Norms> {
        let nothing = RowPart { mean: 0.0, squares: PART as f32 * (1.0 - LAYER_NORM_EPS) };
        let biases: Vec<f32> = biases.iter().map(|bias| bias.to_f32()).collect();
        let parts = vec![nothing; elements.div_ceil(PART)];
        Ok(Norms {
            given: self.upload(&parts)?,
            left: self.upload(&parts)?,
            column_sums: self.upload(&vec![0.0; biases.len()])?,
            biases: self.upload(&biases)?,
            bias_at: 0,
        })
    }

    /// All kernels that do a layer as it is.
    ///
    /// # Errors
    /// [`Error::Internal`] if its parts do not fit together.
    pub fn variants(&self, layer: &Linear) -> Result<Vec<Variant>> {
        layer.with(|input, of, epilogue| {
            let hopper = self.is_hopper() && LinearSm90::takes(input, of, epilogue);
            let kind = |i: &usize| VARIANTS[*i].kind == Kind::ALL[epilogue.index()];
            let mut all: Vec<Variant> = match hopper {
                true => (0..VARIANTS.len()).filter(kind).map(|i| Variant(Which::Hopper(i))).collect(),
                false => vec![],
            };
            if layer.norms.is_none() {
                all.extend([Tile::Large, Tile::Small].map(|tile| Variant(Which::Portable(tile))));
            }
            Ok(all)
        })
    }

    /// The kernel that the tower takes for a layer.
    ///
    /// # Errors
    /// [`Error::Internal`] if its parts do not fit together.
    pub fn chosen(&self, layer: &Linear) -> Result<Variant> {
        let multiprocessors = self.multiprocessors();
        layer.with(|input, of, epilogue| {
            let (m, n, k) = (input_rows(input), of.weight.rows, of.weight.columns);
            let hopper = self.gpu.kernels.linear.sm90.as_ref();
            Ok(Variant(match hopper.filter(|_| LinearSm90::takes(input, of, epilogue)) {
                Some(sm90) => {
                    Which::Hopper(sm90.choose(Kind::ALL[epilogue.index()], m, n, k, multiprocessors))
                }
                None => Which::Portable(choose_tile(m, n, multiprocessors)),
            }))
        })
    }

    /// How a kernel cuts a layer's output for this device.
    pub fn cut(&self, layer: &Linear, variant: Variant) -> Cut {
        let (_, [m, n, _]) = layer.shape();
        let (sides, count) = match variant.0 {
            Which::Portable(tile) => {
                let side = tile.side();
                ([side, side], m.div_ceil(side) * n.div_ceil(side))
            }
            Which::Hopper(i) => {
                let tile = VARIANTS[i].tile;
                ([tile.rows, tile.columns], tile.count(m, n))
            }
        };
        Cut::new(m, n, sides, count, self.multiprocessors())
    }

    pub(super) fn enqueue_linear(&self, layer: &Linear) -> Result<()> {
        let (stream, linear) = (&self.stream, &self.gpu.kernels.linear);
        layer.with(|input, of, epilogue| match layer.variant {
            None => linear.enqueue(stream, input, of, epilogue),
            Some(Variant(Which::Portable(tile))) => linear.enqueue_in(stream, tile, input, of, epilogue),
            Some(Variant(Which::Hopper(i))) => {
                let sm90 = linear.sm90.as_ref();
                let sm90 = sm90.ok_or_else(|| Error::Internal("no kernels of Hopper's are loaded".into()))?;
                sm90.enqueue_in(stream, i, input, of, epilogue)
            }
        })
    }
}
