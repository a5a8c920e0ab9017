//! Which files hold the weights, and the small JSON files beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::dtype::Format;
use super::mapped::read_small;
use super::printable;
use crate::config::{PROFILES, Profile, Size};
use crate::error::{Error, Result};

/// Longest `config.json`, in bytes.
const MAX_CONFIG: u64 = 4 << 20;
/// Longest index of shards, in bytes; that of the 7B checkpoint has 93 kB.
const MAX_INDEX: u64 = 64 << 20;

/// The single file and the index of each format, the preferred one first.
const NAMES: [(Format, &str, &str); 2] = [
    (Format::Safetensors, "model.safetensors", "model.safetensors.index.json"),
    (Format::Bin, "pytorch_model.bin", "pytorch_model.bin.index.json"),
];

/// Where a directory's weights lie.
#[derive(Debug)]
pub(crate) struct WeightFiles {
    pub format: Format,
    pub layout: FileLayout,
    /// A file of another format that lies there as well, and is not read.
    pub unread: Option<&'static str>,
}

/// One file, or several with an index.
#[derive(Debug)]
pub(crate) enum FileLayout {
    /// All tensors in this file.
    Single(PathBuf),
    /// Tensors spread over files.
    Sharded {
        /// The index.
        path: PathBuf,
        /// File name by tensor.
        files: BTreeMap<String, String>,
    },
}

impl WeightFiles {
    /// Finds the weights of a checkpoint directory: safetensors before `.bin`, one file before several.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there are none, or if the index cannot be used.
    pub fn find(dir: &Path) -> Result<Self> {
        // A link counts even where it leads nowhere: opening it then says so.
        let there = |name: &str| dir.join(name).symlink_metadata().is_ok();
        let mut found = NAMES.iter().filter(|(_, single, index)| there(single) || there(index));
        let Some(&(format, single, index)) = found.next() else {
            return Err(nothing_found(dir));
        };
        let unread = found.next().map(|(_, single, index)| if there(single) { *single } else { *index });
        let layout = if there(single) {
            FileLayout::Single(dir.join(single))
        } else {
            let path = dir.join(index);
            let files = parse_index(&path, &read_small(&path, MAX_INDEX)?)?;
            FileLayout::Sharded { path, files }
        };
        Ok(Self { format, layout, unread })
    }
}

fn nothing_found(dir: &Path) -> Error {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| printable(&entry.file_name().to_string_lossy()))
        .collect();
    names.sort();
    if let Some(name) =
        names.iter().find(|name| name.starts_with("gptq_model") || *name == "quantize_config.json")
    {
        let problem = format!("it holds a quantised checkpoint (`{name}`)");
        return Error::checkpoint(dir, problem, super::QUANTISED_REMEDY);
    }
    let more = if names.len() > 8 { ", …" } else { "" };
    names.truncate(8);
    let found = if names.is_empty() { "nothing".into() } else { format!("{}{more}", names.join(", ")) };
    let problem = format!("there are no weights in it; found {found}");
    let remedy = "Give the directory that holds model.safetensors, pytorch_model.bin, or the index of either";
    Error::checkpoint(dir, problem, remedy)
}

/// Takes an index of shards apart: `{"weight_map": {tensor: file}}`.
pub(super) fn parse_index(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(bytes).map_err(|error| {
        Error::checkpoint(path, format!("it is no index of shards: {error}"), "Download the file again")
    })?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    for name in names {
        if !is_plain_file_name(name) {
            let problem = format!(
                "it names the shard `{}`, which is not a plain file name in its directory",
                printable(name)
            );
            return Err(Error::checkpoint(
                path,
                problem,
                "Use the index as the Hub holds it, with the shards beside it",
            ));
        }
    }
    Ok(index.weight_map)
}

/// Whether a name stays in its directory on every platform.
pub(super) fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':', '\0'])
}

/// What `config.json` says: of which profile the checkpoint is, and its sizes.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
    pub profile: &'static Profile,
    /// By what they are, those that are there.
    sizes: BTreeMap<Size, usize>,
}

