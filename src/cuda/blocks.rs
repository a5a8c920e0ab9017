//! Pinned memory that images are decoded into, and uploaded from as it is.
//!
//! ```text
//!   pool ─ block ─▶ decoder, on any thread ─ RGB8 ─▶ one copy, event ─▶ device
//!     ▲                                                 │
//!     └──────────── lent again only after its event ────┘
//! ```
//!
//! The pool grows to what calls need, up to a bound; where it has nothing to lend, the image is decoded to the heap
//! and goes through the [ring](super::upload). It waits for devices, and there only for uploads that it could as well
//! wait for in the ring; never for another thread, which might be waiting for the one that asks.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{Context, Event, PinnedMemory, Span, Stream};
use crate::error::{Error, Result};
use crate::image::room::{Held, Room};

/// Bytes of all blocks together, at most.
const MOST_BYTES: usize = 256 << 20;
/// Blocks are so many bytes long, or a multiple: an image of 2.8 megapixels.
pub(crate) const STEP: usize = 8 << 20;
/// The largest block is such a part of all: whoever comes with one does not leave the pool to itself.
const LARGEST_PART: usize = 3;

/// Blocks of pinned memory, for several devices of the process.
pub(crate) struct Pool {
    contexts: Vec<Arc<Context>>,
    most: usize, // bytes
    blocks: Mutex<Blocks>,
}

/// What there is.
#[derive(Debug, Default)]
struct Blocks {
    free: Vec<Block>, // in the order in which they came back
    count: usize,     // of all, lent ones too
    bytes: usize,     // of all, lent ones too
}

/// Memory, and the end of the last upload from it.
#[derive(Debug)]
struct Block {
    memory: PinnedMemory,
    ends: Vec<Event>,       // an event belongs to a context: one for each
    pending: Option<usize>, // which of them was recorded last, until it is known to be past
}

/// A block as long as somebody has it.
#[derive(Debug)]
pub(crate) struct Lent {
    block: Option<Block>, // until it is dropped
    bytes: usize,         // of it, that were asked for
    pool: Arc<Pool>,
}

/// Where a block comes from.
enum Found {
    /// It was free.
    Block(Block),
    /// It is to be made, of so many bytes, after these are gone.
    Room(usize, Vec<Block>),
    Nothing,
}

impl Pool {
    /// No blocks yet; those to come can be uploaded from to the devices of all `contexts`.
    pub(crate) fn new(contexts: Vec<Arc<Context>>) -> Arc<Self> {
        Self::bounded(contexts, MOST_BYTES)
    }

    /// As [`Pool::new`], with a bound on all blocks together.
    pub(crate) fn bounded(contexts: Vec<Arc<Context>>, most: usize) -> Arc<Self> {
        Arc::new(Self { contexts, most, blocks: Mutex::default() })
    }

    /// Makes blocks for `images` images of up to [`STEP`] bytes, as far as the bound and the system allow.
    pub(crate) fn prepare(&self, images: usize) {
        loop {
            let mut blocks = self.lock();
            if blocks.count >= images || blocks.bytes + STEP > self.most {
                return;
            }
            blocks.add(STEP);
            drop(blocks);
            match self.make(STEP) {
                Some(block) => self.lock().free.push(block),
                None => return,
            }
        }
    }

    /// Blocks and bytes of all of them together.
    pub(crate) fn size(&self) -> (usize, usize) {
        let blocks = self.lock();
        (blocks.count, blocks.bytes)
    }

    /// Finds `bytes` bytes: the smallest free block whose upload is past; else a new one; else the one that has waited
    /// longest for the end of its upload; else a new one in the place of smaller ones.
    fn find(&self, bytes: usize) -> Found {
        let mut blocks = self.lock();
        let Blocks { free, .. } = &mut *blocks;
        let fits = |block: &Block| block.memory.len() >= bytes;
        let past = (0..free.len()).filter(|&i| fits(&free[i]) && free[i].is_past());
        if let Some(i) = past.min_by_key(|&i| free[i].memory.len()) {
            return Found::Block(free.remove(i));
        }
        let size = bytes.next_multiple_of(STEP);
        if blocks.bytes + size <= self.most {
            blocks.add(size);
            return Found::Room(size, vec![]);
        }
        if let Some(i) = blocks.free.iter().position(fits) {
            return Found::Block(blocks.free.remove(i));
        }
        let idle: usize =
            blocks.free.iter().filter(|block| block.is_past()).map(|block| block.memory.len()).sum();
        if blocks.bytes - idle + size > self.most {
            return Found::Nothing;
        }
        let mut gone = vec![];
        while blocks.bytes + size > self.most
            && let Some(i) = blocks.free.iter().position(Block::is_past)
        {
            let block = blocks.free.remove(i);
            blocks.remove(block.memory.len());
            gone.push(block);
        }
        blocks.add(size);
        Found::Room(size, gone)
    }

