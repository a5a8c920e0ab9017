//! Features of several images as one file: written by one process, placed by another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use serde::{Deserialize, Serialize};

use super::format::{self, Fault, Stored, not_finite};
use super::{Features, Preprocessing};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::output::parquet::{ImageRow, TableFile};
use crate::warning::Warning;

/// What such a file calls itself.
const KIND: &str = "imagehere features";
/// What to do about a file that cannot be used as it is.
const AGAIN: &str = "Make it again with `imagehere features`";

/// What is known of an image beside its features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ImageNote {
    /// What messages call it: its path, or what stands for one.
    pub name: String,
    /// SHA-256, in hexadecimal, of the pixels that the tower saw: RGB8, `[side, side, 3]`, without gaps.
    pub pixels: String,
    /// What deserved a word when it was prepared; each names the image.
    pub warnings: Vec<Warning>,
}

impl ImageNote {
    pub(crate) fn new(name: String, pixels: String, warnings: Vec<Warning>) -> Self {
        Self { name, pixels, warnings }
    }

    /// Returns the warnings as they would be were the image the one at `index` of a call: messages count images.
    pub fn warnings_at(&self, index: usize) -> Vec<Warning> {
        let counted = |warning: &Warning| {
            let mut warning = warning.clone();
            let told = warning.message.strip_prefix("image ").and_then(|rest| rest.split_once(" ("));
            if let Some((_, rest)) = told.filter(|(place, _)| place.parse::<usize>().is_ok()) {
                warning.message = format!("image {index} ({rest}");
            }
            warning
        };
        self.warnings.iter().map(counted).collect()
    }
}

/// Features of several images, what is known of these, and how they were made: all that a features file holds.
///
/// Made by [`Encoder::feature_set`](crate::Encoder::feature_set).
#[derive(Clone, Debug)]
pub struct FeatureSet {
    features: Vec<Features>, // [N]
    notes: Vec<ImageNote>,   // [N]
    fingerprint: Arc<str>,
    preprocessing: Preprocessing,
    numerics: String,
    warnings: Vec<Warning>,
}

impl FeatureSet {
    /// Joins features and where they come from; `warnings` are those about the weights.
    pub(crate) fn new(
        images: Vec<(Features, ImageNote)>,
        fingerprint: Arc<str>,
        preprocessing: Preprocessing,
        numerics: String,
        warnings: Vec<Warning>,
    ) -> Self {
        let (features, notes) = images.into_iter().unzip();
        Self { features, notes, fingerprint, preprocessing, numerics, warnings }
    }

    /// Returns the features, in the order of the images.
    pub fn features(&self) -> &[Features] {
        &self.features
    }

    /// Returns what is known of each image.
    pub fn notes(&self) -> &[ImageNote] {
        &self.notes
    }

    /// Checks that every value is a number.
    ///
    /// # Errors
    /// [`Error::Incomplete`] naming the first that is NaN or infinite.
    pub fn verify(&self) -> Result<()> {
        for (note, features) in self.notes.iter().zip(&self.features) {
            if let Some(problem) = not_finite(features.as_slice(), features.hidden()) {
                let problem = format!("the features of {} have {problem}", note.name);
                return Err(Error::Incomplete { problem });
            }
        }
        Ok(())
    }

    /// Adds a row for each image to a table.
    ///
    /// # Errors
    /// [`Error::Incomplete`] if a value is NaN or infinite; [`Error::Write`] if the table cannot be written.
    pub fn push_to(&self, table: &mut TableFile) -> Result<()> {
        self.verify()?;
        for (note, features) in self.notes.iter().zip(&self.features) {
            let (name, pixels, checkpoint) = (&note.name, &note.pixels, &*self.fingerprint);
            table.push(&ImageRow { name, pixels, checkpoint, features: features.into() })?;
        }
        Ok(())
    }

    /// Writes one safetensors file, whole or not at all, and returns its bytes.
    ///
    /// `features` F16 `[N, P, H]`; in the metadata the checkpoint's fingerprint, the preprocessing, the numerics of the
    /// device, each image's name, pixel digest and warnings, and digests of everything. The same set makes the same bytes.
    ///
    /// # Errors
    /// [`Error::Write`] if the target cannot be written; nothing is left behind then.
    /// [`Error::Argument`] if there is no image; [`Error::Incomplete`] if a value is NaN or infinite.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<u64> {
        let Some(first) = self.features.first() else {
            return Err(Error::argument("there are no features to write", "Encode an image or more"));
        };
        self.verify()?;
        let metadata = BTreeMap::from([
            ("checkpoint".to_owned(), self.fingerprint.to_string()),
            ("preprocessing".to_owned(), self.preprocessing.to_json()),
            ("numerics".to_owned(), self.numerics.clone()),
            ("images".to_owned(), serde_json::json!(self.notes).to_string()),
            ("warnings".to_owned(), serde_json::json!(self.warnings).to_string()),
        ]);
        let rows: Vec<&[f16]> = self.features.iter().map(Features::as_slice).collect();
        let (file, bytes) = format::stage(path.as_ref(), KIND, metadata, &rows, first.hidden())?;
        file.commit()?;
        Ok(bytes)
    }
}

