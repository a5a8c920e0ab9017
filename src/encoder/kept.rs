//! Features that outlive a call: made by pixels, found in a cache, kept in a file.
//!
//! ```text
//!   images ─▶ decode, resize on the host ─▶ squares ─▶ SHA-256 ─▶ cache? ─ found ──────────────────┐
//!                                              │                    └ not ─▶ backend ─▶ cache       ├─▶ rows
//!                                              └ equal squares are one                └────────────┘
//! ```
//!
//! What the backend is given are pixels of the tower's size, which its own resize leaves as they are; it never hears of
//! files. So it is, too, where a profile's images are not stretched: that is made here, and every backend can take it.
//! Features go through host memory here, some images at a time, and are then placed as kept ones are.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use half::f16;
use rayon::prelude::*;

use super::{EncodeReport, Encoder};
use crate::backend::{Job, Observer, ProgressFn};
use crate::error::{Error, Result};
use crate::features::{FeatureSet, Features, ImageNote, Key, Preprocessing, pixel_digest};
use crate::image::{Fit, ImageSource, RgbImage, prepare, share_wall};
use crate::packing::{Block, Content, PackedPlan};
use crate::sequence::{RowsMut, SequenceBuffer};
use crate::warning::{Warning, WarningKind};

/// Images that are looked for, encoded and kept before the next: as many as a GPU takes at once, 160 MB of the published
/// model's features. Who is killed loses no more.
const TOGETHER: usize = 16;

/// An image as the tower sees it.
struct Square {
    pixels: RgbImage, // [side, side, 3]
    digest: String,
    warnings: Vec<Warning>,
}

impl Encoder {
    /// Returns the rules by which this encoder's images become pixels.
    pub fn preprocessing(&self) -> Preprocessing {
        Preprocessing::new(self.config(), &self.decode, self.resample)
    }

    /// Names what decides the bits of an image's rows beside weights and pixels: two encoders of one checkpoint that say
    /// the same make the same rows. `cpu (avx512)`, `cuda (NVIDIA H200, 9.0, sm90 kernels)`.
    pub fn numerics(&self) -> String {
        self.backend.numerics()
    }

