//! What is in a checkpoint: the report behind `imagehere inspect`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use super::convert::ValueStats;
use super::dtype::Format;
use super::printable;
use super::report::{GroupStats, Groups, table};
use super::shard::Shard;
use super::tensor::Tensor;
use super::{Checkpoint, refuse_expansion, refuse_quantised, total_len};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::warning::Warning;

/// Elements surveyed by one task.
const CHUNK: usize = 1 << 20;

/// What was found in a checkpoint directory. [`fmt::Display`] gives the tables that a user reads.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct CheckpointReport {
    /// The directory.
    pub dir: String,
    /// The format of its files.
    pub format: Format,
    /// The sizes of the model.
    pub config: ModelConfig,
    /// See [`Checkpoint::fingerprint`].
    pub fingerprint: String,
    /// The tokenizer's file.
    pub tokenizer: Option<&'static str>,
    /// The files with weights, in the order of their names.
    pub shards: Vec<ShardReport>,
    /// Tensors listed, in the index if there is one.
    pub tensors: usize,
    /// Of these, the tensors that encoding needs.
    pub needed: usize,
    /// Elements of the needed tensors.
    pub needed_elements: u64,
    /// Tensors by dtype, as the files name it, in all files that were opened.
    pub dtypes: BTreeMap<String, usize>,
    /// Tensors that are there, not needed, and known to be harmless.
    pub optional: Vec<String>,
    /// Whether all tensors were read, or the needed ones.
    pub all: bool,
    /// The tensors that were read, by group.
    pub groups: Vec<GroupStats>,
    /// With `all`: tensors of a dtype that does not become fp16, which were not read.
    pub unread: Vec<UnreadTensor>,
    /// See [`Checkpoint::warnings`].
    pub warnings: Vec<Warning>,
}

/// One weights file.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ShardReport {
    /// Its name in the directory.
    pub file: String,
    /// Its length, in bytes; `None` if it is not there.
    pub bytes: Option<u64>,
    /// Tensors that it holds, or that the index says it holds.
    pub tensors: usize,
    /// Of these, the needed ones.
    pub needed: usize,
}

/// A tensor that was not read.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct UnreadTensor {
    /// Its name.
    pub name: String,
    /// Its dtype, as the file names it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

pub(crate) fn inspect(checkpoint: &Checkpoint, all: bool) -> Result<CheckpointReport> {
    let Checkpoint { dir, config, names, format, tensors: needed, shards, index, warnings, seed, .. } =
        checkpoint;

    // Files beyond those that are open, as the index lists them.
    let mut more = Vec::new();
    let mut reports: Vec<ShardReport> = Vec::new();
    for file in other_files(shards, index.as_ref()) {
        let path = dir.join(file);
        let there = path.metadata().ok();
        let listed = index.iter().flatten().filter(|(_, f)| *f == file).count();
        let bytes = there.as_ref().map(std::fs::Metadata::len);
        reports.push(ShardReport { file: printable(file), bytes, tensors: listed, needed: 0 });
        if all && there.is_some() {
            let shard = Shard::open(&path, *format)?;
            refuse_quantised(shard.table().keys().map(String::as_str), &path)?;
            more.push(shard);
        }
    }
    for shard in shards {
        reports.push(ShardReport {
            file: printable(&file_name(shard.path())),
            bytes: Some(shard.len() as u64),
            tensors: shard.table().len(),
            needed: shard.table().keys().filter(|name| needed.contains_key(*name)).count(),
        });
    }
    reports.sort_by(|a, b| a.file.cmp(&b.file));

    // The needed tensors in the order of the data's journey, then the others by name.
    let mut read: Vec<Tensor> =
        names.needed(config.layers).iter().filter_map(|(name, _)| needed.get(name)).cloned().collect();
    let mut unread = Vec::new();
    let (mut dtypes, mut optional) = (BTreeMap::new(), Vec::new());
    for shard in shards.iter().chain(&more) {
        for (name, entry) in shard.table() {
            *dtypes.entry(entry.dtype.name(*format)).or_insert(0) += 1;
            if names.is_optional(name) {
                optional.push(printable(name));
            }
            if !all || needed.contains_key(name) {
                continue;
            }
            match shard.tensor(name) {
                Ok(tensor) => read.push(tensor),
                Err(Error::DType { tensor, dtype, .. }) => {
                    unread.push(UnreadTensor { name: tensor, dtype, shape: entry.shape.clone() });
                }
                Err(error) => return Err(error),
            }
        }
    }
    refuse_expansion(dir, read.iter(), total_len(shards.iter().chain(&more)))?;
    let listed = match index {
        Some(index) => index.len(),
        None => shards.iter().map(|shard| shard.table().len()).sum(),
    };
    Ok(CheckpointReport {
        dir: dir.display().to_string(),
        format: *format,
        config: config.clone(),
        fingerprint: checkpoint.fingerprint().to_owned(),
        tokenizer: seed.tokenizer(),
        shards: reports,
        tensors: listed,
        needed: needed.len(),
        needed_elements: needed.values().map(|tensor| tensor.elements() as u64).sum(),
        dtypes,
        optional,
        all,
        groups: survey(&read),
        unread,
        warnings: warnings.clone(),
    })
}

