//! Every mistake a user can make: exit status 2, a message that says what to do, no output, no panic.

use std::fs;
use std::path::PathBuf;

use imagehere::synth::{self, DType, Format, Preset, SynthOptions};

mod support;
use support::{Ended, Place, Words, imagehere, names};

/// An encode of one good picture with what each test changes; afterwards there is no output.
struct Mistake {
    place: Place,
    image: PathBuf,
}

impl Mistake {
    fn new() -> Self {
        let place = Place::new();
        let image = place.picture("good.png", 1);
        Self { place, image }
    }

    fn encode(&self, prompt: &str, images: &[&PathBuf], options: &[&str]) -> Ended {
        let mut words = self.place.on_model("encode", prompt);
        if !images.is_empty() {
            words = words.arg("--image").args(images.iter().map(|path| path.as_os_str()));
        }
        let ended = words.arg("--out").arg(self.place.path("s.safetensors")).args(options).run();
        assert!(!self.place.path("s.safetensors").exists());
        let hidden: Vec<_> = self.place.names().into_iter().filter(|name| name.starts_with('.')).collect();
        assert_eq!(hidden, [""; 0], "something was left behind");
        ended
    }

    /// Encodes the good picture on a broken model.
    fn on_model(&self) -> Ended {
        self.encode("<ImageHere>", &[&self.image], &[])
    }

    fn model(&self, name: &str) -> PathBuf {
        self.place.path("model").join(name)
    }
}

#[test]
fn markers_and_images_that_do_not_match() {
    let case = Mistake::new();
    let good = &case.image;
    let message = case.encode("<ImageHere> or <ImageHere>?", &[good], &[]).mistake(&[
        "2 markers",
        "1 image",
        "at byte 15 of the query",
        "Image 1: <ImageHere>; or ?",
    ]);
    assert!(!message.contains("Image 2"), "{message}");
    case.encode("Which?", &[good, good], &[]).mistake(&[
        "0 markers",
        "2 images",
        "image 2",
        "good.png",
        "Image 1: <ImageHere>; Image 2: <ImageHere>; Which?",
    ]);
    let history = case.place.file("h.json", r#"[["<ImageHere>?", "A cat."]]"#);
    let option = ["--history", history.to_str().unwrap()];
    case.encode("<ImageHere>", &[good], &option).mistake(&["history turn 1, query", "whole conversation"]);
}

#[test]
fn markers_are_counted_before_pixels_and_weights_are_read() {
    let case = Mistake::new();
    let broken = case.place.file("broken.png", "no image");
    let weights = case.model("pytorch_model.bin");
    let mut bytes = fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4096].fill(0xff); // NaN in every dtype
    fs::write(&weights, bytes).unwrap();
    case.encode("no marker", &[&broken], &[]).mistake(&["0 markers"]);
}

#[test]
fn sequences_that_are_too_long() {
    let case = Mistake::new();
    case.encode("<ImageHere>", &[&case.image], &["--max-length", "40"]).mistake(&[
        "positions",
        "the limit is 40",
        "25",
    ]);
    let text = "word ".repeat(20_000);
    let file = case.place.file("long.txt", &text);
    let words =
        Words::new("encode").arg("--model").arg(case.place.path("model")).arg("--prompt-file").arg(&file);
    words.arg("--out").arg(case.place.path("s")).run().mistake(&["32768", "max_position_embeddings"]);
}

#[test]
fn images_that_cannot_be_used() {
    let case = Mistake::new();
    let good = &case.image;
    let missing = case.place.path("missing.jpg");
    case.encode("<ImageHere><ImageHere>", &[good, &missing], &[]).mistake(&["missing.jpg", "Check the path"]);
    let directory = case.place.path("model");
    case.encode("<ImageHere>", &[&directory], &[]).mistake(&["model", "directory"]);
    let text = case.place.file("notes.txt", "Dear diary");
    case.encode("<ImageHere><ImageHere>", &[good, &text], &[])
        .mistake(&["notes.txt", "not a supported image"]);
    let empty = case.place.file("empty.png", "");
    case.encode("<ImageHere>", &[&empty], &[]).mistake(&["empty.png"]);
    let bytes = fs::read(good).unwrap();
    let half = case.place.file("half.png", &bytes[..bytes.len() / 2]);
    case.encode("<ImageHere>", &[&half], &[]).mistake(&["half.png"]);
    let mut huge = bytes.clone();
    huge[16..24].copy_from_slice(&[0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60]); // 60000×60000 in the header
    let huge = case.place.file("huge.png", &huge);
    case.encode("<ImageHere>", &[&huge], &[]).mistake(&["huge.png"]);
}

