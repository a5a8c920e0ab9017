//! Random checkpoints in the layout of those they stand for: for demos, tests and measurements without the real weights.
//!
//! Names, shapes, `config.json` keys and file formats are those of the published checkpoints; only the values
//! are noise. They are scaled as a real initialisation would be, so that activations stay within fp16 and
//! attention is neither flat nor a single spike. The same seed makes the same values on every machine, with
//! any number of threads and in either file format.
//!
//! Nothing is visible under its name before everything is on the disk, and `config.json`, without which no
//! checkpoint opens, is named last: an interrupted run leaves no half checkpoint.

mod layout;
pub(crate) mod noise;
mod torch_zip;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

pub use crate::checkpoint::{DType, Format};
use crate::error::{Error, Result};
use crate::output::{AtomicFile, safetensors, write_error};
use crate::tokenizer;
use layout::{Sizes, Tensor};

/// Which model to imitate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Preset {
    /// A tower of 2 layers and 128 channels over 70×70 pixels (25 rows per image), hidden size 256: encodes
    /// in milliseconds.
    Tiny,
    /// [`Preset::Tiny`] as a LLaVA-1.5: the same sizes, a third layer that features do not come through, LLaVA's names and
    /// `config.json`.
    LlavaTiny,
    /// The real tower (24 layers, 1024 channels, 490×490 pixels, 1225 rows per image), projector and
    /// vocabulary of InternLM-XComposer2-VL-7B, without its language model: 1.4 GB in bf16.
    Vl7bVision,
}

/// How to make a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthOptions {
    /// Where the noise starts: the same seed makes the same values.
    pub seed: u64,
    /// How the weights are stored.
    pub format: Format,
    /// Their dtype.
    pub dtype: DType,
    /// A `tokenizer.model` to copy; `None` makes a small one.
    pub tokenizer: Option<PathBuf>,
}

impl Default for SynthOptions {
    /// Seed 0, stored as the published checkpoint is: `.bin`, bf16; a tokenizer of our own.
    fn default() -> Self {
        Self { seed: 0, format: Format::Bin, dtype: DType::Bf16, tokenizer: None }
    }
}

/// What [`write()`] made.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SynthReport {
    /// The checkpoint directory.
    pub dir: PathBuf,
    /// Its files and their sizes, in bytes.
    pub files: BTreeMap<String, u64>,
    /// Tensors written.
    pub tensors: usize,
    /// Parameters, in elements.
    pub parameters: u64,
}

impl SynthReport {
    /// Returns the size of all files, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.values().sum()
    }
}

/// What a directory made here says about itself, in [`RECORD`]: these files and no others are ours to replace.
#[derive(Serialize, Deserialize)]
struct Record {
    imagehere: String,
    preset: Preset,
    seed: u64,
    format: String,
    dtype: String,
    own_tokenizer: bool,
    files: Vec<String>,
}

const RECORD: &str = "synth.json";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.model";

/// Writes a random checkpoint to the directory `out`, which is made where it does not exist.
///
/// A directory that an earlier call filled is filled anew; any other that is not empty is left alone.
///
/// # Errors
/// [`Error::Write`] if `out` holds anything else or cannot be written; [`Error::Read`] or
/// [`Error::Argument`] if the given tokenizer cannot be used. No checkpoint appears then, and one made
/// earlier stays as it was.
///
/// # Examples
/// ```
/// use imagehere::synth::{self, Format, Preset, SynthOptions};
/// # let dir = tempfile::tempdir().unwrap();
/// let options = SynthOptions { seed: 7, format: Format::Safetensors, ..SynthOptions::default() };
/// let report = synth::write(Preset::Tiny, &options, dir.path().join("model"))?;
/// assert!(report.dir.join("model.safetensors").is_file());
/// # Ok::<(), imagehere::Error>(())
/// ```
pub fn write(preset: Preset, options: &SynthOptions, out: impl AsRef<Path>) -> Result<SynthReport> {
    write_watched(preset, options, out, &mut |_| ())
}

/// As [`write()`], calling `progress` now and then with the work done, from 0 to 1.
///
/// # Errors
/// As [`write()`].
pub fn write_watched(
    preset: Preset,
    options: &SynthOptions,
    out: impl AsRef<Path>,
    progress: &mut dyn FnMut(f32),
) -> Result<SynthReport> {
    let out = out.as_ref();
    let earlier = claim(out)?;
    let (sizes, tokenizer) = sizes_and_tokenizer(preset, options)?;
    let made = !out.exists();
    let report = fs::create_dir_all(out)
        .map_err(|e| write_error(out, e))
        .and_then(|()| fill(preset, options, &sizes, &tokenizer, out, earlier, progress));
    if report.is_err() && made {
        let _ = fs::remove_dir(out); // only if it is empty, which is what is meant
    }
    report
}

