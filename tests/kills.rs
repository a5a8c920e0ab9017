//! Every command that writes, killed at random moments: under a final name there is a whole file or what was there
//! before, and nothing that was there is lost.
//!
//! Twenty kills of each; `IMAGEHERE_KILLS=100` asks for more, `IMAGEHERE_KILLS_SEED=7` for other moments.

#![cfg(unix)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

mod support;
use support::{Place, Words, command, names};

/// What a path holds: the bytes of a file, or those of a folder's files by name. Hidden names aside.
type Held = BTreeMap<String, Vec<u8>>;

fn held(dir: &Path) -> Held {
    let mut all = Held::new();
    for name in names(dir).into_iter().filter(|name| !name.starts_with('.')) {
        let path = dir.join(&name);
        if path.is_dir() {
            all.insert(format!("{name}/"), Vec::new());
            let inside = held(&path).into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes));
            all.extend(inside);
        } else {
            all.insert(name, fs::read(&path).unwrap());
        }
    }
    all
}

fn kills() -> u32 {
    std::env::var("IMAGEHERE_KILLS").map_or(20, |n| n.parse().unwrap())
}

/// Random numbers from 0 to 1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Kills a command again and again. `before` puts into the folder `out` what is there before each run, and the command
/// writes to `out`. `units` are the names that appear together: after a kill, all names of a unit hold either what they
/// held before or what a run to the end leaves.
fn killed(place: &Place, words: &Words, before: impl Fn(&Path), unit_of: impl Fn(&str) -> String) {
    let out = place.path("out");
    // What is hidden stays: the next run of a command has to cope with it.
    let fresh = || {
        fs::create_dir_all(&out).unwrap();
        for name in names(&out).into_iter().filter(|name| !name.starts_with('.')) {
            let path = out.join(name);
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        }
        before(&out);
    };
    fresh();
    let old = held(&out);
    let mut longest = Duration::ZERO;
    for _ in 0..3 {
        fresh();
        let start = Instant::now();
        words.run().ok();
        longest = longest.max(start.elapsed());
    }
    let new = held(&out);
    assert_ne!(old, new);

    let seed = std::env::var("IMAGEHERE_KILLS_SEED").map_or(1, |n| n.parse().unwrap());
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
    let (mut cut_short, mut untouched, mut finished) = (0, 0, 0);
    for kill in 0..kills() {
        fresh();
        // Every other one towards the end, where files get their names.
        let part = if kill % 2 == 0 { random.next() } else { 0.6 + 0.5 * random.next() };
        let mut child = command(&words.0).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(longest.mul_f64(part));
        child.kill().unwrap(); // SIGKILL
        cut_short += u32::from(!child.wait().unwrap().success());

        let found = held(&out);
        for name in old.keys().chain(new.keys()) {
            let unit = unit_of(name);
            let part = |all: &Held| -> Held {
                let mine = all.iter().filter(|(name, _)| unit_of(name) == unit);
                mine.map(|(name, bytes)| (name.clone(), bytes.clone())).collect()
            };
            let (now, was, will) = (part(&found), part(&old), part(&new));
            let names: Vec<&String> = now.keys().collect();
            assert!(now == was || now == will, "{unit} is neither the old one nor the new one: {names:?}");
        }
        for name in found.keys() {
            assert!(old.contains_key(name) || new.contains_key(name), "{name}");
        }
        untouched += u32::from(found == old);
        finished += u32::from(found == new);
    }
    eprintln!(
        "{} kills within {longest:?}: {cut_short} in time; {untouched} as before, {finished} done, {} between",
        kills(),
        kills() - untouched - finished
    );
    assert!(cut_short > 0, "none was killed in time");

    // What the kills left does not stop the next run, and of hidden folders nothing stays.
    fresh();
    words.run().ok();
    assert_eq!(held(&out), new);
    let hidden: Vec<String> = names(&out).into_iter().filter(|name| name.starts_with('.')).collect();
    assert!(hidden.iter().all(|name| !out.join(name).is_dir()), "{hidden:?}");
}

fn itself(name: &str) -> String {
    name.to_owned()
}

/// A model and two pictures.
fn place() -> Place {
    let place = Place::new();
    place.picture("a.png", 1);
    place.picture("b.png", 2);
    place
}

fn encode(place: &Place) -> Words {
    let words = place.on_model("encode", "<ImageHere>, <ImageHere>").args(["--threads", "2", "--image"]);
    words.arg(place.path("a.png")).arg(place.path("b.png"))
}

