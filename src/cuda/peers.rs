//! One device, or several that share the images of a call.
//!
//! ```text
//!                   ┌─▶ primary   text rows   group 0 ─ tower ─ scatter ───────────────────▶ slots
//!   images ─ deal ──┼─▶ peer      reaches     group 1 ─ tower ─ scatter ═══════════════════▶ slots
//!                   └─▶ peer      does not    group 2 ─ tower ─ scatter ─▶ rows ═ copies ══▶ slots
//!                                 └ of the primary's memory                 one a slot
//! ```
//!
//! The primary has the embedding table, the rows for the host and the sequences. A peer has weights, workspace,
//! streams, upload ring and graphs of its own; the slots that its kernels store to are the primary's addresses. Where
//! it cannot reach one of them, it stores the image's rows once in memory of its own, and copies them to that slot.
//! Images are decoded into one pool of pinned blocks, from which every device copies.
//!
//! One thread enqueues for all devices, and waits for none of them but in a full ring. An event puts the primary's
//! poison, and what the caller's stream was given, before all that peers store; the end of a call waits for every
//! device. The bits are those of one: an image's rows depend on neither its group nor its place in it.

use std::sync::Arc;

use super::Gpu;
use super::arena::{Arena, MOST_IMAGES};
use super::blocks::Pool;
use super::driver::{Context, Event, Span};
use super::embed_tokens::TextRow;
use super::linear::SlotRows;
use super::pictures::Growing;
use super::range::RangeReport;
use super::weights::Source;
use crate::backend::TraceFn;
use crate::checkpoint::{ConversionReport, EmbeddingTable};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::image::Resample;
use crate::image::decode::Decoded;

/// The devices of a backend. The fields are dropped in order: peers write into the primary's memory.
#[derive(Debug)]
pub(crate) struct Devices {
    peers: Vec<Peer>,
    pub(crate) primary: Arena,
    ready: Event, // the primary's rows may be written
    pool: Arc<Pool>,
}

/// A device that fills slots in the primary's memory.
#[derive(Debug)]
struct Peer {
    arena: Arena,
    reaches: bool, // the primary's memory, as far as peer access opens it
    rows: Growing, // [B, P, H], on their way to slots out of reach
    copies: usize, // of rows to slots, in this call
}

impl Devices {
    /// Uploads a model to all `gpus`; the first is the primary. Says what [`Arena::new`] says.
    ///
    /// # Errors
    /// As [`Arena::new`], of the first device that fails.
    pub(crate) fn new(
        gpus: Vec<Gpu>,
        config: &ModelConfig,
        weights: Source<'_>,
        embedding: &EmbeddingTable,
    ) -> Result<(Self, ConversionReport)> {
        let pool = Pool::new(gpus.iter().map(|gpu| gpu.context.clone()).collect());
        let mut gpus = gpus.into_iter();
        let first = gpus.next().ok_or_else(|| Error::Internal("a backend on no device".into()))?;
        let ready = Event::new(&first.context)?;
        let (primary, report) = Arena::new(first, config, weights, Some(embedding))?;
        let mut peers = Vec::new();
        for gpu in gpus {
            let (context, reached) = (gpu.context.clone(), &primary.gpu().context);
            let reaches = context.reach(reached)?;
            tracing::info!(device = gpu.describe(), primary = ?reached, remote_stores = reaches, "CUDA peer");
            let (arena, _) = Arena::new(gpu, config, weights, None)?;
            peers.push(Peer { arena, reaches, rows: Peer::no_rows(&context), copies: 0 });
        }
        let mut devices = Self { peers, primary, ready, pool };
        // What a call will need, not inside it.
        let far = |devices: &mut Self| {
            devices.peers.iter_mut().filter(|peer| !peer.reaches).try_for_each(|peer| peer.rows().map(drop))
        };
        devices.with_room(far)?;
        Ok((devices, report))
    }

