//! `imagehere encode --request`: several sequences, each image decoded and encoded once.
//!
//! ```text
//!   request ─▶ plans ─▶ images there? targets writable? ─▶ weights ─▶ one call fills all ─▶ verify ─▶ write ─▶ name
//! ```
//!
//! One packing of all sequences goes through one call of the encoder; each file is a run of its rows. All are written
//! before the first is named; every file, or folder of arrays, is whole or not there, but who kills the program between
//! two names has some of them.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use imagehere::checkpoint::Checkpoint;
use imagehere::encoder::{EncodeReport, Encoder};
use imagehere::image::ImageSource;
use imagehere::output::Folder;
use imagehere::output::safetensors::SequenceRecord;
use imagehere::packing::PackedPlan;
use imagehere::prompt::{Planner, Request, SequencePlan};
use imagehere::sequence::{SequenceBuffer, VerifyReport};
use imagehere::tokenizer::Tokenizer;
use imagehere::{Error, ImageProblem, Result, Warning};
use serde_json::{Value, json};

use super::args::{EncodeArgs, PromptArgs};
use super::progress::Progress;
use super::request::{self, Entry, Requests, Sequence, within};
use super::sink::{Pending, Sink};
use super::{argument, encode, inputs, json_line, say, show, warn};

/// The most positions of all sequences together: 8.6 GB of rows of the published model.
const POSITIONS: usize = 1 << 20;

/// What was done, for table and JSON.
struct Outcome<'r> {
    requests: &'r Requests,
    plans: &'r [SequencePlan], // [S]
    encoder: Encoder,
    report: EncodeReport,
    verified: VerifyReport,
    warnings: Vec<Vec<Warning>>, // [S]
    format: Sink,
    files: Vec<(PathBuf, u64)>, // [S]
    open: Duration,
    write: Duration,
}

/// Runs the command.
pub fn run(args: &EncodeArgs, file: &Path, dir: &Path) -> Result<String> {
    let requests = request::parse(&read(file)?, file, args.format.ending())?;
    let rules = inputs::image_rules(&args.images)?;
    let cache = encode::cache(&args.running)?;

    let opening = Instant::now();
    let checkpoint = Checkpoint::open(&args.prompt.model)?;
    let planner = Planner::new(Tokenizer::from_dir(&args.prompt.model)?, checkpoint.config().clone())?;
    let plan = |sequence: &Sequence| plan(args, &planner, &requests, sequence);
    let laid_out = requests.sequences.iter().map(plan).collect::<Result<Vec<_>>>()?;
    let (prompts, plans): (Vec<_>, Vec<_>) = laid_out.into_iter().unzip(); // [S]
    let packed = pack(&requests, &plans)?;
    if let Some((image, source)) = unreadable_image(&requests) {
        let remedy =
            "Check the path, which is relative to the request, and that the file may be read".to_owned();
        let problem = ImageProblem::Unreadable(source);
        return Err(whose(&requests, Error::Image { index: image, name: String::new(), problem, remedy }));
    }
    let _made = Folder::make(dir).map_err(|error| match error {
        Error::Write { path, source, .. } => {
            let remedy = "Choose a directory that can be made with `--out-dir`".to_owned();
            Error::Write { path, source, remedy }
        }
        other => other,
    })?;
    let targets: Vec<PathBuf> = requests.sequences.iter().map(|sequence| dir.join(&sequence.file)).collect();
    targets.iter().try_for_each(|target| args.format.check(target))?;

    let encoder = encode::load(&args.running, &checkpoint, planner, rules, cache)?;
    let open = opening.elapsed();
    let images: Vec<ImageSource<'_>> = requests.images.iter().map(|image| (&image.path).into()).collect();
    let mut buffer = SequenceBuffer::new();
    let report = {
        let bar = Progress::bar("encoding");
        let encoded = encoder.encode_watched(&packed, &images, &mut buffer, &mut |done| bar.go_on(done));
        encoded.map_err(|error| whose(&requests, error))?
    };
    let verified = buffer.verify()?;

    let warnings: Vec<Vec<Warning>> = requests
        .sequences
        .iter()
        .zip(&plans)
        .map(|(sequence, plan)| {
            let of_images = of_images(sequence, &report.warnings);
            plan.warnings.iter().chain(encoder.warnings()).cloned().chain(of_images).collect()
        })
        .collect();
    let writing = Instant::now();
    let rows = buffer.as_slice().ok_or_else(|| Error::Internal("an owned buffer with gaps".to_owned()))?;
    let (hidden, starts) = (buffer.hidden(), buffer.cu_seqlens());
    let mut pending = Vec::new();
    for (s, (sequence, plan)) in requests.sequences.iter().zip(&plans).enumerate() {
        let prompt = options(&sequence.entry, &args.prompt);
        let record = SequenceRecord {
            plan,
            inputs_embeds: &rows[starts[s] * hidden..starts[s + 1] * hidden],
            hidden,
            metadata: encode::metadata(&prompt, args, &warnings[s], encoder.fingerprint()),
        };
        let (written, bytes) = args.format.stage(
            &targets[s],
            &prompts[s],
            &record,
            encoder.config().profile,
            args.image_token,
        )?;
        pending.push((targets[s].clone(), written, bytes));
    }
    let files = name_all(pending)?;
    let write = writing.elapsed();

    let outcome = Outcome {
        requests: &requests,
        plans: &plans,
        encoder,
        report,
        verified,
        warnings,
        format: args.format,
        files,
        open,
        write,
    };
    outcome.warn();
    if args.json {
        return Ok(json_line(&outcome.json(dir)));
    }
    Ok(outcome.table(dir))
}

