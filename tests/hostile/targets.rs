//! All targets: those of the library, and the request of the command line. Part of `tests/hostile.rs` and of `fuzz/`.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use imagehere::Category;
use imagehere::fuzzing::Target;
use serde_json::{Value, json};

#[allow(dead_code, reason = "the command line uses all of it")]
#[path = "../../src/cli/request.rs"]
mod request;

/// Every target, by its name.
pub fn all() -> Vec<Target> {
    let mut all = imagehere::fuzzing::TARGETS.to_vec();
    all.push(("request", request_file));
    all
}

/// The file of `--request`.
fn request_file(bytes: &[u8]) {
    for ending in [".safetensors", ""] {
        let found = match request::parse(bytes, Path::new("in/request.json"), ending) {
            Ok(found) => found,
            Err(error) => {
                assert_eq!(error.category(), Category::Input, "{error}");
                assert!(error.to_string().len() < 64 << 10, "{error}");
                continue;
            }
        };
        // Each sequence has a file of its own, in the folder that was asked for.
        let mut files = BTreeSet::new();
        for sequence in &found.sequences {
            let path = Path::new(&sequence.file);
            assert!(path.components().all(|part| matches!(part, Component::Normal(_))), "{path:?}");
            assert_eq!(path.components().count(), 1, "{path:?}");
            assert!(
                !sequence.file.starts_with('.') && files.insert(sequence.file.to_lowercase()),
                "{path:?}"
            );
            assert!(sequence.images.iter().all(|&image| image < found.images.len()));
        }
        let used: BTreeSet<usize> = found.sequences.iter().flat_map(|s| s.images.clone()).collect();
        assert_eq!(used.len(), found.images.len(), "an image that nobody uses is among those that are read");

        // Written again, it asks for the same.
        let again =
            request::parse(written(&found).to_string().as_bytes(), Path::new("in/request.json"), ending);
        let again = again.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(written(&found), written(&again));
    }
}

fn written(found: &request::Requests) -> Value {
    let image = |image: &request::Picture| {
        let path = image.path.strip_prefix("in").unwrap_or(&image.path);
        (image.name.clone(), json!(path.to_str()))
    };
    let sequence = |sequence: &request::Sequence| {
        let mut entry = json!({
            "prompt": sequence.entry.prompt,
            "images": sequence.images.iter().map(|&image| &found.images[image].name).collect::<Vec<_>>(),
            "history": sequence.entry.history,
            "raw": sequence.entry.raw,
        });
        if let Some(name) = &sequence.entry.name {
            entry["name"] = json!(name);
        }
        if let Some(meta) = &sequence.entry.meta_instruction {
            entry["meta_instruction"] = json!(meta);
        }
        if let Some(bos) = sequence.entry.bos() {
            let first = bos == imagehere::prompt::Bos::First;
            entry["bos"] = json!(if first { "first" } else { "per-segment" });
        }
        entry
    };
    json!({
        "images": Value::Object(found.images.iter().map(image).collect()),
        "sequences": found.sequences.iter().map(sequence).collect::<Vec<_>>(),
    })
}
