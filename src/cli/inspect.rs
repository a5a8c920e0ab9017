//! `imagehere inspect`: what a checkpoint directory holds.

use imagehere::Result;
use imagehere::checkpoint::Checkpoint;
use serde_json::json;

use super::args::InspectArgs;
use super::json_line;
use super::progress::Progress;

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<String> {
    let report = {
        let _spinner = Progress::spinner("reading weights");
        Checkpoint::open(&args.dir)?.inspect(args.all)?
    };
    Ok(if args.json { json_line(&json!(report)) } else { report.to_string() })
}
