//! `encode --picture`: a PNG of the sequence, and nothing else changed.

use std::fs;
use std::path::Path;

use imagehere::Encoder;
use imagehere::image::{Resample, RgbView, resize};
use imagehere::prompt::Request;
use imagehere::sequence::SequenceBuffer;
use serde_json::json;

mod support;
use support::{Place, Words, picture};

const PROMPT: &str = "<ImageHere> or <ImageHere>?";
/// Where the first image stands, and the side of an image and of its map, in pixels.
const FIRST: (u32, u32) = (28, 64);
const SIDE: u32 = 215; // 5 patches of 43 pixels

/// An encode of two pictures to `s.safetensors` and `p.png`.
fn encode(place: &Place) -> Words {
    let images = [place.picture("a.png", 1), place.picture("b.png", 2)];
    let words = place.on_model("encode", PROMPT).arg("--image").args(images);
    words.arg("--out").arg(place.path("s.safetensors")).arg("--picture").arg(place.path("p.png"))
}

fn open(path: &Path) -> image::RgbImage {
    image::open(path).unwrap().into_rgb8()
}

#[test]
fn pixels_stand_beside_a_map_and_the_sequence_is_what_it_would_be() {
    let place = Place::new();
    let words = encode(&place);
    let text = words.run().ok();
    assert!(text.contains(&format!("drew {} (", place.path("p.png").display())), "{text}");
    assert_eq!(place.names(), ["a.png", "b.png", "model", "p.png", "s.safetensors"]);
    let shown = open(&place.path("p.png"));
    assert!(shown.width() >= 940 && shown.height() > SIDE + 150, "{:?}", shown.dimensions());

    let source = picture(1);
    let view = RgbView::new(&source.data, source.width, source.height, 3 * source.width as usize).unwrap();
    let square = resize::resize(view, 70, 70, Resample::Pillow);
    let seen = resize::resize(square.view(), SIDE, SIDE, Resample::Pillow);
    for (x, y) in [(0, 0), (SIDE - 1, 0), (100, 57), (SIDE - 1, SIDE - 1)] {
        let pixel = &seen.view().row(y)[3 * x as usize..][..3];
        assert_eq!(shown.get_pixel(FIRST.0 + x, FIRST.1 + y).0, pixel, "{x}, {y}");
    }
    // A patch is a square of one colour, and patches differ.
    let map = (FIRST.0 + SIDE + 6, FIRST.1);
    let patch = |column: u32, row: u32, dx: u32, dy: u32| {
        *shown.get_pixel(map.0 + 43 * column + dx, map.1 + 43 * row + dy)
    };
    let mut colours = std::collections::HashSet::new();
    for (column, row) in (0..25).map(|i| (i % 5, i / 5)) {
        assert_eq!(patch(column, row, 0, 0), patch(column, row, 42, 42), "{column}, {row}");
        colours.insert(patch(column, row, 20, 20));
    }
    assert!(colours.len() > 15, "{colours:?}");

    // The same bytes once more, whatever the threads; and the sequence does not know of it.
    let (drawn, sequence) =
        (fs::read(place.path("p.png")).unwrap(), fs::read(place.path("s.safetensors")).unwrap());
    words.clone().args(["--threads", "1"]).run().ok();
    assert!(drawn == fs::read(place.path("p.png")).unwrap());
    let plain = Words(words.0[..words.0.len() - 2].to_vec());
    plain.run().ok();
    assert!(sequence == fs::read(place.path("s.safetensors")).unwrap());
}

