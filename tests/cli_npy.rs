//! `imagehere encode --format npy`: the same sequence as in safetensors, one array a file.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::{Value, json};

mod support;
use support::{Place, Words, names};

/// An array's description, shape and bytes, from a file of format 1.0 that is aligned as NumPy aligns it.
fn array(path: impl AsRef<Path>) -> (String, Vec<usize>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let start = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = std::str::from_utf8(&bytes[10..start]).unwrap();
    assert!(start.is_multiple_of(64) && header.ends_with('\n'), "{header:?}");
    let rest = header.strip_prefix("{'descr': '").unwrap();
    let (descr, rest) = rest.split_once("', 'fortran_order': False, 'shape': (").unwrap();
    let (shape, rest) = rest.split_once("), }").unwrap();
    assert!(rest.trim().is_empty());
    let shape = shape.split(", ").map(|n| n.trim_end_matches(',').parse().unwrap()).collect();
    (descr.to_owned(), shape, bytes[start..].to_vec())
}

/// Asserts that a folder holds the tensors of a file, byte for byte, and each image's rows; returns its names.
#[track_caller]
fn same(folder: &Path, file: &[u8]) -> Vec<String> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    for (name, descr) in
        [("inputs_embeds", "<f2"), ("im_mask", "|b1"), ("input_ids", "<i8"), ("slots", "<i8")]
    {
        let (tensor, found) = (tensors.tensor(name).unwrap(), array(folder.join(format!("{name}.npy"))));
        assert_eq!((found.0.as_str(), found.1.as_slice()), (descr, tensor.shape()), "{name}");
        assert!(found.2 == tensor.data(), "{name} differs");
    }
    let rows = tensors.tensor("inputs_embeds").unwrap();
    let hidden = rows.shape()[2];
    let slots: Vec<i64> = bytemuck::pod_collect_to_vec(tensors.tensor("slots").unwrap().data());
    for (i, slot) in slots.chunks(2).enumerate() {
        let (begin, end) = (slot[0] as usize, slot[1] as usize);
        let (descr, shape, bytes) = array(folder.join(format!("image_{i:03}.npy")));
        assert_eq!((descr.as_str(), shape), ("<f2", vec![end - begin, hidden]));
        assert!(bytes == rows.data()[begin * hidden * 2..end * hidden * 2], "image {i}");
    }
    let (_, header) = SafeTensors::read_metadata(file).unwrap();
    let metadata: Value = serde_json::from_slice(&fs::read(folder.join("metadata.json")).unwrap()).unwrap();
    assert_eq!(metadata, json!(header.metadata().as_ref().unwrap()));
    names(folder)
}

const ALWAYS: [&str; 5] = ["im_mask.npy", "input_ids.npy", "inputs_embeds.npy", "metadata.json", "slots.npy"];

/// The names of a folder with so many images.
fn with_images(count: usize) -> Vec<String> {
    let images = (0..count).map(|i| format!("image_{i:03}.npy"));
    let mut all: Vec<String> = images.chain(ALWAYS.map(str::to_owned)).collect();
    all.sort();
    all
}

#[test]
fn the_folder_holds_what_the_file_holds() {
    let place = Place::new();
    let images = [place.picture("a.png", 1), place.picture("b.png", 2)];
    for (prompt, count) in [("A <ImageHere>, b <ImageHere>.", 2), ("Only text.", 0)] {
        let words = place.on_model("encode", prompt);
        let words = if count > 0 { words.arg("--image").args(&images) } else { words };
        words.clone().arg("--out").arg(place.path("s")).run().ok();
        let folder = place.path(&format!("folder-{count}"));
        let words = words.args(["--format", "npy"]).arg("--out").arg(&folder);
        let report = words.clone().arg("--json").run().json();
        assert_eq!(same(&folder, &fs::read(place.path("s")).unwrap()), with_images(count));
        assert_eq!((&report["format"], &report["out"]), (&json!("npy"), &json!(folder.to_str())));
        let bytes: u64 = names(&folder).iter().map(|name| folder.join(name).metadata().unwrap().len()).sum();
        assert_eq!(report["bytes"], json!(bytes));
        // A second time it is in its own way.
        words.run().mistake(&["it is not empty", "is empty or does not exist yet"]);
    }
    let text =
        place.on_model("encode", "text").args(["--format", "npy", "--out"]).arg(place.path("t")).run().ok();
    assert!(text.contains(&format!("wrote {}", place.path("t").display())), "{text}");
    place.on_model("encode", "text").args(["--format", "pt", "--out", "x"]).run().mistake(&["--format"]);
}