#[test]
fn prompts_and_histories_that_cannot_be_read() {
    let case = Mistake::new();
    let words = |file: &str| {
        let words = Words::new("encode").arg("--model").arg(case.place.path("model"));
        words.arg("--out").arg(case.place.path("s")).arg("--prompt-file").arg(case.place.path(file)).run()
    };
    words("nowhere.txt").mistake(&["nowhere.txt", "--prompt-file"]);
    case.place.file("latin1.txt", b"caf\xe9!");
    words("latin1.txt").mistake(&["latin1.txt", "not UTF-8", "0xe9", "offset 3", "Save the prompt as UTF-8"]);
    for (name, text) in [
        ("broken.json", "[[\"a\", "),
        ("object.json", "{\"query\": \"a\"}"),
        ("single.json", "[[\"a\"]]"),
        ("triple.json", "[[\"a\", \"b\", \"c\"]]"),
        ("numbers.json", "[[1, 2]]"),
    ] {
        let file = case.place.file(name, text);
        case.encode("x", &[], &["--history", file.to_str().unwrap()])
            .mistake(&[name, "[[\"query\", \"answer\"], ...]"]);
    }
    let missing = case.place.path("h.json");
    case.encode("x", &[], &["--history", missing.to_str().unwrap()]).mistake(&["h.json", "--history"]);
}

#[test]
fn targets_that_cannot_be_written() {
    let case = Mistake::new();
    let to = |target: PathBuf| {
        let words = case.place.on_model("encode", "<ImageHere>").arg("--image").arg(&case.image);
        words.arg("--out").arg(target).run()
    };
    to(case.place.path("no/such/dir/s.safetensors")).mistake(&["there is no directory", "mkdir -p"]);
    to(case.place.path("model")).mistake(&["it is a directory", "Name a file inside it"]);
    to(case.place.path("good.png/s.safetensors")).mistake(&["Choose a target in a directory"]);
    #[cfg(unix)]
    to("/dev/null".into()).mistake(&["not a plain file"]);
    assert_eq!(case.place.names(), ["good.png", "model"]);
}

#[cfg(unix)]
#[test]
fn a_directory_without_write_permission() {
    use std::os::unix::fs::PermissionsExt;
    let case = Mistake::new();
    let locked = case.place.path("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(locked.join("probe"), "").is_ok() {
        eprintln!("skipped: this user may write anywhere");
        return;
    }
    let words = case.place.on_model("encode", "<ImageHere>").arg("--image").arg(&case.image);
    words.arg("--out").arg(locked.join("s")).run().mistake(&["write permission", "locked"]);
}

#[test]
fn the_target_is_looked_at_before_the_weights() {
    let case = Mistake::new();
    let weights = case.model("pytorch_model.bin");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let words = case.place.on_model("encode", "<ImageHere>").arg("--image").arg(&case.image);
    words.arg("--out").arg(case.place.path("no/dir/s")).run().mistake(&["mkdir -p"]);
}

#[test]
fn devices_that_are_not_there() {
    let case = Mistake::new();
    for device in ["cuda:97", "cuda:4095"] {
        case.encode("<ImageHere>", &[&case.image], &["--device", device]).mistake(&[device, "use `cpu`"]);
    }
    case.encode("<ImageHere>", &[&case.image], &["--device", "tpu"]).mistake(&["tpu", "cuda:N"]);
    case.encode("<ImageHere>", &[&case.image], &["--device", "cuda:0,0"]).mistake(&["cuda:0 is named twice"]);
}

#[test]
fn options_that_contradict_each_other() {
    let case = Mistake::new();
    for options in [
        ["--compat", "upstream", "--exif", "apply"].as_slice(),
        &["--compat", "upstream", "--alpha", "white"],
        &["--compat", "upstream", "--bos", "first"],
        &["--compat", "upstream", "--max-length", "100"],
    ] {
        case.encode("<ImageHere>", &[&case.image], options)
            .mistake(&[options[2], "Leave one of the two out"]);
    }
    for options in [
        ["--meta-instruction", "x", "--no-meta"].as_slice(),
        &["--raw", "--meta-instruction", "x"],
        &["--raw", "--history", "h.json"],
        &["--prompt-file", "p.txt"],
    ] {
        case.encode("<ImageHere>", &[&case.image], options).mistake(&["cannot be used with", "--help"]);
    }
    let stdin = ["--image", "-", "-"];
    case.encode("<ImageHere><ImageHere>", &[], &stdin).mistake(&["Stdin can be read once"]);
    let words = Words::new("encode").arg("--model").arg(case.place.path("model"));
    let words = words.args(["--prompt-file", "-", "--image", "-", "--out", "s"]);
    words.run().mistake(&["both want stdin"]);
}

