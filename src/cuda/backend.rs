//! The CUDA backend as the encoder sees it: a job in, rows of sequences out.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use half::f16;

use super::Gpu;
use super::arena::Arena;
use super::driver::{DevicePtr, Span};
use super::embed_tokens::TextRow;
use super::linear::SlotRows;
use super::pictures::decode_each;
use super::range::RangeReport;
use super::rows::{CudaRows, Shared, lock};
use super::weights::Source;
use crate::backend::{Backend, Job, Observer, Work};
use crate::checkpoint::{ConversionReport, EmbeddingTable};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::sequence::{Place, RowsMut, SequenceBuffer};

/// Tower, projector and token embedding on one GPU. Calls queue for its arena.
pub(crate) struct CudaBackend {
    arena: Shared,
    embedding: EmbeddingTable,
    config: ModelConfig,
    place: Place,
    description: String,
}

impl CudaBackend {
    /// Uploads a model to `gpu`.
    ///
    /// # Errors
    /// As [`Arena::new`].
    pub(crate) fn new(
        gpu: Gpu,
        config: &ModelConfig,
        weights: Source<'_>,
        embedding: EmbeddingTable,
    ) -> Result<(Self, ConversionReport)> {
        let description = gpu.describe();
        let ordinal = gpu.context.ordinal();
        let (arena, report) = Arena::new(gpu, config, weights, &embedding)?;
        let arena = Arc::new(Mutex::new(arena));
        let backend =
            Self { arena, embedding, config: config.clone(), place: Place::Cuda(ordinal), description };
        Ok((backend, report))
    }

    /// Does everything a job asks for but the way back to the host, and waits for it. Says what it did, where
    /// the rows for the host are, and what the text rows held that fp16 cannot.
    fn run_on_device(
        &self,
        arena: &mut Arena,
        job: &Job<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<(Work, Span<f16>, RangeReport)> {
        let staging = arena.staging(host_rows(job))?;
        let places = Places::new(job, staging.ptr(), self.config.hidden_size);
        let mut work = Work::default();
        let done = self.enqueue(arena, job, &places, observer, &mut work);
        match done.and_then(|()| arena.finish()) {
            Ok(report) => Ok((work, staging, report)),
            Err(error) => {
                arena.settle();
                Err(error)
            }
        }
    }

    /// The device's arena, which calls and sequences share.
    pub(super) fn arena(&self) -> &Shared {
        &self.arena
    }

    /// Enqueues everything a job asks for but the way back to the host; says what it did.
    fn enqueue(
        &self,
        arena: &mut Arena,
        job: &Job<'_>,
        places: &Places,
        observer: &mut Observer<'_>,
        work: &mut Work,
    ) -> Result<()> {
        arena.enqueue_texts(&places.texts)?;
        let pictures = &job.pictures;
        let wanted: Vec<usize> =
            (0..pictures.sources.len()).filter(|&i| !places.slots[i].is_empty()).collect();
        let unwanted = (0..pictures.sources.len()).filter(|&i| places.slots[i].is_empty());
        let mut unwanted: Vec<usize> = unwanted.collect(); // decoded, so that a broken one is found
        let size = group_len(wanted.len(), arena.group_size());
        let mut warnings = vec![Vec::new(); pictures.sources.len()];
        let mut group_after_group = wanted.chunks(size);
        loop {
            let group = group_after_group.next().unwrap_or_default();
            let decode: Vec<usize> = group.iter().copied().chain(unwanted.drain(..)).collect();
            if decode.is_empty() {
                break;
            }
            arena.begin_group()?;
            work.decode += decode_each(pictures, &decode, |i, decoded| {
                warnings[i] = decoded.warnings.clone();
                let Some(place) = group.iter().position(|&wanted| wanted == i) else { return Ok(()) };
                arena.enqueue_image(place, decoded.view(), pictures.resample)
            })?;
            if group.is_empty() {
                break;
            }
            let slots: Vec<Vec<SlotRows>> = group.iter().map(|&i| places.slots[i].clone()).collect();
            match observer.trace.as_deref_mut() {
                None => arena.end_group(&slots, None)?,
                Some(trace) => {
                    arena.end_group(&slots, Some(&mut |i, stage, values| trace(group[i], stage, values)))?;
                }
            }
            work.images_encoded += group.len();
            if let Some(progress) = &mut observer.progress {
                progress(work.images_encoded as f32 / wanted.len() as f32);
            }
        }
        work.warnings = warnings.concat();
        Ok(())
    }
}

impl Backend for CudaBackend {
    fn describe(&self) -> String {
        self.description.clone()
    }

    fn fill(&self, mut job: Job<'_>, observer: &mut Observer<'_>) -> Result<Work> {
        let start = Instant::now();
        self.check(&job)?;
        let mut arena = lock(&self.arena);
        let hidden = self.config.hidden_size;
        let (mut work, staging, report) =
            arena.with_room(|arena| self.run_on_device(arena, &job, observer))?;
        if let Some(index) = report.refused() {
            // The host finds the same and says it in its words.
            self.embedding.gather_row((index / hidden as u64) as u32, &mut vec![f16::ZERO; hidden])?;
            return Err(Error::Internal(format!("the device refused value {index} of the embedding table")));
        }
        self.embedding.count_saturated(report.out_of_range().into());
        // All is well: only now does a row of the host's change.
        let mut at = 0;
        for rows in blocks(&job).filter(|rows| rows.place() == Place::Host) {
            let part = staging.slice(at * hidden..(at + rows.len()) * hidden)?;
            at += rows.len();
            if !rows.is_empty() {
                let shape = (rows.len(), hidden);
                // SAFETY: the block is exclusively lent, and left alone until the wait below.
                unsafe {
                    arena.compute.download_rows(part, hidden, shape, rows.row_ptr(0), rows.row_stride())?
                };
            }
        }
        arena.compute.synchronize()?;
        for (features, rows) in &mut job.kept {
            if rows.place() != Place::Host {
                arena.upload_rows(on_device(rows), rows.row_stride(), &features[..rows.len() * hidden])?;
                continue;
            }
            for (i, row) in features.chunks_exact(hidden).take(rows.len()).enumerate() {
                rows.row_mut(i).copy_from_slice(row);
            }
        }
        work.encode = start.elapsed().saturating_sub(work.decode);
        Ok(work)
    }

