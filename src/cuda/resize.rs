//! Launches `kernels/resize.cu`: Pillow's resampling, a pass at a time, byte for byte.
//!
//! [`Passes`] has the tables and says which pass comes first; they are uploaded as they are.

use std::sync::Arc;

use super::driver::{DevicePtr, Module, Span, Stream};
use super::launch::{Entry, Kernel, contract, int, launch, parameters};
use crate::error::{Error, Result};
use crate::image::resize::{Passes, Table};

/// Rows of RGB8 on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pixels {
    pub(crate) span: Span<u8>,
    pub(crate) rows: usize,
    pub(crate) width: usize, // pixels
    pub(crate) pitch: usize, // bytes
}

impl Pixels {
    /// Lays rows over the beginning of `span`.
    ///
    /// # Errors
    /// [`Error::Internal`] if they do not fit.
    pub(crate) fn new(span: Span<u8>, rows: usize, width: usize, pitch: usize) -> Result<Self> {
        let pixels = Self { span, rows, width, pitch };
        pixels.check("nothing yet", "an image").map(|()| pixels)
    }

    /// Some of the rows.
    ///
    /// # Errors
    /// [`Error::Internal`] if there are fewer.
    pub(crate) fn rows(&self, at: usize, rows: usize) -> Result<Self> {
        if at + rows > self.rows {
            return Err(Error::Internal(format!("{rows} rows from {at} of {self:?}")));
        }
        let from = (at * self.pitch).min(self.span.len());
        Ok(Self { span: self.span.slice(from..self.span.len())?, rows, ..*self })
    }

    fn check(&self, kernel: &str, what: &str) -> Result<()> {
        let (bytes, last) = (3 * self.width, self.rows.saturating_sub(1));
        let fits = bytes <= self.pitch && (self.rows == 0 || last * self.pitch + bytes <= self.span.len());
        contract!(kernel, fits, "{what} does not fit: {self:?}");
        Ok(())
    }
}

/// A [`Table`] on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceTable {
    words: Span<i32>,
    outputs: usize,
    taps: usize,
    reach: usize,
}

impl DeviceTable {
    /// Says that `words` holds those of `table`.
    ///
    /// # Errors
    /// [`Error::Internal`] if it has another length.
    pub(crate) fn new(words: Span<i32>, table: &Table) -> Result<Self> {
        if words.len() != table.words.len() {
            return Err(Error::Internal(format!("{} words of a table in {words:?}", table.words.len())));
        }
        Ok(Self { words, outputs: table.outputs, taps: table.taps, reach: table.reach })
    }

    /// Addresses of first inputs, counts and weights.
    fn parts(&self) -> [DevicePtr<i32>; 3] {
        let words = self.words.ptr();
        [words, words.add(self.outputs), words.add(2 * self.outputs)]
    }
}

/// The tables of [`Passes`] on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DevicePasses {
    pub(crate) horizontal: Option<DeviceTable>,
    pub(crate) vertical: Option<DeviceTable>,
}

impl DevicePasses {
    /// Words that both tables of `passes` have, one after the other.
    pub(crate) fn words(passes: &Passes) -> usize {
        passes.horizontal.iter().chain(&passes.vertical).map(|table| table.words.len()).sum()
    }

    /// Says that `words` begins with those of `passes`' tables, horizontal before vertical.
    ///
    /// # Errors
    /// [`Error::Internal`] if it is too short.
    pub(crate) fn new(words: Span<i32>, passes: &Passes) -> Result<Self> {
        let mut at = 0;
        let mut take = |table: &Table| {
            let from = at;
            at += table.words.len();
            DeviceTable::new(words.slice(from..at)?, table)
        };
        let horizontal = passes.horizontal.as_ref().map(&mut take).transpose()?;
        let vertical = passes.vertical.as_ref().map(&mut take).transpose()?;
        Ok(Self { horizontal, vertical })
    }
}

parameters! {
    /// Of `resize_horizontal` and, with the names in brackets, of `resize_vertical`.
    pub(crate) struct PassParameters {
        out: DevicePtr<u8>,
        from: DevicePtr<u8>,
        first: DevicePtr<i32>, // [width_out] ([rows_out])
        count: DevicePtr<i32>, // [width_out] ([rows_out])
        weights: DevicePtr<i32>, // [width_out, taps] ([rows_out, taps])
        taps: i32,
        across: i32, // width_out (row_bytes)
        rows: i32, // (rows_out)
        in_pitch: i32,
        out_pitch: i32,
    }
}

/// Rows of a thread and pixels of a block in the horizontal pass, bytes of a block in the vertical one.
const ROWS: usize = 4;
const PIXELS: usize = 128;
const BYTES: usize = 512;

/// Horizontal, vertical.
pub(crate) const ENTRIES: [Entry; 2] =
    [Entry::new("resize_horizontal", 128, 0), Entry::new("resize_vertical", 128, 0)];

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct Resize {
    horizontal: Kernel<PassParameters>,
    vertical: Kernel<PassParameters>,
}

