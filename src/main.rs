//! The `imagehere` command: parse, call, print.
//!
//! Data go to stdout, everything said about them to stderr. Exit status: 0 done; 2 something the user can
//! mend (arguments, inputs, checkpoint, target, device); 1 the rest.

use std::process::ExitCode;

use clap::Parser;

mod cli;

fn main() -> ExitCode {
    let args = cli::Args::parse(); // exits with 2 on a usage error, with 0 after --help
    cli::log_to_stderr(args.verbose);
    cli::finish(|| match &args.command {
        cli::Command::Encode(args) => cli::encode::run(args),
        cli::Command::Features(args) => cli::features::run(args),
        cli::Command::Plan(args) => cli::plan::run(args),
        cli::Command::Preprocess(args) => cli::preprocess::run(args),
        cli::Command::Inspect(args) => cli::inspect::run(args),
        cli::Command::Convert(args) => cli::convert::run(args),
        cli::Command::Bench(args) => cli::bench::run(args),
        cli::Command::Synth(args) => cli::synth::run(args),
        cli::Command::Demo(args) => cli::demo::run(args),
        cli::Command::Completions(args) => cli::shell::completions(args),
        cli::Command::Man(args) => cli::shell::man(args),
    })
}
