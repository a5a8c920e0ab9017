//! `--format` of `imagehere encode` and `features`, for engines: the same rows as in safetensors, bit by bit, in the shape
//! that each of them reads; what a format has no place for is refused before anything is encoded.

use std::fs;
use std::io::{Cursor, Read as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use safetensors::SafeTensors;
use serde_json::{Value, json};

mod support;
use support::{Ended, Place, Words, names};

const PROMPT: &str = "First <ImageHere>, then <ImageHere>.";

/// A model and two pictures.
struct Case(Place);

/// What a sequence's safetensors file holds.
struct Sequence {
    rows: Vec<u8>, // [L, H] fp16
    hidden: usize,
    slots: Vec<[usize; 2]>,
}

impl Case {
    fn new() -> Self {
        let place = Place::new();
        for (name, seed) in [("a.png", 1), ("b.png", 2)] {
            place.picture(name, seed);
        }
        Self(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    /// `encode` of a prompt and its pictures.
    fn encode(&self, prompt: &str) -> Words {
        let images = ["a.png", "b.png"].map(|name| self.path(name));
        let words = self.0.on_model("encode", prompt);
        match prompt.matches("<ImageHere>").count() {
            0 => words,
            count => words.arg("--image").args(images.iter().cycle().take(count)),
        }
    }

    /// What `words` make in a format, and what the command says of it.
    fn made(&self, words: &Words, format: &str) -> (Vec<u8>, Value) {
        let out = self.path("made");
        let report = words.clone().args(["--json", "--format", format, "--out"]).arg(&out).run().json();
        let bytes = fs::read(&out).unwrap();
        assert_eq!(report["format"], json!(format));
        assert_eq!(report["bytes"], json!(bytes.len()));
        (bytes, report)
    }

    fn sequence(&self, words: &Words) -> Sequence {
        sequence(&self.made(words, "safetensors").0)
    }
}

fn sequence(file: &[u8]) -> Sequence {
    let file = SafeTensors::deserialize(file).unwrap();
    let tensor = |name| file.tensor(name).unwrap();
    let integers = |name| bytemuck::pod_collect_to_vec::<_, i64>(tensor(name).data());
    Sequence {
        rows: tensor("inputs_embeds").data().to_vec(),
        hidden: tensor("inputs_embeds").shape()[2],
        slots: integers("slots").chunks(2).map(|slot| [slot[0] as usize, slot[1] as usize]).collect(),
    }
}

impl Sequence {
    /// The bytes of an image's rows.
    fn image(&self, image: usize) -> &[u8] {
        let [begin, end] = self.slots[image];
        &self.rows[begin * self.hidden * 2..end * self.hidden * 2]
    }
}

/// An entry of an archive that torch reads, and where its bytes begin.
fn entry(archive: &[u8], name: &str) -> (Vec<u8>, u64) {
    let mut zip = zip::ZipArchive::new(Cursor::new(archive)).unwrap();
    let mut entry = zip.by_name(&format!("archive/{name}")).unwrap();
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).unwrap();
    (bytes, entry.data_start().unwrap())
}

/// The rows of a `.npy` file, after a header of 128 bytes with this shape in it.
#[track_caller]
fn npy(bytes: &[u8], shape: &str) -> Vec<u8> {
    let header = String::from_utf8_lossy(&bytes[..128]).into_owned();
    assert!(header.contains("'descr': '<f2', 'fortran_order': False") && header.contains(shape), "{header}");
    bytes[128..].to_vec()
}

#[test]
fn a_chat_body_has_one_part_for_each_image_among_the_texts() {
    let case = Case::new();
    let history = case.0.file("h.json", r#"[["Seen <ImageHere>?", "Yes."]]"#);
    let words = case.encode(PROMPT).arg(case.path("a.png"));
    let words = words.args(["--meta-instruction", "Bé \"brief\".", "--history"]).arg(history);
    let (bytes, _) = case.made(&words, "vllm-image-embeds");
    let plain = case.sequence(&words);

    let body: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(body.as_object().unwrap().keys().collect::<Vec<_>>(), ["messages"]);
    let messages = body["messages"].as_array().unwrap();
    let roles: Vec<_> = messages.iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "user"]);
    assert_eq!((&messages[0]["content"], &messages[2]["content"]), (&json!("Bé \"brief\"."), &json!("Yes.")));
    let parts = |message: &Value| message["content"].as_array().unwrap().clone();
    let parts = [parts(&messages[1]), parts(&messages[3])].concat();
    let texts: Vec<_> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
    assert_eq!(texts, ["Seen ", "?", "First ", ", then ", "."]);
    let kinds: Vec<_> = parts.iter().map(|part| part["type"].as_str().unwrap()).collect();
    let (t, i) = ("text", "image_embeds");
    assert_eq!(kinds, [t, i, t, t, i, t, i, t]);
    let images: Vec<_> = parts.iter().filter(|part| part["type"] == i).collect();
    for (image, part) in images.iter().enumerate() {
        let file = STANDARD.decode(part["image_embeds"].as_str().unwrap()).unwrap();
        assert!(npy(&file, "'shape': (25, 256), }") == plain.image(image), "image {image}");
    }
    // Images 0 and 2 are one picture: equal rows have one name.
    assert_eq!(images[0]["uuid"], images[2]["uuid"]);
    assert_ne!(images[0]["uuid"], images[1]["uuid"]);

    let (text, _) = case.made(&case.encode("Just text.").arg("--no-meta"), "vllm-image-embeds");
    assert_eq!(text, b"{\"messages\":[{\"role\":\"user\",\"content\":\"Just text.\"}]}\n");
}

#[test]
fn prompt_embeds_are_all_rows_as_torch_saves_them() {
    let case = Case::new();
    let words = case.encode(PROMPT);
    let (file, _) = case.made(&words, "vllm-prompt-embeds");
    let plain = case.sequence(&words);
    let (rows, start) = entry(&file, "data/0");
    assert!(rows == plain.rows && start.is_multiple_of(64));
    let (pickle, _) = entry(&file, "data.pkl");
    assert!(pickle.windows(11).any(|window| window == b"HalfStorage"));
    let (again, _) = case.made(&words, "vllm-prompt-embeds");
    assert!(again == file, "the same command makes the same file");

    let (body, _) = case.made(&words, "vllm-completion");
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert!(STANDARD.decode(body["prompt_embeds"].as_str().unwrap()).unwrap() == file);
}

/// Asserts that the parts of a pickle stand in it in this order.
#[track_caller]
fn in_order(pickle: &[u8], parts: &[&[u8]]) {
    let mut rest = pickle;
    for part in parts {
        let at = rest.windows(part.len()).position(|window| window == *part);
        let at = at.unwrap_or_else(|| panic!("no {} in {}", part.escape_ascii(), rest.escape_ascii()));
        rest = &rest[at + part.len()..];
    }
}

#[test]
fn lmdeploy_gets_each_image_and_its_range() {
    let case = Case::new();
    let words = case.encode(PROMPT);
    let plain = case.sequence(&words);
    let (file, _) = case.made(&words, "lmdeploy");
    for image in 0..2 {
        assert!(entry(&file, &format!("data/{image}")).0 == plain.image(image), "image {image}");
    }
    let (pickle, _) = entry(&file, "data.pkl");
    let ranges: Vec<_> = plain.slots.concat().iter().map(|at| (*at as u16).to_le_bytes()).collect();
    let range = |at: usize| match u8::try_from(u16::from_le_bytes(ranges[at])) {
        Ok(small) => vec![b'K', small],
        Err(_) => [b"M", &ranges[at][..]].concat(),
    };
    let [first, second] = [[range(0), range(1)].concat(), [range(2), range(3)].concat()];
    in_order(
        &pickle,
        &[
            b"input_ids",
            &b"K\x00".repeat(25),
            &b"K\x00".repeat(25),
            b"input_embedding_ranges",
            &first,
            &second,
            b"input_embeddings",
            b"_rebuild_tensor_v2",
            b"HalfStorage",
        ],
    );
    let (other, _) = case.made(&words.clone().args(["--image-token", "9"]), "lmdeploy");
    in_order(&entry(&other, "data.pkl").0, &[&b"K\x09".repeat(25), &b"K\x09".repeat(25)]);

    let (text, _) = case.made(&case.encode("Just text."), "lmdeploy");
    let (pickle, _) = entry(&text, "data.pkl");
    in_order(&pickle, &[b"input_embedding_ranges", b"N", b"input_embeddings", b"N"]);
}

#[test]
fn sglang_gets_all_images_in_one_tensor() {
    let case = Case::new();
    let words = case.encode(PROMPT);
    let plain = case.sequence(&words);
    let (file, _) = case.made(&words.clone().args(["--image-token", "32000"]), "sglang");
    assert!(entry(&file, "data/0").0 == [plain.image(0), plain.image(1)].concat());
    let run = b"M\x00\x7d".repeat(25);
    let pickle = entry(&file, "data.pkl").0;
    in_order(&pickle, &[b"input_ids", &run, &run, b"image_data", b"format", b"precomputed_embedding"]);
    in_order(&pickle, &[b"feature", b"offsets"]);

    let out = case.path("refused");
    let sglang = words.clone().args(["--format", "sglang", "--out"]).arg(&out);
    sglang.clone().run().mistake(&["--format sglang", "--image-token"]);
    sglang.clone().args(["--image-token", "1"]).run().mistake(&["--format sglang", "position 0", "the id 1"]);
    sglang.args(["--image-token", "2147483648"]).run().mistake(&["--image-token"]);
    words.args(["--image-token", "7", "--out"]).arg(&out).run().mistake(&["it has no ids", "another format"]);
    assert!(!out.exists());
}

/// `features` of both pictures, and one of them again.
fn features(case: &Case, format: &str, out: &Path) -> Words {
    let words = Words::new("features").arg("--model").arg(case.path("model")).args(["--json", "--image"]);
    words
        .args(["a.png", "b.png", "a.png"].map(|name| case.path(name)))
        .args(["--format", format, "--out"])
        .arg(out)
}

#[test]
fn an_encoder_cache_keeps_what_is_in_it() {
    let case = Case::new();
    let plain = case.sequence(&case.encode(PROMPT));
    let dir = case.path("some/cache");
    let report = features(&case, "vllm-encoder-cache", &dir).run().json();
    let uuid = |image: usize| report["images"][image]["uuid"].as_str().unwrap().to_owned();
    assert!(uuid(0) == uuid(2) && uuid(0) != uuid(1));
    for image in 0..2 {
        let path = dir.join(uuid(image)).join("encoder_cache.safetensors");
        let file = fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let tensor = tensors.tensor("ec_cache").unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (safetensors::Dtype::F16, [25, 256].as_slice()));
        assert!(tensor.data() == plain.image(image));
        assert_eq!(names(path.parent().unwrap()), ["encoder_cache.safetensors"]);
    }
    assert_eq!(names(&dir).len(), 2);
    // The server makes empty folders where it looks in vain; others' entries stay.
    fs::create_dir(dir.join("other")).unwrap();
    fs::remove_file(dir.join(uuid(1)).join("encoder_cache.safetensors")).unwrap();
    let mut words = features(&case, "vllm-encoder-cache", &dir);
    words.0.retain(|word| word != "--json");
    assert!(words.run().ok().contains(&format!("uuid {}  ", uuid(1))));
    assert!(dir.join(uuid(1)).join("encoder_cache.safetensors").exists() && dir.join("other").exists());

    let words = features(&case, "vllm-encoder-cache", &case.path("a.png"));
    words.run().mistake(&["cannot write", "a.png"]);
    case.0.file("broken.png", "no image");
    let dir = case.path("fresh");
    let words = features(&case, "vllm-encoder-cache", &dir).arg("--image").arg(case.path("broken.png"));
    words.run().mistake(&["image 3 (", "broken.png"]);
    assert!(!dir.exists());
}