/// A features file whose header was read and checked; its rows are still in it.
///
/// # Examples
/// ```
/// use imagehere::Encoder;
/// use imagehere::features::FeatureFile;
/// # use imagehere::image::RgbView;
/// # let dir = tempfile::tempdir().unwrap();
/// # let (model, path) = (dir.path().join("model"), dir.path().join("f.safetensors"));
/// # imagehere::synth::write(imagehere::synth::Preset::Tiny, &Default::default(), &model).unwrap();
/// # let pixels = vec![90; 60 * 40 * 3];
/// # let image = RgbView::new(&pixels, 60, 40, 180).unwrap();
///
/// let encoder = Encoder::open(&model)?;
/// let (set, _) = encoder.feature_set(&[image.into()], &mut |_| std::ops::ControlFlow::Continue(()))?;
/// set.save(&path)?;
///
/// // In another process, which needs no tower:
/// let file = FeatureFile::open(&path)?;
/// file.check(encoder.fingerprint(), encoder.config(), &encoder.preprocessing())?;
/// assert_eq!(file.notes()[0].name, "60x40 pixels in memory");
/// assert_eq!(file.read()?[0].as_slice(), set.features()[0].as_slice());
/// # Ok::<(), imagehere::Error>(())
/// ```
#[derive(Debug)]
pub struct FeatureFile {
    path: PathBuf,
    stored: Stored,
    notes: Vec<ImageNote>, // [N]
    fingerprint: Arc<str>,
    preprocessing: Preprocessing,
    numerics: String,
    warnings: Vec<Warning>,
}

impl FeatureFile {
    /// Opens a file and checks its header; reads no rows.
    ///
    /// # Errors
    /// [`Error::Read`] if it cannot be read; [`Error::Features`] if it is no features file, cut, damaged or of another
    /// version.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let stored = format::open(path, KIND).map_err(|fault| refuse(path, fault))?;
        Self::of(path, stored).ok_or_else(|| refuse(path, Fault::Bad("its metadata are not complete".into())))
    }

    /// Takes the metadata apart.
    fn of(path: &Path, stored: Stored) -> Option<Self> {
        fn json<T: serde::de::DeserializeOwned>(text: &str) -> Option<T> {
            serde_json::from_str(text).ok()
        }
        let metadata = &stored.metadata;
        let text = |key: &str| metadata.get(key).map(String::as_str);
        let notes: Vec<ImageNote> = text("images").and_then(json)?;
        if notes.len() != stored.images {
            return None;
        }
        Some(Self {
            path: path.to_path_buf(),
            notes,
            fingerprint: text("checkpoint")?.into(),
            preprocessing: text("preprocessing").and_then(Preprocessing::from_json)?,
            numerics: text("numerics")?.to_owned(),
            warnings: text("warnings").and_then(json)?,
            stored,
        })
    }

    /// Returns what is known of each image, in order.
    pub fn notes(&self) -> &[ImageNote] {
        &self.notes
    }

    /// Returns the fingerprint of the checkpoint that made the features.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Returns the rules by which files became pixels.
    pub fn preprocessing(&self) -> &Preprocessing {
        &self.preprocessing
    }

    /// Names the device and the kernels that made the features, as far as these decide bits: `cpu (avx512)`.
    pub fn numerics(&self) -> &str {
        &self.numerics
    }

    /// Returns what was to be said about the weights when the features were made.
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Checks that the features are those which a checkpoint and these rules would make of the images.
    ///
    /// # Errors
    /// [`Error::Features`] with the first difference and what to do about it.
    pub fn check(
        &self,
        fingerprint: &str,
        config: &ModelConfig,
        preprocessing: &Preprocessing,
    ) -> Result<()> {
        let refuse = |problem: String, remedy: String| {
            Err(Error::Features { path: self.path.clone(), problem, remedy })
        };
        if self.fingerprint() != fingerprint {
            return refuse(
                format!(
                    "checkpoint {} made these features, and this one is {fingerprint}",
                    self.fingerprint.escape_debug()
                ),
                "Use that checkpoint with `--model`, or make the features again with this one".to_owned(),
            );
        }
        if let Some(found) = self.preprocessing.difference(preprocessing) {
            let [rule, has, other] =
                [found.rule, found.has, found.other].map(|text| text.escape_debug().to_string());
            let remedy = match rule.as_str() {
                "exif" | "alpha" | "resample" => format!(
                    "Give `--{rule} {has}` here, too, or make the features again with `--{rule} {other}`"
                ),
                _ => AGAIN.to_owned(),
            };
            return refuse(
                format!("its images were prepared with {rule} `{has}`, and this call has `{other}`"),
                remedy,
            );
        }
        let (has, needs) = ((self.stored.patches, self.stored.hidden), (config.patches, config.hidden_size));
        if has != needs {
            return refuse(
                format!("its images have {has:?} rows and channels, and the model makes {needs:?}"),
                AGAIN.to_owned(),
            );
        }
        Ok(())
    }

    /// Reads all features, in order, each checked as soon as it is there.
    ///
    /// # Errors
    /// [`Error::Read`] if the file cannot be read; [`Error::Features`] if rows are not those that were written, or hold
    /// NaN or an infinity.
    pub fn read(mut self) -> Result<Vec<Features>> {
        let mut features = Vec::new();
        for _ in 0..self.stored.images {
            let rows = self.stored.next_rows().map_err(|fault| refuse(&self.path, fault))?;
            features.push(Features::new(rows, self.stored.hidden, self.fingerprint.clone()));
        }
        Ok(features)
    }
}

/// Says what is wrong with a file and what to do about it.
fn refuse(path: &Path, fault: Fault) -> Error {
    let path = path.to_path_buf();
    let give = "Give a file that `imagehere features` wrote".to_owned();
    match fault {
        Fault::Io(source) => Error::Read { action: "read", path, source, remedy: give },
        Fault::Other(problem) => Error::Features { path, problem, remedy: give },
        Fault::Bad(problem) => Error::Features { path, problem, remedy: AGAIN.to_owned() },
    }
}

#[cfg(test)]
mod tests;
