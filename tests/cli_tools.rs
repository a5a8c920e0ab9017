//! `synth`, `inspect`, `preprocess`, `demo`, and what every command has.

use std::fs;

use imagehere::Encoder;
use imagehere::image::{Resample, RgbView, resize};
use serde_json::{Value, json};

mod support;
use support::{Place, Words, imagehere, names, picture};

#[test]
fn synth_makes_checkpoints_that_open_and_agree() {
    let place = Place::empty();
    let mut first: Option<Value> = None;
    for format in ["bin", "safetensors"] {
        for dtype in ["bf16", "f16", "f32"] {
            let out = place.path(&format!("{format}-{dtype}"));
            let words =
                Words::new("synth").args(["tiny", "--seed", "5", "--format", format, "--dtype", dtype]);
            let report = words.arg("--out").arg(&out).arg("--json").run().json();
            let files = report["files"].as_object().unwrap();
            assert_eq!(files.keys().cloned().collect::<Vec<_>>(), names(&out));
            let encoder = Encoder::open(&out).unwrap();
            let config = json!(encoder.config());
            assert_eq!(*first.get_or_insert_with(|| config.clone()), config, "{format} {dtype}");
        }
    }
    let config = first.unwrap();
    assert_eq!((&config["image_size"], &config["patches"]), (&json!(70), &json!(25)));
}

#[test]
fn the_same_seed_makes_the_same_bytes_and_another_seed_others() {
    let place = Place::empty();
    let make = |name: &str, seed: &str| {
        let words = Words::new("synth").args(["tiny", "--seed", seed, "--out"]).arg(place.path(name));
        let text = words.run().ok();
        assert!(text.contains("pytorch_model.bin") && text.contains("parameters"), "{text}");
        fs::read(place.path(name).join("pytorch_model.bin")).unwrap()
    };
    let one = make("a", "1");
    assert!(one == make("b", "1"));
    assert!(one != make("c", "2"));
    assert!(one == make("c", "1"), "what synth made, synth makes anew");
}

#[test]
fn inspect_tells_what_is_there() {
    let place = Place::new();
    let text = Words::new("inspect").arg(place.path("model")).run().ok();
    for part in ["pytorch_model.bin", "bf16", "70", "128", "256", "1024"] {
        assert!(text.to_lowercase().contains(part), "no {part:?} in {text}");
    }
    for words in [Words::new("inspect"), Words::new("inspect").arg("--all")] {
        let report = words.arg(place.path("model")).arg("--json").run().json();
        assert_eq!(report["config"]["width"], json!(128));
        assert_eq!(report["fingerprint"], json!(Encoder::open(place.path("model")).unwrap().fingerprint()));
    }
}

#[test]
fn preprocess_writes_what_the_model_sees() {
    let place = Place::new();
    let images = [place.picture("a.png", 1), place.picture("b.png", 2)];
    let words = Words::new("preprocess").arg("--image").args(&images).arg("--out").arg(place.path("seen"));
    let report = words.clone().arg("--model").arg(place.path("model")).arg("--json").run().json();
    assert_eq!(report["size"], json!(70));
    assert_eq!(names(&place.path("seen")), ["000.png", "001.png"]);
    for (i, seed) in [(0, 1), (1, 2)] {
        let file = place.path(&format!("seen/{i:03}.png"));
        assert_eq!(report["images"][i]["file"], json!(file.to_str()));
        let seen = image::open(&file).unwrap().into_rgb8();
        let source = picture(seed);
        let view =
            RgbView::new(&source.data, source.width, source.height, 3 * source.width as usize).unwrap();
        assert!(*seen.as_raw() == resize::resize(view, 70, 70, Resample::Pillow).data);
    }
    let text = words.args(["--size", "33"]).run().ok();
    assert!(text.contains("000.png") && text.contains("33×33"), "{text}");
    assert_eq!(image::image_dimensions(place.path("seen/001.png")).unwrap(), (33, 33));
}

#[test]
fn preprocess_fails_whole() {
    let place = Place::empty();
    let (good, bad) = (place.picture("a.png", 1), place.file("b.png", "no image"));
    let words = Words::new("preprocess").arg("--image").arg(good).arg(bad).args(["--size", "70", "--out"]);
    words.arg(place.path("seen")).run().mistake(&["b.png"]);
    assert_eq!(place.names(), ["a.png", "b.png"]);
}

#[test]
fn the_demo_runs_from_nothing_and_again() {
    let place = Place::empty();
    let run = || {
        let output = support::command(["demo"]).current_dir(place.path("")).output().unwrap();
        support::Ended::of(output).ok()
    };
    let first = run();
    for part in [
        "made ",
        "drew ",
        "$ imagehere encode ",
        "= 50 in 2 images + ",
        "encode ",
        "wrote ",
        "drew imagehere-demo/picture.png (",
    ] {
        assert!(first.contains(part), "no {part:?} in {first}");
    }
    assert!(run().contains("found "));
    let at = place.path("imagehere-demo");
    assert_eq!(names(&at), ["house.png", "model", "picture.png", "sequence.safetensors", "sunset.png"]);

    // The printed command can be typed, and does the same.
    let before = fs::read(at.join("sequence.safetensors")).unwrap();
    fs::remove_file(at.join("sequence.safetensors")).unwrap();
    let line = first.lines().find_map(|line| line.strip_prefix("$ imagehere ")).unwrap();
    let line = format!("'{}' {line}", env!("CARGO_BIN_EXE_imagehere"));
    let status = std::process::Command::new("sh")
        .args(["-c", &line])
        .current_dir(place.path(""))
        .stdout(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success());
    assert!(before == fs::read(at.join("sequence.safetensors")).unwrap());
}

#[test]
fn help_teaches_and_version_tells() {
    let text = imagehere(["--help"]).ok();
    for part in [
        "encode",
        "plan",
        "preprocess",
        "inspect",
        "convert",
        "synth",
        "bench",
        "demo",
        "Examples:",
        "Exit status",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let text = imagehere(["encode", "--help"]).ok();
    for option in [
        "--model",
        "--prompt",
        "--prompt-file",
        "--image",
        "--out",
        "--format",
        "--meta-instruction",
        "--no-meta",
        "--history",
        "--raw",
        "--allow-control-tokens",
        "--bos",
        "--max-length",
        "--truncate",
        "--exif",
        "--alpha",
        "--resample",
        "--compat",
        "--device",
        "--picture",
        "--picture-map",
        "--json",
    ] {
        assert!(text.contains(option), "no {option} in {text}");
    }
    assert_eq!(imagehere(["--version"]).ok(), format!("imagehere {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_log_goes_to_stderr_on_request() {
    let place = Place::new();
    let words = place.on_model("encode", "text").arg("--out").arg(place.path("s"));
    assert_eq!(words.run().stderr, "");
    let said = words.arg("-v").run();
    assert!(said.stderr.contains("opened"), "{said:?}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let help = imagehere(["--help"]).ok();
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(commands.contains(&"encode") && commands.len() > 8, "{commands:?}");
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = imagehere(["completions", shell]).ok();
        for word in commands.iter().chain(&["feature-cache", "no-meta"]) {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
    }
    let overview = imagehere(["man"]).ok();
    assert!(overview.contains(".TH imagehere 1"), "{overview}");
    for command in commands {
        assert!(overview.contains(command), "{command}");
        let page = imagehere(["man", command]).ok();
        assert!(page.contains(&format!(".TH imagehere-{command} 1")), "{page}");
    }
    imagehere(["man", "decode"]).mistake(&["no command `decode`", "Use one of: encode"]);
}
