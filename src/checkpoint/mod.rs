//! A checkpoint directory as the Hub holds it: files mapped, names and shapes checked, weights as fp16.
//!
//! ```text
//!  config.json ────────────────────┐
//!  *.index.json ─▶ which shards    ├─▶ ModelConfig        sizes from shapes, checked against config.json
//!  shard, mapped ─▶ table ─▶ Tensor┤
//!                                  ├─▶ VisionWeights      tower and projector, converted once, in parallel
//!                                  └─▶ EmbeddingTable     rows converted when they are asked for
//! ```
//!
//! [`Checkpoint::open`] maps and checks, and touches no weight; [`Checkpoint::vision_weights`] converts.
//!
//! # What it reads
//!
//! - `model.safetensors`, or shards with `model.safetensors.index.json`;
//! - `pytorch_model.bin`, or shards with `pytorch_model.bin.index.json`: the zip archives of `torch.save`,
//!   zip64 included, read with a restricted pickle interpreter that executes nothing.
//!
//! Safetensors are preferred where both are there. Only the shards that hold needed tensors must be there.
//! The files may be links, as in the Hub's cache; the names in an index must be plain names. The
//! dtypes bf16, f16 and f32 become fp16; every other is refused by name, and so are quantised checkpoints.
//!
//! # Distrust
//!
//! A file is checked where it enters: every later access is to elements that were seen to lie in it. What a
//! file declares is never allocated on its word, and weights may not expand to much more than the files
//! hold (a view can repeat one element any number of times).

mod convert;
mod dtype;
mod embedding;
mod fingerprint;
pub(crate) mod fuzzing;
mod index;
mod inspect;
mod load;
mod mapped;
pub(crate) mod names;
mod pickle;
mod preprocessor;
mod report;
mod safetensors;
mod shard;
#[cfg(test)]
#[path = "../../tests/checkpoint_support/mod.rs"]
mod support;
mod tensor;
mod torch_zip;
pub mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub use self::convert::{RangePolicy, ValueStats};
pub use self::dtype::{DType, Format};
pub use self::embedding::EmbeddingTable;
use self::fingerprint::Seed;
use self::index::{ConfigFile, FileLayout, WeightFiles};
pub use self::inspect::{CheckpointReport, ShardReport, UnreadTensor};
pub use self::report::{ConversionReport, GroupStats};
pub(crate) use self::report::{Groups, conversion_report};
use self::shard::Shard;
pub(crate) use self::tensor::Tensor;
use self::weights::VisionWeights;
use crate::config::{ModelConfig, TensorNames};
use crate::error::{Error, Result};
use crate::warning::{Warning, WarningKind};

/// The longest file beside the weights that is read, in bytes.
const MAX_BESIDE: u64 = 256 << 20;
const QUANTISED_REMEDY: &str = "Use the original checkpoint in bf16, f16 or f32";
/// Tensors may take this many times the bytes of the files that hold them, as fp16 …
const MAX_EXPANSION: usize = 4;
/// … and this many bytes more.
const EXPANSION_SLACK: usize = 64 << 20;

/// A checkpoint directory, mapped and checked.
///
/// Its files stay open while it lives, and while an [`EmbeddingTable`] of it does. They must not be shortened
/// meanwhile. Weights that are no longer there when they are read are an error on Unix; but a table, a sample for the
/// fingerprint, a survey or weights on their way to a GPU are looked at where the file is mapped, and there a part that
/// is no longer there ends the process (SIGBUS), as it does every program that maps files. Replacing a file by renaming
/// another over it is safe.
///
/// # Examples
/// ```no_run
/// use imagehere::checkpoint::{Checkpoint, RangePolicy};
///
/// let checkpoint = Checkpoint::open("internlm-xcomposer2-vl-7b")?;
/// println!("{} pixels, {} rows per image", checkpoint.config().image_size, checkpoint.config().patches);
/// let (weights, report) = checkpoint.vision_weights(RangePolicy::Refuse)?;
/// assert_eq!(weights.layers.len(), checkpoint.config().layers);
/// for warning in report.warnings() {
///     eprintln!("{warning}");
/// }
/// # Ok::<(), imagehere::Error>(())
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    /// What its tensors are called.
    names: &'static TensorNames,
    format: Format,
    /// The needed tensors, by name.
    tensors: BTreeMap<String, Tensor>,
    /// The files that hold them.
    shards: Vec<Shard>,
    /// The index, where the weights lie in several files.
    index: Option<BTreeMap<String, String>>,
    warnings: Vec<Warning>,
    seed: Seed,
    fingerprint: OnceLock<String>,
}

