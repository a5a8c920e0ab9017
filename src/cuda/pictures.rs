//! Images on their way to the tower: decoded on the host, resized on the device.
//!
//! ```text
//!   files ─ decode ─▶ RGB8 in a pinned block ─────── one copy ─▶ raw ─ resize, two passes ─▶ square [S, S, 3]
//!                     no block left, lent pixels ─ ring, bands ─▶
//!           threads of the host                                  one after the other, on the stream of uploads
//! ```
//!
//! The passes are those of [`crate::image::resize`], in its order, with its tables: the same bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use super::Kernels;
use super::blocks::Lent;
use super::driver::{Context, DeviceMemory, Span, Stream};
use super::resize::{DevicePasses, Pixels, Resize};
use super::upload::Ring;
use crate::backend::Pictures;
use crate::error::{Error, Result};
use crate::image::decode::{Decoded, decode_in};
use crate::image::resize::Passes;
use crate::image::room::Room;
use crate::image::{ImageSource, Resample};

/// Device memory that grows to what is asked of it and is kept from then on.
#[derive(Debug)]
pub(crate) struct Growing {
    context: Arc<Context>,
    memory: Option<DeviceMemory>,
    purpose: &'static str,
}

impl Growing {
    /// Nothing yet; `purpose` goes into the message should there be no room.
    pub(crate) fn new(context: &Arc<Context>, purpose: &'static str) -> Self {
        Self { context: context.clone(), memory: None, purpose }
    }

    /// `bytes` of it; what was there before is lost if there were fewer.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room or the driver fails.
    pub(crate) fn span(&mut self, bytes: usize) -> Result<Span<u8>> {
        if self.memory.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            self.memory = None; // waits for what uses it
            self.memory = Some(DeviceMemory::new(&self.context, bytes, self.purpose)?);
        }
        match &self.memory {
            // SAFETY: its holder keeps it while anything enqueued uses it; growing frees it only after that.
            Some(memory) => unsafe { memory.span() }.slice(0..bytes),
            None => Ok(Span::NONE),
        }
    }

    /// All of it, as it is.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is nothing yet.
    pub(crate) fn peek(&self) -> Result<Span<u8>> {
        let memory =
            self.memory.as_ref().ok_or_else(|| Error::Internal(format!("no {} yet", self.purpose)))?;
        // SAFETY: as above.
        Ok(unsafe { memory.span() })
    }
}

/// Brings images to the tower's size on the device.
#[derive(Debug)]
pub(crate) struct Resizer {
    raw: Growing,
    between: Growing,
    tables: Growing,
}

impl Resizer {
    /// Nothing yet.
    pub(crate) fn new(context: &Arc<Context>) -> Self {
        Self {
            raw: Growing::new(context, "an image"),
            between: Growing::new(context, "an image between the passes of its resize"),
            tables: Growing::new(context, "the tables of a resize"),
        }
    }

    /// Uploads an image and enqueues its resize by `rule` to `square`, `[side, side, 3]` without gaps. The image may
    /// be dropped then.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room for the image or the driver fails.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is another thing; a struct would only rename the list"
    )]
    pub(crate) fn enqueue(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        ring: &mut Ring,
        image: &mut Decoded<'_>,
        rule: Resample,
        side: usize,
        square: Span<u8>,
    ) -> Result<()> {
        let size = (image.view().width(), image.view().height());
        let (width, height) = (size.0 as usize, size.1 as usize);
        let passes = Passes::new(size, (side as u32, side as u32), rule);
        if passes.horizontal.is_none() && passes.vertical.is_none() {
            return send(stream, ring, image, square, 3 * side);
        }
        let pitch = (3 * width).next_multiple_of(4);
        let raw = self.raw.span(height * pitch)?;
        send(stream, ring, image, raw, pitch)?;
        let words = self.tables.span(DevicePasses::words(&passes) * size_of::<i32>())?;
        let mut at = 0;
        for table in passes.horizontal.iter().chain(&passes.vertical) {
            let part = words.slice(at..at + size_of_val(table.words.as_slice()))?;
            ring.send_all(stream, part, &table.words)?;
            at += part.len();
        }
        let tables = DevicePasses::new(words.cast()?, &passes)?;
        let between = self.between.span(Resize::between_bytes(&passes, width, side))?;
        let out = Pixels::new(square, side, side, 3 * side)?;
        let from = Pixels::new(raw, height, width, pitch)?;
        kernels.resize.enqueue(stream, &out, &from, between, &passes, &tables).map(|_| ())
    }
}

