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
    let features =
        support::Words::new("features").arg("--model").arg(place.path("model")).arg("--image").arg(&image);
    with_little_room(&features.arg("--out").arg(&before)).mistake(&["s.safetensors", "Make room"]);
    assert_eq!(fs::read(&before).unwrap(), b"as it was");
    for format in ["safetensors", "npy"] {
        with_little_room(&request(&place, &place.path("several")).args(["--format", format]))
            .mistake(&["Make room"]);
    }
    fs::remove_file(place.path("request.json")).unwrap();
    assert_eq!(place.names(), ["a.png", "model", "s.safetensors"]);
}

/// A request of two sequences, and the command for it.
fn request(place: &Place, out: &Path) -> support::Words {
    let request = r#"{"images": {"a": "a.png"}, "sequences": [{"prompt": "<ImageHere>", "images": ["a"]}, {"prompt": "b"}]}"#;
    let request = place.file("request.json", request);
    let words = support::Words::new("encode").arg("--model").arg(place.path("model"));
    words.arg("--request").arg(request).arg("--out-dir").arg(out)
}

#[cfg(target_os = "linux")]
#[test]
fn where_nothing_may_be_written_the_message_says_so() {
    let place = Place::new();
    let image = place.picture("a.png", 1);
    // For root, too.
    let out = Path::new("/sys/imagehere");
    let encode = place.on_model("encode", "<ImageHere>").arg("--image").arg(&image);
    let model = || place.path("model");
    for words in [
        encode.clone(),
        encode.args(["--format", "npy"]),
        support::Words::new("features").arg("--model").arg(model()).arg("--image").arg(&image),
        support::Words::new("convert").arg(model()),
        support::Words::new("preprocess").args(["--size", "490", "--image"]).arg(&image),
        support::Words::new("synth").arg("tiny"),
    ] {
        let message = words.arg("--out").arg(out).run().mistake(&["/sys/imagehere", "cannot write"]);
        assert!(message.contains("permi") || message.contains("Choose"), "{message}");
    }
    request(&place, out).run().mistake(&["/sys/imagehere", "cannot write"]);
    assert!(!out.exists());
}

/// Starts a command one of whose images is stdin, gives it a picture, and calls `meanwhile` when it reads that: all
/// paths were looked at by then, and the checkpoint was opened, but nothing was decoded and no weight was read.
fn interrupted(words: &support::Words, meanwhile: impl FnOnce()) -> Ended {
    use std::io::Write as _;
    // Noise, of more bytes than a pipe holds.
    let noise = (0u32..250 * 250 * 3).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut png = Vec::new();
    imagehere::image::RgbImage { width: 250, height: 250, data: noise }.write_png(&mut png).unwrap();
    assert!(png.len() > 128 << 10);
    let mut child = command(&words.0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let (last, most) = png.split_last().unwrap();
    stdin.write_all(most).unwrap();
    meanwhile();
    stdin.write_all(&[*last]).unwrap();
    drop(stdin);
    Ended::of(child.wait_with_output().unwrap())
}

#[test]
fn an_image_that_vanishes_after_it_was_looked_for_is_named() {
    let place = Place::new();
    let out = place.path("out");
    let encode = place.on_model("encode", "<ImageHere><ImageHere>");
    let features = support::Words::new("features").arg("--model").arg(place.path("model"));
    for words in [encode.clone(), encode.args(["--format", "npy"]), features] {
        let image = place.picture("a.png", 1);
        let words = words.args(["--image", "-"]).arg(&image).arg("--out").arg(&out);
        let ended = interrupted(&words, || fs::remove_file(&image).unwrap());
        ended.mistake(&["image 1 (", "a.png", "cannot read it", "Check the path"]);
        assert_eq!(place.names(), ["model"]);
    }
}

#[test]
fn weights_that_are_cut_while_a_command_runs_are_an_error_and_no_signal() {
    for format in ["bin", "safetensors"] {
        let place = Place::empty();
        let synth = support::Words::new("synth").args(["tiny", "--format", format, "--out"]);
        synth.arg(place.path("model")).run().ok();
        let weights = names(&place.path("model")).into_iter().find(|name| name.contains("model."));
        let weights = weights.unwrap();
        let words =
            place.on_model("encode", "<ImageHere>").args(["--image", "-", "--out"]).arg(place.path("out"));
        let ended = interrupted(&words, || {
            fs::File::options()
                .write(true)
                .open(place.path("model").join(&weights))
                .unwrap()
                .set_len(64)
                .unwrap();
        });
        ended.mistake(&[&weights, "it got shorter while it was read", "Run it again"]);
        assert_eq!(place.names(), ["model"]);
    }
}
