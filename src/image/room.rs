//! Where finished pixels are put: on the heap, or in memory that whoever wants them lends.
//!
//! ```text
//!   file ─ decoder ─▶ samples, where they are not RGB8 yet ─▶ RGB8 ─ if turned ─▶ RGB8
//!                     heap                                    room                room
//! ```
//!
//! A decoder asks its [`Room`] for the memory of RGB8 alone, after the limits were checked, and writes every byte of
//! it: what lay there before is anything.

use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::{RefUnwindSafe, UnwindSafe};

/// Lends memory for pixels.
pub(crate) trait Room: Sync {
    /// Memory of exactly `bytes` bytes, holding anything; `None` leaves it to the heap. Waits for no other thread.
    fn lend(&self, bytes: usize) -> Option<Box<dyn Held>>;
}

/// Memory that goes back to its owner when it is dropped. Who knows the owner finds it again through [`Any`].
pub(crate) trait Held: Any + Send + Sync + UnwindSafe + RefUnwindSafe {
    /// All of it.
    fn bytes(&self) -> &[u8];

    /// All of it, to write to.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// The room of those who want nothing special.
#[derive(Debug)]
pub(crate) struct Heap;

impl Room for Heap {
    fn lend(&self, _: usize) -> Option<Box<dyn Held>> {
        None
    }
}

/// Memory of pixels.
pub(crate) enum PixelMemory {
    /// On the heap.
    Heap(Vec<u8>),
    /// Lent.
    Held(Box<dyn Held>),
}

impl PixelMemory {
    /// Takes `bytes` bytes from `room`, or from the heap where it lends none.
    pub(crate) fn new(room: &dyn Room, bytes: usize) -> Self {
        match room.lend(bytes) {
            Some(held) => Self::Held(held),
            None => Self::Heap(vec![0; bytes]),
        }
    }

    /// The bytes on the heap; what was lent is copied.
    pub(crate) fn into_vec(self) -> Vec<u8> {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Held(held) => held.bytes().to_vec(),
        }
    }
}

impl Deref for PixelMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Held(held) => held.bytes(),
        }
    }
}

impl DerefMut for PixelMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(bytes) => bytes,
            Self::Held(held) => held.bytes_mut(),
        }
    }
}

impl Clone for PixelMemory {
    /// A copy lies on the heap.
    fn clone(&self) -> Self {
        Self::Heap(self.to_vec())
    }
}

impl fmt::Debug for PixelMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if matches!(self, Self::Heap(_)) { "on the heap" } else { "lent" };
        write!(f, "{} bytes {place}", self.len())
    }
}

#[cfg(test)]
mod tests;