/// Returns whether `dir` holds the checkpoint that [`write()`] would make, whole; false if a tokenizer is given,
/// which may have changed since.
pub fn is_there(preset: Preset, options: &SynthOptions, dir: impl AsRef<Path>) -> bool {
    let dir = dir.as_ref();
    read_record(dir).is_some_and(|record| {
        record.imagehere == crate::VERSION
            && record.preset == preset
            && record.seed == options.seed
            && record.format == format!("{:?}", options.format)
            && record.dtype == options.dtype.name()
            && record.own_tokenizer
            && options.tokenizer.is_none()
            && record.files.iter().all(|name| dir.join(name).is_file())
    })
}

/// Checks that `out` is ours to fill, and returns the files that an earlier call left there.
fn claim(out: &Path) -> Result<Vec<String>> {
    let refuse = |found: String| {
        Err(Error::Write {
            path: out.to_path_buf(),
            source: io::Error::new(io::ErrorKind::AlreadyExists, found),
            remedy: "Choose a directory that is empty or does not exist yet; nothing was changed".to_owned(),
        })
    };
    let names = match fs::read_dir(out) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|e| write_error(out, e))?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => return refuse("it is a file".to_owned()),
        Err(e) => return Err(write_error(out, e)),
    };
    let ours = read_record(out).map_or_else(Vec::new, |record| record.files);
    match names.iter().find(|name| !ours.iter().any(|mine| name.as_os_str() == mine.as_str())) {
        Some(other) => {
            refuse(format!("it is not empty and was not made by synth: it holds {}", other.display()))
        }
        None => Ok(ours),
    }
}

/// Reads what a directory says about itself, if it is one of ours.
fn read_record(dir: &Path) -> Option<Record> {
    let record: Record = serde_json::from_slice(&fs::read(dir.join(RECORD)).ok()?).ok()?;
    // Names come from a file that anyone may have edited: they must not lead out of the directory.
    let plain = |name: &String| Path::new(name).file_name().is_some_and(|file| file == name.as_str());
    record.files.iter().all(plain).then_some(record)
}

/// Returns the sizes of a preset with the tokenizer that fits them.
fn sizes_and_tokenizer(preset: Preset, options: &SynthOptions) -> Result<(Sizes, Vec<u8>)> {
    let mut sizes = Sizes::of(preset);
    let Some(path) = &options.tokenizer else {
        let tokenizer = tokenizer::synthetic(sizes.vocab);
        return Ok((sizes, tokenizer));
    };
    let bytes = fs::read(path).map_err(|source| Error::Read {
        action: "read",
        path: path.clone(),
        source,
        remedy: "Give the path of a SentencePiece `tokenizer.model`, or none to have a small one made".into(),
    })?;
    let pieces = tokenizer::Tokenizer::from_sentencepiece(&bytes, path)?.vocab_size();
    match preset {
        Preset::Tiny | Preset::LlavaTiny => sizes.vocab = pieces,
        Preset::Vl7bVision if pieces <= sizes.vocab => {}
        Preset::Vl7bVision => {
            return Err(Error::argument(
                format!(
                    "{} has {pieces} pieces, but this model has {} embeddings",
                    path.display(),
                    sizes.vocab
                ),
                "Give a tokenizer with no more pieces than that, or use the preset `tiny`, which adapts",
            ));
        }
    }
    Ok((sizes, bytes))
}