/// Reads the file of a request.
fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    inputs::readable(path)
        .and_then(|()| File::open(path)?.take(request::FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|e| inputs::unreadable(path, e, "Check the path of `--request`"))?;
    if bytes.len() as u64 > request::FILE_BYTES {
        let limit = request::FILE_BYTES;
        return Err(argument(
            format!("{} has more than {limit} bytes, the limit of a request", path.display()),
            "Split it into several",
        ));
    }
    Ok(bytes)
}

/// An image's file that cannot be read, as the system says.
fn unreadable_image(requests: &Requests) -> Option<(usize, io::Error)> {
    let tries = requests.images.iter().enumerate();
    tries.map(|(i, image)| (i, inputs::readable(&image.path))).find_map(|(i, tried)| Some((i, tried.err()?)))
}

/// The options that would ask for the same with a single encode, history and images aside.
fn options(entry: &Entry, shared: &PromptArgs) -> PromptArgs {
    PromptArgs {
        meta_instruction: entry.meta_instruction.clone().flatten(),
        no_meta: entry.meta_instruction == Some(None),
        raw: entry.raw,
        bos: entry.bos(),
        ..shared.clone()
    }
}

/// Lays out one sequence, and returns what was asked for as well.
fn plan(
    args: &EncodeArgs,
    planner: &Planner,
    requests: &Requests,
    sequence: &Sequence,
) -> Result<(Request, SequencePlan)> {
    let entry = &sequence.entry;
    let names = sequence.images.iter().map(|&image| requests.images[image].name.clone()).collect();
    let prompt = options(entry, &args.prompt);
    inputs::assemble(&prompt, &args.images, entry.prompt.clone(), entry.history.clone(), names)
        .and_then(|request| {
            let plan = planner.plan(&request)?;
            args.format.check_plan(&request, &plan, planner.config().profile, args.image_token)?;
            Ok((request, plan))
        })
        .map_err(|error| within(&sequence.label, error))
}

/// Lays all sequences end to end.
fn pack<'p>(requests: &Requests, plans: &'p [SequencePlan]) -> Result<PackedPlan<'p>> {
    let mut packed = PackedPlan::new();
    for (sequence, plan) in requests.sequences.iter().zip(plans) {
        packed.push(plan, sequence.images.as_slice()).map_err(|error| within(&sequence.label, error))?;
    }
    if packed.total_len() > POSITIONS {
        return Err(argument(
            format!(
                "the sequences of the request have {} positions together, and the limit is {POSITIONS}",
                packed.total_len()
            ),
            "Split it into several requests",
        ));
    }
    Ok(packed)
}

/// Turns an error about an image of the call into one about an image of the first sequence that uses it.
fn whose(requests: &Requests, error: Error) -> Error {
    let Error::Image { index, problem, remedy, .. } = error else { return error };
    let place = |sequence: &Sequence| sequence.images.iter().position(|&image| image == index);
    let user = requests.sequences.iter().find_map(|sequence| Some((sequence, place(sequence)?)));
    let name = requests
        .images
        .get(index)
        .map_or(String::new(), |image| format!("{:?}, {}", image.name, image.path.display()));
    match user {
        Some((sequence, index)) => within(&sequence.label, Error::Image { index, name, problem, remedy }),
        None => Error::Image { index, name, problem, remedy },
    }
}

/// The warnings about a sequence's images, which count them within the call, counted within the sequence.
fn of_images(sequence: &Sequence, warnings: &[Warning]) -> Vec<Warning> {
    let about = |(place, image): (usize, &usize)| {
        let prefix = format!("image {image} (");
        let mine = warnings.iter().filter_map(|warning| {
            let mut counted = warning.clone();
            counted.message = format!("image {place} ({}", warning.message.strip_prefix(&prefix)?);
            Some(counted)
        });
        mine.collect::<Vec<_>>()
    };
    sequence.images.iter().enumerate().flat_map(about).collect()
}

/// Gives all files, or folders, their names. Should one fail after others have theirs, the error says which those are.
fn name_all(pending: Vec<(PathBuf, Pending, u64)>) -> Result<Vec<(PathBuf, u64)>> {
    let mut named: Vec<(PathBuf, u64)> = Vec::new();
    for (path, written, bytes) in pending {
        match written.commit() {
            Err(Error::Write { path, source, remedy }) if !named.is_empty() => {
                let there: Vec<_> = named.iter().map(|(path, _)| path.display().to_string()).collect();
                let remedy = format!("{remedy}. Written of this request, and whole: {}", there.join(", "));
                return Err(Error::Write { path, source, remedy });
            }
            committed => committed?,
        }
        named.push((path, bytes));
    }
    Ok(named)
}