impl Resize {
    /// Finds the kernels in resize's module.
    pub(crate) fn load(module: &Arc<Module>) -> Result<Self> {
        let [horizontal, vertical] = ENTRIES;
        Ok(Self { horizontal: Kernel::load(module, horizontal)?, vertical: Kernel::load(module, vertical)? })
    }

    /// Bytes of `between` that [`Resize::enqueue`] needs for an image of `width` pixels to a side of `side`;
    /// the rows of what is there are as long as they are.
    pub(crate) fn between_bytes(passes: &Passes, width: usize, side: usize) -> usize {
        match (&passes.horizontal, &passes.vertical) {
            (Some(_), Some(_)) if passes.vertical_first => side * 3 * width,
            (Some(_), Some(_)) => passes.needed.len() * 3 * side,
            _ => 0,
        }
    }

    /// Enqueues the passes that turn `from`, a whole image, into the square `out`; returns where the result
    /// is: `out`, or `from` itself where there is nothing to do.
    pub(crate) fn enqueue(
        &self,
        stream: &Stream,
        out: &Pixels,
        from: &Pixels,
        between: Span<u8>,
        passes: &Passes,
        tables: &DevicePasses,
    ) -> Result<Pixels> {
        match (&tables.horizontal, &tables.vertical) {
            (None, None) => return Ok(*from),
            (Some(wide), None) => self.enqueue_horizontal(stream, out, from, wide)?,
            (None, Some(high)) => {
                let needed = from.rows(passes.needed.start, passes.needed.len())?;
                self.enqueue_vertical(stream, out, &needed, high)?;
            }
            (Some(wide), Some(high)) if passes.vertical_first => {
                let between = Pixels::new(between, out.rows, from.width, 3 * from.width)?;
                self.enqueue_vertical(stream, &between, from, high)?;
                self.enqueue_horizontal(stream, out, &between, wide)?;
            }
            (Some(wide), Some(high)) => {
                let needed = from.rows(passes.needed.start, passes.needed.len())?;
                let between = Pixels::new(between, needed.rows, out.width, 3 * out.width)?;
                self.enqueue_horizontal(stream, &between, &needed, wide)?;
                self.enqueue_vertical(stream, out, &between, high)?;
            }
        }
        Ok(*out)
    }

    /// Enqueues the horizontal pass over the rows of `from`, all of them or a band.
    pub(crate) fn enqueue_horizontal(
        &self,
        stream: &Stream,
        out: &Pixels,
        from: &Pixels,
        table: &DeviceTable,
    ) -> Result<()> {
        let name = self.horizontal.name();
        contract!(name, out.width == table.outputs, "{} pixels from a table of {table:?}", out.width);
        contract!(name, out.rows == from.rows, "{} rows from {}", out.rows, from.rows);
        contract!(name, table.reach <= from.width, "{table:?} looks beyond {} pixels", from.width);
        let grid = [out.rows.div_ceil(ROWS), out.width.div_ceil(PIXELS), 1];
        enqueue_pass(stream, &self.horizontal, grid, out, from, table, out.width)
    }

    /// Enqueues the vertical pass.
    pub(crate) fn enqueue_vertical(
        &self,
        stream: &Stream,
        out: &Pixels,
        from: &Pixels,
        table: &DeviceTable,
    ) -> Result<()> {
        let name = self.vertical.name();
        contract!(name, out.rows == table.outputs, "{} rows from a table of {table:?}", out.rows);
        contract!(name, out.width == from.width, "{} pixels from {}", out.width, from.width);
        contract!(name, table.reach <= from.rows, "{table:?} looks beyond {} rows", from.rows);
        let bytes = 3 * out.width;
        enqueue_pass(stream, &self.vertical, [out.rows, bytes.div_ceil(BYTES), 1], out, from, table, bytes)
    }
}

/// What the passes have in common: the rest of the contract, and the launch. `across` is what a row of `out` has, in
/// the kernel's unit.
fn enqueue_pass(
    stream: &Stream,
    kernel: &Kernel<PassParameters>,
    grid: [usize; 3],
    out: &Pixels,
    from: &Pixels,
    table: &DeviceTable,
    across: usize,
) -> Result<()> {
    let name = kernel.name();
    out.check(name, "out")?;
    from.check(name, "in")?;
    if out.rows == 0 || out.width == 0 {
        return Ok(());
    }
    let [first, count, weights] = table.parts();
    let parameters = PassParameters {
        out: out.span.ptr(),
        from: from.span.ptr(),
        first,
        count,
        weights,
        taps: int(name, "taps", table.taps)?,
        across: int(name, "across", across)?,
        rows: int(name, "rows", out.rows)?,
        in_pitch: int(name, "in_pitch", from.pitch)?,
        out_pitch: int(name, "out_pitch", out.pitch)?,
    };
    // SAFETY: the passes checked how `table` fits both sides, and here the rest was; spans vouch for the memory, `Table`
    // for the windows.
    unsafe { launch(stream, kernel, grid, &parameters) }
}

#[cfg(test)]
mod tests;