/// Writes all files without names, then names them, `config.json` last.
fn fill(
    preset: Preset,
    options: &SynthOptions,
    sizes: &Sizes,
    tokenizer: &[u8],
    out: &Path,
    earlier: Vec<String>,
    progress: &mut dyn FnMut(f32),
) -> Result<SynthReport> {
    let shards = sizes.shards();
    let all = || shards.iter().flatten();
    let parameters: usize = all().map(Tensor::elements).sum();
    let names = shard_names(options.format, shards.len());
    let mut files = Files { out, pending: Vec::new() };

    let mut done = 0;
    for (name, tensors) in names.iter().zip(&shards) {
        files.add(name, |file| {
            let mut fill = |sink: &mut dyn Write, tensor: &Tensor| {
                noise::stream(options.seed, tensor, options.dtype, sink, &mut |elements| {
                    done += elements;
                    progress(done as f32 / parameters as f32);
                })
            };
            match options.format {
                Format::Bin => torch_zip::write(file, name, tensors, options.dtype, &mut fill),
                Format::Safetensors => write_safetensors(file, tensors, options.dtype, &mut fill),
            }
        })?;
    }
    if shards.len() > 1 {
        let weight_map: BTreeMap<&str, &str> = names
            .iter()
            .zip(&shards)
            .flat_map(|(name, tensors)| tensors.iter().map(move |t| (t.name.as_str(), name.as_str())))
            .collect();
        let total = parameters * options.dtype.size();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        files.add_json(index_name(options.format), &index)?;
    }
    files.add(TOKENIZER, |file| file.write_all(tokenizer))?;
    let mut listed: Vec<String> = files.pending.iter().map(|(name, ..)| name.clone()).collect();
    listed.extend([RECORD.to_owned(), CONFIG.to_owned()]);
    let record = Record {
        imagehere: crate::VERSION.to_owned(),
        preset,
        seed: options.seed,
        format: format!("{:?}", options.format),
        dtype: options.dtype.name().to_owned(),
        own_tokenizer: options.tokenizer.is_none(),
        files: listed,
    };
    // First to be named, so that a run killed while naming is recognised as ours and can be repeated.
    files.add_json(RECORD, &json!(record))?;
    files.pending.rotate_right(1);
    files.add_json(CONFIG, &sizes.config(options.dtype))?;

    // Without its config.json an earlier checkpoint is none; then its files can go one by one.
    for name in std::iter::once(CONFIG).chain(earlier.iter().map(String::as_str)) {
        match fs::remove_file(out.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(write_error(&out.join(name), e));
            }
            _ => {}
        }
    }
    let files = files.commit()?;
    Ok(SynthReport { dir: out.to_path_buf(), files, tensors: all().count(), parameters: parameters as u64 })
}

/// Files of one directory that wait for their names.
struct Files<'a> {
    out: &'a Path,
    pending: Vec<(String, AtomicFile, u64)>,
}

impl Files<'_> {
    fn add(&mut self, name: &str, fill: impl FnOnce(&mut AtomicFile) -> io::Result<()>) -> Result<()> {
        let mut file = AtomicFile::create(self.out.join(name))?;
        fill(&mut file).map_err(|e| file.failed(e))?;
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(|e| file.failed(e))?;
        self.pending.push((name.to_owned(), file, bytes));
        Ok(())
    }

    fn add_json(&mut self, name: &str, value: &serde_json::Value) -> Result<()> {
        self.add(name, |file| file.write_all(format!("{value:#}\n").as_bytes()))
    }

    /// Names all of them, in order. Not synced: what is here can be made again.
    fn commit(self) -> Result<BTreeMap<String, u64>> {
        self.pending
            .into_iter()
            .map(|(name, file, bytes)| file.commit_unsynced().map(|()| (name, bytes)))
            .collect()
    }
}

/// Writes one `.safetensors` file.
fn write_safetensors(
    file: &mut AtomicFile,
    tensors: &[Tensor],
    dtype: DType,
    fill: &mut dyn FnMut(&mut dyn Write, &Tensor) -> io::Result<()>,
) -> io::Result<()> {
    let entry = |tensor: &Tensor| safetensors::Entry {
        name: tensor.name.clone(),
        dtype: names(dtype).safetensors,
        shape: tensor.shape.clone(),
        width: dtype.size(),
    };
    let entries: Vec<_> = tensors.iter().map(entry).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    file.write_all(&safetensors::header(&entries, &metadata))?;
    tensors.iter().try_for_each(|tensor| fill(file, tensor))
}

/// Names shards as `save_pretrained` does: without numbers if there is one.
fn shard_names(format: Format, count: usize) -> Vec<String> {
    let (stem, extension) = match format {
        Format::Bin => ("pytorch_model", "bin"),
        Format::Safetensors => ("model", "safetensors"),
    };
    match count {
        1 => vec![format!("{stem}.{extension}")],
        _ => (1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.{extension}")).collect(),
    }
}

fn index_name(format: Format) -> &'static str {
    match format {
        Format::Bin => "pytorch_model.bin.index.json",
        Format::Safetensors => "model.safetensors.index.json",
    }
}