impl Checkpoint {
    /// Opens a checkpoint directory: maps the files with needed tensors, reads their tables, checks that
    /// names, shapes and `config.json` agree.
    ///
    /// No weight is touched, so this costs milliseconds whatever the checkpoint's size.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the directory or a file of it is missing, broken, a git-lfs pointer, in the
    /// legacy format of `torch.save`, quantised, or asks for more than tensors; if a needed tensor is missing;
    /// if shapes disagree with each other or with `config.json`. [`Error::DType`] if a needed tensor is not
    /// bf16, f16 or f32. The message names the file, both sides of a disagreement, and what to do.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            let problem = if dir.exists() { "this is not a directory" } else { "there is no such directory" };
            return Err(Error::checkpoint(
                dir,
                problem,
                "Give the directory that holds config.json and the weights",
            ));
        }
        let config_file = ConfigFile::read(dir)?;
        let WeightFiles { format, layout, unread } = WeightFiles::find(dir)?;

        let (shards, found, index) = match layout {
            FileLayout::Single(path) => {
                let shard = Shard::open(&path, format)?;
                let found = read_single(&shard, &config_file)?;
                (vec![shard], found, None)
            }
            FileLayout::Sharded { path, files } => {
                let (shards, found) = read_sharded(dir, format, &path, &files, &config_file)?;
                (shards, found, Some(files))
            }
        };
        let Found { names, layers, tensors } = found;
        let shape_of = |name: &str| tensors.get(name).map(|tensor| (tensor.shape(), tensor.file().path()));
        let config = names::read_sizes(layers, names, &config_file, shape_of)?;
        if config.profile.has_preprocessor {
            preprocessor::check(dir, &config)?;
        }
        refuse_expansion(dir, tensors.values(), total_len(shards.iter()))?;

        let mut warnings = Vec::new();
        if let Some(unread) = unread {
            let read = if format == Format::Safetensors { "safetensors" } else { ".bin" };
            let message =
                format!("{}: the weights are there twice; read {read}, not {unread}", dir.display());
            warnings.push(Warning::new(WarningKind::Checkpoint, message));
        }
        let seed = Seed::read(dir, &config_file.bytes)?;
        tracing::debug!(dir = %dir.display(), ?format, shards = shards.len(), ?config, "checkpoint opened");
        let dir = dir.to_owned();
        let fingerprint = OnceLock::new();
        Ok(Self { dir, config, names, format, tensors, shards, index, warnings, seed, fingerprint })
    }

    /// Returns the sizes of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the directory, as it was given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the format of the files that are read.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns what deserves a word about the directory. What conversion did to values is
    /// [`ConversionReport::warnings`].
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Returns the fingerprint: a SHA-256, in hexadecimal, of `config.json`, the tokenizer's file, the needed
    /// tensors' names, dtypes and shapes, and a fixed sample of their elements.
    ///
    /// Made when first asked for, from a few hundred kilobytes. The same weights have the same fingerprint in
    /// either format and in any number of shards. Two checkpoints that differ only in elements that are not
    /// in the sample share one.
    pub fn fingerprint(&self) -> &str {
        self.fingerprint.get_or_init(|| self.seed.fingerprint(self.tensors.values()))
    }

    /// Converts tower and projector to fp16, rounding to nearest even, on all threads of the current
    /// [`rayon`] pool.
    ///
    /// The pages that were read are given back to the page cache, so the memory needed is that of the result.
    ///
    /// # Errors
    /// [`Error::ValueOutOfRange`] with the first value, in the order of [`VisionWeights`], that `policy`
    /// refuses; [`Error::Checkpoint`] if there is not enough memory.
    ///
    /// # Numerics
    /// One rounding per value, to nearest even, from the value as stored; subnormals are kept. A magnitude
    /// above 65504 does not fit, also where rounding would lead back to it.
    pub fn vision_weights(&self, policy: RangePolicy) -> Result<(VisionWeights, ConversionReport)> {
        load::vision_weights(&self.dir, &self.config, self.names, &self.tensors, policy)
    }

    /// Returns the tensors of tower and projector as they are stored, for a device that converts them.
    #[cfg(feature = "cuda")]
    pub(crate) fn stored_weights(&self) -> Result<weights::VisionWeights<Vec<&Tensor>>> {
        load::stored_weights(&self.config, self.names, &self.tensors)
    }

    /// Returns the token embedding table, which refuses values that fp16 cannot hold; see
    /// [`EmbeddingTable::with_policy`].
    pub fn embedding(&self) -> EmbeddingTable {
        EmbeddingTable::new(self.tensors[&self.names.token_embedding()].clone())
    }

    /// Returns what the tensors are called.
    pub(crate) fn names(&self) -> &'static TensorNames {
        self.names
    }

    /// Returns the needed tensors, in the order of the data's journey.
    pub(crate) fn needed(&self) -> Vec<&Tensor> {
        let needed = self.names.needed(self.config.layers);
        needed.iter().filter_map(|(name, _)| self.tensors.get(name)).collect()
    }

    /// Returns a tensor that is not needed, if it is there.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], about this tensor and its file.
    pub(crate) fn optional(&self, name: &str) -> Result<Option<Tensor>> {
        let open = self.shards.iter().find(|shard| shard.table().contains_key(name));
        if let Some(shard) = open {
            return shard.tensor(name).map(Some);
        }
        let path = self.index.iter().flatten().find(|(listed, _)| *listed == name);
        let path = path.map(|(_, file)| self.dir.join(file)).filter(|path| path.exists());
        path.map(|path| Shard::open(&path, self.format)?.tensor(name)).transpose()
    }

    /// Reads a small file of the directory whole; `None` if it is not there.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is there and cannot be read, is empty, or is a git-lfs pointer.
    pub(crate) fn file_beside(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.dir.join(name);
        // A link counts even where it leads nowhere: opening it then says so.
        path.symlink_metadata().is_ok().then(|| mapped::read_small(&path, MAX_BESIDE)).transpose()
    }

    /// Reads the needed tensors, or `all` that are there, and reports what was found.
    ///
    /// Reads every byte of these tensors, on all threads of the current [`rayon`] pool. Values that fp16
    /// cannot hold are counted, not refused.
    ///
    /// # Errors
    /// With `all`: [`Error::Checkpoint`] if a shard that was not needed so far is broken. Shards that are not
    /// there are reported as absent.
    pub fn inspect(&self, all: bool) -> Result<CheckpointReport> {
        inspect::inspect(self, all)
    }
}