impl ConfigFile {
    /// Reads a directory's `config.json`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is absent or no JSON object, if it is of no known profile, if a size is no whole
    /// number, or if it says that the checkpoint is quantised.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let bytes = read_small(&path, MAX_CONFIG)?;
        Self::parse(path, bytes)
    }

    /// As [`ConfigFile::read`], of bytes that are there.
    pub(super) fn parse(path: PathBuf, bytes: Vec<u8>) -> Result<Self> {
        let refuse = |problem: String, remedy: &str| Error::checkpoint(&path, problem, remedy);
        let config: Map<String, Value> = serde_json::from_slice(&bytes)
            .map_err(|error| refuse(format!("it is no JSON object: {error}"), "Download the file again"))?;
        if let Some(quantisation) = config.get("quantization_config").filter(|value| !value.is_null()) {
            let method = quantisation.get("quant_method").and_then(Value::as_str);
            let method = method.map_or_else(String::new, |method| format!(" by {}", printable(method)));
            let problem = format!("the checkpoint is quantised{method} (`quantization_config`)");
            return Err(refuse(problem, super::QUANTISED_REMEDY));
        }
        let profile = recognise(&config).map_err(|problem| refuse(problem, OF_A_PROFILE))?;
        let mut sizes = BTreeMap::new();
        for &(size, key, default) in profile.sizes {
            match at(&config, key) {
                None => sizes.extend(default.map(|default| (size, default))),
                Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                    Some(n) if n > 0 => {
                        sizes.insert(size, n);
                    }
                    _ => {
                        let problem = format!("`{key}` is {}, not a positive whole number", shown(value));
                        return Err(refuse(problem, "Correct it, or download the file again"));
                    }
                },
            }
        }
        Ok(Self { path, bytes, profile, sizes })
    }

    /// A size, if the file says it or its profile does instead.
    pub fn size(&self, size: Size) -> Option<usize> {
        self.sizes.get(&size).copied()
    }

    /// The key under which the file has a size.
    pub fn key(&self, size: Size) -> &'static str {
        self.profile.sizes.iter().find(|(known, ..)| *known == size).map_or("", |(_, key, _)| key)
    }
}

/// What to do about a checkpoint of another family.
const OF_A_PROFILE: &str = "Use a checkpoint of InternLM-XComposer2-VL, or of LLaVA-1.5 as transformers saves it (llava-hf on the Hub)";

/// Finds the profile of a `config.json`; the problem names what was expected and what was found.
fn recognise(config: &Map<String, Value>) -> Result<&'static Profile, String> {
    let profile = match config.get("model_type").filter(|value| !value.is_null()) {
        None => PROFILES[0],
        Some(found) => {
            let of_type = |profile: &&&Profile| profile.model_types.iter().any(|name| found == name);
            *PROFILES.iter().find(of_type).ok_or_else(|| {
                let known =
                    |profile: &&Profile| format!("\"{}\" ({})", profile.model_types[0], profile.title);
                let known: Vec<String> = PROFILES.iter().map(known).collect();
                format!("`model_type` is {}, where {} is expected", shown(found), known.join(" or "))
            })?
        }
    };
    for &(key, fact) in profile.facts {
        if let Some(found) = at(config, key).filter(|found| !fact.is(found)) {
            let title = profile.title;
            return Err(format!("`{key}` is {}, where {title} has {fact}", shown(found)));
        }
    }
    Ok(profile)
}

/// What stands under a key, whose parts are joined by dots; null is nothing.
fn at<'c>(config: &'c Map<String, Value>, key: &str) -> Option<&'c Value> {
    let mut parts = key.split('.');
    let first = config.get(parts.next()?);
    parts.fold(first, |value, part| value?.get(part)).filter(|value| !value.is_null())
}

/// A value as a message may show it: as JSON, short.
pub(super) fn shown(value: &Value) -> String {
    printable(&value.to_string()).replace("\\\"", "\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_stay_in_the_directory() {
        for name in ["pytorch_model-00001-of-00002.bin", "model.safetensors", "..hidden", "a b"] {
            assert!(is_plain_file_name(name), "{name}");
        }
        for name in
            ["", ".", "..", "../x.bin", "/x.bin", "a/b.bin", "a/..", "a\\b", "C:x", "./x", "x/", "x\0"]
        {
            assert!(!is_plain_file_name(name), "{name}");
        }
    }
}
