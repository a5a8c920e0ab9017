//! Memory that starts on a cache line: for a call, and for a thread, to use again and again.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable};

/// A cache line.
#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// A growing buffer of numbers.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    /// Makes a buffer of `len` zeros; `None` if there is no memory for them.
    pub(crate) fn zeroed<T: Pod>(len: usize) -> Option<Self> {
        Some(Self { lines: bytemuck::allocation::try_zeroed_vec(lines_of::<T>(len)).ok()? })
    }

    /// Returns `len` numbers with whatever values they have.
    pub(crate) fn take<T: Pod>(&mut self, len: usize) -> &mut [T] {
        if self.lines.len() < lines_of::<T>(len) {
            // Zeroed by the system: untouched pages cost nothing.
            self.lines = bytemuck::allocation::zeroed_vec(lines_of::<T>(len));
        }
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..len]
    }

    /// Returns the first `len` numbers.
    ///
    /// # Panics
    /// If there are not so many.
    pub(crate) fn get<T: Pod>(&self, len: usize) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..len]
    }
}

/// Cache lines that `len` numbers take.
fn lines_of<T>(len: usize) -> usize {
    (len * size_of::<T>()).div_ceil(size_of::<Line>())
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends `len` f32 of the calling thread's own, with whatever values they have.
///
/// `work` must not call rayon: a stolen task on this thread would ask for the same memory.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| work(scratch.take(len)))
}
