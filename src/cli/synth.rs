//! `imagehere synth`: a random checkpoint.

use imagehere::Result;
use imagehere::synth::{SynthOptions, write_watched};
use serde_json::json;

use super::args::SynthArgs;
use super::progress::Progress;
use super::{json_line, show};

/// Runs the command.
pub fn run(args: &SynthArgs) -> Result<String> {
    let options = SynthOptions {
        seed: args.seed,
        format: args.format,
        dtype: args.dtype,
        tokenizer: args.tokenizer.clone(),
    };
    let report = {
        let bar = Progress::bar("making weights");
        write_watched(args.preset, &options, &args.out, &mut |done| bar.set(done))?
    };
    if args.json {
        return Ok(json_line(&json!(report)));
    }
    let mut out = format!(
        "{}: a random {} with seed {}, {} and {} parameters\n",
        report.dir.display(),
        args.preset,
        args.seed,
        show::count(report.tensors, "tensor"),
        report.parameters
    );
    for (name, &bytes) in &report.files {
        out += &format!("{:>10}  {name}\n", show::bytes(bytes));
    }
    Ok(out)
}