#[test]
fn a_table_has_a_row_for_each_image_however_many_there_are() {
    let case = Case::new();
    let plain = case.sequence(&case.encode(PROMPT));
    let out = case.path("t.parquet");
    let report = features(&case, "parquet", &out).run().json();
    let bytes = fs::read(&out).unwrap();
    assert_eq!((&report["bytes"], &report["format"]), (&json!(bytes.len()), &json!("parquet")));
    assert!(bytes.starts_with(b"PAR1") && bytes.ends_with(b"PAR1"));
    let at = |image: usize| {
        let rows = plain.image(image);
        let found = bytes.windows(rows.len()).enumerate().filter(|(_, window)| *window == rows);
        found.map(|(at, _)| at).collect::<Vec<_>>()
    };
    let (a, b) = (at(0), at(1));
    assert!(a.len() == 2 && b.len() == 1 && a[0] < b[0] && b[0] < a[1], "{a:?} {b:?}");
    for name in
        ["name", "pixels", "checkpoint", "rows", "hidden", "features", "list", "element", "preprocessing"]
    {
        in_order(&bytes, &[name.as_bytes()]);
    }
    in_order(&bytes, &[report["images"][1]["pixels"].as_str().unwrap().as_bytes()]);

    // More than are encoded together: what is said of an image counts it among all.
    let many: Vec<_> = (0..70).map(|i| case.path(if i == 65 { "broken.png" } else { "b.png" })).collect();
    let clear =
        image::RgbaImage::from_fn(40, 30, |x, y| image::Rgba([x as u8, y as u8, 9, (x % 2) as u8 * 255]));
    clear.save_with_format(case.path("broken.png"), image::ImageFormat::Png).unwrap();
    let words =
        Words::new("features").arg("--model").arg(case.path("model")).args(["--json", "--format", "parquet"]);
    let words = words.arg("--out").arg(&out).arg("--image").args(&many);
    let ended = words.run();
    assert!(ended.stderr.contains("image 65 (") && ended.stderr.contains("alpha"), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["shape"], json!([70, 25, 256]));
    assert_eq!(report["images_encoded"], json!(4), "of each group every picture once");
    case.0.file("broken.png", "no image");
    let before = fs::read(&out).unwrap();
    words.run().mistake(&["image 65 (", "broken.png"]);
    assert!(fs::read(&out).unwrap() == before, "what was there did not stay");
}

