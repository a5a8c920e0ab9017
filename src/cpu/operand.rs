//! What a linear layer reads: rows of fp16, or, for machines with tiles, panels split for them.
//!
//! ```text
//!   layer norm, attention, activation ──▶ Sink ──▶ Operand ──▶ Input ──▶ linear
//!                                          │
//!                                          ├ vectors:  fp16, row-major            [M, K]
//!                                          └ tiles:    two bf16 to a number       [⌈M / 32⌉][⌈K / 32⌉][2][32][32]
//! ```
//!
//! A stage that feeds a linear layer stores its numbers the way that layer reads them, rounded to fp16 all the same: the
//! split is exact and costs no pass of its own.

use half::{bf16, f16};
use rayon::prelude::*;

use super::epilogue::{Output, halves};
use super::scratch::Scratch;
use super::simd::{Kernel, Machine, Simd, tiles};

/// The rows of X: all of a buffer, or those of each image that follow its class token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    data: &'a [f16], // [.., K]
    width: usize,    // K
    group: usize,    // rows taken from each image
    period: usize,   // rows from an image's first to the next image's first
    first: usize,    // rows skipped in each image
}

impl<'a> Rows<'a> {
    /// All rows of `data`, `[M, K]`.
    pub(crate) fn all(data: &'a [f16], width: usize) -> Self {
        let rows = data.len() / width;
        Self { data, width, group: rows.max(1), period: rows, first: 0 }
    }

    /// Of `data`, `[B · T, K]`, the rows of each image but its first: M = B · (T − 1).
    pub(crate) fn without_class(data: &'a [f16], width: usize, tokens: usize) -> Self {
        Self { data, width, group: tokens - 1, period: tokens, first: 1 }
    }

    /// M.
    pub(crate) fn count(&self) -> usize {
        self.data.len() / self.width / self.period.max(1) * self.group
    }

    /// K.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Row `i` of M, `[K]`.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [f16] {
        let at = i / self.group * self.period + self.first + i % self.group;
        &self.data[at * self.width..][..self.width]
    }
}

/// X `[M, K]`, as a linear layer takes it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Input<'a> {
    /// For machines without tiles.
    Rows(Rows<'a>),
    /// For machines with tiles.
    Split {
        /// `[⌈M / 32⌉][⌈K / 32⌉][tiles::SPLIT]`
        data: &'a [u16],
        /// M
        rows: usize,
        /// K
        width: usize,
    },
}

impl Input<'_> {
    /// M and K.
    pub(crate) fn shape(&self) -> (usize, usize) {
        match *self {
            Input::Rows(rows) => (rows.count(), rows.width()),
            Input::Split { rows, width, .. } => (rows, width),
        }
    }
}

/// Memory for one matrix at a time, whatever its form.
#[derive(Debug, Default)]
pub(crate) struct Operand {
    memory: Scratch,
}

/// Elements of `[rows, width]`, split.
fn split_len(rows: usize, width: usize) -> usize {
    rows.div_ceil(tiles::PANEL) * width.div_ceil(tiles::PANEL) * tiles::SPLIT
}

impl Operand {
    /// Returns `[rows, width]` of fp16, with whatever values they have.
    pub(crate) fn rows_mut(&mut self, rows: usize, width: usize) -> &mut [f16] {
        self.memory.take(rows * width)
    }