impl Outcome<'_> {
    /// Says what deserves a word: of the images once, of a sequence with its name.
    fn warn(&self) {
        for name in &self.requests.unused {
            say("warning", "33", &unused(name));
        }
        warn(self.encoder.warnings());
        warn(&self.report.warnings);
        for (sequence, plan) in self.requests.sequences.iter().zip(self.plans) {
            for warning in &plan.warnings {
                say("warning", "33", &format!("{}: {}", sequence.label, warning.message));
            }
        }
    }

    /// The object that `--json` prints.
    fn json(&self, dir: &Path) -> Value {
        let mut slots = self.verified.slots.as_slice();
        let mut sequences = Vec::new();
        for (s, (sequence, plan)) in self.requests.sequences.iter().zip(self.plans).enumerate() {
            let names: Vec<String> =
                sequence.images.iter().map(|&image| self.requests.images[image].name.clone()).collect();
            let (mine, rest) = slots.split_at(plan.slots.len());
            slots = rest;
            let (file, bytes) = &self.files[s];
            let mut object = show::layout_json(plan, self.encoder.config(), &names);
            object["name"] = json!(sequence.entry.name);
            object["images"] = show::slots_json(plan, mine, &names);
            object["warnings"] = json!(self.warnings[s]);
            object["out"] = json!(file.to_string_lossy());
            object["bytes"] = json!(bytes);
            sequences.push(object);
        }
        let images = self.requests.images.iter();
        let images = images.map(|image| json!({ "name": image.name, "path": image.path.to_string_lossy() }));
        let unused_images = self.requests.unused.iter();
        let mut warnings: Vec<Value> =
            unused_images.map(|name| json!({ "kind": "unused_image", "message": unused(name) })).collect();
        warnings.extend(self.encoder.warnings().iter().chain(&self.report.warnings).map(|w| json!(w)));
        json!({
            "sequences": sequences,
            "images": images.collect::<Vec<_>>(),
            "images_encoded": self.report.images_encoded,
            "images_cached": self.report.images_cached,
            "timings": show::timings_json(self.open, &self.report, self.write),
            "peak_bytes": show::peak_bytes(),
            "warnings": warnings,
            "device": self.encoder.describe(),
            "fingerprint": self.encoder.fingerprint(),
            "format": self.format.name(),
            "out_dir": dir.to_string_lossy(),
            "bytes": self.bytes(),
        })
    }

    /// What is printed otherwise: a line for each sequence, sums, timings.
    fn table(&self, dir: &Path) -> String {
        let mut out = String::from("       L   images       bytes  file\n");
        for ((sequence, plan), (_, bytes)) in self.requests.sequences.iter().zip(self.plans).zip(&self.files)
        {
            let (length, images) = (plan.input_ids.len(), plan.slots.len());
            let _ = writeln!(out, "{length:>8} {images:>8} {:>11}  {}", show::bytes(*bytes), sequence.file);
        }
        let positions: usize = self.plans.iter().map(SequencePlan::len).sum();
        let slots: usize = self.plans.iter().map(SequencePlan::image_count).sum();
        let count = show::count(self.plans.len(), "sequence");
        let encoded = show::count(self.report.images_encoded, "image");
        let slots = show::count(slots, "slot");
        let cached = match self.report.images_cached {
            0 => String::new(),
            n => format!(", {n} found,"),
        };
        let _ = writeln!(out, "\n{count}, {positions} positions; {encoded} encoded{cached} for {slots}");
        out += &show::costs(self.open, &self.report, 0, self.write, &self.encoder.describe());
        let files = show::count(self.files.len(), self.format.noun());
        let _ = writeln!(out, "wrote {files} to {} ({})", dir.display(), show::bytes(self.bytes()));
        out
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum()
    }
}

fn unused(name: &str) -> String {
    format!("the image {name:?} stands in no sequence and was not read; name it in one, or take it out")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use imagehere::output::AtomicFile;

    use super::*;

    #[test]
    fn a_file_that_gets_no_name_after_others_have_theirs_tells_which_those_are() {
        let place = tempfile::tempdir().unwrap();
        let targets = ["a", "b", "c"].map(|name| place.path().join(name));
        let pending = |path| Pending::File(AtomicFile::create(path).unwrap());
        let pending = targets.iter().map(|path| (path.clone(), pending(path), 0)).collect();
        fs::create_dir(&targets[1]).unwrap(); // since it was looked at
        let message = name_all(pending).unwrap_err().to_string();
        assert!(message.contains(&format!("cannot write {}", targets[1].display())), "{message}");
        let whole = format!("Written of this request, and whole: {}", targets[0].display());
        assert!(message.ends_with(&whole), "{message}");
        assert!(targets[0].is_file() && !targets[2].exists());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "no hidden file");
    }
}
