//! What the command-line tests share: running the binary, and a place with a model and pictures.

#![allow(dead_code, reason = "every test file uses its own part of this")]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use imagehere::image::RgbImage;
use imagehere::synth::{self, Preset, SynthOptions};
use serde_json::Value;

#[cfg(all(feature = "cuda", target_os = "linux"))]
pub mod emulator;

/// How a command ended and what it said.
#[derive(Debug)]
pub struct Ended {
    /// Exit status.
    pub code: i32,
    /// Data.
    pub stdout: String,
    /// Everything said about them.
    pub stderr: String,
}

impl Ended {
    /// Reads how a process ended; it must have ended by itself and speak UTF-8.
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or_else(|| panic!("{:?}", output.status)),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Asserts success and returns stdout.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:#?}");
        self.stdout
    }

    /// Asserts success and returns stdout as the one JSON object that it must be.
    #[track_caller]
    pub fn json(self) -> Value {
        let value: Value =
            serde_json::from_str(&self.clone_stdout()).unwrap_or_else(|e| panic!("{e}: {self:#?}"));
        assert!(value.is_object() && self.code == 0, "{self:#?}");
        value
    }

    /// Asserts the status of a user's mistake and a message with all of `parts`; nothing on stdout, no panic.
    #[track_caller]
    pub fn mistake(self, parts: &[&str]) -> String {
        assert_eq!(self.code, 2, "{self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        assert!(self.stderr.starts_with("error: "), "{self:#?}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in {self:#?}");
        }
        self.stderr
    }

    fn clone_stdout(&self) -> String {
        self.stdout.clone()
    }
}

/// Prepares the binary, in an environment that does not depend on who runs the tests.
pub fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_imagehere"));
    command.args(args).stdin(Stdio::null()).env_remove("NO_COLOR").env_remove("IMAGEHERE_CUDA_SYNC");
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("EMU_")) {
        command.env_remove(name);
    }
    command
}

/// Prepares the binary where it finds the emulated device instead of a driver, with these settings of its.
#[cfg(all(feature = "cuda", target_os = "linux"))]
pub fn emulated<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, settings: &[(&str, &str)]) -> Command {
    let mut command = command(args);
    command.env("LD_LIBRARY_PATH", emulator::folder()).envs(settings.iter().copied());
    command
}

/// Runs the binary to its end.
pub fn imagehere<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ended {
    Ended::of(command(args).output().unwrap())
}

/// A directory with a tiny model in `model`, gone when dropped.
pub struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// Makes the directory and the model.
    pub fn new() -> Self {
        let place = Self::empty();
        synth::write(Preset::Tiny, &SynthOptions::default(), place.path("model")).unwrap();
        place
    }

    /// Makes the directory alone.
    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// Returns the path of something in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file and returns its path.
    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// Draws a picture as PNG, different for each seed, and returns its path.
    pub fn picture(&self, name: &str, seed: u32) -> PathBuf {
        let mut png = Vec::new();
        picture(seed).write_png(&mut png).unwrap();
        self.file(name, png)
    }

    /// Returns the names of what is in it, sorted.
    pub fn names(&self) -> Vec<String> {
        names(self.dir.path())
    }

    /// Starts a command on the model: `plan --model DIR --prompt PROMPT`, and so on.
    pub fn on_model(&self, command: &str, prompt: &str) -> Words {
        Words::new(command).arg("--model").arg(self.path("model")).arg("--prompt").arg(prompt)
    }
}

/// Words of a command line, in order.
#[derive(Clone)]
pub struct Words(pub Vec<OsString>);

impl Words {
    /// Begins with one word.
    pub fn new(word: &str) -> Self {
        Self(vec![word.into()])
    }

    /// Adds a word.
    pub fn arg(mut self, word: impl Into<OsString>) -> Self {
        self.0.push(word.into());
        self
    }

    /// Adds several.
    pub fn args<S: Into<OsString>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.0.extend(words.into_iter().map(Into::into));
        self
    }

    /// Runs them.
    pub fn run(&self) -> Ended {
        imagehere(&self.0)
    }
}

/// A picture of odd size with something to see.
pub fn picture(seed: u32) -> RgbImage {
    let (width, height) = (40 + 13 * (seed % 5), 30 + 7 * (seed % 3));
    let mut data = Vec::new();
    for y in 0..height {
        for x in 0..width {
            data.extend([(x * 5 + seed * 40) as u8, (y * 7) as u8, (x * y + seed) as u8]);
        }
    }
    RgbImage { width, height, data }
}

/// The names of what is in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}
