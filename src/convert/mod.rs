//! What encoding needs of a checkpoint, as fp16 safetensors in a directory of its own.
//!
//! ```text
//!   Checkpoint ─▶ which tensor under which name in which file ─▶ 16 MB at a time: read, round, write ─▶ name it all
//!                 layout                                         stream
//! ```
//!
//! Tower, projector and token embedding are taken, the language model is left. No value is rounded twice: the same
//! weights make the same bytes whatever dtype, format and shards they came in, and a directory of
//! [`Layout::Upstream`] encodes to the bits that the original encodes to.
//!
//! # Layouts
//!
//! [`Layout::Upstream`] keeps the names of the published model, so its directory is a checkpoint like any other, to this
//! crate and to upstream's own code:
//!
//! | file | what it holds |
//! |---|---|
//! | `config.json` | the original's, with `torch_dtype` float16 |
//! | `model.safetensors` | `vit.vision_tower.vision_model.*`, `vision_proj.*`, `model.tok_embeddings.weight` |
//! | `tokenizer.model`, … | the original's |
//!
//! [`Layout::ClipVision`] is for the classes of transformers and torch, which load each file as it is:
//!
//! | file | what loads it |
//! |---|---|
//! | `config.json`, `model.safetensors` | `CLIPVisionModel.from_pretrained(DIR)` |
//! | `projector.safetensors` | `Sequential(Linear(C, W), GELU(), Linear(W, H)).load_state_dict` |
//! | `token_embedding.safetensors` | `Embedding(V, H).load_state_dict` |
//! | `tokenizer.model`, … | as before |
//!
//! The tower's features are `hidden_states[-1][:, 1:]`. `post_layernorm`, which upstream has taken out of its checkpoint
//! and nothing here uses, is the original's where it has one and the identity elsewhere; only `pooler_output` depends
//! on it.

mod layout;
mod stream;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::checkpoint::{Checkpoint, ConversionReport, Format, Groups, RangePolicy, conversion_report};
use crate::error::{Error, Result};
use crate::output::{AtomicFile, StagedDir};
use crate::warning::{Warning, WarningKind};

/// Whose names the tensors get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Layout {
    /// The published model's: what [`Checkpoint::open`] reads, and upstream's own code.
    #[default]
    Upstream,
    /// Those of transformers' `CLIPVisionModel`, with projector and token embedding as files beside it.
    ClipVision,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Upstream => "upstream",
            Self::ClipVision => "clip-vision",
        })
    }
}

/// How to convert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvertOptions {
    /// Whose names the tensors get.
    pub layout: Layout,
    /// What happens to values that fp16 cannot hold.
    pub range_policy: RangePolicy,
}

/// What [`write()`] made.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ConvertReport {
    /// The new directory.
    pub dir: PathBuf,
    /// Whose names its tensors have.
    pub layout: Layout,
    /// Its files and their sizes, in bytes.
    pub files: BTreeMap<String, u64>,
    /// Tensors written.
    pub tensors: usize,
    /// Parameters, in elements.
    pub parameters: u64,
    /// Its [`Checkpoint::fingerprint`]; `None` where the layout is no checkpoint's.
    pub fingerprint: Option<String>,
    /// The directory that was converted.
    pub source: PathBuf,
    /// The format of its files.
    pub source_format: Format,
    /// Its [`Checkpoint::fingerprint`].
    pub source_fingerprint: String,
    /// Values that were cut to ±65504.
    pub saturated: u64,
    /// What became of the values.
    #[serde(flatten)]
    pub conversion: ConversionReport,
    /// What deserves a word, of the original and of its values in fp16.
    pub warnings: Vec<Warning>,
}

impl ConvertReport {
    /// Returns the size of all files, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.values().sum()
    }
}

/// What a tokenizer consists of. Only the first two are read here; the others tell transformers how to read them.
const TOKENIZER_FILES: [&str; 5] = [
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];
/// The first of them are enough each.
const TOKENIZERS: usize = 2;

