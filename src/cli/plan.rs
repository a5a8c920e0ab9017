//! `imagehere plan`: the layout of a sequence, without weights and without pixels.

use imagehere::Result;
use imagehere::checkpoint::Checkpoint;
use imagehere::prompt::Planner;
use imagehere::tokenizer::Tokenizer;
use serde_json::json;

use super::args::PlanArgs;
use super::{colour, inputs, json_line, show, warn};

/// Runs the command.
pub fn run(args: &PlanArgs) -> Result<String> {
    let request = inputs::request(&args.prompt, &args.images)?;
    inputs::image_rules(&args.images)?; // what encode would refuse is refused here
    let checkpoint = Checkpoint::open(&args.prompt.model)?;
    let planner = Planner::new(Tokenizer::from_dir(&args.prompt.model)?, checkpoint.config().clone())?;
    let plan = planner.plan(&request)?;
    inputs::check_paths(&args.images.image)?;

    warn(&plan.warnings);
    let names: Vec<String> = args.images.image.iter().map(|path| inputs::name(path)).collect();
    if args.json {
        let mut object = show::layout_json(&plan, planner.config(), &names);
        object["warnings"] = json!(plan.warnings);
        return Ok(json_line(&object));
    }
    Ok(show::layout(&plan, planner.config(), &names, colour(&std::io::stdout())))
}