#[test]
fn features_from_a_file_make_the_same() {
    let case = Case::new();
    let features = Words::new("features").arg("--model").arg(case.path("model")).arg("--image");
    let features = features.args(["a.png", "b.png"].map(|name| case.path(name))).arg("--out");
    features.arg(case.path("f")).run().ok();
    let words = case.0.on_model("encode", PROMPT).arg("--features").arg(case.path("f"));
    for format in ["vllm-image-embeds", "vllm-prompt-embeds", "lmdeploy"] {
        assert!(case.made(&words, format).0 == case.made(&case.encode(PROMPT), format).0, "{format}");
    }
}

#[test]
fn a_request_makes_a_file_for_each_sequence() {
    let case = Case::new();
    let request = json!({
        "images": { "a": "a.png", "b": "b.png" },
        "sequences": [
            { "name": "both", "prompt": "<ImageHere><ImageHere>?", "images": ["b", "a"] },
            { "prompt": "Just text.", "meta_instruction": null },
        ],
    });
    let file = case.0.file("r.json", request.to_string());
    let words = Words::new("encode").arg("--model").arg(case.path("model")).arg("--request").arg(file);
    words.clone().arg("--out-dir").arg(case.path("plain")).run().ok();
    let both = sequence(&fs::read(case.path("plain/both.safetensors")).unwrap());
    for (format, ending) in
        [("vllm-image-embeds", "json"), ("vllm-completion", "json"), ("vllm-prompt-embeds", "pt")]
    {
        let dir = case.path(format);
        words.clone().args(["--format", format]).arg("--out-dir").arg(&dir).run().ok();
        assert_eq!(names(&dir), [format!("001.{ending}"), format!("both.{ending}")]);
    }
    let (rows, _) = entry(&fs::read(case.path("vllm-prompt-embeds/both.pt")).unwrap(), "data/0");
    assert!(rows == both.rows);
    let body: Value =
        serde_json::from_slice(&fs::read(case.path("vllm-image-embeds/both.json")).unwrap()).unwrap();
    let part = &body["messages"][1]["content"][0];
    let file = STANDARD.decode(part["image_embeds"].as_str().unwrap()).unwrap();
    assert!(npy(&file, "(25, 256)") == both.image(0));
}