/// The tensors that a checkpoint's files turned out to have.
struct Found {
    names: &'static TensorNames,
    layers: usize,
    /// The needed ones, by name.
    tensors: BTreeMap<String, Tensor>,
}

/// Takes the needed tensors out of a single file.
fn read_single(shard: &Shard, config: &ConfigFile) -> Result<Found> {
    let all = || shard.table().keys().map(String::as_str);
    refuse_quantised(all(), shard.path())?;
    let names = names::choose(config.profile, all());
    let missing =
        |name: &str| names::missing(all(), name, config.profile, names, shard.path(), shard.nested());
    if all().next().is_none() && !shard.nested().is_empty() {
        return Err(missing(&names.token_embedding()));
    }
    let layers = names::count_layers(all(), names, config, shard.path())?;
    let mut tensors = BTreeMap::new();
    for (name, _) in names.needed(layers) {
        if !shard.table().contains_key(&name) {
            return Err(missing(&name));
        }
        tensors.insert(name.clone(), shard.tensor(&name)?);
    }
    Ok(Found { names, layers, tensors })
}

/// Opens the shards that hold needed tensors, and takes those out of them.
fn read_sharded(
    dir: &Path,
    format: Format,
    index: &Path,
    files: &BTreeMap<String, String>,
    config: &ConfigFile,
) -> Result<(Vec<Shard>, Found)> {
    let all = || files.keys().map(String::as_str);
    refuse_quantised(all(), index)?;
    let names = names::choose(config.profile, all());
    let layers = names::count_layers(all(), names, config, index)?;
    let needed = names.needed(layers);
    let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, _) in &needed {
        let file =
            files.get(name).ok_or_else(|| names::missing(all(), name, config.profile, names, index, &[]))?;
        by_file.entry(file).or_default().push(name);
    }

    let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
    for (file, wanted) in by_file {
        let path = dir.join(file);
        if path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            let problem = format!(
                "the shard is not there, but {} needs {} tensors of it",
                index.display(),
                wanted.len()
            );
            return Err(Error::checkpoint(
                path,
                problem,
                format!("Download it; `{}` is one of them", wanted[0]),
            ));
        }
        let shard = Shard::open(&path, format)?;
        refuse_quantised(shard.table().keys().map(String::as_str), &path)?;
        for name in wanted {
            if !shard.table().contains_key(name) {
                let problem =
                    format!("{} says that tensor `{name}` lies here, but it does not", index.display());
                return Err(Error::checkpoint(path, problem, "Use an index and shards that belong together"));
            }
            tensors.insert(name.to_owned(), shard.tensor(name)?);
        }
        shards.push(shard);
    }
    Ok((shards, Found { names, layers, tensors }))
}