#[test]
fn the_map_is_what_it_is_asked_to_be() {
    let place = Place::new();
    let words = encode(&place);
    words.run().ok();
    let components = fs::read(place.path("p.png")).unwrap();
    let report = words.clone().args(["--picture-map", "norm", "--json"]).run().json();
    let norms = fs::read(place.path("p.png")).unwrap();
    assert!(components != norms);
    let out = place.path("p.png");
    let expected = json!({ "out": out.to_string_lossy(), "bytes": norms.len(), "map": "norm" });
    assert_eq!(report["picture"], expected);
    assert!(report["timings"]["picture_s"].as_f64().unwrap() > 0.0);

    // The brightest square is the patch of the greatest norm.
    let encoder = Encoder::open(place.path("model")).unwrap();
    let plan = encoder.plan(&Request::new("<ImageHere>").image_count(1)).unwrap();
    let mut sequence = SequenceBuffer::new();
    encoder.encode_into(&plan, &[place.path("a.png").as_path().into()], &mut sequence).unwrap();
    let norm = |patch: &usize| {
        let row = sequence.row(plan.slots[0].offset + patch);
        row.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>()
    };
    let greatest = (0..25).max_by(|a, b| norm(a).total_cmp(&norm(b))).unwrap() as u32;
    let shown = open(&out);
    let at = (FIRST.0 + SIDE + 6 + 43 * (greatest % 5), FIRST.1 + 43 * (greatest / 5));
    assert_eq!(shown.get_pixel(at.0, at.1).0, [253, 244, 190]);

    let text = words.clone().args(["--picture-map", "mean"]).run().mistake(&["pca, norm"]);
    assert!(text.contains("--picture-map"), "{text}");
    let report = words.arg("--json").run().json();
    assert_eq!(report["picture"]["map"], json!("pca"));
}

#[test]
fn kept_features_have_maps_without_pixels_and_a_folder_of_arrays_has_a_picture_too() {
    let place = Place::new();
    let image = place.picture("a.png", 3);
    let kept = place.path("kept.safetensors");
    let words = Words::new("features").arg("--model").arg(place.path("model")).arg("--image").arg(image);
    words.arg("--out").arg(&kept).run().ok();
    let words = place.on_model("encode", "<ImageHere>").arg("--features").arg(&kept);
    let words = words.arg("--out").arg(place.path("arrays")).args(["--format", "npy"]);
    words.arg("--picture").arg(place.path("p.png")).run().ok();
    assert!(place.path("arrays/metadata.json").is_file());
    let shown = open(&place.path("p.png"));
    // The map stands where the image would, in patches of 86 pixels.
    let at = |x: u32, y: u32| *shown.get_pixel(FIRST.0 + x, FIRST.1 + y);
    assert!((0..5).all(|i| at(86 * i, 86) == at(86 * i + 85, 171)));
    assert!((0..4).any(|i| at(86 * i, 86) != at(86 * (i + 1), 86)));
    assert_eq!(at(431, 5).0, [255; 3], "nothing beside it");
}

#[test]
fn text_alone_has_a_picture_of_its_layout() {
    let place = Place::new();
    let words = place.on_model("encode", "text").arg("--out").arg(place.path("s"));
    words.arg("--picture").arg(place.path("text.png")).run().ok();
    assert!(open(&place.path("text.png")).height() < 250);
}

#[test]
fn both_files_or_none() {
    let place = Place::new();
    let words = encode(&place);
    let same = place.path("s.safetensors");
    let cut = |words: &Words| Words(words.0[..words.0.len() - 1].to_vec());
    cut(&words).arg(&same).run().mistake(&["`--out` and `--picture` are both", "a name of its own"]);
    cut(&words).arg(place.path("no/p.png")).run().mistake(&["no/p.png", "mkdir -p"]);
    cut(&words).arg(place.path("model")).run().mistake(&["it is a directory"]);
    assert_eq!(place.names(), ["a.png", "b.png", "model"]);

    // An image that cannot be used leaves neither, and what was there stays.
    fs::write(place.path("p.png"), "old").unwrap();
    fs::write(place.path("b.png"), "no image").unwrap();
    words.run().mistake(&["b.png"]);
    assert_eq!(place.names(), ["a.png", "b.png", "model", "p.png"]);
    assert_eq!(fs::read(place.path("p.png")).unwrap(), b"old");

    let several = Words::new("encode").arg("--model").arg(place.path("model"));
    let several = several.args(["--request", "r.json", "--out-dir", "d", "--picture", "p.png"]);
    several.run().mistake(&["--picture", "cannot be used with", "--request"]);
    let alone = place.on_model("encode", "text").args(["--out", "s", "--picture-map", "norm"]);
    alone.run().mistake(&["--picture <F.png>"]);
}