#[test]
fn a_request_makes_a_folder_for_each_sequence() {
    let place = Place::new();
    for (name, seed) in [("a.png", 1), ("b.png", 2)] {
        place.picture(name, seed);
    }
    let request = json!({
        "images": { "a": "a.png", "b": "b.png" },
        "sequences": [
            { "name": "both", "prompt": "<ImageHere><ImageHere>?", "images": ["b", "a"] },
            { "prompt": "<ImageHere>", "images": ["a"], "meta_instruction": null },
            { "name": "text", "prompt": "Just text." },
        ],
    });
    let file = place.file("r.json", request.to_string());
    let words = Words::new("encode").arg("--model").arg(place.path("model")).arg("--request").arg(file);
    words.clone().arg("--out-dir").arg(place.path("files")).run().ok();
    let folders = words.clone().args(["--format", "npy"]).arg("--out-dir").arg(place.path("folders"));
    let report = folders.clone().arg("--json").run().json();
    assert_eq!(names(&place.path("folders")), ["001", "both", "text"]);
    for (i, (name, count)) in [("both", 2), ("001", 1), ("text", 0)].into_iter().enumerate() {
        let file = fs::read(place.path(&format!("files/{name}.safetensors"))).unwrap();
        let folder = place.path("folders").join(name);
        assert_eq!(same(&folder, &file), with_images(count));
        assert_eq!(report["sequences"][i]["out"], json!(folder.to_str()));
    }
    assert_eq!(report["format"], json!("npy"));

    // All are looked at before a weight is: one that is in the way stops all.
    fs::remove_dir_all(place.path("folders/both")).unwrap();
    fs::remove_dir_all(place.path("folders/001")).unwrap();
    folders.run().mistake(&["text", "it is not empty"]);
    assert_eq!(names(&place.path("folders")), ["text"]);
    let text = words.args(["--format", "npy"]).arg("--out-dir").arg(place.path("other")).run().ok();
    assert!(text.contains("wrote 3 folders to"), "{text}");
}

#[test]
fn images_that_are_cut_off_have_the_rows_that_are_left() {
    let place = Place::new();
    let mut config: Value =
        serde_json::from_slice(&fs::read(place.path("model/config.json")).unwrap()).unwrap();
    let image = place.picture("a.png", 1);
    let words = place
        .on_model("encode", "<ImageHere><ImageHere><ImageHere>")
        .arg("--image")
        .args([&image, &image, &image]);
    let plan = {
        let mut words = words.clone();
        words.0[0] = "plan".into();
        words.arg("--json").run().json()
    };
    config["max_length"] = json!(plan["slots"][1][0].as_u64().unwrap() + 3);
    place.file("model/config.json", config.to_string());
    let words = words.arg("--truncate");
    words.clone().arg("--out").arg(place.path("s")).run().ok();
    words.args(["--format", "npy"]).arg("--out").arg(place.path("folder")).run().ok();
    assert_eq!(same(&place.path("folder"), &fs::read(place.path("s")).unwrap()), with_images(3));
    assert_eq!(array(place.path("folder/image_001.npy")).1, [3, 256]);
    assert_eq!(array(place.path("folder/image_002.npy")).1, [0, 256]);
}