/// Writes what encoding needs of `checkpoint` to the directory `out`, as fp16; `out` must not exist or be empty.
///
/// It appears whole or not at all, once all of it is on the disk. Needs a few tens of megabytes of memory whatever the
/// checkpoint's size, and as many threads as the current [`rayon`] pool has.
///
/// # Errors
/// [`Error::Write`] if `out` is there and not empty, or cannot be written; [`Error::ValueOutOfRange`] with the first
/// value that the range policy refuses; [`Error::Checkpoint`] if a file beside the weights cannot be read. Nothing is
/// left behind then.
///
/// # Numerics
/// As [`Checkpoint::vision_weights`].
///
/// # Examples
/// ```
/// use imagehere::checkpoint::Checkpoint;
/// use imagehere::convert::{self, ConvertOptions};
/// # use imagehere::synth::{self, Preset, SynthOptions};
/// # let dir = tempfile::tempdir().unwrap();
/// # let (model, fp16) = (dir.path().join("model"), dir.path().join("fp16"));
/// # synth::write(Preset::Tiny, &SynthOptions::default(), &model)?;
///
/// let report = convert::write(&Checkpoint::open(&model)?, ConvertOptions::default(), &fp16)?;
/// assert_eq!(report.saturated, 0);
/// assert_eq!(Checkpoint::open(&fp16)?.config(), Checkpoint::open(&model)?.config());
/// # Ok::<(), imagehere::Error>(())
/// ```
pub fn write(
    checkpoint: &Checkpoint,
    options: ConvertOptions,
    out: impl AsRef<Path>,
) -> Result<ConvertReport> {
    write_watched(checkpoint, options, out, &mut |_| ())
}

/// As [`write()`], calling `progress` now and then with the work done, from 0 to 1.
///
/// # Errors
/// As [`write()`].
pub fn write_watched(
    checkpoint: &Checkpoint,
    options: ConvertOptions,
    out: impl AsRef<Path>,
    progress: &mut dyn FnMut(f32),
) -> Result<ConvertReport> {
    let out = out.as_ref();
    let ConvertOptions { layout, range_policy } = options;
    let staged = StagedDir::create(out)?;
    let files = layout::files(checkpoint, layout)?;
    let all = || files.iter().flat_map(|file| &file.parts);
    let parameters: u64 = all().map(|part| part.elements() as u64).sum();

    let mut written = BTreeMap::new();
    let (mut groups, mut done) = (Groups::default(), 0);
    let mut buffer = stream::buffer(checkpoint.dir())?;
    for file in &files {
        let mut sink = staged.file(file.name)?;
        let bytes =
            stream::write(file, range_policy, &mut buffer, &mut sink, &mut groups, &mut |elements| {
                done += elements as u64;
                progress(done as f32 / parameters as f32);
            })?;
        sink.commit()?;
        written.insert(file.name.to_owned(), bytes);
    }
    drop(buffer);

    let mut small =
        vec![(layout::CONFIG, format!("{:#}\n", layout::config(checkpoint, layout)?).into_bytes())];
    for name in TOKENIZER_FILES {
        small.extend(checkpoint.file_beside(name)?.map(|bytes| (name, bytes)));
    }
    for (name, bytes) in &small {
        let mut file = staged.file(name)?;
        write_whole(&mut file, bytes)?;
        file.commit()?;
        written.insert((*name).to_owned(), bytes.len() as u64);
    }

    let fingerprint = match layout {
        Layout::Upstream => Some(reopen(&staged)?),
        Layout::ClipVision => None,
    };
    let conversion = conversion_report(groups, range_policy);
    let mut warnings = checkpoint.warnings().to_vec();
    warnings.extend(conversion.warnings());
    if !small.iter().any(|(name, _)| TOKENIZER_FILES[..TOKENIZERS].contains(name)) {
        let message = format!(
            "{}: there is no tokenizer beside the weights, so there is none beside the new ones; encoding needs \
             upstream's tokenizer.model there",
            checkpoint.dir().display()
        );
        warnings.push(Warning::new(WarningKind::Checkpoint, message));
    }
    let report = ConvertReport {
        dir: out.to_path_buf(),
        layout,
        files: written,
        tensors: all().count(),
        parameters,
        fingerprint,
        source: checkpoint.dir().to_path_buf(),
        source_format: checkpoint.format(),
        source_fingerprint: checkpoint.fingerprint().to_owned(),
        saturated: conversion.saturated(),
        conversion,
        warnings,
    };
    staged.commit()?;
    tracing::info!(dir = %out.display(), %layout, bytes = report.bytes(), "checkpoint converted");
    Ok(report)
}

fn write_whole(file: &mut AtomicFile, bytes: &[u8]) -> Result<()> {
    file.write_all(bytes).map_err(|e| file.failed(e))
}

/// Opens the new checkpoint before anybody sees it, and returns its fingerprint.
fn reopen(staged: &StagedDir) -> Result<String> {
    let reopened = Checkpoint::open(staged.path())
        .map_err(|e| Error::Internal(format!("the converted checkpoint does not open: {e}")))?;
    Ok(reopened.fingerprint().to_owned())
}
