//! `imagehere features`, `encode --features` and `--feature-cache`: the sequence is that of a plain encode, byte for
//! byte; what does not fit is refused; nothing that happens to a cache reaches a sequence.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use imagehere::synth::{self, Preset, SynthOptions};
use safetensors::SafeTensors;
use serde_json::{Value, json};

mod support;
use support::{Ended, Place, Words, command, names};

/// Bytes that one image of the tiny model takes in a cache, about.
const ENTRY: u64 = 25 * 256 * 2;

/// A model and pictures: three plain ones and one whose alpha is worth a warning.
struct Case(Place);

impl Case {
    fn new() -> Self {
        let place = Place::new();
        for (name, seed) in [("a.png", 1), ("b.png", 2), ("c.png", 3)] {
            place.picture(name, seed);
        }
        let clear = image::RgbaImage::from_fn(40, 30, |x, y| {
            image::Rgba([x as u8 * 5, y as u8 * 7, 90, (x % 2) as u8 * 255])
        });
        clear.save_with_format(place.path("t.png"), image::ImageFormat::Png).unwrap();
        Self(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    fn images(&self, names: &[&str]) -> Vec<OsString> {
        names.iter().map(|name| self.path(&format!("{name}.png")).into()).collect()
    }

    /// `features` of these pictures to `out`.
    fn features(&self, images: &[&str], out: &str) -> Words {
        let words = Words::new("features").arg("--model").arg(self.path("model"));
        words.arg("--image").args(self.images(images)).arg("--out").arg(self.path(out))
    }

    /// Keeps features of these pictures and returns where.
    fn kept(&self, images: &[&str], out: &str) -> PathBuf {
        self.features(images, out).run().ok();
        self.path(out)
    }

    /// `encode` of as many images as there are.
    fn encode(&self, images: usize, out: &str) -> Words {
        let prompt: String = (0..images).map(|i| format!("Image {i}:<ImageHere>, ")).collect();
        self.0.on_model("encode", &prompt).arg("--out").arg(self.path(out))
    }

    /// The file that a plain encode of these pictures makes.
    fn plain(&self, images: &[&str], options: &[&str]) -> Vec<u8> {
        let words = self.encode(images.len(), "plain").args(options);
        words.arg("--image").args(self.images(images)).run().ok();
        fs::read(self.path("plain")).unwrap()
    }

    /// Encodes these pictures with a cache: the report, and the file.
    fn cached(&self, images: &[&str], options: &[&str]) -> (Value, Vec<u8>) {
        let words = self.encode(images.len(), "cached").arg("--json").args(options);
        let words = words.arg("--feature-cache").arg(self.path("cache"));
        let report = words.arg("--image").args(self.images(images)).run().json();
        (report, fs::read(self.path("cached")).unwrap())
    }

    /// The files of the cache, and their bytes.
    fn entries(&self) -> Vec<(PathBuf, u64)> {
        let files = fs::read_dir(self.path("cache")).unwrap().map(|file| file.unwrap().path());
        files.map(|path| (path.clone(), fs::metadata(path).unwrap().len())).collect()
    }

    /// Encodes from a file that must be refused, with all of `parts` in the message and nothing written.
    #[track_caller]
    fn refused(&self, file: &Path, options: &[&str], parts: &[&str]) -> String {
        let words = self.encode(2, "refused").arg("--features").arg(file).args(options);
        let message = words.run().mistake(parts);
        assert!(!self.path("refused").exists(), "{message}");
        message
    }
}

/// How many images went through the tower, and how many were found.
fn counts(report: &Value) -> (u64, u64) {
    (report["images_encoded"].as_u64().unwrap(), report["images_cached"].as_u64().unwrap())
}

#[test]
fn from_features_the_sequence_is_that_of_a_plain_encode() {
    let case = Case::new();
    case.0.file("h.json", r#"[["What is it?", "A cat."]]"#);
    let history = case.path("h.json");
    for options in [
        [].as_slice(),
        &["--alpha", "white"],
        &["--exif", "ignore", "--resample", "pillow13"],
        &["--compat", "upstream"],
        &["--saturate", "--no-meta", "--bos", "first"],
        &["--history", history.to_str().unwrap(), "--meta-instruction", "- be brief"],
    ] {
        let of_images: Vec<&str> = match options[..] {
            [rule @ ("--alpha" | "--exif" | "--compat"), ..] => {
                options[..if rule == "--exif" { 4 } else { 2 }].into()
            }
            ["--saturate", ..] => vec!["--saturate"],
            _ => vec![],
        };
        case.features(&["c"], "one").args(&of_images).run().ok();
        case.features(&["t", "a"], "two").args(&of_images).run();
        let words = case.encode(3, "s").arg("--features").arg(case.path("one")).arg("--features");
        let ended = words.arg(case.path("two")).args(options).arg("--json").run();
        let warned = ended.stderr.contains("image 1 (") && ended.stderr.contains("t.png");
        assert_eq!(warned, !of_images.contains(&"--alpha"), "{ended:?}");
        let report = ended.json();
        assert_eq!((counts(&report), &report["images_placed"]), ((0, 0), &json!(3)));
        assert_eq!(report["device"], json!("host (no tower)"));
        assert_eq!(report["images"][1]["name"], json!(case.path("t.png").to_str()));
        assert!(fs::read(case.path("s")).unwrap() == case.plain(&["c", "t", "a"], options), "{options:?}");
    }
    // The same images again.
    let two = case.kept(&["c", "b"], "two");
    case.encode(4, "s").arg("--features").arg(&two).arg(&two).run().ok();
    assert!(fs::read(case.path("s")).unwrap() == case.plain(&["c", "b", "c", "b"], &[]));
    // Cut inside the last one: 4096 positions are the most.
    let long = format!("<ImageHere>{}<ImageHere>", "word ".repeat(1222));
    let words = case.0.on_model("encode", &long).args(["--truncate", "--json", "--out"]).arg(case.path("s"));
    let report = words.clone().arg("--features").arg(&two).run().json();
    let last = &report["slots"][1];
    assert!(last[1] == 4096 && (1..25).contains(&(4096 - last[0].as_u64().unwrap())), "{last}");
    let cut = fs::read(case.path("s")).unwrap();
    words.arg("--image").args(case.images(&["c", "b"])).run().json();
    assert!(fs::read(case.path("s")).unwrap() == cut);
}

#[test]
fn the_file_holds_features_and_says_what_they_are_of() {
    let case = Case::new();
    let words = case.features(&["a", "t", "a"], "f");
    let ended = words.clone().arg("--json").run();
    assert!(ended.stderr.contains("image 1 (") && ended.stderr.contains("t.png"), "{ended:?}");
    let report = ended.json();
    assert_eq!(counts(&report), (2, 0), "the same pixels are encoded once");
    let bytes = fs::read(case.path("f")).unwrap();
    assert_eq!(report["bytes"], json!(bytes.len()));
    assert_eq!(report["shape"], json!([3, 25, 256]));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let features = file.tensor("features").unwrap();
    assert_eq!((features.dtype(), features.shape()), (safetensors::Dtype::F16, [3, 25, 256].as_slice()));
    let image = |i: usize| &features.data()[i * ENTRY as usize..(i + 1) * ENTRY as usize];
    assert!(image(0) == image(2) && image(0) != image(1));
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["checkpoint"], report["fingerprint"].as_str().unwrap());
    let images: Value = serde_json::from_str(&metadata["images"]).unwrap();
    assert_eq!(images, report["images"]);
    assert_eq!((&images[0], &images[1]["warnings"][0]["kind"]), (&images[2], &json!("alpha_dropped")));
    let rules: Value = serde_json::from_str(&metadata["preprocessing"]).unwrap();
    assert_eq!((&rules["image_size"], &rules["alpha"]), (&json!("70"), &json!("drop")));
    for key in ["open_s", "decode_s", "resize_s", "encode_s", "write_s"] {
        assert!(report["timings"][key].as_f64().unwrap() >= 0.0, "{key}");
    }

    // What the tower saw is what `preprocess` shows.
    let seen = Words::new("preprocess").arg("--model").arg(case.path("model")).arg("--image");
    seen.args(case.images(&["a"])).arg("--out").arg(case.path("seen")).run().ok();
    let pixels = image::open(case.path("seen/000.png")).unwrap().into_rgb8().into_raw();
    let digest = <sha2::Sha256 as sha2::Digest>::digest(&pixels);
    assert_eq!(images[0]["pixels"], json!(digest.iter().map(|b| format!("{b:02x}")).collect::<String>()));

    let text = words.run().ok();
    for part in ["image 3  25 rows of 256  ", "a.png", "(2 images)", "device: ", "wrote "] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(fs::read(case.path("f")).unwrap() == bytes, "the same command makes the same file");
}

#[test]
fn an_image_can_come_from_stdin() {
    let case = Case::new();
    let words =
        Words::new("features").arg("--model").arg(case.path("model")).args(["--image", "-", "--json"]);
    let mut child = command(&words.arg("--out").arg(case.path("f")).0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&fs::read(case.path("a.png")).unwrap()).unwrap();
    let report = Ended::of(child.wait_with_output().unwrap()).json();
    assert_eq!(report["images"][0]["name"], json!("stdin"));
    case.encode(1, "s").arg("--features").arg(case.path("f")).run().ok();
    assert!(fs::read(case.path("s")).unwrap() == case.plain(&["a"], &[]));
}

#[test]
fn features_that_do_not_fit_are_refused() {
    let case = Case::new();
    let file = case.kept(&["a", "b"], "f");
    let exif =
        ["exif `apply`", "this call has `ignore`", "Give `--exif apply` here", "again with `--exif ignore`"];
    case.refused(&file, &["--exif", "ignore"], &exif);
    case.refused(&file, &["--compat", "upstream"], &exif[..2]);
    case.refused(&file, &["--alpha", "white"], &["alpha `drop`", "this call has `white`", "--alpha drop"]);
    case.refused(&file, &["--resample", "pillow13"], &["resample `pillow`", "`pillow13`"]);
    case.features(&["a", "b"], "white").args(["--alpha", "white"]).run().ok();
    case.refused(&case.path("white"), &[], &["alpha `white`", "this call has `drop`", "--alpha white"]);
    case.refused(&file, &["--prompt", "x"], &["cannot be used multiple times"]);

    let other = SynthOptions { seed: 7, ..SynthOptions::default() };
    synth::write(Preset::Tiny, &other, case.path("other")).unwrap();
    let mut words = case.encode(2, "refused").arg("--features").arg(&file);
    words.0[2] = case.path("other").into();
    words.run().mistake(&["f: checkpoint ", "made these features, and this one is ", "--model"]);

    let three = case.encode(3, "refused").arg("--features").arg(&file);
    three.run().mistake(&["3 markers", "2 images"]);
    let one = case.encode(1, "refused").arg("--features").arg(&file);
    one.run().mistake(&["1 marker", "2 images", "no marker: image 2", "b.png"]);
    assert!(!case.path("refused").exists());
}

#[test]
fn files_that_are_no_features_or_not_whole_are_refused() {
    let case = Case::new();
    let file = case.kept(&["a", "b"], "f");
    let good = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let bad = case.path("bad");
    for length in [0, 7, 8, header / 2, header - 1, header, header + 1, good.len() - 1] {
        fs::write(&bad, &good[..length]).unwrap();
        let message = case.refused(&bad, &[], &["bad: ", "imagehere features"]);
        assert!(message.contains("it is cut") || length <= 8, "{length}: {message}");
    }
    fs::write(&bad, [&good[..], b"more"].concat()).unwrap();
    case.refused(&bad, &[], &["4 bytes at its end"]);
    // Every byte is tested beside the reader; here some of each part.
    for at in [0, 2, 7, 8, 9, 40, header / 2, header - 1, header, (header + good.len()) / 2, good.len() - 1] {
        let mut turned = good.clone();
        turned[at] ^= 0x10;
        fs::write(&bad, turned).unwrap();
        case.refused(&bad, &[], &["bad: ", "imagehere features"]);
    }
    let edited = String::from_utf8_lossy(&good[8..header]).replace("a.png", "z.png");
    fs::write(&bad, [&good[..8], edited.as_bytes(), &good[header..]].concat()).unwrap();
    case.refused(&bad, &[], &["damaged", "Make it again"]);

    case.plain(&["a"], &[]);
    case.refused(&case.path("plain"), &[], &["not one of features", "\"im_mask\"", "Give a file that"]);
    case.refused(&case.path("a.png"), &[], &["no file of features"]);
    case.refused(&case.path("model"), &[], &["cannot read", "it is a directory"]);
    case.refused(&case.path("nowhere"), &[], &["cannot read", "nowhere", "Give a file that"]);
    if cfg!(unix) {
        case.refused("/dev/zero".as_ref(), &[], &["not a plain file"]);
    }
    let both = case.encode(3, "refused").arg("--features").arg(&file).arg(&bad);
    both.run().mistake(&["bad: ", "damaged"]);
}

#[test]
fn options_that_do_not_go_together() {
    let case = Case::new();
    let file = case.kept(&["a"], "f");
    for options in [["--image", "a.png"], ["--feature-cache", "cache"], ["--request", "r.json"]] {
        let words = case.encode(1, "refused").arg("--features").arg(&file).args(options);
        words.run().mistake(&["cannot be used with", "--features"]);
    }
    let words = case.encode(0, "refused");
    words.clone().args(["--feature-cache-size", "1GiB"]).run().mistake(&["--feature-cache <DIR>"]);
    for size in ["0", "10G", "1.5GiB", "much"] {
        let words = words.clone().args(["--feature-cache", "cache", "--feature-cache-size", size]);
        words.run().mistake(&["--feature-cache-size"]);
    }
    let features = Words::new("features").arg("--model").arg(case.path("model"));
    let out = case.path("g");
    features.clone().arg("--out").arg(&out).run().mistake(&["there is no image", "`--image`"]);
    features.clone().args(["--image", "x.png", "--out"]).arg(&out).run().mistake(&["image 0 (x.png)"]);
    features.arg("--image").arg(case.path("a.png")).run().mistake(&["--out"]);
    case.features(&["a"], "no/such/f").run().mistake(&["there is no directory", "mkdir -p"]);
    case.0.file("b.png", "no image");
    case.features(&["a", "b"], "g").run().mistake(&["image 1 (", "b.png", "not a supported image"]);
    for (dir, part) in [("a.png", "it is a file"), ("a.png/cache", "a.png/cache cannot be a feature cache")] {
        for words in [case.features(&["c"], "g"), case.encode(1, "g").arg("--image").arg(case.path("c.png"))]
        {
            let words = words.arg("--feature-cache").arg(case.path(dir));
            words.run().mistake(&[part, "Give a directory"]);
        }
    }
    assert!(!case.path("g").exists() && !case.path("refused").exists());
}

#[test]
fn the_cache_knows_images_by_what_the_tower_sees() {
    let case = Case::new();
    let plain = case.plain(&["a", "t", "b"], &[]);
    let (report, file) = case.cached(&["a", "t", "b"], &[]);
    assert_eq!((counts(&report), file == plain), ((3, 0), true));
    assert_eq!(report["warnings"][0]["kind"], json!("alpha_dropped"));
    let (report, file) = case.cached(&["a", "t", "b"], &["--threads", "1"]);
    assert_eq!((counts(&report), file == plain), ((0, 3), true));
    assert_eq!(case.entries().len(), 3);
    let (report, file) = case.cached(&["b", "c", "b"], &[]);
    assert_eq!((counts(&report), file == case.plain(&["b", "c", "b"], &[])), ((1, 1), true));

    // Another file with the same pixels; other rules that change no pixel of it; rules that do.
    let same = image::open(case.path("a.png")).unwrap();
    same.save_with_format(case.path("same.png"), image::ImageFormat::Png).unwrap();
    let exif = ["--exif", "ignore"];
    let (report, file) = case.cached(&["same"], &exif);
    assert_eq!((counts(&report), file == case.plain(&["same"], &exif)), ((0, 1), true));
    let white = ["--alpha", "white"];
    let (report, file) = case.cached(&["t", "a"], &white);
    assert_eq!((counts(&report), file == case.plain(&["t", "a"], &white)), ((1, 1), true));

    // `features` shares it.
    let words = case.features(&["a", "b", "a"], "f").arg("--feature-cache").arg(case.path("cache"));
    assert_eq!(counts(&words.clone().arg("--json").run().json()), (0, 2));
    let text = words.run().ok();
    assert!(text.contains("(2 images from the cache)"), "{text}");
    let with = fs::read(case.path("f")).unwrap();
    assert!(with == fs::read(case.kept(&["a", "b", "a"], "f")).unwrap());

    // Another checkpoint, another device.
    let other = SynthOptions { seed: 7, ..SynthOptions::default() };
    synth::write(Preset::Tiny, &other, case.path("other")).unwrap();
    let mut words = case.encode(1, "s").arg("--json").arg("--image").arg(case.path("a.png"));
    words = words.arg("--feature-cache").arg(case.path("cache"));
    let mut elsewhere = words.clone();
    elsewhere.0[2] = case.path("other").into();
    assert_eq!(counts(&elsewhere.run().json()), (1, 0));
    let portable = || {
        let output = command(&words.0).env("IMAGEHERE_CPU_ISA", "portable").output().unwrap();
        counts(&Ended::of(output).json())
    };
    let best = words.clone().run().json();
    assert_eq!(counts(&best), (0, 1));
    if !best["device"].as_str().unwrap().contains("portable") {
        assert_eq!(portable(), (1, 0));
    }
    assert_eq!(portable(), (0, 1));
}

#[test]
fn a_request_uses_it_too() {
    let case = Case::new();
    let sequences = json!([
        { "prompt": "<ImageHere> <ImageHere>What changed?", "images": ["a", "b"] },
        { "name": "t", "prompt": "<ImageHere><ImageHere>", "images": ["t", "a"] },
    ]);
    let request = json!({ "images": { "a": "a.png", "b": "b.png", "t": "t.png" }, "sequences": sequences });
    let request = case.0.file("r.json", request.to_string());
    let words = |out: &str| {
        let words =
            Words::new("encode").arg("--model").arg(case.path("model")).arg("--request").arg(&request);
        words.arg("--out-dir").arg(case.path(out))
    };
    words("plain").run().ok();
    let cache = |out: &str| words(out).arg("--feature-cache").arg(case.path("cache"));
    case.cached(&["b"], &[]);
    assert_eq!(counts(&cache("first").arg("--json").run().json()), (2, 1));
    let text = cache("second").run().ok();
    for part in ["0 images encoded, 3 found, for 4 slots", "(3 images from the cache)"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    for name in ["000.safetensors", "t.safetensors"] {
        let file = |out: &str| fs::read(case.path(out).join(name)).unwrap();
        assert!(file("plain") == file("first") && file("plain") == file("second"), "{name}");
    }
    // An image that cannot be used is found before the cache has a say, and nothing is written.
    case.0.file("t.png", "no image");
    cache("third").run().mistake(&["sequence 1 (\"t\"): image 0 (\"t\"", "not a supported image"]);
    assert!(!case.path("third").exists());
}

#[test]
fn entries_that_are_broken_are_made_again() {
    let case = Case::new();
    let plain = case.plain(&["a"], &[]);
    case.cached(&["a"], &[]);
    let (path, length) = case.entries().remove(0);
    let good = fs::read(&path).unwrap();
    for at in [0, 9, length as usize / 2, length as usize - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        for bad in [&bad[..], &good[..at]] {
            fs::write(&path, bad).unwrap();
            let (report, file) = case.cached(&["a"], &[]);
            assert_eq!((counts(&report), file == plain, &report["warnings"]), ((1, 0), true, &json!([])));
            assert!(fs::read(&path).unwrap() == good, "it was replaced");
        }
    }
    assert_eq!(counts(&case.cached(&["a"], &[]).0), (0, 1));
}

#[test]
fn it_is_bounded_and_what_was_not_used_for_longest_goes_first() {
    let case = Case::new();
    let size = ["--feature-cache-size", &format!("{}B", 3 * (ENTRY + 1024))];
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        let before: Vec<PathBuf> = match i {
            0 => vec![],
            _ => case.entries().into_iter().map(|(path, _)| path).collect(),
        };
        case.cached(&[name], &size);
        let new = case.entries().into_iter().find(|(path, _)| !before.contains(path)).unwrap().0;
        let then = SystemTime::now() - Duration::from_secs(1000 - i as u64);
        File::open(new).unwrap().set_modified(then).unwrap();
    }
    assert_eq!(counts(&case.cached(&["a"], &size).0), (0, 1)); // now used last
    assert_eq!(counts(&case.cached(&["t"], &size).0), (1, 0)); // instead of b
    assert_eq!(case.entries().len(), 3);
    assert_eq!(counts(&case.cached(&["a", "c", "t"], &size).0), (0, 3));
    assert_eq!(counts(&case.cached(&["b"], &size).0), (1, 0));
    assert!(case.entries().iter().map(|(_, bytes)| bytes).sum::<u64>() <= 3 * (ENTRY + 1024));

    // Smaller than a call, smaller than an image.
    fs::remove_dir_all(case.path("cache")).unwrap();
    for (size, kept) in [(2 * (ENTRY + 1024), 2), (100, 0)] {
        let size = ["--feature-cache-size", &size.to_string()];
        let (report, file) = case.cached(&["a", "b", "c"], &size);
        assert!(file == case.plain(&["a", "b", "c"], &[]));
        assert_eq!(report["warnings"][0]["kind"], json!("feature_cache"));
        let message = report["warnings"][0]["message"].as_str().unwrap();
        let missing = 3 - counts(&report).1;
        let told = format!("kept {} of {missing} images", kept.min(missing));
        assert!(message.contains(&told) && message.contains("--feature-cache-size"), "{message}");
        let _ = fs::remove_dir_all(case.path("cache"));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_cache_that_cannot_be_written_costs_a_warning_and_nothing_else() {
    let case = Case::new();
    let plain = case.plain(&["a", "b"], &[]);
    let encode = case.encode(2, "s").arg("--image").args(case.images(&["a", "b"]));
    let ended = encode.clone().args(["--feature-cache", "/proc/self", "--json"]).run();
    assert!(ended.stderr.starts_with("warning: the feature cache does not keep"), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    let report = ended.json();
    assert_eq!((counts(&report), &report["warnings"][0]["kind"]), ((2, 0), &json!("feature_cache")));
    assert!(fs::read(case.path("s")).unwrap() == plain, "and it is not in the file");

    // A full disk, for the sequence as well: nothing is left behind, in the cache neither.
    let words = encode.arg("--feature-cache").arg(case.path("cache"));
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_imagehere")]);
    Ended::of(shell.args(&words.0).output().unwrap()).mistake(&["cannot write", "Make room"]);
    assert_eq!(names(&case.path("cache")), [""; 0]);
}

#[test]
fn processes_that_share_a_small_cache_do_not_disturb_one_another() {
    let case = Case::new();
    let lists = [["a", "b"], ["b", "c"], ["c", "t"], ["t", "a"]];
    let plain: Vec<Vec<u8>> = lists.iter().map(|images| case.plain(images, &[])).collect();
    // Room for two and a half of the four: there is always something to take away.
    let size = (ENTRY + 1024) * 5 / 2;
    std::thread::scope(|scope| {
        for (process, (images, plain)) in lists.iter().zip(&plain).enumerate() {
            let case = &case;
            scope.spawn(move || {
                for step in 0..6 {
                    let out = format!("s{process}");
                    let words = case.encode(2, &out).arg("--image").args(case.images(images)).arg("--json");
                    let words = words.arg("--feature-cache").arg(case.path("cache"));
                    let report = words.args(["--feature-cache-size", &size.to_string()]).run().json();
                    assert!(fs::read(case.path(&out)).unwrap() == *plain, "{process}, {step}");
                    let (encoded, cached) = counts(&report);
                    assert_eq!(encoded + cached, 2);
                }
            });
        }
        // And one that never gets far.
        scope.spawn(|| {
            let words = case.encode(4, "killed").arg("--image").args(case.images(&["t", "c", "b", "a"]));
            let words = words.arg("--feature-cache").arg(case.path("cache"));
            for step in 0..30 {
                let quiet = || Stdio::null();
                let mut child = command(&words.0).stdout(quiet()).stderr(quiet()).spawn().unwrap();
                std::thread::sleep(Duration::from_millis(3 * (step % 15)));
                child.kill().unwrap();
                child.wait().unwrap();
            }
        });
    });
    // Whoever keeps something next puts right what the killed left.
    case.0.picture("e.png", 4);
    case.cached(&["e"], &["--feature-cache-size", &size.to_string()]);
    assert!(case.entries().iter().map(|(_, bytes)| bytes).sum::<u64>() <= size);
}

#[cfg(unix)]
#[test]
fn killed_at_any_moment_it_leaves_whole_files_or_none() {
    let case = Case::new();
    fs::create_dir(case.path("out")).unwrap();
    let out = case.path("out/f.safetensors");
    let words = case.features(&["a", "b", "c", "t"], "out/f.safetensors");
    let words = words.arg("--feature-cache").arg(case.path("cache"));
    let (mut none, mut some) = (0, 0);
    for step in 0..40 {
        let _ = fs::remove_file(&out);
        if step % 4 == 0 {
            let _ = fs::remove_dir_all(case.path("cache"));
        }
        let mut child = command(&words.0).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(2_500 * (step % 20)));
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        match fs::read(&out) {
            Ok(bytes) => {
                SafeTensors::deserialize(&bytes).unwrap();
                some += 1;
            }
            Err(_) => none += 1,
        }
        for (path, _) in if case.path("cache").exists() { case.entries() } else { vec![] } {
            let hidden = path.file_name().unwrap().to_str().unwrap().starts_with('.');
            assert!(hidden || SafeTensors::deserialize(&fs::read(&path).unwrap()).is_ok(), "{path:?}");
        }
        let hidden = names(&case.path("out")).iter().filter(|name| name.starts_with('.')).count();
        assert!(hidden == 0 || !cfg!(target_os = "linux"));
    }
    assert!(none > 0, "{some} of 40 were never killed in time");
    let (report, file) = case.cached(&["a", "b", "c", "t"], &[]);
    assert!(file == case.plain(&["a", "b", "c", "t"], &[]));
    assert_eq!(counts(&report).0 + counts(&report).1, 4);
}

/// On the emulated device: features of its own are placed bit by bit, and its cache is not the CPU's.
#[cfg(all(feature = "cuda", target_os = "linux"))]
#[test]
fn a_gpu_keeps_its_own() {
    let case = Case::new();
    let device = ["--device", "cuda"];
    let run = |words: Words| Ended::of(support::emulated(&words.args(device).0, &[]).output().unwrap());
    let images = ["a", "b", "a"];
    let encode = |out: &str| case.encode(3, out).arg("--image").args(case.images(&images)).arg("--json");
    let cache = |words: Words| words.arg("--feature-cache").arg(case.path("cache"));
    case.cached(&images, &[]);
    let report = run(encode("plain")).json();
    assert_eq!(counts(&report), (3, 0));
    assert_eq!(counts(&run(cache(encode("first"))).json()), (2, 0));
    assert_eq!(counts(&run(cache(encode("second"))).json()), (0, 2));
    let report = run(cache(case.features(&images, "f")).arg("--json")).json();
    assert_eq!(counts(&report), (0, 2));
    assert!(report["numerics"].as_str().unwrap().starts_with("cuda ("), "{report}");
    case.encode(3, "placed").arg("--features").arg(case.path("f")).run().ok();
    let plain = fs::read(case.path("plain")).unwrap();
    for out in ["first", "second", "placed"] {
        assert!(fs::read(case.path(out)).unwrap() == plain, "{out}");
    }
}
