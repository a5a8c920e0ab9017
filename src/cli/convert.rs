//! `imagehere convert`: what encoding needs, as fp16 safetensors.

use std::fmt::Write as _;

use imagehere::Result;
use imagehere::checkpoint::{Checkpoint, RangePolicy};
use imagehere::convert::{ConvertOptions, write_watched};
use imagehere::output::StagedDir;
use serde_json::json;

use super::args::ConvertArgs;
use super::progress::Progress;
use super::{json_line, show, warn};

/// Runs the command.
pub fn run(args: &ConvertArgs) -> Result<String> {
    StagedDir::check(&args.out)?;
    let checkpoint = Checkpoint::open(&args.dir)?;
    let range_policy = if args.saturate { RangePolicy::Saturate } else { RangePolicy::Refuse };
    let options = ConvertOptions { layout: args.layout, range_policy };
    let report = {
        let bar = Progress::bar("converting");
        write_watched(&checkpoint, options, &args.out, &mut |done| bar.set(done))?
    };
    warn(&report.warnings);
    if args.json {
        let mut object = json!(report);
        object["bytes"] = json!(report.bytes());
        object["peak_bytes"] = json!(show::peak_bytes());
        return Ok(json_line(&object));
    }
    let mut out = format!(
        "{}: {} in fp16, layout {}, {} and {} parameters\n",
        report.dir.display(),
        report.source.display(),
        report.layout,
        show::count(report.tensors, "tensor"),
        report.parameters
    );
    for (name, &bytes) in &report.files {
        let _ = writeln!(out, "{:>10}  {name}", show::bytes(bytes));
    }
    let _ = writeln!(out, "\n{}", report.conversion);
    let _ = writeln!(out, "{} cut to ±65504", show::count(report.saturated as usize, "value"));
    if let Some(fingerprint) = &report.fingerprint {
        let _ = writeln!(out, "fingerprint {fingerprint}");
    }
    Ok(out)
}
