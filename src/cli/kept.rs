//! The files of `--features`, as one list of images.

use std::path::PathBuf;

use imagehere::checkpoint::Checkpoint;
use imagehere::features::{FeatureFile, Features, ImageNote, Preprocessing};
use imagehere::image::{DecodeOptions, Resample};
use imagehere::{Result, Warning};

/// Features in files, opened and not yet read.
pub struct Kept {
    files: Vec<FeatureFile>,
}

impl Kept {
    /// Opens all files and checks their headers.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        Ok(Self { files: paths.iter().map(FeatureFile::open).collect::<Result<_>>()? })
    }

    /// What the images are called.
    pub fn names(&self) -> Vec<String> {
        self.notes().map(|note| note.name.clone()).collect()
    }

    /// Checks that the checkpoint and the rules of the call would make the same of the images.
    pub fn check(&self, checkpoint: &Checkpoint, decode: &DecodeOptions, resample: Resample) -> Result<()> {
        let rules = Preprocessing::new(checkpoint.config(), decode, resample);
        self.files.iter().try_for_each(|f| f.check(checkpoint.fingerprint(), checkpoint.config(), &rules))
    }

    /// What was said about the weights when they were loaded, once.
    pub fn of_weights(&self) -> Vec<Warning> {
        let mut all: Vec<Warning> = Vec::new();
        for warning in self.files.iter().flat_map(|file| file.warnings()) {
            if !all.contains(warning) {
                all.push(warning.clone());
            }
        }
        all
    }

    /// What was said about the images, each counted by its place among all.
    pub fn of_images(&self) -> Vec<Warning> {
        self.notes().enumerate().flat_map(|(place, note)| note.warnings_at(place)).collect()
    }

    /// Reads all features.
    pub fn read(self) -> Result<Vec<Features>> {
        let mut all = Vec::new();
        for file in self.files {
            all.extend(file.read()?);
        }
        Ok(all)
    }

    fn notes(&self) -> impl Iterator<Item = &ImageNote> {
        self.files.iter().flat_map(|file| file.notes())
    }
}