    fn device_sequence(&self) -> Result<SequenceBuffer<'static>> {
        Ok(SequenceBuffer::on_device(Box::new(CudaRows::ours(&self.arena))))
    }

    unsafe fn wrap_device(
        &self,
        address: u64,
        elements: usize,
        row_stride: usize,
        stream: usize,
    ) -> Result<SequenceBuffer<'static>> {
        // SAFETY: the caller's promise.
        let rows = unsafe { CudaRows::theirs(&self.arena, address, elements, row_stride, stream)? };
        Ok(SequenceBuffer::on_device(Box::new(rows)))
    }

    fn warm_up(&self, batch_sizes: &[usize]) -> Result<()> {
        lock(&self.arena).with_room(|arena| arena.warm_up(batch_sizes.iter().copied()))
    }
}

impl CudaBackend {
    /// Checks that a job's parts agree with one another and with the model.
    fn check(&self, job: &Job<'_>) -> Result<()> {
        let hidden = self.config.hidden_size;
        let internal = |problem: String| Err(Error::Internal(problem));
        if job.pictures.sources.len() != job.targets.len() {
            return internal(format!(
                "{} images, {} lists of targets",
                job.pictures.sources.len(),
                job.targets.len()
            ));
        }
        let kept = || job.kept.iter().map(|(_, rows)| rows);
        let elsewhere = |rows: &&RowsMut<'_>| rows.place() != Place::Host && rows.place() != self.place;
        if let Some(rows) = blocks(job).chain(kept()).find(elsewhere) {
            return Err(Error::argument(
                format!(
                    "the sequence lies in the memory of {:?}, the encoder runs on {:?}",
                    rows.place(),
                    self.place
                ),
                "Give a sequence in host memory or in that of the encoder's device",
            ));
        }
        if let Some(rows) = blocks(job).chain(kept()).find(|rows| rows.hidden() != hidden) {
            return internal(format!("target rows of {} elements; H is {hidden}", rows.hidden()));
        }
        for (ids, rows) in &job.texts {
            if ids.len() != rows.len() {
                return internal(format!("{} ids for {} rows", ids.len(), rows.len()));
            }
            if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
                return Err(Error::argument(
                    format!(
                        "token id {id} is outside the {} rows of the embedding table",
                        self.config.vocab_size
                    ),
                    "Use the tokenizer that belongs to this checkpoint",
                ));
            }
        }
        Ok(())
    }
}

/// Images of each group but the last, which may have fewer: as many as fit, and all groups about alike.
pub(super) fn group_len(images: usize, most: usize) -> usize {
    images.div_ceil(images.div_ceil(most).max(1)).max(1)
}

/// The blocks of rows that the device fills, in the order in which they lie in its staging memory.
fn blocks<'j>(job: &'j Job<'_>) -> impl Iterator<Item = &'j RowsMut<'j>> {
    job.texts.iter().map(|(_, rows)| rows).chain(job.targets.iter().flatten())
}

/// Rows in host memory that the device fills.
fn host_rows(job: &Job<'_>) -> usize {
    blocks(job).filter(|rows| rows.place() == Place::Host).map(RowsMut::len).sum()
}

/// The address of the first of some rows on the device; null if there is none.
fn on_device(rows: &RowsMut<'_>) -> DevicePtr<f16> {
    if rows.is_empty() { DevicePtr::NULL } else { DevicePtr::new(rows.row_ptr(0).addr() as u64) }
}

/// Where everything goes on the device.
struct Places {
    texts: Vec<TextRow>,
    slots: Vec<Vec<SlotRows>>, // by image
}

impl Places {
    /// Gives every block that lies on the host its rows of `staging`, in order; others are where they are.
    fn new(job: &Job<'_>, staging: DevicePtr<f16>, hidden: usize) -> Self {
        let mut next = staging;
        let mut take = |rows: &RowsMut<'_>| {
            if rows.place() != Place::Host {
                return (on_device(rows), rows.row_stride());
            }
            let first = next;
            next = next.add(rows.len() * hidden);
            (first, hidden)
        };
        let mut texts = Vec::new();
        for (ids, rows) in &job.texts {
            let (first, pitch) = take(rows);
            let row = |(i, &id): (usize, &u32)| TextRow { to: first.add(i * pitch), id: id as i32, pad: 0 };
            texts.extend(ids.iter().enumerate().map(row));
        }
        let mut slot = |rows: &RowsMut<'_>| {
            let (first, pitch) = take(rows);
            SlotRows { first, pitch: pitch as i64, rows: rows.len() as i32, pad: 0 }
        };
        let slots = job
            .targets
            .iter()
            .map(|blocks| blocks.iter().filter(|rows| !rows.is_empty()).map(&mut slot).collect());
        Self { slots: slots.collect(), texts }
    }
}

impl fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaBackend")
            .field("config", &self.config)
            .field("device", &self.description)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