#[test]
fn what_a_format_has_no_place_for_is_refused() {
    let case = Case::new();
    let out = case.path("refused");
    #[track_caller]
    fn refused(words: Words, out: &Path, format: &str, parts: &[&str]) {
        words.args(["--format", format]).arg("--out").arg(out).run().mistake(parts);
        assert!(!out.exists());
    }
    let raw = case.encode(PROMPT).arg("--raw");
    refused(raw, &out, "vllm-image-embeds", &["--format vllm-image-embeds", "without raw mode"]);
    refused(case.encode(PROMPT), &out, "vllm", &["invalid value 'vllm'", "vllm-prompt-embeds"]);

    let config: Value = serde_json::from_slice(&fs::read(case.path("model/config.json")).unwrap()).unwrap();
    let mut short = config.clone();
    short["max_length"] = json!(40);
    case.0.file("model/config.json", short.to_string());
    let cut = case.encode(PROMPT).arg("--truncate");
    refused(cut.clone(), &out, "vllm-image-embeds", &["the sequence is cut", "another `--format`"]);
    let (file, _) = case.made(&cut, "vllm-prompt-embeds");
    assert_eq!(entry(&file, "data/0").0.len(), 40 * 256 * 2);
    case.0.file("model/config.json", config.to_string());

    for format in ["parquet", "vllm-encoder-cache"] {
        refused(case.encode(PROMPT), &out, format, &[format, "no sequence", "`imagehere features`"]);
    }
    // What is there stays until what replaces it is whole.
    fs::create_dir(&out).unwrap();
    for format in ["vllm-image-embeds", "vllm-prompt-embeds", "vllm-completion"] {
        let words = case.encode(PROMPT).args(["--format", format]);
        words.clone().arg("--out").arg(&out).run().mistake(&["it is a directory"]);
        words.arg("--out").arg(case.path("no/such")).run().mistake(&["there is no directory", "mkdir -p"]);
    }
}

#[cfg(unix)]
#[test]
fn on_a_full_disk_nothing_is_left() {
    let case = Case::new();
    // No more than a few kilobytes to any file.
    let limited = |words: Words| {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_imagehere")]);
        Ended::of(shell.args(words.0).output().unwrap())
    };
    let out = case.path("out");
    let before = case.0.names();
    for format in ["vllm-image-embeds", "vllm-prompt-embeds", "vllm-completion", "lmdeploy"] {
        let words = case.encode(PROMPT).args(["--format", format, "--out"]).arg(&out);
        limited(words).mistake(&["cannot write", "out", "nothing was left behind"]);
        assert_eq!(case.0.names(), before, "{format}");
    }
    for format in ["parquet", "vllm-encoder-cache"] {
        limited(features(&case, format, &out)).mistake(&["cannot write", "out", "nothing was left behind"]);
        assert_eq!(case.0.names(), before, "{format}");
    }
}
