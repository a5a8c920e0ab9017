//! `imagehere features`: what the tower makes of images, kept for `imagehere encode --features`.

use std::fmt::Write as _;
use std::time::Instant;

use imagehere::Result;
use imagehere::checkpoint::Checkpoint;
use imagehere::output::AtomicFile;
use imagehere::prompt::Planner;
use imagehere::tokenizer::Tokenizer;
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
    AtomicFile::check(&args.out)?;

    let opening = Instant::now();
    let checkpoint = Checkpoint::open(&args.model)?;
    let planner = Planner::new(Tokenizer::from_dir(&args.model)?, checkpoint.config().clone())?;
    let images = inputs::sources(&args.images.image, &rules.0)?;
    let encoder = encode::load(&args.running, &checkpoint, planner, rules, cache)?;
    let open = opening.elapsed();

    let (set, report) = {
        let bar = Progress::bar("encoding");
        encoder.feature_set(&images, &mut |done| bar.go_on(done))?
    };
    let writing = Instant::now();
    let bytes = set.save(&args.out)?;
    let write = writing.elapsed();

    let warnings = [encoder.warnings(), &report.warnings].concat();
    warn(&warnings);
    let (patches, hidden) = (encoder.config().patches, encoder.config().hidden_size);
    if args.json {
        let images: Vec<Value> = set
            .notes()
            .iter()
            .map(|note| json!({ "name": note.name, "pixels": note.pixels, "warnings": note.warnings }))
            .collect();
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
            "out": args.out.to_string_lossy(),
            "bytes": bytes,
        })));
    }
    let mut out = String::new();
    for (i, note) in set.notes().iter().enumerate() {
        let _ = writeln!(out, "image {}  {patches} rows of {hidden}  {}", i + 1, note.name);
    }
    out += &show::costs(open, &report, 0, write, &encoder.describe());
    let _ = writeln!(out, "wrote {} ({})", args.out.display(), show::bytes(bytes));
    Ok(out)
}