/// What the formats call a dtype: a safetensors header, `config.json`'s `torch_dtype`, a torch storage.
struct Names {
    safetensors: &'static str,
    torch: &'static str,
    storage: &'static str,
}

fn names(dtype: DType) -> Names {
    let (safetensors, torch, storage) = match dtype {
        DType::Bf16 => ("BF16", "bfloat16", "BFloat16Storage"),
        DType::F16 => ("F16", "float16", "HalfStorage"),
        DType::F32 => ("F32", "float32", "FloatStorage"),
    };
    Names { safetensors, torch, storage }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tiny => "tiny",
            Self::LlavaTiny => "llava-tiny",
            Self::Vl7bVision => "vl-7b-vision",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use ::safetensors::SafeTensors;

    use super::*;

    fn options(format: Format, dtype: DType) -> SynthOptions {
        SynthOptions { seed: 11, format, dtype, ..SynthOptions::default() }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut all: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        all.sort();
        all
    }

    #[test]
    fn both_formats_hold_the_same_bytes_in_the_same_order() {
        for dtype in [DType::Bf16, DType::F16, DType::F32] {
            let dir = tempfile::tempdir().unwrap();
            let (bin, safe) = (dir.path().join("bin"), dir.path().join("safe"));
            let report = write(Preset::Tiny, &options(Format::Bin, dtype), &bin).unwrap();
            write(Preset::Tiny, &options(Format::Safetensors, dtype), &safe).unwrap();
            assert_eq!(names(&bin), ["config.json", "pytorch_model.bin", "synth.json", "tokenizer.model"]);
            assert_eq!(report.files.keys().cloned().collect::<Vec<_>>(), names(&bin));
            assert_eq!(
                report.bytes(),
                names(&bin).iter().map(|n| bin.join(n).metadata().unwrap().len()).sum::<u64>()
            );

            let bytes = fs::read(safe.join("model.safetensors")).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(tensors.len(), report.tensors);
            let file = fs::File::open(bin.join("pytorch_model.bin")).unwrap();
            let mut zip = zip::ZipArchive::new(file).unwrap();
            for (i, tensor) in Sizes::of(Preset::Tiny).shards().concat().iter().enumerate() {
                let mut entry = zip.by_name(&format!("pytorch_model/data/{i}")).unwrap();
                assert_eq!(entry.data_start().unwrap() % 64, 0, "{}", tensor.name);
                let mut stored = Vec::new();
                entry.read_to_end(&mut stored).unwrap(); // checks the CRC, too
                let other = tensors.tensor(&tensor.name).unwrap();
                assert_eq!(other.shape(), tensor.shape);
                assert!(stored == other.data(), "{} differs", tensor.name);
            }
        }
    }

    #[test]
    fn what_it_made_it_makes_anew_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let (bin, safe) = (options(Format::Bin, DType::Bf16), options(Format::Safetensors, DType::Bf16));
        write(Preset::Tiny, &bin, &out).unwrap();
        assert!(is_there(Preset::Tiny, &bin, &out) && !is_there(Preset::Tiny, &safe, &out));
        write(Preset::Tiny, &safe, &out).unwrap();
        assert_eq!(names(&out), ["config.json", "model.safetensors", "synth.json", "tokenizer.model"]);

        fs::write(out.join("mine.txt"), "precious").unwrap();
        let message = write(Preset::Tiny, &bin, &out).unwrap_err().to_string();
        assert!(message.contains("mine.txt") && message.contains("is empty or does not exist"), "{message}");
        assert_eq!(names(&out).len(), 5);

        // A record that names files elsewhere is not believed.
        let record = fs::read_to_string(out.join(RECORD)).unwrap();
        fs::write(out.join(RECORD), record.replace("\"config.json\"", "\"../outside\", \"mine.txt\""))
            .unwrap();
        fs::write(dir.path().join("outside"), "precious").unwrap();
        write(Preset::Tiny, &bin, &out).unwrap_err();
        assert!(dir.path().join("outside").exists());
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let tokenizer = Some(dir.path().join("no-such-tokenizer.model"));
        let failed = write(Preset::Tiny, &SynthOptions { tokenizer, ..SynthOptions::default() }, &out);
        assert!(failed.unwrap_err().to_string().contains("tokenizer.model"));
        assert!(!out.exists());
        fs::write(&out, "a file").unwrap();
        let message = write(Preset::Tiny, &SynthOptions::default(), &out).unwrap_err().to_string();
        assert!(message.contains("it is a file"), "{message}");
    }
}
