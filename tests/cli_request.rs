//! `imagehere encode --request`: the files are those of single encodes, each image is encoded once, and every mistake
//! is found before anything is written.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};

mod support;
use support::{Ended, Place, Words, names};

/// A model, three pictures in `in/`, and requests beside them.
struct Case(Place);

impl Case {
    fn new() -> Self {
        let place = Place::new();
        fs::create_dir(place.path("in")).unwrap();
        for (name, seed) in [("a.png", 1), ("b.png", 2), ("c.png", 3)] {
            place.picture(&format!("in/{name}"), seed);
        }
        Self(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    fn words(&self, request: impl AsRef<[u8]>) -> Words {
        let file = self.0.file("in/request.json", request);
        let words = Words::new("encode").arg("--model").arg(self.path("model")).arg("--request").arg(file);
        words.arg("--out-dir").arg(self.path("out"))
    }

    /// Runs a request that must fail with all of `parts`, and leave nothing.
    #[track_caller]
    fn mistake(&self, request: impl AsRef<[u8]>, options: &[&str], parts: &[&str]) -> String {
        let message = self.words(request).args(options).run().mistake(parts);
        assert!(!self.path("out").exists(), "{message}");
        message
    }

    /// As [`Case::mistake`], where weights and pixels are broken: nothing looked at them.
    #[track_caller]
    fn early(&self, request: &Value, parts: &[&str]) -> String {
        self.mistake(request.to_string(), &[], parts)
    }

    /// The single encode of a prompt with the pictures of these names.
    fn single(&self, prompt: &str, images: &[&str], options: &[&str]) -> Vec<u8> {
        let mut words = self.0.on_model("encode", prompt);
        if !images.is_empty() {
            words = words.arg("--image").args(images.iter().map(|name| self.path(&format!("in/{name}.png"))));
        }
        words.arg("--out").arg(self.path("single")).args(options).run().ok();
        fs::read(self.path("single")).unwrap()
    }
}

/// The pictures of a [`Case`].
fn pictures() -> Value {
    json!({ "a": "a.png", "b": "b.png", "c": "c.png" })
}

/// A request of these sequences on the pictures.
fn request(sequences: Value) -> Value {
    json!({ "images": pictures(), "sequences": sequences })
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// Asserts that two files hold the same tensors, byte for byte.
#[track_caller]
fn same_tensors(one: &[u8], other: &[u8]) {
    let (one, other) = (SafeTensors::deserialize(one).unwrap(), SafeTensors::deserialize(other).unwrap());
    for name in ["inputs_embeds", "im_mask", "input_ids", "slots"] {
        let (one, other) = (one.tensor(name).unwrap(), other.tensor(name).unwrap());
        assert_eq!((one.dtype(), one.shape()), (other.dtype(), other.shape()), "{name}");
        assert!(one.data() == other.data(), "{name} differs");
    }
}

#[test]
fn the_files_are_those_of_single_encodes_and_each_image_is_encoded_once() {
    let case = Case::new();
    let history = case.0.file("h.json", r#"[["<ImageHere>What is it?", "A cat."]]"#);
    let turns = json!([["<ImageHere>What is it?", "A cat."]]);
    let sequences = json!([
        { "name": "both", "prompt": "One:<ImageHere>, two:<ImageHere>.", "images": ["a", "b"] },
        { "prompt": "<ImageHere><ImageHere><ImageHere>Again?", "images": ["b", "a", "b"] },
        { "name": "own", "prompt": "<ImageHere>", "images": ["c"], "meta_instruction": "- be brief" },
        { "prompt": "<ImageHere>", "images": ["c"], "meta_instruction": null },
        { "name": "told", "prompt": "And <ImageHere>?", "images": ["a", "c"], "history": turns, "raw": false },
        { "prompt": "a<ImageHere>b", "images": ["b"], "raw": true, "bos": "first" },
        { "name": "text", "prompt": "Just text." },
        { "prompt": "a<ImageHere>b", "images": ["a"], "bos": "per-segment" },
    ]);
    let report = case.words(request(sequences).to_string()).arg("--json").run().json();
    let out = |name: &str| read(case.path("out").join(format!("{name}.safetensors")));
    let told = ["--history", history.to_str().unwrap()];
    for (name, prompt, images, options) in [
        ("both", "One:<ImageHere>, two:<ImageHere>.", ["a", "b"].as_slice(), [].as_slice()),
        ("001", "<ImageHere><ImageHere><ImageHere>Again?", &["b", "a", "b"], &[]),
        ("own", "<ImageHere>", &["c"], &["--meta-instruction", "- be brief"]),
        ("003", "<ImageHere>", &["c"], &["--no-meta"]),
        ("told", "And <ImageHere>?", &["a", "c"], &told),
        ("005", "a<ImageHere>b", &["b"], &["--raw", "--bos", "first"]),
        ("text", "Just text.", &[], &[]),
        ("007", "a<ImageHere>b", &["a"], &["--bos", "per-segment"]),
    ] {
        let (several, single) = (out(name), case.single(prompt, images, options));
        same_tensors(&several, &single);
        assert!(several == single, "{name}: what the file says of its making differs");
    }
    let files =
        ["001", "003", "005", "007", "both", "own", "text", "told"].map(|n| format!("{n}.safetensors"));
    assert_eq!(names(&case.path("out")), files);

    assert_eq!(report["images_encoded"], json!(3));
    assert_eq!(report["warnings"], json!([]));
    let images = report["images"].as_array().unwrap();
    assert_eq!(images.iter().map(|image| &image["name"]).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(images[0]["path"].as_str().unwrap().ends_with("a.png"));
    let sequences = report["sequences"].as_array().unwrap();
    assert_eq!(sequences.len(), 8);
    assert_eq!((&sequences[0]["name"], &sequences[1]["name"]), (&json!("both"), &Value::Null));
    assert_eq!(sequences[1]["out"], json!(case.path("out/001.safetensors").to_str()));
    let mut bytes = 0;
    for sequence in sequences {
        let file = read(sequence["out"].as_str().unwrap());
        assert_eq!(sequence["bytes"], json!(file.len()));
        bytes += file.len();
        let shape = SafeTensors::deserialize(&file).unwrap().tensor("input_ids").unwrap().shape().to_vec();
        assert_eq!(sequence["length"], json!(shape[1]));
        let slots: Vec<_> =
            sequence["images"].as_array().unwrap().iter().map(|image| image["slot"].clone()).collect();
        assert_eq!(sequence["slots"], json!(slots));
        assert_eq!(sequence["warnings"], json!([]));
    }
    assert_eq!(report["bytes"], json!(bytes));
    let used: Vec<_> =
        sequences[1]["images"].as_array().unwrap().iter().map(|image| image["name"].clone()).collect();
    assert_eq!(used, ["b", "a", "b"]);
    assert_eq!(sequences[1]["images"][0]["mean_norm"], sequences[1]["images"][2]["mean_norm"]);
    for key in ["open_s", "decode_s", "resize_s", "encode_s", "write_s"] {
        assert!(report["timings"][key].as_f64().unwrap() >= 0.0, "{key}");
    }
}

#[test]
fn without_json_it_prints_a_line_for_each_sequence_and_sums() {
    let case = Case::new();
    let sequences = json!([
        { "name": "first", "prompt": "<ImageHere><ImageHere>", "images": ["a", "b"] },
        { "prompt": "<ImageHere>", "images": ["a"] },
    ]);
    let ended = case.words(request(sequences).to_string()).run();
    for part in ["image \"c\"", "stands in no sequence", "was not read"] {
        assert!(ended.stderr.contains(part), "{ended:?}");
    }
    assert_eq!(ended.stderr.matches("warning: ").count(), 1, "{ended:?}");
    let text = ended.ok();
    for part in [
        "first.safetensors",
        "001.safetensors",
        "2 sequences, ",
        "2 images encoded for 3 slots",
        "encode ",
        "device: ",
        "wrote 2 files to ",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains('\x1b'), "no colour in a pipe");
}

#[test]
fn paths_are_relative_to_the_request_or_absolute() {
    let case = Case::new();
    fs::create_dir(case.path("in/deep")).unwrap();
    fs::rename(case.path("in/b.png"), case.path("in/deep/b.png")).unwrap();
    fs::rename(case.path("in/c.png"), case.path("c.png")).unwrap();
    let request = json!({
        "images": { "a": case.path("in/a.png"), "b": "deep/b.png", "c": "../c.png" },
        "sequences": [{ "prompt": "<ImageHere><ImageHere><ImageHere>", "images": ["a", "b", "c"] }],
    });
    case.words(request.to_string()).run().ok();
    // A request named from where it lies, without a folder.
    let words = ["encode", "--model", "../model", "--request", "request.json", "--out-dir", "near"];
    let output = support::command(words).current_dir(case.path("in")).output().unwrap();
    Ended::of(output).ok();
    assert!(read(case.path("out/000.safetensors")) == read(case.path("in/near/000.safetensors")));
}

#[test]
fn an_image_that_no_sequence_uses_is_not_opened_and_is_warned_of() {
    let case = Case::new();
    let request = json!({
        "images": { "gone": "no/such.png", "a": "a.png" },
        "sequences": [{ "prompt": "<ImageHere>", "images": ["a"] }],
    });
    let report = case.words(request.to_string()).arg("--json").run().json();
    assert_eq!(report["images_encoded"], json!(1));
    assert_eq!(report["warnings"][0]["kind"], json!("unused_image"));
    assert!(report["warnings"][0]["message"].as_str().unwrap().contains("\"gone\""));
}

#[test]
fn existing_files_are_replaced_and_others_stay() {
    let case = Case::new();
    fs::create_dir(case.path("out")).unwrap();
    case.0.file("out/000.safetensors", "old");
    case.0.file("out/other.safetensors", "mine");
    let good = request(json!([{ "prompt": "<ImageHere>", "images": ["a"] }])).to_string();
    case.words(&good).run().ok();
    assert!(SafeTensors::deserialize(&read(case.path("out/000.safetensors"))).is_ok());
    assert_eq!(read(case.path("out/other.safetensors")), b"mine");
    let before = read(case.path("out/000.safetensors"));
    let worse = request(json!([{ "prompt": "<ImageHere>", "images": ["b"] }, { "prompt": "<ImageHere>" }]));
    case.words(worse.to_string()).run().mistake(&["sequence 1", "1 marker"]);
    assert!(read(case.path("out/000.safetensors")) == before, "a failure changes nothing");
    assert_eq!(names(&case.path("out")), ["000.safetensors", "other.safetensors"]);
    // A directory of their own is made, with those around it.
    let words = case.words(good);
    let mut deep = words.clone();
    *deep.0.last_mut().unwrap() = case.path("new/deep/out").into();
    deep.run().ok();
    assert!(read(case.path("new/deep/out/000.safetensors")) == before);
}

#[test]
fn options_hold_for_all_sequences_and_warnings_go_to_those_they_are_about() {
    let case = Case::new();
    let clear = image::RgbaImage::from_fn(40, 30, |x, y| {
        image::Rgba([x as u8 * 5, y as u8 * 7, 90, (x % 2) as u8 * 255])
    });
    clear.save_with_format(case.path("in/b.png"), image::ImageFormat::Png).unwrap();
    let sequences = json!([
        { "prompt": "<ImageHere>", "images": ["a"] },
        { "prompt": "<ImageHere>[UNUSED_TOKEN_145]<ImageHere>", "images": ["c", "b"] },
    ]);
    let request = request(sequences).to_string();
    let check = |options: &[&str], kinds: &[&str]| {
        let ended = case.words(&request).args(options).arg("--json").run();
        let stderr = ended.stderr.clone();
        let report = ended.json();
        let mine = report["sequences"][1]["warnings"].as_array().unwrap();
        assert_eq!(mine.iter().map(|warning| &warning["kind"]).collect::<Vec<_>>(), kinds, "{stderr}");
        assert_eq!(report["sequences"][0]["warnings"], json!([]));
        let out = |name: &str| read(case.path("out").join(name));
        assert!(out("000.safetensors") == case.single("<ImageHere>", &["a"], options));
        let prompt = "<ImageHere>[UNUSED_TOKEN_145]<ImageHere>";
        assert!(out("001.safetensors") == case.single(prompt, &["c", "b"], options));
        stderr
    };
    let stderr = check(&[], &["control_tokens", "alpha_dropped"]);
    assert!(stderr.contains("sequence 1: control tokens") && stderr.contains("b.png"), "{stderr}");
    check(&["--alpha", "white", "--resample", "pillow13"], &["control_tokens"]);
    check(&["--compat", "upstream", "--threads", "1"], &["control_tokens", "alpha_dropped"]);
    check(&["--allow-control-tokens", "--max-length", "2000"], &["control_tokens", "alpha_dropped"]);
    case.words(&request).args(["--max-length", "40"]).run().mistake(&["sequence 0", "the limit is 40"]);
}

/// Breaks weights and pixels, so that whoever reads them fails with another message.
fn with_broken_weights_and_pixels() -> Case {
    let case = Case::new();
    let weights = case.path("model/pytorch_model.bin");
    let mut bytes = read(&weights);
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4096].fill(0xff); // NaN in every dtype
    fs::write(&weights, bytes).unwrap();
    case.0.file("in/a.png", "no image");
    case
}

#[test]
fn sequences_that_cannot_be_are_named_before_weights_and_pixels_are_read() {
    let case = with_broken_weights_and_pixels();
    let good = json!({ "prompt": "<ImageHere>", "images": ["a"] });
    for (bad, parts) in [
        (json!({ "prompt": "<ImageHere><ImageHere>", "images": ["a"] }), ["2 markers", "1 image"].as_slice()),
        (json!({ "prompt": "none", "images": ["a", "b"] }), &["0 markers", "2 images", "image 2 (b)"]),
        (json!({ "prompt": "<ImageHere>", "images": ["d"] }), &["no image \"d\"", "\"a\", \"b\", \"c\""]),
        (json!({ "prompt": "", "raw": true }), &["the prompt is empty"]),
        (json!({ "prompt": "x", "raw": true, "history": [["a", "b"]] }), &["raw mode", "a history"]),
        (json!({ "prompt": "x", "raw": true, "meta_instruction": "y" }), &["raw mode", "a meta instruction"]),
    ] {
        case.early(&request(json!([good, bad])), &[["sequence 1: "].as_slice(), parts].concat());
        let mut named = bad.clone();
        named["name"] = json!("left");
        case.early(&request(json!([good, named])), &[["sequence 1 (\"left\"): "].as_slice(), parts].concat());
    }
    let first = json!([{ "prompt": "x", "bos": "first" }]);
    case.mistake(request(first).to_string(), &["--compat", "upstream"], &["sequence 0", "--bos first"]);
    case.mistake(
        request(json!([good])).to_string(),
        &["--compat", "upstream", "--exif", "apply"],
        &["--exif apply"],
    );
}

#[test]
fn names_that_cannot_be_those_of_files() {
    let case = with_broken_weights_and_pixels();
    for (name, part) in [
        ("", "its name is empty"),
        (".", "begins with '.'"),
        ("..", "begins with '.'"),
        (".hidden", "begins with '.'"),
        ("../up", "begins with '.'"),
        ("a/b", "has '/' in it"),
        ("/etc/passwd", "begins with '/'"),
        ("a\\b", "has '\\\\' in it"),
        ("a\u{0}", "has '\\0' in it"),
        ("a:b", "has ':' in it"),
        (&"x".repeat(201), "201 bytes"),
    ] {
        let parts = ["sequence 1", part, "A file is called so"];
        case.early(&request(json!([{ "prompt": "x" }, { "name": name, "prompt": "x" }])), &parts);
    }
    for (one, other) in
        [(json!("left"), json!("left")), (json!("Left"), json!("lEFT")), (json!("001"), Value::Null)]
    {
        let sequences = json!([{ "name": one, "prompt": "x" }, { "name": other, "prompt": "x" }]);
        case.early(&request(sequences), &["sequence 1", "its file would be", "that of sequence 0 ("]);
    }
}

#[test]
fn documents_that_are_no_request_say_where() {
    let case = with_broken_weights_and_pixels();
    for (text, parts) in [
        ("", ["EOF", "line 1 column 0"].as_slice()),
        ("{\n  \"sequences\": [\n    {\"prompt\": \"x\",}\n  ]\n}", &["sequence 0: ", "line 3"]),
        ("{\"sequences\": [{\"prompt\": \"x\"}]} {}", &["trailing characters", "line 1 column 34"]),
        ("[]", &["expected an object", "line 1"]),
        ("{}", &["missing field `sequences`"]),
        ("{\"sequences\": {}}", &["expected a list of sequences"]),
        ("{\"sequences\": [],\n \"imagse\": {}}", &["unknown field `imagse`", "line 2"]),
        (
            "{\"sequences\": [{\"prompt\": \"x\"},\n{\"promt\": \"x\"}]}",
            &["sequence 1: unknown field `promt`", "line 2"],
        ),
        ("{\"sequences\": [{\"images\": []}]}", &["sequence 0: missing field `prompt`", "line 1"]),
        ("{\"sequences\": [[\"n\", \"x\"]]}", &["sequence 0: ", "expected an object"]),
        (
            "{\"sequences\": [{\"prompt\": 7}]}",
            &["sequence 0: invalid type", "expected a string", "column 27"],
        ),
        (
            "{\"sequences\": [{\"prompt\": \"x\", \"prompt\": \"y\"}]}",
            &["sequence 0: duplicate field `prompt`"],
        ),
        ("{\"sequences\": [{\"prompt\": \"x\", \"images\": \"a\"}]}", &["sequence 0: invalid type"]),
        ("{\"sequences\": [{\"prompt\": \"x\", \"raw\": 1}]}", &["sequence 0: ", "expected a boolean"]),
        (
            "{\"sequences\": [{\"prompt\": \"x\", \"bos\": \"never\"}]}",
            &["sequence 0: ", "`per-segment` or `first`"],
        ),
        ("{\"sequences\": [{\"prompt\": \"x\", \"history\": [[\"q\"]]}]}", &["sequence 0: invalid length 1"]),
        ("{\"sequences\": [{\"prompt\": \"x\", \"meta_instruction\": 1}]}", &["sequence 0: invalid type"]),
        (
            "{\"images\": {\"a\": \"1\",\n\"a\": \"2\"}, \"sequences\": []}",
            &["image name \"a\" stands twice", "line 2"],
        ),
        ("{\"images\": {\"a\": 3}, \"sequences\": []}", &["the path of image \"a\": invalid type", "line 1"]),
        ("{\"images\": [\"a.png\"], \"sequences\": []}", &["an object of image names and paths"]),
    ] {
        let message = case.mistake(text, &[], &[["request.json is no request: "].as_slice(), parts].concat());
        assert!(message.contains("Write {\"images\""), "{message}");
        assert_eq!(message.matches("line ").count(), 1, "{message}");
    }
    case.mistake(
        b"{\"sequences\": [{\"prompt\": \"caf\xe9\"}]}",
        &[],
        &["request.json is no request", "line 1"],
    );
    case.mistake("{\"sequences\": []}", &[], &["has no sequence", "`sequences`"]);
    case.mistake(
        "{\"images\": {\"\": \"a.png\"}, \"sequences\": [{\"prompt\": \"x\"}]}",
        &[],
        &["no name or no path"],
    );
    case.mistake(
        "{\"images\": {\"a\": \"\"}, \"sequences\": [{\"prompt\": \"x\"}]}",
        &[],
        &["\"a\"", "no path"],
    );
}

#[test]
fn sizes_beyond_the_limits() {
    let case = with_broken_weights_and_pixels();
    let many = vec![json!({ "prompt": "x" }); 201];
    case.early(&request(json!(many)), &["201 sequences", "the limit is 200"]);
    let images: serde_json::Map<_, _> = (0..1001).map(|i| (format!("{i}"), json!("a.png"))).collect();
    case.early(
        &json!({ "images": images, "sequences": [{ "prompt": "x" }] }),
        &["1001 images", "the limit is 1000"],
    );
    case.mistake(vec![b' '; (4 << 20) + 1], &[], &["more than 4194304 bytes", "Split it"]);
    let long = json!({ "prompt": "<ImageHere>".repeat(1000), "images": vec!["b"; 1000] }); // 25 rows each
    case.early(&request(json!(vec![long; 50])), &["positions together", "1048576", "Split it"]);
}

#[test]
fn files_that_cannot_be_read_or_written() {
    let case = Case::new();
    let uses = |name: &str| {
        let left = json!({ "name": "left", "prompt": "<ImageHere><ImageHere>", "images": ["a", "z"] });
        json!({ "images": { "a": "a.png", "z": name }, "sequences": [{ "prompt": "x" }, left] })
    };
    let whose = "sequence 1 (\"left\"): image 1 (\"z\", ";
    case.early(&uses("nowhere.png"), &[whose, "nowhere.png", "relative to the request"]);
    case.early(&uses("../model"), &[whose, "directory"]);
    case.0.file("in/notes.txt", "Dear diary");
    case.early(&uses("notes.txt"), &[whose, "notes.txt", "not a supported image"]);

    let words = |request: PathBuf, out: PathBuf| {
        let words = Words::new("encode").arg("--model").arg(case.path("model")).arg("--request").arg(request);
        words.arg("--out-dir").arg(out).run()
    };
    words(case.path("in/none.json"), case.path("out")).mistake(&["none.json", "`--request`"]);
    words(case.path("in"), case.path("out")).mistake(&["directory", "`--request`"]);
    let good = case.0.file(
        "in/good.json",
        request(json!([{ "prompt": "x" }, { "name": "b", "prompt": "x" }])).to_string(),
    );
    words(good.clone(), case.path("in/a.png")).mistake(&["a.png", "--out-dir"]);
    words(good.clone(), case.path("in/a.png/out")).mistake(&["a.png", "--out-dir"]);
    fs::create_dir_all(case.path("taken/b.safetensors")).unwrap();
    words(good, case.path("taken")).mistake(&["b.safetensors", "it is a directory"]);
    assert_eq!(names(&case.path("taken")), ["b.safetensors"]);
    assert!(!case.path("out").exists());
}

#[test]
fn options_that_belong_to_a_single_encode() {
    let case = Case::new();
    let good = request(json!([{ "prompt": "x" }])).to_string();
    for options in [
        ["--prompt", "x"].as_slice(),
        &["--prompt-file", "x"],
        &["--image", "a.png"],
        &["--out", "x"],
        &["--meta-instruction", "x"],
        &["--no-meta"],
        &["--history", "h.json"],
        &["--raw"],
        &["--bos", "first"],
    ] {
        case.mistake(&good, options, &["cannot be used with", "--request", options[0]]);
    }
    let words = Words::new("encode").arg("--model").arg(case.path("model"));
    words.clone().args(["--request", "r.json"]).run().mistake(&["--out-dir"]);
    let single = words.clone().args(["--prompt", "x", "--out"]).arg(case.path("single"));
    single.args(["--out-dir", "d"]).run().mistake(&["cannot be used with", "--out-dir"]);
    words.clone().args(["--out-dir", "d"]).run().mistake(&["--request"]);
    words.clone().args(["--prompt", "x"]).run().mistake(&["--out"]);
    words.run().mistake(&["--prompt", "--out"]);
}

#[cfg(unix)]
#[test]
fn without_room_nothing_is_left() {
    let case = Case::new();
    let words = case.words(request(json!([{ "prompt": "x", "raw": true }, { "prompt": "x" }])).to_string());
    let mut shell = std::process::Command::new("sh");
    // Room for the first sequence, not for the second.
    shell.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_imagehere")]);
    Ended::of(shell.args(&words.0).output().unwrap()).mistake(&["001.safetensors", "Make room"]);
    assert!(!case.path("out").exists());
    words.run().ok();
}
