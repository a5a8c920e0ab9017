//! Where features of images go, and how many images are in memory together on their way.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use imagehere::features::FeatureSet;
use imagehere::output::parquet::TableFile;
use imagehere::output::{AtomicFile, Rows, vllm};
use imagehere::{Error, Result};

/// How features of images are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FeatureSink {
    /// One file of this program's own, for `encode --features`
    #[default]
    Safetensors,
    /// For many images: one table with a row for each, for pyarrow, pandas, Spark and Ray
    Parquet,
    /// For vLLM's ECExampleConnector: a directory with an entry for each image, found by the uuid that is printed
    VllmEncoderCache,
}

/// Images that are written as they come.
#[derive(Debug)]
pub enum Bulk {
    /// One file, made of the only group.
    Safetensors { out: PathBuf, bytes: u64 },
    /// A table.
    Parquet { table: Box<TableFile> },
    /// A directory of entries.
    VllmEncoderCache { dir: PathBuf, bytes: u64 },
}

impl FeatureSink {
    /// What the option calls it.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Checks that features could be written there.
    pub fn check(self, out: &Path) -> Result<()> {
        match self {
            Self::Safetensors | Self::Parquet => AtomicFile::check(out),
            Self::VllmEncoderCache => vllm::check_encoder_cache(out),
        }
    }

    /// How many images of `count` are encoded before they are written: one call's worth, where a file can grow.
    pub fn group(self, count: usize) -> usize {
        match self {
            Self::Safetensors => count,
            Self::Parquet | Self::VllmEncoderCache => 32, // 320 MB of the published model's features
        }
    }

    /// Starts to write.
    pub fn begin(self, out: &Path) -> Result<Bulk> {
        let here = || out.to_path_buf();
        Ok(match self {
            Self::Safetensors => Bulk::Safetensors { out: here(), bytes: 0 },
            Self::Parquet => Bulk::Parquet { table: Box::new(TableFile::create(out)?) },
            Self::VllmEncoderCache => Bulk::VllmEncoderCache { dir: here(), bytes: 0 },
        })
    }
}

impl Bulk {
    /// Writes a group of images and returns the uuid of each, where the format gives them one.
    pub fn add(&mut self, set: &FeatureSet) -> Result<Vec<String>> {
        match self {
            Self::Safetensors { out, bytes } => {
                *bytes = set.save(out)?;
                Ok(Vec::new())
            }
            Self::Parquet { table } => {
                set.push_to(table)?;
                Ok(Vec::new())
            }
            Self::VllmEncoderCache { dir, bytes } => {
                set.verify()?;
                let mut uuids = Vec::new();
                for rows in set.features().iter().map(Rows::from) {
                    let uuid = rows.digest();
                    let written = vllm::write_encoder_cache(&dir, &uuid, rows);
                    *bytes += written.map_err(|error| after(error, *bytes))?;
                    uuids.push(uuid);
                }
                Ok(uuids)
            }
        }
    }

    /// Ends what was begun, with what is said of it where there is a place, and returns the bytes written.
    pub fn end(self, metadata: &BTreeMap<String, String>) -> Result<u64> {
        match self {
            Self::Safetensors { bytes, .. } | Self::VllmEncoderCache { bytes, .. } => Ok(bytes),
            Self::Parquet { table } => table.commit(metadata),
        }
    }
}

/// An error about an entry, after others of so many bytes have their names.
fn after(error: Error, bytes: u64) -> Error {
    match error {
        Error::Write { path, source, remedy } if bytes > 0 => Error::Write {
            path,
            source,
            remedy: format!("{remedy}. Entries of images before it are whole, and stay"),
        },
        other => other,
    }
}
