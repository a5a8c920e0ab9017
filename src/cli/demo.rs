//! `imagehere demo`: the main job, from nothing.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use clap::Parser;
use imagehere::backend::Device;
use imagehere::image::RgbImage;
use imagehere::output::AtomicFile;
use imagehere::synth::{self, Preset, SynthOptions};
use imagehere::{Error, Result};

use super::args::{Args, Command, DemoArgs};
use super::scenes::{SCENES, draw};
use super::{encode, warn};

const PROMPT: &str = "First picture:<ImageHere>, second picture:<ImageHere>. What is different?";

/// Runs the command. What is there from an earlier run is used again.
pub fn run(args: &DemoArgs) -> Result<String> {
    let dir = &args.out;
    fs::create_dir_all(dir).map_err(|source| Error::Write {
        path: dir.clone(),
        source,
        remedy: "Choose another place with `--out DIR`".to_owned(),
    })?;
    let mut out = String::new();

    let (model, options) = (dir.join("model"), SynthOptions::default());
    let found = synth::is_there(Preset::Tiny, &options, &model);
    if !found {
        synth::write(Preset::Tiny, &options, &model)?;
    }
    let how = if found { "found" } else { "made" };
    let _ = writeln!(out, "{how} {}: a small random model in the upstream layout", model.display());

    let mut paths = Vec::new();
    for (name, scene) in SCENES {
        let path = dir.join(name);
        save(&path, &draw(320, 240, scene))?;
        let _ = writeln!(out, "drew {}", path.display());
        paths.push(path);
    }

    // The job itself, through the front door: what is printed can be typed.
    let sequence = dir.join("sequence.safetensors");
    let mut words: Vec<OsString> = vec!["imagehere".into(), "encode".into(), "--model".into(), model.into()];
    words.extend(["--prompt".into(), PROMPT.into(), "--image".into()]);
    words.extend(paths.into_iter().map(OsString::from));
    words.extend(["--out".into(), sequence.into(), "--picture".into(), dir.join("picture.png").into()]);
    if args.device != Device::Auto {
        words.extend(["--device".into(), args.device.to_string().into()]);
    }
    let quoted: Vec<String> = words.iter().map(|word| quote(&word.to_string_lossy())).collect();
    let _ = writeln!(out, "\n$ {}\n", quoted.join(" "));
    let parsed =
        Args::try_parse_from(words).map_err(|e| Error::Internal(format!("the demo's command: {e}")))?;
    let Command::Encode(job) = parsed.command else {
        return Err(Error::Internal("the demo's command is not an encode".to_owned()));
    };
    let outcome = encode::encode(&job)?;
    warn(&outcome.warnings);
    out += &outcome.table();
    Ok(out)
}

/// Puts quotes around a word that a shell would split.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:,=+@\\".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

fn save(path: &Path, image: &RgbImage) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    image.write_png(&mut file).map_err(|source| Error::Write {
        path: path.to_path_buf(),
        source,
        remedy: "Make room there or choose another place with `--out DIR`".to_owned(),
    })?;
    file.commit_unsynced()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_command_survives_a_shell() {
        assert_eq!(quote("a/b-c.png"), "a/b-c.png");
        assert_eq!(quote("it's <here>"), r"'it'\''s <here>'");
        assert_eq!(quote(""), "''");
    }
}