#[test]
fn words_that_mean_nothing() {
    let case = Mistake::new();
    for (options, part) in [
        (["--exif", "rotate"].as_slice(), "apply, ignore"),
        (&["--alpha", "pink"], "drop, white, black"),
        (&["--resample", "nearest"], "pillow, pillow13"),
        (&["--bos", "never"], "per-segment, first"),
        (&["--compat", "downstream"], "upstream"),
        (&["--max-length", "0"], "at least 1"),
        (&["--max-length", "many"], "whole number"),
        (&["--colour"], "--help"),
    ] {
        case.encode("<ImageHere>", &[&case.image], options).mistake(&[options[0], part]);
    }
    imagehere(["encode"]).mistake(&["--model", "--out", "--prompt"]);
    imagehere(["encoed"]).mistake(&["encode"]);
    imagehere(["plan", "--model", "m"]).mistake(&["--prompt"]);
    imagehere(["synth", "large", "--out", "m"]).mistake(&["tiny, vl-7b-vision"]);
    imagehere(["synth", "tiny", "--out", "m", "--dtype", "int8"]).mistake(&["bf16, f16, f32"]);
    imagehere(["synth", "tiny", "--out", "m", "--format", "gguf"]).mistake(&["bin, safetensors"]);
    imagehere(["preprocess", "--image", "a.png", "--out", "d"]).mistake(&["--size", "--model"]);
    imagehere(["preprocess", "--image", "a.png", "--out", "d", "--size", "0"]).mistake(&["--size"]);
    imagehere(["preprocess", "--size", "70", "--out", "d"]).mistake(&["there is no image", "--image"]);
    let ended = imagehere([""; 0]);
    assert!(ended.code == 2 && ended.stderr.contains("Examples:"), "{ended:?}");
}

#[test]
fn directories_that_are_no_checkpoint() {
    let case = Mistake::new();
    let on = |model: PathBuf| {
        let words = Words::new("encode").arg("--model").arg(model).args(["--prompt", "x", "--out"]);
        words.arg(case.place.path("s")).run()
    };
    on(case.place.path("nowhere")).mistake(&["nowhere"]);
    on(case.image.clone()).mistake(&["good.png"]);
    fs::create_dir(case.place.path("empty")).unwrap();
    on(case.place.path("empty")).mistake(&["empty", "config.json"]);
    for command in ["inspect", "inspect --all"] {
        let words: Vec<_> =
            command.split(' ').map(Into::into).chain([case.place.path("empty").into()]).collect();
        Words(words).run().mistake(&["empty", "config.json"]);
    }
}

#[test]
fn checkpoint_files_that_are_missing_or_broken() {
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 9980000000\n";
    for (file, bytes, parts) in [
        ("config.json", None, ["config.json"].as_slice()),
        ("config.json", Some("{ not json"), &["config.json"]),
        ("tokenizer.model", None, &["tokenizer.model"]),
        ("tokenizer.model", Some("no tokenizer"), &["tokenizer.model"]),
        ("tokenizer.model", Some(lfs), &["tokenizer.model", "git lfs pull"]),
        ("pytorch_model.bin", None, &["pytorch_model.bin"]),
        ("pytorch_model.bin", Some("no zip"), &["pytorch_model.bin"]),
        ("pytorch_model.bin", Some(lfs), &["pytorch_model.bin", "git lfs pull"]),
    ] {
        let case = Mistake::new();
        match bytes {
            Some(bytes) => fs::write(case.model(file), bytes).unwrap(),
            None => fs::remove_file(case.model(file)).unwrap(),
        }
        case.on_model().mistake(parts);
    }
    let case = Mistake::new();
    let bytes = fs::read(case.model("pytorch_model.bin")).unwrap();
    fs::write(case.model("pytorch_model.bin"), &bytes[..bytes.len() / 2]).unwrap();
    case.on_model().mistake(&["pytorch_model.bin"]);
}

#[test]
fn weights_that_fp16_cannot_hold() {
    let case = Mistake::new();
    fs::remove_dir_all(case.place.path("model")).unwrap();
    let options = SynthOptions { format: Format::Safetensors, dtype: DType::F32, ..SynthOptions::default() };
    synth::write(Preset::Tiny, &options, case.place.path("model")).unwrap();
    let file = case.model("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 4; // the last element of vision_proj.2.bias, [256]
    bytes[last..].copy_from_slice(&70000.0f32.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    case.on_model().mistake(&["vision_proj.2.bias", "255", "70000", "65504", "--saturate"]);
    let words = case.place.on_model("encode", "<ImageHere>").arg("--image").arg(&case.image);
    let ended = words.arg("--out").arg(case.place.path("s")).arg("--saturate").run();
    assert!(ended.stderr.contains("warning: ") && ended.stderr.contains("vision_proj.2.bias"), "{ended:?}");
    ended.ok();
}

#[test]
fn places_that_are_not_for_synth() {
    let place = Place::empty();
    let out = place.path("mine");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.tex"), "precious").unwrap();
    let synth = |out: &PathBuf| Words::new("synth").args(["tiny", "--out"]).arg(out).run();
    synth(&out).mistake(&["thesis.tex", "is empty or does not exist"]);
    assert_eq!(names(&out), ["thesis.tex"]);
    let file = place.file("file", "");
    synth(&file).mistake(&["it is a file"]);
    let words = Words::new("synth").args(["tiny", "--tokenizer", "/no/such.model", "--out"]);
    words.arg(place.path("m")).run().mistake(&["/no/such.model", "tokenizer.model"]);
    assert_eq!(place.names(), ["file", "mine"]);
}
