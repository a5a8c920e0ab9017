//! `imagehere completions` and `imagehere man`: what shells and `man` read, made from the options themselves.

use clap::CommandFactory;
use imagehere::{Error, Result};

use super::args::{Args, CompletionsArgs, ManArgs};
use super::argument;

/// The completions of a shell.
pub fn completions(args: &CompletionsArgs) -> Result<String> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "imagehere", &mut script);
    text(script)
}

/// The manual page of the whole, or of one command.
pub fn man(args: &ManArgs) -> Result<String> {
    let mut whole = Args::command();
    whole.build(); // global options reach the commands
    let page = match &args.command {
        None => whole,
        Some(name) => match whole.find_subcommand(name) {
            Some(command) => command.clone(),
            None => {
                let names: Vec<&str> = whole.get_subcommands().map(clap::Command::get_name).collect();
                let remedy = format!("Use one of: {}", names.join(", "));
                return Err(argument(format!("there is no command `{name}`"), remedy));
            }
        },
    };
    let mut roff = Vec::new();
    clap_mangen::Man::new(page)
        .render(&mut roff)
        .map_err(|error| Error::Internal(format!("a page into memory: {error}")))?;
    text(roff)
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| Error::Internal(format!("a page that is no text: {error}")))
}
