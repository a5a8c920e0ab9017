//! `imagehere features`: what the tower makes of images, kept for `imagehere encode --features`.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use imagehere::checkpoint::Checkpoint;
use imagehere::encoder::EncodeReport;
use imagehere::features::ImageNote;
use imagehere::prompt::Planner;
use imagehere::tokenizer::Tokenizer;
use imagehere::{Result, WarningKind};
use serde_json::{Value, json};

use super::args::FeaturesArgs;
use super::progress::Progress;
use super::{argument, encode, inputs, json_line, show, warn};

/// Runs the command, cheapest checks first.
pub fn run(args: &FeaturesArgs) -> Result<String> {
    let rules = inputs::image_rules(&args.images)?;
    if args.images.image.is_empty() {
        return Err(argument("there is no image", "Give one or more with `--image`"));
    }
    let cache = encode::cache(&args.running)?;
    args.format.check(&args.out)?;

    let opening = Instant::now();
    let checkpoint = Checkpoint::open(&args.model)?;
    let planner = Planner::new(Tokenizer::from_dir(&args.model)?, checkpoint.config().clone())?;
    let images = inputs::sources(&args.images.image, &rules.0)?;
    let encoder = encode::load(&args.running, &checkpoint, planner, rules, cache)?;
    let open = opening.elapsed();

    let mut bulk = args.format.begin(&args.out)?;
    let bar = Progress::bar("encoding");
    let (mut all, mut notes, mut uuids) = (EncodeReport::default(), Vec::new(), Vec::new());
    let mut write = Duration::ZERO;
    for group in images.chunks(args.format.group(images.len())) {
        let before = notes.len();
        let share = |done: f32| (before as f32 + done * group.len() as f32) / images.len() as f32;
        let encoded = encoder.feature_set(group, &mut |done| bar.go_on(share(done)));
        let (set, report) = encoded.map_err(|error| error.after_images(before))?;
        let writing = Instant::now();
        uuids.extend(bulk.add(&set)?);
        write += writing.elapsed();
        let of_cache = report.warnings.into_iter().filter(|w| w.kind == WarningKind::FeatureCache);
        all.warnings.extend(of_cache);
        for note in set.notes() {
            all.warnings.extend(note.warnings_at(notes.len()));
            notes.push(note.clone());
        }
        all.decode += report.decode;
        all.resize += report.resize;
        all.encode += report.encode;
        all.images_encoded += report.images_encoded;
        all.images_cached += report.images_cached;
    }
    drop(bar);
    let writing = Instant::now();
    let bytes = bulk.end(&encoder.provenance())?;
    write += writing.elapsed();
    let report = all;

    let warnings = [encoder.warnings(), &report.warnings].concat();
    warn(&warnings);
    let (patches, hidden) = (encoder.config().patches, encoder.config().hidden_size);
    if args.json {
        let image = |(i, note): (usize, &ImageNote)| {
            let mut image = json!({ "name": note.name, "pixels": note.pixels, "warnings": note.warnings });
            if let Some(uuid) = uuids.get(i) {
                image["uuid"] = json!(uuid);
            }
            image
        };
        let images: Vec<Value> = notes.iter().enumerate().map(image).collect();
        return Ok(json_line(&json!({
            "images": images,
            "shape": [images.len(), patches, hidden],
            "images_encoded": report.images_encoded,
            "images_cached": report.images_cached,
            "timings": show::timings_json(open, &report, write),
            "peak_bytes": show::peak_bytes(),
            "warnings": warnings,
            "device": encoder.describe(),
            "numerics": encoder.numerics(),
            "preprocessing": encoder.preprocessing(),
            "fingerprint": encoder.fingerprint(),
            "format": args.format.name(),
            "out": args.out.to_string_lossy(),
            "bytes": bytes,
        })));
    }
    let mut out = String::new();
    for (i, note) in notes.iter().enumerate() {
        let _ = write!(out, "image {}  {patches} rows of {hidden}  ", i + 1);
        if let Some(uuid) = uuids.get(i) {
            let _ = write!(out, "uuid {uuid}  ");
        }
        let _ = writeln!(out, "{}", note.name);
    }
    out += &show::costs(open, &report, 0, write, &encoder.describe());
    let _ = writeln!(out, "wrote {} ({})", args.out.display(), show::bytes(bytes));
    Ok(out)
}
