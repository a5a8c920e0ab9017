//! `imagehere preprocess`: what the model sees of each image, as PNG.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use imagehere::checkpoint::Checkpoint;
use imagehere::image::prepare_all;
use imagehere::output::AtomicFile;
use imagehere::{Error, Result, Warning};
use serde_json::{Value, json};

use super::args::PreprocessArgs;
use super::{argument, inputs, json_line, warn};

/// Runs the command.
pub fn run(args: &PreprocessArgs) -> Result<String> {
    let (decode, resample) = inputs::image_rules(&args.images)?;
    if args.images.image.is_empty() {
        return Err(argument("there is no image", "Give one or more with `--image`"));
    }
    let frame = match (&args.model, args.size) {
        (Some(dir), _) => Checkpoint::open(dir)?.config().frame(),
        (None, Some(side)) => side.into(),
        (None, None) => return Err(argument("there is no size", "Give `--model DIR` or `--size N`")),
    };
    let sources = inputs::sources(&args.images.image, &decode)?;
    let prepared = prepare_all(&sources, frame, resample, &decode)?;
    let side = frame.side;

    // Every file is written before the first gets its name: all or, as far as a directory allows, nothing.
    let made = !args.out.exists();
    fs::create_dir_all(&args.out).map_err(|source| Error::Write {
        path: args.out.clone(),
        source,
        remedy: "Choose a directory that can be made".to_owned(),
    })?;
    let written = write_all(args, &prepared.iter().map(|one| &one.pixels).collect::<Vec<_>>());
    if written.is_err() && made {
        let _ = fs::remove_dir(&args.out); // only if nothing is in it
    }
    let files = written?;

    let warnings: Vec<Warning> = prepared.iter().flat_map(|one| one.warnings.clone()).collect();
    warn(&warnings);
    if args.json {
        let images: Vec<Value> = files
            .iter()
            .zip(&sources)
            .zip(&prepared)
            .map(|((file, source), one)| {
                let (width, height) = (one.width, one.height);
                json!({ "name": source.name(), "width": width, "height": height, "file": file.to_string_lossy() })
            })
            .collect();
        return Ok(json_line(&json!({ "size": side, "images": images, "warnings": warnings })));
    }
    let mut out = String::new();
    for ((file, source), one) in files.iter().zip(&sources).zip(&prepared) {
        let (from, width, height) = (source.name(), one.width, one.height);
        let _ = writeln!(out, "{}  {side}×{side}  from {from}, {width}×{height}", file.display());
    }
    Ok(out)
}

/// Writes the images to `000.png`, `001.png`, … and returns the paths.
fn write_all(args: &PreprocessArgs, images: &[&imagehere::image::RgbImage]) -> Result<Vec<PathBuf>> {
    let mut pending = Vec::new();
    for (i, image) in images.iter().enumerate() {
        let path = args.out.join(format!("{i:03}.png"));
        let mut png = Vec::new();
        image.write_png(&mut png).map_err(|e| Error::Internal(format!("a PNG could not be made: {e}")))?;
        let mut file = AtomicFile::create(&path)?;
        file.write_all(&png).map_err(|source| Error::Write {
            path: path.clone(),
            source,
            remedy: "Make room there or choose another directory".to_owned(),
        })?;
        pending.push((path, file));
    }
    pending.into_iter().map(|(path, file)| file.commit().map(|()| path)).collect()
}