    /// Makes a block that was counted already.
    fn make(&self, size: usize) -> Option<Block> {
        match Block::new(&self.contexts, size) {
            Ok(block) => Some(block),
            Err(error) => {
                tracing::debug!(%error, "decoding to the heap");
                self.lock().remove(size);
                None
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Blocks {
    /// Counts a block.
    fn add(&mut self, bytes: usize) {
        self.count += 1;
        self.bytes += bytes;
    }

    /// Counts it no more.
    fn remove(&mut self, bytes: usize) {
        self.count -= 1;
        self.bytes -= bytes;
    }
}

impl Room for Arc<Pool> {
    fn lend(&self, bytes: usize) -> Option<Box<dyn Held>> {
        if bytes == 0 || bytes.next_multiple_of(STEP) > self.most / LARGEST_PART {
            return None;
        }
        let block = match self.find(bytes) {
            Found::Block(block) => block,
            Found::Room(size, gone) => {
                drop(gone); // takes its time: the pool is not locked any more
                self.make(size)?
            }
            Found::Nothing => return None,
        };
        let mut lent = Lent { block: Some(block), bytes, pool: self.clone() };
        match lent.settle() {
            Ok(()) => Some(Box::new(lent)),
            Err(error) => {
                tracing::debug!(%error, "decoding to the heap");
                None
            }
        }
    }
}

impl Block {
    fn new(contexts: &[Arc<Context>], size: usize) -> Result<Self> {
        let first = contexts.first().ok_or_else(|| Error::Internal("pinned memory for no device".into()))?;
        let memory = PinnedMemory::new(first, size)?;
        let ends = contexts.iter().map(Event::new).collect::<Result<_>>()?;
        Ok(Self { memory, ends, pending: None })
    }

    /// True if nothing reads it any more.
    fn is_past(&self) -> bool {
        self.pending.is_none_or(|end| self.ends[end].is_past().unwrap_or(false))
    }

    /// Waits until nothing reads it any more.
    fn settle(&mut self) -> Result<()> {
        if let Some(end) = self.pending {
            self.ends[end].synchronize()?;
            self.pending = None;
        }
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let _ = self.settle(); // a device that fails reads nothing any more
    }
}

impl Lent {
    /// Uploads its bytes as rows of `columns` to rows `pitch` bytes apart, by one copy. Returns at once: the block is
    /// lent to nobody else until that is done. What lies between the rows is not written.
    ///
    /// # Errors
    /// [`Error::Internal`] if the rows do not fit; [`Error::Device`] if the driver fails.
    pub(crate) fn send_rows(
        &mut self,
        stream: &Stream,
        to: Span<u8>,
        pitch: usize,
        columns: usize,
    ) -> Result<()> {
        self.settle()?;
        let rows = self.bytes / columns.max(1);
        let Some(block) = &mut self.block else { return Ok(()) };
        let ordinal = stream.context().ordinal();
        let end = block.ends.iter().position(|end| end.context().ordinal() == ordinal);
        let end =
            end.ok_or_else(|| Error::Internal(format!("an upload from another pool to cuda:{ordinal}")))?;
        // SAFETY: the memory is written or freed again only after `settle`, which waits for the event behind the copy.
        unsafe { stream.upload_rows(to, pitch, &block.memory, (rows, columns))? };
        block.pending = Some(end);
        block.ends[end].record(stream).inspect_err(|_| {
            // Without the event, the copy is waited for here.
            let _ = stream.synchronize();
        })
    }

    fn settle(&mut self) -> Result<()> {
        self.block.as_mut().map_or(Ok(()), Block::settle)
    }
}

impl Held for Lent {
    fn bytes(&self) -> &[u8] {
        self.block.as_ref().map_or(&[], |block| &block.memory[..self.bytes])
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        let _ = self.settle(); // a device that fails reads nothing any more
        self.block.as_mut().map_or(&mut [], |block| &mut block.memory[..self.bytes])
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.lock().free.push(block);
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, bytes) = self.size();
        write!(f, "{count} pinned blocks of {bytes} bytes together")
    }
}

#[cfg(test)]
mod tests;