#[test]
fn encode_replaces_a_file_or_leaves_it() {
    let place = place();
    let words = encode(&place).arg("--out").arg(place.path("out/s.safetensors"));
    let before = |out: &Path| fs::write(out.join("s.safetensors"), "as it was").unwrap();
    killed(&place, &words, before, itself);
}

#[test]
fn encode_to_npy_makes_a_whole_folder_or_none() {
    let place = place();
    let words = encode(&place).args(["--format", "npy", "--out"]).arg(place.path("out/s"));
    let before = |out: &Path| fs::write(out.join("beside"), "as it was").unwrap();
    killed(&place, &words, before, |name| name.split('/').next().unwrap_or_default().to_owned());
}

#[test]
fn encode_of_a_request_replaces_each_file_or_leaves_it() {
    let place = place();
    let request = place.file(
        "request.json",
        r#"{"images": {"a": "a.png", "b": "b.png"}, "sequences": [
            {"name": "x", "prompt": "<ImageHere>?", "images": ["a"]},
            {"name": "y", "prompt": "<ImageHere><ImageHere>", "images": ["b", "a"]},
            {"name": "z", "prompt": "none"}]}"#,
    );
    let words =
        Words::new("encode").arg("--model").arg(place.path("model")).args(["--threads", "2", "--request"]);
    let words = words.arg(request).arg("--out-dir").arg(place.path("out"));
    let before = |out: &Path| {
        for name in ["x.safetensors", "z.safetensors", "mine"] {
            fs::write(out.join(name), "as it was").unwrap();
        }
    };
    killed(&place, &words, before, itself);
}

#[test]
fn features_replaces_a_file_or_leaves_it() {
    let place = place();
    let words =
        Words::new("features").arg("--model").arg(place.path("model")).args(["--threads", "2", "--image"]);
    let words = words.arg(place.path("a.png")).arg(place.path("b.png"));
    let words = words.arg("--out").arg(place.path("out/f.safetensors"));
    killed(&place, &words, |out| fs::write(out.join("f.safetensors"), "as it was").unwrap(), itself);
}

#[test]
fn features_for_others_are_whole_or_not_there() {
    let place = place();
    for format in ["parquet", "vllm-encoder-cache"] {
        let words = Words::new("features").arg("--model").arg(place.path("model"));
        let words = words.args(["--threads", "2", "--format", format, "--image"]);
        let words = words.arg(place.path("a.png")).arg(place.path("b.png")).arg("--out");
        let before = |out: &Path| fs::write(out.join("t.parquet"), "as it was").unwrap();
        let out = if format == "parquet" { "out/t.parquet" } else { "out/cache" };
        // Folders of a cache may be there without their files: a server makes such itself.
        killed(&place, &words.arg(place.path(out)), before, itself);
    }
}

#[test]
fn convert_makes_a_whole_checkpoint_or_none() {
    let place = place();
    for layout in ["upstream", "clip-vision"] {
        let words = Words::new("convert").arg(place.path("model")).args(["--layout", layout, "--out"]);
        let before = |out: &Path| {
            fs::create_dir(out.join("m")).unwrap();
            fs::write(out.join("beside"), "as it was").unwrap();
        };
        let unit = |name: &str| name.split('/').next().unwrap_or_default().to_owned();
        killed(&place, &words.arg(place.path("out/m")), before, unit);
    }
}

#[test]
fn the_feature_cache_has_whole_entries_alone() {
    let place = place();
    let with_cache = |out: &str| {
        let words = encode(&place).arg("--feature-cache").arg(place.path("out"));
        words.arg("--out").arg(place.path(out))
    };
    // A broken entry is there before, and is replaced.
    let words = with_cache("s.safetensors");
    fs::create_dir(place.path("out")).unwrap();
    words.run().ok();
    let entries: Vec<_> = held(&place.path("out")).into_iter().collect();
    assert_eq!(entries.len(), 2);
    let before = |out: &Path| {
        fs::write(out.join(&entries[0].0), &entries[0].1[..700]).unwrap();
        fs::write(out.join("mine"), "as it was").unwrap();
    };
    killed(&place, &words, before, itself);
    // However it was left, what comes out is what comes out without a cache.
    encode(&place).arg("--out").arg(place.path("plain")).run().ok();
    assert!(fs::read(place.path("plain")).unwrap() == fs::read(place.path("s.safetensors")).unwrap());
}
