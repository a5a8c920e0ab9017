//! The resize as a device does it: which passes, in which order, with tables of equal rows.

use std::ops::Range;

use super::super::Resample;
use super::Axis;

/// One axis' windows and weights.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    /// First input of each output, `[outputs]`; inputs of each, `[outputs]`; weights, `[outputs, taps]`,
    /// zeros after the last of a row.
    pub(crate) words: Vec<i32>,
    /// Pixels or rows that come out.
    pub(crate) outputs: usize,
    /// The most inputs of any output.
    pub(crate) taps: usize,
    /// One past the last input that any output looks at.
    pub(crate) reach: usize,
}

impl Table {
    /// Of an axis; inputs are counted from `start`.
    fn new(axis: &Axis, start: usize) -> Self {
        let outputs = axis.windows.len();
        let taps = axis.windows.iter().map(|window| window.count).max().unwrap_or(0);
        let mut words = Vec::with_capacity(outputs * (2 + taps));
        words.extend(axis.windows.iter().map(|window| (window.start - start) as i32));
        words.extend(axis.windows.iter().map(|window| window.count as i32));
        for window in &axis.windows {
            words.extend_from_slice(axis.weights(*window));
            words.resize(words.len() + taps - window.count, 0);
        }
        Self { words, outputs, taps, reach: axis.span().end - start }
    }
}

/// A resize from one size to another, as passes over whole images.
#[derive(Clone, Debug)]
pub(crate) struct Passes {
    /// `None` where the width stays.
    pub(crate) horizontal: Option<Table>,
    /// `None` where the height stays. Its inputs are rows of `needed` where it is the second pass.
    pub(crate) vertical: Option<Table>,
    /// Down before across.
    pub(crate) vertical_first: bool,
    /// Rows of the image that anybody looks at.
    pub(crate) needed: Range<usize>,
}

impl Passes {
    /// Plans a resize `from` one size `to` another: width and height, in pixels.
    pub(crate) fn new(from: (u32, u32), to: (u32, u32), rule: Resample) -> Self {
        let axis = |from: u32, to: u32| (from != to).then(|| Axis::new(from, to));
        let (wide, high) = (axis(from.0, to.0), axis(from.1, to.1));
        let vertical_first = wide.is_some() && high.is_some() && rule.vertical_first(from, to);
        let needed = match &high {
            Some(high) if !vertical_first => high.span(),
            _ => 0..from.1 as usize,
        };
        Self {
            horizontal: wide.map(|axis| Table::new(&axis, 0)),
            vertical: high.map(|axis| Table::new(&axis, needed.start)),
            vertical_first,
            needed,
        }
    }
}
