//! The command line, one module per command.
//!
//! | module | what it does |
//! |---|---|
//! | [`args`] | the commands and their options: a contract, others script it |
//! | [`inputs`] | options to a request and images |
//! | [`request`] | the file of `--request`: images, and the sequences that share them |
//! | [`kept`] | the files of `--features` |
//! | [`sink`] | where a sequence goes: one file, or a folder of arrays |
//! | [`bulk`] | where features of images go |
//! | [`picture`] | the picture of `--picture` |
//! | [`encode`], [`several`], [`features`], [`plan`], [`preprocess`], [`inspect`], [`convert`], [`bench`], [`synth`], [`demo`] | the commands |
//! | [`scenes`] | what is drawn where there is no image |
//! | [`shell`] | completions and manual pages, made from the options |
//! | [`show`] | layouts as table, strip and JSON; sizes and times for people |
//! | [`progress`] | bars, on a terminal and after a second only |
//!
//! A command returns what goes to stdout, whole, and has written its files by then. With `--json` that is
//! one object and nothing else.

use std::io::{self, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use imagehere::{Category, Error, Result, Warning};

mod args;
pub mod bench;
mod bulk;
pub mod convert;
pub mod demo;
pub mod encode;
pub mod features;
pub mod inputs;
pub mod inspect;
mod kept;
mod picture;
pub mod plan;
pub mod preprocess;
mod progress;
mod request;
mod scenes;
mod several;
pub mod shell;
mod show;
mod sink;
pub mod synth;

pub use args::{Args, Command};

/// Sends the library's log to stderr: nothing, steps (`-v`) or everything (`-vv`).
pub fn log_to_stderr(verbose: u8) {
    use tracing_subscriber::filter::LevelFilter;
    let level = match verbose {
        0 => return,
        1 => LevelFilter::INFO,
        _ => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(colour(&io::stderr()))
        .init();
}

/// Runs a command, prints what it returns, and turns every way it can end into an exit status.
pub fn finish(command: impl FnOnce() -> Result<String>) -> ExitCode {
    // A panic is a bug here, never the user's mistake. Its own message goes to stderr first.
    let result = catch_unwind(AssertUnwindSafe(command))
        .unwrap_or_else(|_| Err(Error::Internal("a panic (above)".to_owned())))
        .and_then(|text| print(&text));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say("error", "31", &error.to_string());
            ExitCode::from(if error.category() == Category::Internal { 1 } else { 2 })
        }
    }
}

/// Prints each warning once to stderr.
pub fn warn(warnings: &[Warning]) {
    for (i, warning) in warnings.iter().enumerate() {
        if !warnings[..i].contains(warning) {
            say("warning", "33", &warning.message);
        }
    }
}

/// Says something on stderr. A closed stderr is nobody's error.
fn say(what: &str, ansi: &str, message: &str) {
    let mut stderr = io::stderr();
    let _ = match colour(&stderr) {
        true => writeln!(stderr, "\x1b[1;{ansi}m{what}:\x1b[0m {message}"),
        false => writeln!(stderr, "{what}: {message}"),
    };
}

/// Whether to colour what goes there: on a terminal, unless the user asked for none (<https://no-color.org>).
pub fn colour(stream: &impl IsTerminal) -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Writes to stdout. A reader that has had enough (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::Write {
            path: "the standard output".into(),
            source: e,
            remedy: "Give it somewhere to go with room".to_owned(),
        }),
        _ => Ok(()),
    }
}

/// An [`Error::Argument`] from its two halves.
fn argument(problem: impl Into<String>, remedy: impl Into<String>) -> Error {
    Error::Argument { problem: problem.into(), remedy: remedy.into() }
}

/// Runs `work` on so many threads, or on all.
fn in_threads<T: Send>(threads: Option<usize>, work: impl FnOnce() -> T + Send) -> Result<T> {
    let Some(threads) = threads else { return Ok(work()) };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| {
        argument(format!("cannot start {threads} threads: {error}"), "Ask for fewer with `--threads`")
    })?;
    Ok(pool.install(work))
}

/// Turns a value into one line of JSON.
fn json_line(value: &serde_json::Value) -> String {
    format!("{value}\n")
}