    /// Does `work`. As long as that finds too little memory on a device, makes room there by smaller groups and
    /// does it again.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Device`] if there is no room for one image any more.
    pub(crate) fn with_room<T>(&mut self, mut work: impl FnMut(&mut Self) -> Result<T>) -> Result<T> {
        for device in 0..self.count() {
            if self.arena(device).group_size() == 0 {
                self.arena(device).regroup(MOST_IMAGES)?; // an earlier call had to give it up
            }
        }
        loop {
            let before = self.shortages();
            let error = match work(self) {
                Err(error) => error,
                done => return done,
            };
            let mut short = before.into_iter().zip(self.shortages());
            let short = short.position(|(before, after)| after > before);
            let Some(device) = short.filter(|&device| self.arena(device).group_size() > 1) else {
                return Err(error);
            };
            let images = self.arena(device).group_size() / 2;
            tracing::info!(%error, images, "trying with smaller groups");
            self.settle();
            if let Some(peer) = device.checked_sub(1) {
                let peer = &mut self.peers[peer];
                peer.rows = Peer::no_rows(&peer.arena.gpu().context);
            }
            self.arena(device).regroup(images)?;
        }
    }

    /// How often each device had too little memory.
    fn shortages(&self) -> Vec<u64> {
        self.arenas().map(|arena| arena.gpu().context.shortages()).collect()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        1 + self.peers.len()
    }

    /// Names them, the primary first.
    pub(crate) fn describe(&self) -> String {
        let names: Vec<String> = self.arenas().map(|arena| arena.gpu().describe()).collect();
        names.join(" + ")
    }

    /// Splits `images` into groups, dealt to the devices in turn: group `i` is for device `i % count`.
    pub(crate) fn deal<'i>(&self, images: &'i [usize]) -> Vec<&'i [usize]> {
        let mut rest = images;
        let mut take = |size: usize| {
            let (group, after) = rest.split_at(size);
            rest = after;
            group
        };
        self.group_sizes(images.len()).into_iter().map(&mut take).collect()
    }

    fn group_sizes(&self, images: usize) -> Vec<usize> {
        let most = self.arenas().map(Arena::group_size).min().unwrap_or(1);
        group_sizes(images, self.count(), most)
    }

    fn arenas(&self) -> impl Iterator<Item = &Arena> {
        std::iter::once(&self.primary).chain(self.peers.iter().map(|peer| &peer.arena))
    }

    fn arena(&mut self, device: usize) -> &mut Arena {
        match device.checked_sub(1) {
            None => &mut self.primary,
            Some(peer) => &mut self.peers[peer].arena,
        }
    }

    /// Where images for any of them are decoded to.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Bounds the pool to so many bytes.
    #[cfg(test)]
    pub(crate) fn bound_pool(&mut self, bytes: usize) {
        let contexts = self.arenas().map(|arena| arena.gpu().context.clone()).collect();
        self.pool = Pool::bounded(contexts, bytes);
    }

    /// Begins a call: enqueues its text rows, and lets peers write after what the primary was given so far.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn begin(&mut self, texts: &[TextRow]) -> Result<()> {
        if !self.peers.is_empty() {
            self.ready.record(&self.primary.compute)?;
        }
        for peer in &mut self.peers {
            peer.arena.compute.wait_for(&self.ready)?;
            peer.copies = 0;
        }
        self.primary.enqueue_texts(texts)
    }

    /// As [`Arena::begin_group`], on one device.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn begin_group(&mut self, device: usize) -> Result<()> {
        self.arena(device).begin_group()
    }

    /// As [`Arena::enqueue_image`], on one device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no room or the driver fails.
    pub(crate) fn enqueue_image(
        &mut self,
        device: usize,
        place: usize,
        image: &mut Decoded<'_>,
        rule: Resample,
    ) -> Result<()> {
        self.arena(device).enqueue_image(place, image, rule)
    }

    /// As [`Arena::end_group`], on one device; `slots` lie in the primary's memory.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails; [`Error::Argument`] if an image has too many slots.
    pub(crate) fn end_group(
        &mut self,
        device: usize,
        slots: &[Vec<SlotRows>],
        trace: Option<&mut TraceFn<'_>>,
    ) -> Result<()> {
        match device.checked_sub(1) {
            None => self.primary.end_group(slots, trace),
            Some(peer) => self.peers[peer].end_group(&self.primary.gpu().context, slots, trace),
        }
    }

    /// Waits for all work of a call on all devices, and says what the text rows held that fp16 cannot.
    ///
    /// # Errors
    /// [`Error::Device`] if anything failed since.
    pub(crate) fn finish(&mut self) -> Result<RangeReport> {
        for peer in &self.peers {
            peer.arena.compute.synchronize()?;
        }
        let copies: usize = self.peers.iter().map(|peer| peer.copies).sum();
        if copies > 0 {
            tracing::debug!(copies, "slots filled by copies between devices");
        }
        self.primary.finish()
    }

    /// Waits for all devices, whatever became of their work: nothing of it touches memory afterwards.
    pub(crate) fn settle(&self) {
        self.arenas().for_each(Arena::settle);
    }

    /// Captures the graphs that calls of so many images will replay, and pins memory to decode them into.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn warm_up(&mut self, batch_sizes: &[usize]) -> Result<()> {
        for &images in batch_sizes {
            self.pool.prepare(images);
            for (i, size) in self.group_sizes(images).into_iter().enumerate() {
                let device = i % self.count();
                self.arena(device).warm_up(size)?;
            }
        }
        Ok(())
    }
}

