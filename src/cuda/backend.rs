//! The CUDA backend as the encoder sees it: a job in, rows of sequences out.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use half::f16;

use super::Gpu;
use super::driver::{DevicePtr, Span};
use super::embed_tokens::TextRow;
use super::linear::SlotRows;
use super::peers::Devices;
use super::pictures::decode_each;
use super::range::RangeReport;
use super::rows::{CudaRows, Shared, lock};
use super::weights::Source;
use crate::backend::{Backend, Job, Observer, Work};
use crate::checkpoint::{ConversionReport, EmbeddingTable};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::sequence::{Place, RowsMut, SequenceBuffer};

/// Tower, projector and token embedding on one GPU or several. Calls queue for their arenas.
pub(crate) struct CudaBackend {
    devices: Shared,
    embedding: EmbeddingTable,
    config: ModelConfig,
    place: Place,
    description: String,
}

impl CudaBackend {
    /// Uploads a model to `gpus`; sequences lie on the first.
    ///
    /// # Errors
    /// As [`Devices::new`].
    pub(crate) fn new(
        gpus: Vec<Gpu>,
        config: &ModelConfig,
        weights: Source<'_>,
        embedding: EmbeddingTable,
    ) -> Result<(Self, ConversionReport)> {
        let (devices, report) = Devices::new(gpus, config, weights, &embedding)?;
        let place = Place::Cuda(devices.primary.gpu().context.ordinal());
        let description = devices.describe();
        let devices = Arc::new(Mutex::new(devices));
        Ok((Self { devices, embedding, config: config.clone(), place, description }, report))
    }

    /// What calls and sequences share.
    pub(crate) fn devices(&self) -> &Shared {
        &self.devices
    }

    /// Does everything a job asks for but the way back to the host, and waits for it. Says what it did, where the
    /// rows for the host are, and what the text rows held that fp16 cannot.
    fn run_on_devices(
        &self,
        devices: &mut Devices,
        job: &Job<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<(Work, Span<f16>, RangeReport)> {
        let staging = devices.primary.staging(host_rows(job))?;
        let places = Places::new(job, staging.ptr(), self.config.hidden_size);
        let mut work = Work::default();
        let done = self.enqueue(devices, job, &places, observer, &mut work);
        match done.and_then(|()| devices.finish()) {
            Ok(report) => Ok((work, staging, report)),
            Err(error) => {
                devices.settle();
                Err(error)
            }
        }
    }

    /// Enqueues everything a job asks for but the way back to the host; says what it did.
    fn enqueue(
        &self,
        devices: &mut Devices,
        job: &Job<'_>,
        places: &Places,
        observer: &mut Observer<'_>,
        work: &mut Work,
    ) -> Result<()> {
        devices.begin(&places.texts)?;
        let images = 0..job.pictures.sources.len();
        let mut warnings = vec![Vec::new(); images.len()];
        let (wanted, mut unwanted): (Vec<usize>, Vec<usize>) =
            images.partition(|&i| !places.slots[i].is_empty());
        let groups = devices.deal(&wanted);
        // A group for each device at a time; what nobody wants is decoded with the first, so that a broken one is
        // found.
        for round in 0..groups.len().div_ceil(devices.count()).max(1) {
            let from = round * devices.count();
            let mut round = Round::new(&groups[from..groups.len().min(from + devices.count())]);
            let decode: Vec<usize> = round.groups.concat().into_iter().chain(unwanted.drain(..)).collect();
            (0..round.groups.len()).try_for_each(|device| devices.begin_group(device))?;
            let room = devices.pool().clone();
            work.decode += decode_each(&job.pictures, &decode, &room, |i, mut decoded| {
                warnings[i] = std::mem::take(&mut decoded.warnings);
                let Some((device, place)) = round.find(i) else { return Ok(()) };
                devices.enqueue_image(device, place, &mut decoded, job.pictures.resample)?;
                for device in round.complete(device) {
                    let group = round.groups[device];
                    let slots: Vec<Vec<SlotRows>> = group.iter().map(|&i| places.slots[i].clone()).collect();
                    match observer.trace.as_deref_mut() {
                        None => devices.end_group(device, &slots, None)?,
                        Some(trace) => {
                            let trace = &mut |i: usize, stage, values: &[f16]| trace(group[i], stage, values);
                            devices.end_group(device, &slots, Some(trace))?;
                        }
                    }
                    work.images_encoded += group.len();
                    if let Some(progress) = &mut observer.progress {
                        let share = work.images_encoded as f32 / wanted.len() as f32;
                        if progress(share).is_break() && work.images_encoded < wanted.len() {
                            return Err(Error::Stopped);
                        }
                    }
                }
                Ok(())
            })?;
        }
        work.warnings = warnings.concat();
        Ok(())
    }
}

/// Groups whose images are decoded together, one for each device. They end in order, each as soon as its images
/// and those of the groups before it are there.
struct Round<'g> {
    groups: &'g [&'g [usize]],
    missing: Vec<usize>, // images not there yet, by group
    ended: usize,        // groups
}

impl<'g> Round<'g> {
    fn new(groups: &'g [&'g [usize]]) -> Self {
        Self { groups, missing: groups.iter().map(|group| group.len()).collect(), ended: 0 }
    }

    /// The group of image `i`, and its place in it.
    fn find(&self, i: usize) -> Option<(usize, usize)> {
        let place = |(at, group): (usize, &&[usize])| Some((at, group.iter().position(|&other| other == i)?));
        self.groups.iter().enumerate().find_map(place)
    }

    /// Notes that an image of `group` is there; the groups that end with it.
    fn complete(&mut self, group: usize) -> Range<usize> {
        self.missing[group] -= 1;
        let begin = self.ended;
        while self.missing.get(self.ended) == Some(&0) {
            self.ended += 1;
        }
        begin..self.ended
    }
}

impl Backend for CudaBackend {
    fn describe(&self) -> String {
        self.description.clone()
    }

    fn fill(&self, mut job: Job<'_>, observer: &mut Observer<'_>) -> Result<Work> {
        let start = Instant::now();
        self.check(&job)?;
        let mut devices = lock(&self.devices);
        let hidden = self.config.hidden_size;
        let (mut work, staging, report) =
            devices.with_room(|devices| self.run_on_devices(devices, &job, observer))?;
        let arena = &devices.primary;
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
        Ok(SequenceBuffer::on_device(Box::new(CudaRows::ours(&self.devices))))
    }

    unsafe fn wrap_device(
        &self,
        address: u64,
        elements: usize,
        row_stride: usize,
        stream: usize,
    ) -> Result<SequenceBuffer<'static>> {
        // SAFETY: the caller's promise.
        let rows = unsafe { CudaRows::theirs(&self.devices, address, elements, row_stride, stream)? };
        Ok(SequenceBuffer::on_device(Box::new(rows)))
    }

    fn warm_up(&self, batch_sizes: &[usize]) -> Result<()> {
        lock(&self.devices).with_room(|devices| devices.warm_up(batch_sizes))
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
                "Give a sequence in host memory or in that of the encoder's (first) device",
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
pub(crate) mod tests;
