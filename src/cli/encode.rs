//! `imagehere encode`: the main job.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use imagehere::checkpoint::{Checkpoint, RangePolicy};
use imagehere::encoder::{EncodeReport, Encoder, EncoderOptions};
use imagehere::features::FeatureCache;
use imagehere::image::{DecodeOptions, Resample, RgbImage};
use imagehere::output::safetensors::SequenceRecord;
use imagehere::picture::{Map, PictureRecord};
use imagehere::prompt::{Planner, Request, SequencePlan};
use imagehere::sequence::{SequenceBuffer, VerifyReport};
use imagehere::tokenizer::Tokenizer;
use imagehere::{Error, Result, Warning, WarningKind};
use serde_json::{Value, json};

use super::args::{Compat, EncodeArgs, ImageArgs, PromptArgs, RunningArgs};
use super::kept::Kept;
use super::progress::Progress;
use super::sink::Sink;
use super::{argument, colour, inputs, json_line, picture, several, show, warn};

/// What an encode did, for table and JSON.
pub struct Outcome {
    pub plan: SequencePlan,
    pub encoder: Encoder,
    pub names: Vec<String>,
    pub report: EncodeReport,
    pub placed: usize, // images whose features came from files
    pub verified: VerifyReport,
    pub warnings: Vec<Warning>,
    pub open: Duration,
    pub write: Duration,
    pub format: Sink,
    pub out: PathBuf,
    pub bytes: u64,
    pub picture: Option<picture::Drawn>,
}

/// Runs the command.
pub fn run(args: &EncodeArgs) -> Result<String> {
    args.format.check_options(args.image_token)?;
    if let (Some(request), Some(dir)) = (&args.request, &args.out_dir) {
        return several::run(args, request, dir);
    }
    let outcome = encode(args)?;
    warn(&outcome.warnings);
    if args.json {
        return Ok(json_line(&outcome.json()));
    }
    Ok(outcome.table())
}

/// Does the work, cheapest checks first: nothing is decoded before markers and limits are known to fit, no
/// weight is converted before the target is known to be writable, nothing is written that is not complete.
pub fn encode(args: &EncodeArgs) -> Result<Outcome> {
    if !args.features.is_empty() {
        return place(args);
    }
    let request = inputs::request(&args.prompt, &args.images)?;
    let rules = inputs::image_rules(&args.images)?;
    let cache = cache(&args.running)?;
    let out = args.out.clone().ok_or_else(|| argument("there is no target", "Give `--out`"))?;
    args.format.check(&out)?;
    picture::check(args, &out)?;

    let opening = Instant::now();
    let checkpoint = Checkpoint::open(&args.prompt.model)?;
    let planner = Planner::new(Tokenizer::from_dir(&args.prompt.model)?, checkpoint.config().clone())?;
    let plan = planner.plan(&request)?;
    args.format.check_plan(&request, &plan, planner.config().profile, args.image_token)?;
    let mut open = opening.elapsed();

    let images = inputs::sources(&args.images.image, &rules.0)?;
    let names: Vec<String> = images.iter().map(|image| image.name()).collect();

    let opening = Instant::now();
    let encoder = load(&args.running, &checkpoint, planner, rules, cache)?;
    open += opening.elapsed();

    let mut sequence = SequenceBuffer::new();
    let report = {
        let bar = Progress::bar("encoding");
        encoder.encode_watched(&plan, &images, &mut sequence, &mut |done| bar.go_on(done))?
    };
    let of_images = report.warnings.clone();
    let done = Done { request, plan, encoder, names, report, open, placed: 0 };
    let frame = done.encoder.config().frame();
    done.write(args, &sequence, &[], &of_images, out, || picture::squares(args, &images, frame, &rules))
}

/// As [`encode`], from features that are there: nothing is decoded, no weight of the tower is read.
fn place(args: &EncodeArgs) -> Result<Outcome> {
    let kept = Kept::open(&args.features)?;
    let request = inputs::request_of(&args.prompt, &args.images, kept.names())?;
    let rules = inputs::image_rules(&args.images)?;
    let out = args.out.clone().ok_or_else(|| argument("there is no target", "Give `--out`"))?;
    args.format.check(&out)?;
    picture::check(args, &out)?;

    let opening = Instant::now();
    let checkpoint = Checkpoint::open(&args.prompt.model)?;
    kept.check(&checkpoint, &rules.0, rules.1)?;
    let planner = Planner::new(Tokenizer::from_dir(&args.prompt.model)?, checkpoint.config().clone())?;
    let plan = planner.plan(&request)?;
    args.format.check_plan(&request, &plan, planner.config().profile, args.image_token)?;
    let encoder = Encoder::load_without_tower(&checkpoint, planner, options(&args.running, rules, None));
    let open = opening.elapsed();

    let placing = Instant::now();
    let (names, of_weights, of_images) = (kept.names(), kept.of_weights(), kept.of_images());
    let features = kept.read()?;
    let mut sequence = SequenceBuffer::new();
    encoder.place_into(&plan, &features, &mut sequence)?;
    let mut report = EncodeReport::default();
    report.encode = placing.elapsed();
    let done = Done { request, plan, encoder, names, report, open, placed: features.len() };
    done.write(args, &sequence, &of_weights, &of_images, out, || Ok(vec![]))
}

/// A sequence that is there and not yet written.
struct Done {
    request: Request,
    plan: SequencePlan,
    encoder: Encoder,
    names: Vec<String>,
    report: EncodeReport,
    open: Duration,
    placed: usize,
}

