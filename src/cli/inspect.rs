//! `imagehere inspect`: what a checkpoint directory holds.

use imagehere::Result;

use super::args::InspectArgs;
use super::argument;

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<String> {
    Err(argument(format!("{} cannot be inspected", args.dir.display()), "Wait"))
}
