//! The way from the host to the device for what lies in pageable memory: a ring of pinned slots.
//!
//! ```text
//!   weights, tables ─ copy ─▶ slot 0 ─ upload, event 0 ─▶ device
//!   lent pixels               slot 1 ─ upload, event 1 ─▶
//!                             …           a slot is refilled only after its event
//!   files ─ decode ─▶ block of the pool ─ upload, event ─▶          as a block is: the one kind of wait in an encode
//! ```
//!
//! Images of files do not come this way but where the [pool](super::blocks) has no block for them.

use super::driver::{Context, Event, PinnedMemory, Span, Stream};
use crate::error::{Error, Result};
use std::sync::Arc;

/// Slots of a ring: one is filled while one is on its way and one waits its turn.
const SLOTS: usize = 4;

/// Pinned memory that uploads go through.
#[derive(Debug)]
pub(crate) struct Ring {
    slots: Vec<Slot>,
    next: usize,
    bytes: usize, // of a slot
}

/// A piece of pinned memory and the event behind the last upload from it.
#[derive(Debug)]
struct Slot {
    memory: PinnedMemory,
    sent: Event,
}

impl Ring {
    /// Pins [`SLOTS`] slots of `bytes`.
    ///
    /// # Errors
    /// [`Error::Device`] if the system has no more memory that can be locked.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let slot = |_| Ok(Slot { memory: PinnedMemory::new(context, bytes)?, sent: Event::new(context)? });
        Ok(Self { slots: (0..SLOTS).map(slot).collect::<Result<_>>()?, next: 0, bytes })
    }

    /// Bytes that one upload can have.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Fills the next slot by `fill` and uploads it to all of `to`. Returns when the bytes are on their way.
    ///
    /// # Errors
    /// [`Error::Internal`] if `to` is larger than a slot; [`Error::Device`] if the driver fails.
    pub(crate) fn send(&mut self, stream: &Stream, to: Span<u8>, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let count = self.slots.len();
        let slot = &mut self.slots[self.next];
        let Some(room) = slot.memory.get_mut(..to.len()) else {
            return Err(Error::Internal(format!(
                "an upload of {} bytes by slots of {}",
                to.len(),
                self.bytes
            )));
        };
        slot.sent.synchronize()?;
        fill(room);
        // SAFETY: the slot is touched again only after the event recorded behind the upload; the ring is dropped
        // after its streams are idle, since freeing pinned memory waits for them.
        unsafe { stream.upload(to, &slot.memory, 0)? };
        slot.sent.record(stream)?;
        self.next = (self.next + 1) % count;
        Ok(())
    }

    /// Uploads `values`, slot by slot.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is no room; [`Error::Device`] if the driver fails.
    pub(crate) fn send_all<T: bytemuck::NoUninit>(
        &mut self,
        stream: &Stream,
        to: Span<u8>,
        values: &[T],
    ) -> Result<()> {
        let values: &[u8] = bytemuck::cast_slice(values);
        for (i, part) in values.chunks(self.bytes).enumerate() {
            let at = i * self.bytes;
            self.send(stream, to.slice(at..at + part.len())?, |slot| slot.copy_from_slice(part))?;
        }
        Ok(())
    }

    /// Uploads rows that lie apart to rows `pitch` bytes apart, as many at a time as a slot takes. What lies
    /// between the rows on the device becomes 0.
    ///
    /// # Errors
    /// [`Error::Internal`] if they do not fit; [`Error::Device`] if the driver fails.
    pub(crate) fn send_rows<'r>(
        &mut self,
        stream: &Stream,
        to: Span<u8>,
        pitch: usize,
        rows: usize,
        row: impl Fn(usize) -> &'r [u8],
    ) -> Result<()> {
        let band = (self.bytes / pitch.max(1)).max(1);
        for first in (0..rows).step_by(band) {
            let count = band.min(rows - first);
            self.send(stream, to.slice(first * pitch..(first + count) * pitch)?, |slot| {
                for (i, slot) in slot.chunks_exact_mut(pitch).enumerate() {
                    let row = row(first + i);
                    slot[..row.len()].copy_from_slice(row);
                    slot[row.len()..].fill(0);
                }
            })?;
        }
        Ok(())
    }
}