impl Done {
    /// Checks the sequence and writes it, with all that is to be said about it, and the picture, if there is to be one, of
    /// which `squares` makes the pixels.
    fn write(
        self,
        args: &EncodeArgs,
        sequence: &SequenceBuffer<'_>,
        of_weights: &[Warning],
        of_images: &[Warning],
        out: PathBuf,
        squares: impl FnOnce() -> Result<Vec<RgbImage>>,
    ) -> Result<Outcome> {
        let Self { request, plan, encoder, names, report, open, placed } = self;
        let verified = sequence.verify()?;
        let warnings = [&plan.warnings, encoder.warnings(), of_weights, of_images].concat();

        let rows =
            sequence.as_slice().ok_or_else(|| Error::Internal("an owned buffer with gaps".to_owned()))?;
        let shown = PictureRecord {
            plan: &plan,
            inputs_embeds: rows,
            hidden: sequence.hidden(),
            grid: encoder.config().grid,
            names: &names,
            pixels: &[],
            map: Map::default(),
        };
        let drawn = picture::stage(args, shown, squares)?;
        let writing = Instant::now();
        let record = SequenceRecord {
            plan: &plan,
            inputs_embeds: rows,
            hidden: sequence.hidden(),
            metadata: metadata(&args.prompt, args, &warnings, encoder.fingerprint()),
        };
        let (pending, bytes) =
            args.format.stage(&out, &request, &record, encoder.config().profile, args.image_token)?;
        pending.commit()?;
        let write = writing.elapsed();
        let picture = picture::commit(drawn, &out)?;
        let format = args.format;
        Ok(Outcome {
            plan,
            encoder,
            names,
            report,
            placed,
            verified,
            warnings,
            open,
            write,
            format,
            out,
            bytes,
            picture,
        })
    }
}

/// Loads the weights where and how the options say.
pub fn load(
    args: &RunningArgs,
    checkpoint: &Checkpoint,
    planner: Planner,
    rules: (DecodeOptions, Resample),
    cache: Option<FeatureCache>,
) -> Result<Encoder> {
    let _spinner = Progress::spinner("opening the checkpoint");
    Encoder::load(checkpoint, planner, options(args, rules, cache))
}

/// Opens the cache that the options name, before anything else costs time.
pub fn cache(args: &RunningArgs) -> Result<Option<FeatureCache>> {
    let open = |dir: &PathBuf| {
        let cache = FeatureCache::open(dir)?;
        Ok(cache.with_size(args.feature_cache_size.unwrap_or(FeatureCache::DEFAULT_SIZE)))
    };
    args.feature_cache.as_ref().map(open).transpose()
}

fn options(
    args: &RunningArgs,
    (decode, resample): (DecodeOptions, Resample),
    cache: Option<FeatureCache>,
) -> EncoderOptions {
    let mut options = EncoderOptions::new().device(args.device).decode(decode).resample(resample);
    if let Some(threads) = args.threads {
        options = options.threads(threads);
    }
    if args.saturate {
        options = options.range_policy(RangePolicy::Saturate);
    }
    if let Some(cache) = cache {
        options = options.feature_cache(cache);
    }
    options
}

/// What the file says about its making. Nothing in it depends on the machine, the time, the device, or on what a cache
/// took or not. `prompt` holds what is the sequence's own.
pub fn metadata(
    prompt: &PromptArgs,
    args: &EncodeArgs,
    warnings: &[Warning],
    fingerprint: &str,
) -> BTreeMap<String, String> {
    let warnings: Vec<_> = warnings.iter().filter(|w| w.kind != WarningKind::FeatureCache).collect();
    BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()), // row-major; some loaders ask for this key
        ("format_version".to_owned(), "1".to_owned()),
        ("version".to_owned(), format!("imagehere {}", imagehere::VERSION)),
        ("options".to_owned(), given(prompt, &args.images, args.running.saturate).to_string()),
        ("warnings".to_owned(), json!(warnings).to_string()),
        ("fingerprint".to_owned(), fingerprint.to_owned()),
    ])
}

/// The options that decide what is in a sequence, as they were given; null where they were not.
fn given(prompt: &PromptArgs, images: &ImageArgs, saturate: bool) -> Value {
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
    fn json(&self) -> Value {
        let mut object = show::layout_json(&self.plan, self.encoder.config(), &self.names);
        object["images"] = show::slots_json(&self.plan, &self.verified.slots, &self.names);
        object["images_encoded"] = json!(self.report.images_encoded);
        object["images_cached"] = json!(self.report.images_cached);
        object["images_placed"] = json!(self.placed);
        object["timings"] = show::timings_json(self.open, &self.report, self.write);
        object["peak_bytes"] = json!(show::peak_bytes());
        object["warnings"] = json!(self.warnings);
        object["device"] = json!(self.encoder.describe());
        object["fingerprint"] = json!(self.encoder.fingerprint());
        object["format"] = json!(self.format.name());
        object["out"] = json!(self.out.to_string_lossy());
        object["bytes"] = json!(self.bytes);
        if let Some(picture) = &self.picture {
            object["timings"]["picture_s"] = json!(picture.time.as_secs_f64());
            object["picture"] = picture.json();
        }
        object
    }

    /// What is printed otherwise: layout, timings, where the output is.
    pub fn table(&self) -> String {
        let mut out =
            show::layout(&self.plan, self.encoder.config(), &self.names, colour(&std::io::stdout()));
        out += &show::costs(self.open, &self.report, self.placed, self.write, &self.encoder.describe());
        let _ = writeln!(out, "wrote {} ({})", self.out.display(), show::bytes(self.bytes));
        if let Some(picture) = &self.picture {
            let (path, bytes, time) =
                (picture.out.display(), show::bytes(picture.bytes), show::time(picture.time));
            let _ = writeln!(out, "drew {path} ({bytes}) in {time}");
        }
        out
    }
}