    /// Says what made this encoder's features: what a table of them has beside its rows. `format_version`, `version`,
    /// `checkpoint`, `preprocessing` as JSON, `numerics`.
    pub fn provenance(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("format_version".to_owned(), "1".to_owned()),
            ("version".to_owned(), format!("imagehere {}", crate::VERSION)),
            ("checkpoint".to_owned(), self.fingerprint.to_string()),
            ("preprocessing".to_owned(), self.preprocessing().to_json()),
            ("numerics".to_owned(), self.numerics()),
        ])
    }

    /// Encodes images and returns their features with what is known of each: what a features file holds. Images of the
    /// same pixels are encoded once; with a [`FeatureCache`](crate::features::FeatureCache), those that are not in it.
    ///
    /// Calls `progress` now and then with the work done, from 0 to 1, until it breaks.
    ///
    /// # Errors
    /// [`Error::Image`] naming the first image that cannot be used; [`Error::Stopped`].
    pub fn feature_set(
        &self,
        images: &[ImageSource<'_>],
        progress: &mut ProgressFn<'_>,
    ) -> Result<(FeatureSet, EncodeReport)> {
        let (squares, mut report) = self.look_at(images)?;
        let start = Instant::now();
        let features = self.features_of(&squares, &mut report, progress)?;
        report.encode = start.elapsed();
        let note = |(square, source): (Square, &ImageSource<'_>)| {
            ImageNote::new(source.name(), square.digest, square.warnings)
        };
        let notes = squares.into_iter().zip(images).map(note);
        let set = FeatureSet::new(
            features.into_iter().zip(notes).collect(),
            self.fingerprint.clone(),
            self.preprocessing(),
            self.numerics(),
            self.of_weights.clone(),
        );
        Ok((set, report))
    }

    /// As the backend's own way from images to a sequence, with the cache in between.
    pub(super) fn fill_by_pixels(
        &self,
        packed: &PackedPlan<'_>,
        images: &[ImageSource<'_>],
        sequence: &mut SequenceBuffer<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<EncodeReport> {
        let filled = self.look_at(images).and_then(|(squares, mut report)| {
            let start = Instant::now();
            let blocks = self.fill_with(packed, &squares, sequence, &mut report, observer)?;
            report.encode = start.elapsed();
            Ok((blocks, report))
        });
        match filled {
            Ok((blocks, report)) => {
                for block in &blocks {
                    sequence.mark_written(block.offset..block.offset + block.len);
                }
                Ok(report)
            }
            Err(error) => {
                sequence.forget();
                Err(error)
            }
        }
    }

    /// Gives `run` the images as a backend takes them: as they come, or, where the profile does not stretch them, which is
    /// all that backends do, as squares of the tower's size. Returns what it did, and what was done here before.
    pub(super) fn framed<T>(
        &self,
        images: &[ImageSource<'_>],
        run: impl FnOnce(&[ImageSource<'_>]) -> Result<T>,
    ) -> Result<(T, EncodeReport)> {
        match self.config().profile.fit {
            Fit::Stretch => Ok((run(images)?, EncodeReport::default())),
            Fit::CentreCrop => {
                let (squares, report) = self.look_at(images)?;
                let sources: Vec<ImageSource<'_>> =
                    squares.iter().map(|square| (&square.pixels).into()).collect();
                Ok((run(&sources)?, report))
            }
        }
    }

    /// Writes all rows of a packing, some images at a time.
    fn fill_with(
        &self,
        packed: &PackedPlan<'_>,
        squares: &[Square],
        sequence: &mut SequenceBuffer<'_>,
        report: &mut EncodeReport,
        observer: &mut Observer<'_>,
    ) -> Result<Vec<Block>> {
        let (blocks, lent) = self.lay_out(packed, sequence)?;
        let mut texts = Vec::new();
        let mut pictures: Vec<(&Square, Vec<RowsMut<'_>>)> = Vec::new(); // of different pixels
        let mut known: HashMap<&str, usize> = HashMap::new();
        for (block, rows) in blocks.iter().zip(lent) {
            match &block.content {
                Content::Text(ids) => texts.push((ids.as_slice(), rows)),
                Content::Image(image) => {
                    let square = &squares[*image];
                    let place = *known.entry(square.digest.as_str()).or_insert(pictures.len());
                    if place == pictures.len() {
                        pictures.push((square, Vec::new()));
                    }
                    pictures[place].1.push(rows);
                }
            }
        }
        self.place(texts, vec![])?;

        let (all, mut done) = (pictures.len(), 0);
        let mut rest = pictures.into_iter();
        loop {
            let group: Vec<_> = rest.by_ref().take(TOGETHER).collect();
            if group.is_empty() {
                return Ok(blocks);
            }
            let these: Vec<&Square> = group.iter().map(|(square, _)| *square).collect();
            let mut part = |share: f32| {
                let done = (done as f32 + share * these.len() as f32) / all as f32;
                observer.progress.as_mut().map_or(ControlFlow::Continue(()), |progress| progress(done))
            };
            let features = self.find_or_encode(&these, report, &mut part)?;
            if part(1.0).is_break() && done + these.len() < all {
                return Err(Error::Stopped);
            }
            done += these.len();
            let targets = features.iter().zip(group).flat_map(|(features, (_, targets))| {
                targets.into_iter().map(|rows| (features.as_slice(), rows))
            });
            self.place(vec![], targets.collect())?;
        }
    }

    /// Has the backend write rows of text and kept rows.
    fn place(&self, texts: Vec<(&[u32], RowsMut<'_>)>, kept: Vec<(&[f16], RowsMut<'_>)>) -> Result<()> {
        let job = Job { texts, kept, pictures: self.pictures(&[]), targets: vec![] };
        self.install(|| self.backend.fill(job, &mut Observer::default())).map(drop)
    }

    /// Decodes and resizes images on the host and digests their pixels.
    fn look_at(&self, images: &[ImageSource<'_>]) -> Result<(Vec<Square>, EncodeReport)> {
        let start = Instant::now();
        let frame = self.config().frame();
        let look = |(index, source): (usize, &ImageSource<'_>)| {
            let seen = prepare(index, source, frame, self.resample, &self.decode)?;
            let digest = pixel_digest(&seen.pixels.data);
            let times = (seen.decode_time, seen.resize_time);
            Ok((Square { pixels: seen.pixels, digest, warnings: seen.warnings }, times))
        };
        let seen: Vec<Result<_>> =
            self.install(|| images.par_iter().enumerate().map(look).collect::<Vec<_>>());
        let (squares, times): (Vec<Square>, Vec<(Duration, Duration)>) =
            seen.into_iter().collect::<Result<Vec<_>>>()?.into_iter().unzip();

        let warnings = squares.iter().flat_map(|square| square.warnings.clone()).collect();
        let mut report = EncodeReport { warnings, ..EncodeReport::default() };
        let (decode, resize): (Vec<Duration>, Vec<Duration>) = times.into_iter().unzip();
        (report.decode, report.resize) =
            share_wall(start.elapsed(), decode.iter().sum(), resize.iter().sum());
        Ok((squares, report))
    }

    /// The features of squares, equal ones shared.
    fn features_of(
        &self,
        squares: &[Square],
        report: &mut EncodeReport,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Features>> {
        let mut different: Vec<&Square> = Vec::new();
        let mut known: HashMap<&str, usize> = HashMap::new();
        for square in squares {
            known.entry(square.digest.as_str()).or_insert_with(|| {
                different.push(square);
                different.len() - 1
            });
        }
        let (all, mut features) = (different.len(), Vec::with_capacity(different.len()));
        // Without a cache there is nothing to gain by the way.
        for group in different.chunks(self.cache.as_ref().map_or(all, |_| TOGETHER).max(1)) {
            let done = features.len();
            let mut part = |share: f32| progress((done as f32 + share * group.len() as f32) / all as f32);
            features.extend(self.find_or_encode(group, report, &mut part)?);
        }
        Ok(squares.iter().map(|square| features[known[square.digest.as_str()]].clone()).collect())
    }

    /// The features of squares that are all different: from the cache, or encoded and put there.
    fn find_or_encode(
        &self,
        squares: &[&Square],
        report: &mut EncodeReport,
        progress: &mut ProgressFn<'_>,
    ) -> Result<Vec<Features>> {
        let (patches, hidden) = (self.config().patches, self.config().hidden_size);
        let numerics = self.numerics();
        let key = |square: &&Square| Key::new(&self.fingerprint, &numerics, &square.digest);
        let keys: Vec<Key> = squares.iter().map(key).collect();
        let mut features: Vec<Option<Features>> = match &self.cache {
            None => vec![None; squares.len()],
            Some(cache) => {
                let found = |key: &Key| cache.get(key, patches, hidden);
                let found: Vec<_> = self.install(|| keys.par_iter().map(found).collect());
                let made = |rows| Features::new(rows, hidden, self.fingerprint.clone());
                found.into_iter().map(|rows: Option<Vec<f16>>| rows.map(made)).collect()
            }
        };
        let missing: Vec<usize> = (0..squares.len()).filter(|&i| features[i].is_none()).collect();
        report.images_cached += squares.len() - missing.len();
        if !missing.is_empty() {
            let sources: Vec<ImageSource<'_>> =
                missing.iter().map(|&i| (&squares[i].pixels).into()).collect();
            let mut observer = Observer { progress: Some(progress), ..Observer::default() };
            let (encoded, work) = self.encode_squares(&sources, &mut observer)?;
            report.images_encoded += work.images_encoded;
            if let Some(cache) = &self.cache {
                let entries: Vec<(Key, &[f16])> =
                    missing.iter().zip(&encoded).map(|(&i, new)| (keys[i].clone(), new.as_slice())).collect();
                let warning = not_kept(cache.put(&entries, hidden), entries.len(), cache.size());
                // Once is enough, however many groups a call has.
                let told = report.warnings.iter().any(|told| told.kind == WarningKind::FeatureCache);
                report.warnings.extend(warning.filter(|_| !told));
            }
            for (i, new) in missing.into_iter().zip(encoded) {
                features[i] = Some(new);
            }
        }
        let all: Option<Vec<Features>> = features.into_iter().collect();
        all.ok_or_else(|| Error::Internal("an image was neither found nor encoded".to_owned()))
    }
}

/// Says what the cache did not take, and what to do about it.
fn not_kept(kept: Result<usize>, given: usize, size: u64) -> Option<Warning> {
    let message = match kept {
        Ok(kept) if kept < given => Some(format!(
            "the feature cache of {size} bytes kept {kept} of {given} images; give it a larger \
             `--feature-cache-size` to have all of them next time"
        )),
        Ok(_) => None,
        Err(error) => Some(format!("the feature cache does not keep these images: {error}")),
    };
    let message = message?;
    tracing::warn!("{message}"); // who asks for features alone gets no warnings
    Some(Warning::new(WarningKind::FeatureCache, message))
}