/// Uploads an image to rows `pitch` bytes apart: by one copy where it lies in a block, else through the ring.
fn send(stream: &Stream, ring: &mut Ring, image: &mut Decoded<'_>, to: Span<u8>, pitch: usize) -> Result<()> {
    let (width, height) = (image.view().width() as usize, image.view().height() as usize);
    if let Some(block) = image.held::<Lent>() {
        return block.send_rows(stream, to, pitch, 3 * width);
    }
    let view = image.view();
    ring.send_rows(stream, to, pitch, height, |y| view.row(y as u32))
}

/// Decodes images, into `room`, on as many threads as rayon has here, and gives each to `take` as soon as it is there,
/// in any order. The caller sleeps while there is none.
///
/// The threads are not rayon's own. One of those that waits does meanwhile what else is queued: another call, say,
/// which waits for the devices that this one has locked. And all of them may be waiting for this call.
///
/// Returns how long the caller had nothing to do but wait for an image.
///
/// # Errors
/// The error of the first image, in the order of the call, that cannot be decoded; else that of `take`.
pub(crate) fn decode_each(
    pictures: &Pictures<'_>,
    indices: &[usize],
    room: &dyn Room,
    mut take: impl FnMut(usize, Decoded<'_>) -> Result<()>,
) -> Result<Duration> {
    let mut waited = Duration::ZERO;
    let mut broken: Option<(usize, Error)> = None;
    let mut taken = Ok(());
    let mut give = |i: usize, decoded: Result<Decoded<'_>>| match decoded {
        Err(error) if broken.as_ref().is_none_or(|(first, _)| i < *first) => broken = Some((i, error)),
        Ok(decoded) if broken.is_none() && taken.is_ok() => taken = take(i, decoded),
        _ => {}
    };
    let decode = |i: usize| decode_in(room, i, &pictures.sources[i], pictures.decode);
    let is_file = |&i: &usize| !matches!(pictures.sources[i], ImageSource::Rgb8(_));
    let (files, lent): (Vec<usize>, Vec<usize>) = indices.iter().copied().partition(is_file);
    let next = AtomicUsize::new(0);
    let work = |send: Sender<_>| {
        while let Some(&i) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if send.send((i, decode(i))).is_err() {
                break; // nobody waits any more
            }
        }
    };
    std::thread::scope(|scope| {
        let (send, receive) = channel();
        // One file needs no other thread.
        let threads = if files.len() > 1 { rayon::current_num_threads().min(files.len()) } else { 0 };
        let begin = || {
            let (send, thread) = (send.clone(), std::thread::Builder::new().name("imagehere-decode".into()));
            thread.spawn_scoped(scope, || work(send)).is_ok()
        };
        let started = (0..threads).filter(|_| begin()).count();
        lent.into_iter().for_each(|i| give(i, decode(i)));
        let mut start = Instant::now();
        if started == 0 {
            work(send);
        } else {
            drop(send);
        }
        while let Ok((i, decoded)) = receive.recv() {
            waited += start.elapsed();
            give(i, decoded);
            start = Instant::now();
        }
    });
    match broken {
        Some((_, error)) => Err(error),
        None => taken.map(|()| waited),
    }
}

#[cfg(test)]
mod tests;
