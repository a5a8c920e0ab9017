//! `imagehere encode`: the main job.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use imagehere::checkpoint::{Checkpoint, RangePolicy};
use imagehere::encoder::{EncodeReport, Encoder, EncoderOptions};
use imagehere::output::AtomicFile;
use imagehere::output::safetensors::{SequenceRecord, write_sequence};
use imagehere::prompt::{Planner, SequencePlan};
use imagehere::sequence::{SequenceBuffer, VerifyReport};
use imagehere::tokenizer::Tokenizer;
use imagehere::{Error, Result, Warning};
use serde_json::{Value, json};

use super::args::{Compat, EncodeArgs, ImageArgs, PromptArgs};
use super::progress::Progress;
use super::{colour, inputs, json_line, show, warn};

/// What an encode did, for table and JSON.
pub struct Outcome {
    pub plan: SequencePlan,
    pub encoder: Encoder,
    pub names: Vec<String>,
    pub report: EncodeReport,
    pub verified: VerifyReport,
    pub warnings: Vec<Warning>,
    pub open: Duration,
    pub write: Duration,
    pub bytes: u64,
}

/// Runs the command.
pub fn run(args: &EncodeArgs) -> Result<String> {
    let outcome = encode(args)?;
    warn(&outcome.warnings);
    if args.json {
        return Ok(json_line(&outcome.json(args)));
    }
    Ok(outcome.table(args))
}

/// Does the work, cheapest checks first: nothing is decoded before markers and limits are known to fit, no
/// weight is converted before the target is known to be writable, nothing is written that is not complete.
pub fn encode(args: &EncodeArgs) -> Result<Outcome> {
    let request = inputs::request(&args.prompt, &args.images)?;
    let (decode, resample) = inputs::image_rules(&args.images)?;
    AtomicFile::check(&args.out)?;

    let opening = Instant::now();
    let checkpoint = Checkpoint::open(&args.prompt.model)?;
    let planner = Planner::new(Tokenizer::from_dir(&args.prompt.model)?, checkpoint.config().clone())?;
    let plan = planner.plan(&request)?;
    let mut open = opening.elapsed();

    let images = inputs::sources(&args.images.image, &decode)?;
    let names: Vec<String> = images.iter().map(|image| image.name()).collect();

    let opening = Instant::now();
    let mut options = EncoderOptions::new().device(args.device).decode(decode).resample(resample);
    if let Some(threads) = args.threads {
        options = options.threads(threads);
    }
    if args.saturate {
        options = options.range_policy(RangePolicy::Saturate);
    }
    let encoder = {
        let _spinner = Progress::spinner("opening the checkpoint");
        Encoder::load(&checkpoint, planner, options)?
    };
    open += opening.elapsed();

    let mut sequence = SequenceBuffer::new();
    let report = {
        let bar = Progress::bar("encoding");
        encoder.encode_watched(&plan, &images, &mut sequence, &mut |done| bar.set(done))?
    };
    let verified = sequence.verify()?;
    let mut warnings = plan.warnings.clone();
    warnings.extend_from_slice(encoder.warnings());
    warnings.extend_from_slice(&report.warnings);

    let writing = Instant::now();
    let rows = sequence.as_slice().ok_or_else(|| Error::Internal("an owned buffer with gaps".to_owned()))?;
    let record = SequenceRecord {
        plan: &plan,
        inputs_embeds: rows,
        hidden: sequence.hidden(),
        metadata: metadata(args, &warnings, encoder.fingerprint()),
    };
    let bytes = write_sequence(&args.out, &record)?;
    let write = writing.elapsed();
    Ok(Outcome { plan, encoder, names, report, verified, warnings, open, write, bytes })
}

/// What the file says about its making. Nothing in it depends on the machine, the time or the device.
fn metadata(args: &EncodeArgs, warnings: &[Warning], fingerprint: &str) -> BTreeMap<String, String> {
    BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()), // row-major; some loaders ask for this key
        ("format_version".to_owned(), "1".to_owned()),
        ("version".to_owned(), format!("imagehere {}", imagehere::VERSION)),
        ("options".to_owned(), options(&args.prompt, &args.images, args.saturate).to_string()),
        ("warnings".to_owned(), json!(warnings).to_string()),
        ("fingerprint".to_owned(), fingerprint.to_owned()),
    ])
}

/// The options that decide what is in a sequence, as they were given; null where they were not.
fn options(prompt: &PromptArgs, images: &ImageArgs, saturate: bool) -> Value {
    json!({
        "meta_instruction": prompt.meta_instruction,
        "no_meta": prompt.no_meta,
        "raw": prompt.raw,
        "allow_control_tokens": prompt.allow_control_tokens,
        "bos": prompt.bos.map(|bos| format!("{bos:?}")),
        "max_length": prompt.max_length,
        "truncate": prompt.truncate,
        "exif": images.exif.map(|exif| format!("{exif:?}")),
        "alpha": images.alpha.map(|alpha| format!("{alpha:?}")),
        "resample": images.resample.map(|resample| format!("{resample:?}")),
        "compat": images.compat.map(|Compat::Upstream| "upstream"),
        "saturate": saturate,
    })
}

impl Outcome {
    /// The object that `--json` prints.
    fn json(&self, args: &EncodeArgs) -> Value {
        let mut object = show::layout_json(&self.plan, self.encoder.config(), &self.names);
        let images: Vec<Value> = self
            .verified
            .slots
            .iter()
            .map(|slot| {
                let (begin, end) = (slot.slot.offset, slot.slot.offset + slot.slot.len);
                json!({ "name": self.names.get(slot.image), "slot": [begin, end], "mean_norm": slot.mean_norm })
            })
            .collect();
        object["images"] = json!(images);
        object["images_encoded"] = json!(self.report.images_encoded);
        object["timings"] = json!({
            "open_s": self.open.as_secs_f64(),
            "decode_s": self.report.decode.as_secs_f64(),
            "resize_s": self.report.resize.as_secs_f64(),
            "encode_s": self.report.encode.as_secs_f64(),
            "write_s": self.write.as_secs_f64(),
        });
        object["peak_bytes"] = json!(show::peak_bytes());
        object["warnings"] = json!(self.warnings);
        object["device"] = json!(self.encoder.describe());
        object["fingerprint"] = json!(self.encoder.fingerprint());
        object["out"] = json!(args.out.to_string_lossy());
        object["bytes"] = json!(self.bytes);
        object
    }

    /// What is printed otherwise: layout, timings, where the output is.
    pub fn table(&self, args: &EncodeArgs) -> String {
        let mut out =
            show::layout(&self.plan, self.encoder.config(), &self.names, colour(&std::io::stdout()));
        let report = &self.report;
        let _ = writeln!(
            out,
            "\nopen {}, decode {}, resize {}, encode {} ({}), write {}",
            show::time(self.open),
            show::time(report.decode),
            show::time(report.resize),
            show::time(report.encode),
            show::count(report.images_encoded, "image"),
            show::time(self.write),
        );
        let peak = show::peak_bytes().map_or(String::new(), |n| format!("; peak memory {}", show::bytes(n)));
        let _ = writeln!(out, "device: {}{peak}", self.encoder.describe());
        let _ = writeln!(out, "wrote {} ({})", args.out.display(), show::bytes(self.bytes));
        out
    }
}
