//! Files appear whole or not at all, whatever ends the program.

#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use safetensors::SafeTensors;

mod support;
use support::{Ended, Place, command, names};

#[test]
fn killed_at_any_moment_encode_leaves_the_whole_file_or_none() {
    let place = Place::new();
    let image = place.picture("a.png", 1);
    fs::create_dir(place.path("out")).unwrap();
    let out = place.path("out/s.safetensors");
    let words = place.on_model("encode", "<ImageHere>").arg("--image").arg(&image).arg("--out").arg(&out);
    let (mut whole, mut none) = (0, 0);
    for step in 0..40 {
        let _ = fs::remove_file(&out);
        let mut child = command(&words.0).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(3 * step));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        match fs::read(&out) {
            Ok(bytes) => {
                SafeTensors::deserialize(&bytes).unwrap();
                whole += 1;
            }
            Err(_) => none += 1,
        }
        let there = names(&place.path("out"));
        let hidden = there.iter().filter(|name| name.starts_with('.')).count();
        assert!(hidden == 0 || !cfg!(target_os = "linux"), "{there:?}");
    }
    assert!(none > 0, "{whole} of 40 were never killed in time");
}

#[test]
fn killed_synth_leaves_nothing_that_opens() {
    let place = Place::empty();
    let out = place.path("m");
    for wait in [0, 20, 300] {
        let mut child =
            command(["synth", "vl-7b-vision", "--out"]).arg(&out).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!out.join("config.json").exists());
        if cfg!(target_os = "linux") && out.exists() {
            assert_eq!(names(&out), [""; 0]);
        }
    }
}

/// Runs a command that makes the folder `out/made` and kills it a little later each time. `whole` is asked when the
/// folder is there: it must have all of its files.
fn killed_at_any_moment(place: &Place, words: &support::Words, whole: impl Fn(&Path)) {
    fs::create_dir(place.path("out")).unwrap();
    let made = place.path("out/made");
    let words = words.clone().arg("--out").arg(&made);
    let (mut whole_ones, mut none) = (0, 0);
    for step in 0..60 {
        let mut child = command(&words.0).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(1200 * step));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        if made.exists() {
            whole(&made);
            whole_ones += 1;
        } else {
            none += 1;
        }
        // What else is there is hidden, and in nobody's way.
        assert!(names(&place.path("out")).iter().all(|name| name == "made" || name.starts_with(".made.")));
        fs::remove_dir_all(place.path("out")).unwrap();
        fs::create_dir(place.path("out")).unwrap();
    }
    assert!(none > 0, "{whole_ones} of 60 were never killed in time");
}

#[test]
fn killed_at_any_moment_convert_leaves_a_checkpoint_that_opens_or_none() {
    let place = Place::new();
    let words = support::Words::new("convert").arg(place.path("model"));
    killed_at_any_moment(&place, &words, |made| {
        assert_eq!(names(made), ["config.json", "model.safetensors", "tokenizer.model"]);
        imagehere::Encoder::open(made).unwrap();
    });
}

#[test]
fn killed_at_any_moment_encode_leaves_a_whole_folder_or_none() {
    let place = Place::new();
    let image = place.picture("a.png", 1);
    let words = place.on_model("encode", "<ImageHere>").arg("--image").arg(&image).args(["--format", "npy"]);
    killed_at_any_moment(&place, &words, |made| assert_eq!(names(made).len(), 6));
}

/// Runs a command that may not write more than a few kilobytes to any file, as on a full disk.
fn with_little_room(words: &support::Words) -> Ended {
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_imagehere")]);
    Ended::of(shell.args(&words.0).stdin(Stdio::null()).output().unwrap())
}

#[test]
fn without_room_nothing_is_left() {
    let place = Place::new();
    let image = place.picture("a.png", 1);
    let before = place.file("s.safetensors", "as it was");
    let words = place.on_model("encode", "<ImageHere>").arg("--image").arg(&image).arg("--out").arg(&before);
    with_little_room(&words).mistake(&["s.safetensors", "Make room"]);
    assert_eq!(fs::read(&before).unwrap(), b"as it was");

    let synth = support::Words::new("synth").args(["tiny", "--out"]).arg(place.path("m"));
    for format in ["bin", "safetensors"] {
        let message = with_little_room(&synth.clone().args(["--format", format])).mistake(&["Make room"]);
        assert_eq!(message.lines().count(), 1, "{message}");
    }
    let convert = support::Words::new("convert").arg(place.path("model")).arg("--out").arg(place.path("m"));
    for layout in ["upstream", "clip-vision"] {
        let message = with_little_room(&convert.clone().args(["--layout", layout])).mistake(&["Make room"]);
        assert!(message.contains(place.path("m/model.safetensors").to_str().unwrap()), "{message}");
    }
    let folder = place.on_model("encode", "<ImageHere>").arg("--image").arg(&image).args(["--format", "npy"]);
    let message = with_little_room(&folder.arg("--out").arg(place.path("f"))).mistake(&["Make room"]);
    assert!(message.contains(place.path("f/inputs_embeds.npy").to_str().unwrap()), "{message}");
    let preprocess = support::Words::new("preprocess").args(["--size", "490", "--image"]).arg(&image);
    with_little_room(&preprocess.arg("--out").arg(place.path("seen"))).mistake(&["000.png", "Make room"]);
    assert_eq!(place.names(), ["a.png", "model", "s.safetensors"]);
}