    /// Returns where a stage stores `[rows, width]` for a linear layer.
    pub(crate) fn sink(&mut self, machine: Machine, rows: usize, width: usize) -> Sink<'_> {
        if !machine.has_tiles() {
            return Sink::Rows(Output::new(self.memory.take(rows * width), width));
        }
        let blocks = width.div_ceil(tiles::PANEL);
        let data: &mut [u16] = self.memory.take(split_len(rows, width));
        if !width.is_multiple_of(tiles::PANEL) {
            // What nobody stores along K counts as zero.
            data.chunks_exact_mut(blocks * tiles::SPLIT).for_each(|panel| {
                panel[(blocks - 1) * tiles::SPLIT..].fill(0);
            });
        }
        let rows = rows.next_multiple_of(tiles::PANEL);
        Sink::Split { data: Output::new(bytemuck::cast_slice_mut(data), tiles::PANEL), rows, blocks }
    }

    /// Returns what was stored through [`Operand::sink`] of the same sizes.
    pub(crate) fn input(&self, machine: Machine, rows: usize, width: usize) -> Input<'_> {
        match machine.has_tiles() {
            true => Input::Split { data: self.memory.get(split_len(rows, width)), rows, width },
            false => Input::Rows(Rows::all(self.memory.get(rows * width), width)),
        }
    }

    /// Returns rows of fp16 as a linear layer reads them: as they are, or split into this memory.
    pub(crate) fn take_rows<'a>(&'a mut self, machine: Machine, rows: Rows<'a>) -> Input<'a> {
        if !machine.has_tiles() {
            return Input::Rows(rows);
        }
        let (count, width) = (rows.count(), rows.width());
        store_rows(machine, rows, &self.sink(machine, count, width));
        self.input(machine, count, width)
    }

    /// Returns what was stored through [`Operand::sink`] of the same sizes as rows, `[rows, width]`, those that are
    /// split in memory of their own.
    pub(crate) fn to_rows(&self, machine: Machine, rows: usize, width: usize) -> std::borrow::Cow<'_, [f16]> {
        let Input::Split { data, .. } = self.input(machine, rows, width) else {
            return self.memory.get(rows * width).into();
        };
        let panel_len = width.div_ceil(tiles::PANEL) * tiles::SPLIT;
        let element = |row: usize, column: usize| {
            let block = row / tiles::PANEL * panel_len + column / tiles::PANEL * tiles::SPLIT;
            let at = block + tiles::row_of_a(row % tiles::PANEL) + column % tiles::PANEL;
            let part = |at: usize| bf16::from_bits(data[at]).to_f32();
            f16::from_f32(part(at) + part(at + tiles::BLOCK))
        };
        (0..rows)
            .flat_map(|row| (0..width).map(move |column| element(row, column)))
            .collect::<Vec<_>>()
            .into()
    }
}

/// Stores rows.
pub(crate) fn store_rows(machine: Machine, rows: Rows<'_>, sink: &Sink<'_>) {
    (0..rows.count().div_ceil(tiles::PANEL)).into_par_iter().for_each(|panel| {
        let end = rows.count().min((panel + 1) * tiles::PANEL);
        machine.vectorize(Store { rows, range: panel * tiles::PANEL..end, sink });
    });
}

/// Stores some rows.
struct Store<'a, 'b> {
    rows: Rows<'a>,
    range: std::ops::Range<usize>,
    sink: &'a Sink<'b>,
}

impl Kernel for Store<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.range {
            for (i, values) in self.rows.row(row).chunks(S::NR).enumerate() {
                let (low, high) = values.split_at(values.len().min(S::LANES));
                let v = [s.load_f16_slice(low), s.load_f16_slice(high)];
                // SAFETY: each row belongs to one task.
                unsafe { self.sink.put(s, row, i * S::NR, values.len(), v) };
            }
        }
    }
}

/// Where a stage stores `[M, K]`, its tasks disjoint elements at the same time.
#[derive(Debug)]
pub(crate) enum Sink<'a> {
    /// Rows of fp16.
    Rows(Output<'a>),
    /// Split panels.
    Split {
        /// `[⌈M / 32⌉ · ⌈K / 32⌉ · 2 · 32, 32]`
        data: Output<'a>,
        /// Rows there is room for.
        rows: usize,
        /// ⌈K / 32⌉
        blocks: usize,
    },
}

impl Sink<'_> {
    /// Stores elements `column .. column + count` of row `row`, rounded to fp16: the first `count` of `v`, `1 ..= NR`;
    /// `column` is a multiple of NR.
    ///
    /// The others of `v` must be zeros.
    ///
    /// # Safety
    /// Nobody else has to do with these elements meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(&self, s: S, row: usize, column: usize, count: usize, v: [S::V; 2]) {
        match self {
            Sink::Rows(output) => {
                // SAFETY: the caller's promise.
                let y = unsafe { output.piece(row, column, count) };
                for (j, range) in halves::<S>(count) {
                    s.store_f16_slice(&mut y[range], v[j]);
                }
            }
            Sink::Split { data, rows, blocks } => {
                assert!(row < *rows && column / tiles::PANEL < *blocks);
                let block = row / tiles::PANEL * blocks + column / tiles::PANEL;
                let line = block * (tiles::SPLIT / tiles::PANEL) + row % tiles::PANEL;
                for (j, v) in v.into_iter().enumerate() {
                    let column = column % tiles::PANEL + j * S::LANES;
                    // SAFETY: the caller's promise, and what `store_split` asks: LANES elements each.
                    unsafe {
                        let upper = data.piece(line, column, S::LANES).as_mut_ptr().cast();
                        let lower = data.piece(line + tiles::PANEL, column, S::LANES).as_mut_ptr().cast();
                        s.store_split(upper, lower, s.round_f16(v));
                    }
                }
            }
        }
    }
}
