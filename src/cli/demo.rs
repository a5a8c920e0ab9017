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

    let pictures = [("sunset.png", sunset as fn(f32, f32) -> Rgb), ("house.png", house)];
    let mut paths = Vec::new();
    for (name, scene) in pictures {
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
    words.extend(["--out".into(), sequence.into()]);
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

/// A colour in units of 1.
type Rgb = [f32; 3];

/// Draws a scene given as a colour at every point (x, y) of a frame 4 wide and 3 high, y downwards. Four
/// samples per pixel keep edges smooth.
fn draw(width: u32, height: u32, scene: fn(f32, f32) -> Rgb) -> RgbImage {
    let mut data = Vec::with_capacity(3 * (width * height) as usize); // [height, width, 3]
    for y in 0..height {
        for x in 0..width {
            let mut sum = [0.0; 3];
            for (dx, dy) in [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)] {
                let (x, y) = ((x as f32 + dx) * 4.0 / width as f32, (y as f32 + dy) * 3.0 / height as f32);
                let colour = scene(x, y);
                (0..3).for_each(|c| sum[c] += colour[c] / 4.0);
            }
            data.extend(sum.map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8));
        }
    }
    RgbImage { width, height, data }
}

/// From `a` (t = 0) to `b` (t = 1).
fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    [0, 1, 2].map(|c| a[c] + (b[c] - a[c]) * t.clamp(0.0, 1.0))
}

/// A low sun over the sea, and its light on the waves.
fn sunset(x: f32, y: f32) -> Rgb {
    let from_sun = (x - 2.0).hypot(y - 1.5);
    match y {
        y if y < 2.0 && from_sun < 0.45 => [1.0, 0.93, 0.62],
        y if y < 2.0 => {
            mix(mix([1.0, 0.55, 0.25], [0.16, 0.2, 0.45], (2.0 - y) / 2.0), [1.0, 0.8, 0.4], 0.5 - from_sun)
        }
        _ => {
            let wave = ((y - 2.0) * 40.0 + (x * 9.0).sin()).sin();
            let glitter = wave > 0.2 && (x - 2.0).abs() < 0.2 + (y - 2.0) * 0.5;
            if glitter { [1.0, 0.78, 0.42] } else { mix([0.2, 0.22, 0.4], [0.05, 0.08, 0.2], y - 2.0) }
        }
    }
}

/// A house with a red roof, a door and two windows, on grass under a clear sky.
fn house(x: f32, y: f32) -> Rgb {
    let within =
        |left: f32, right: f32, top: f32, bottom: f32| x >= left && x < right && y >= top && y < bottom;
    if within(1.85, 2.2, 1.75, 2.4) {
        [0.35, 0.2, 0.1]
    } else if within(1.35, 1.65, 1.55, 1.85) || within(2.4, 2.7, 1.55, 1.85) {
        [0.65, 0.85, 1.0]
    } else if within(1.1, 2.95, 1.25, 2.4) {
        [0.95, 0.9, 0.75]
    } else if (0.5..1.25).contains(&y) && (x - 2.025).abs() < (y - 0.5) * 1.5 {
        [0.75, 0.15, 0.12]
    } else if y >= 2.2 {
        mix([0.35, 0.65, 0.25], [0.2, 0.45, 0.15], (y - 2.2) / 0.8)
    } else {
        mix([0.35, 0.6, 0.95], [0.8, 0.9, 1.0], y / 2.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pictures_are_different_and_not_flat() {
        let (a, b) = (draw(64, 48, sunset), draw(64, 48, house));
        assert_eq!(a.data.len(), 64 * 48 * 3);
        let colours = |image: &RgbImage| image.data.chunks(3).collect::<std::collections::HashSet<_>>().len();
        assert!(colours(&a) > 100 && colours(&b) > 30);
        assert_ne!(a, b);
    }

    #[test]
    fn a_printed_command_survives_a_shell() {
        assert_eq!(quote("a/b-c.png"), "a/b-c.png");
        assert_eq!(quote("it's <here>"), r"'it'\''s <here>'");
        assert_eq!(quote(""), "''");
    }
}
