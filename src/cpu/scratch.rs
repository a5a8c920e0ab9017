//! Aligned f32 memory that a thread, or a call, uses again and again.

use std::cell::RefCell;

/// f32 to a cache line.
pub(crate) const LINE: usize = 16;

/// A growing buffer whose slices start on a cache line.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    data: Vec<f32>,
}

impl Scratch {
    /// Returns `len` f32 with whatever values they have.
    pub(crate) fn take(&mut self, len: usize) -> &mut [f32] {
        if self.data.len() < len + LINE {
            self.data = vec![0.0; len + LINE]; // zeroed by the system: untouched pages cost nothing
        }
        let first = self.data.as_ptr().align_offset(4 * LINE).min(LINE);
        &mut self.data[first..first + len]
    }
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