impl Peer {
    /// Of [`Peer::rows`], none yet.
    fn no_rows(context: &Arc<Context>) -> Growing {
        Growing::new(context, "rows on their way to another device")
    }

    /// Room for the rows of a group, `[B, P, H]`.
    fn rows(&mut self) -> Result<Span<half::f16>> {
        let config = self.arena.config();
        let elements = self.arena.group_size() * config.patches * config.hidden_size;
        self.rows.span(elements * size_of::<half::f16>())?.cast()
    }

    /// Enqueues tower and scatter of a group, and the copies to slots out of reach.
    fn end_group(
        &mut self,
        primary: &Context,
        slots: &[Vec<SlotRows>],
        trace: Option<&mut TraceFn<'_>>,
    ) -> Result<()> {
        let (patches, hidden) = (self.arena.config().patches, self.arena.config().hidden_size);
        let (mut stores, mut copies) = (Vec::with_capacity(slots.len()), Vec::new());
        for (image, slots) in slots.iter().enumerate() {
            let (mut near, mut far) = (Vec::new(), Vec::new());
            for slot in slots {
                let within = self.reaches && self.arena.gpu().context.may_write(slot.first)?;
                if within { near.push(*slot) } else { far.push(*slot) }
            }
            if !far.is_empty() {
                let rows = self.rows()?.slice(image * patches * hidden..(image + 1) * patches * hidden)?;
                near.push(SlotRows { first: rows.ptr(), pitch: hidden as i64, rows: patches as i32, pad: 0 });
                copies.extend(far.into_iter().map(|slot| (rows, slot)));
            }
            stores.push(near);
        }
        self.arena.end_group(&stores, trace)?;
        for (rows, slot) in copies {
            let (count, pitch) = (slot.rows as usize, slot.pitch as usize);
            let len = count.checked_sub(1).map_or(0, |before| before * pitch + hidden);
            // SAFETY: rows lent to this call, which waits for the copy.
            let to = unsafe { Span::new(slot.first, len) };
            let from = rows.slice(0..count * hidden)?;
            self.arena.compute.copy_rows_to_peer(primary, to, pitch, from, hidden)?;
            self.copies += 1;
        }
        Ok(())
    }
}

/// Sizes of the groups of a call: at most `most` each, as many for each device as for any other while there are
/// images enough, and all of one size or one less.
pub(super) fn group_sizes(images: usize, devices: usize, most: usize) -> Vec<usize> {
    let (devices, most) = (devices.max(1), most.max(1));
    let groups = images.div_ceil(most).next_multiple_of(devices).min(images);
    (0..groups).map(|i| images / groups + usize::from(i < images % groups)).collect()
}

#[cfg(test)]
mod tests;