/// The files of an index that hold no needed tensor.
fn other_files<'a>(shards: &[Shard], index: Option<&'a BTreeMap<String, String>>) -> Vec<&'a str> {
    let open: Vec<String> = shards.iter().map(|shard| file_name(shard.path())).collect();
    let mut files: Vec<&str> = index.into_iter().flatten().map(|(_, file)| file.as_str()).collect();
    files.sort_unstable();
    files.dedup();
    files.retain(|file| !open.iter().any(|open| open == file));
    files
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Reads tensors in parallel, and counts.
fn survey(tensors: &[Tensor]) -> Vec<GroupStats> {
    let chunks = |(i, tensor): (usize, &Tensor)| {
        let elements = tensor.elements();
        (0..elements)
            .step_by(CHUNK)
            .map(move |first| (i, first..elements.min(first + CHUNK)))
            .collect::<Vec<_>>()
    };
    let tasks: Vec<_> = tensors.iter().enumerate().flat_map(chunks).collect();
    let done: Vec<(usize, ValueStats)> = tasks
        .into_par_iter()
        .map(|(i, range)| {
            let stats = tensors[i].survey(range.clone());
            tensors[i].release(range);
            (i, stats)
        })
        .collect();
    let mut totals = vec![ValueStats::default(); tensors.len()];
    done.iter().for_each(|(i, stats)| totals[*i].merge(stats));
    let mut groups = Groups::default();
    for (tensor, stats) in tensors.iter().zip(&totals) {
        groups.add(tensor.name(), tensor.dtype(), stats);
    }
    groups.into_vec()
}

impl fmt::Display for CheckpointReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.config;
        let format = match self.format {
            Format::Safetensors => "safetensors",
            Format::Bin => "torch zip (.bin)",
        };
        writeln!(f, "checkpoint    {}", self.dir)?;
        writeln!(f, "profile       {} ({})", c.profile, c.profile.title)?;
        writeln!(f, "format        {format}")?;
        writeln!(f, "tokenizer     {}", self.tokenizer.unwrap_or("none"))?;
        writeln!(f, "fingerprint   {}", self.fingerprint)?;
        writeln!(
            f,
            "image         {} px, patches of {} px, grid {}x{}",
            c.image_size, c.patch_size, c.grid, c.grid
        )?;
        writeln!(f, "slot          {} positions per image", c.patches)?;
        writeln!(
            f,
            "tower         {} layers, width {}, {} heads, MLP {}",
            c.layers, c.width, c.heads, c.mlp_width
        )?;
        writeln!(f, "projector     {} -> {} -> {}", c.width, c.projector_width, c.hidden_size)?;
        writeln!(f, "embeddings    {} x {}", c.vocab_size, c.hidden_size)?;
        let limit = |limit: Option<usize>| limit.map_or("not given".into(), |n| format!("{n} positions"));
        writeln!(f, "max_length    {}", limit(c.max_length))?;
        writeln!(f, "max positions {}", limit(c.max_position_embeddings))?;

        let dtypes: Vec<String> = self.dtypes.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let (tensors, needed, elements) = (self.tensors, self.needed, self.needed_elements);
        writeln!(f, "tensors       {tensors}, {needed} needed ({elements} values); {}", dtypes.join(", "))?;
        if !self.optional.is_empty() {
            writeln!(f, "optional      {}", self.optional.join(", "))?;
        }
        for shard in &self.shards {
            let bytes = shard.bytes.map_or("not there".into(), |bytes| format!("{bytes} bytes"));
            writeln!(
                f,
                "file          {}: {bytes}, {} tensors, {} needed",
                shard.file, shard.tensors, shard.needed
            )?;
        }

        writeln!(f)?;
        table(&self.groups, f)?;
        for UnreadTensor { name, dtype, shape } in &self.unread {
            writeln!(f, "not read: {name} {shape:?} of dtype {dtype}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}