/// Refuses a table with tensors of a quantisation method in it.
fn refuse_quantised<'a>(mut names: impl Iterator<Item = &'a str>, path: &Path) -> Result<()> {
    match names.find_map(|name| Some((name, names::quantised_by(name)?))) {
        None => Ok(()),
        Some((name, method)) => {
            let name = printable(name);
            let problem = format!("the checkpoint is quantised: tensor `{name}` is one of {method}");
            Err(Error::checkpoint(path, problem, QUANTISED_REMEDY))
        }
    }
}

/// Refuses tensors that would take far more memory or time than their files hold: views that repeat
/// elements. `held` is what the files have, in bytes.
fn refuse_expansion<'t>(dir: &Path, tensors: impl Iterator<Item = &'t Tensor>, held: usize) -> Result<()> {
    let converted = |tensor: &Tensor| tensor.elements().saturating_mul(size_of::<half::f16>());
    let needed = tensors.map(converted).fold(0, usize::saturating_add);
    if needed > held.saturating_mul(MAX_EXPANSION).saturating_add(EXPANSION_SLACK) {
        let problem = format!(
            "its tensors would take {needed} bytes, but the files have only {held}: they repeat their elements"
        );
        return Err(Error::checkpoint(dir, problem, "Save the checkpoint with contiguous tensors"));
    }
    Ok(())
}

/// The length of files together, in bytes.
fn total_len<'s>(shards: impl Iterator<Item = &'s Shard>) -> usize {
    shards.map(Shard::len).fold(0, usize::saturating_add)
}

/// A name from a file as a message may show it: short, and with control characters escaped.
fn printable(name: &str) -> String {
    const LIMIT: usize = 120;
    let mut shown: String = name.chars().take(LIMIT).flat_map(char::escape_debug).collect();
    if name.chars().nth(LIMIT).is_some() {
        shown.push('…');
    }
    shown
}
