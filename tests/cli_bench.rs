//! `bench`: what an encode is made of, in a table and as JSON.

use serde_json::{Value, json};

mod support;
use support::{Place, Words};

const OPS: [&str; 12] = [
    "patches",
    "patch_embedding",
    "pre_norm",
    "norm1",
    "qkv",
    "attention",
    "attention_out",
    "norm2",
    "fc1",
    "fc2",
    "projector_hidden",
    "projector_out",
];

fn bench(place: &Place) -> Words {
    Words::new("bench").arg("--model").arg(place.path("model")).args(["--device", "cpu"])
}

fn seconds(row: &Value) -> Vec<f64> {
    row["seconds"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect()
}

#[test]
fn the_parts_add_up_to_the_whole() {
    let place = Place::new();
    let images = [place.picture("a.png", 1), place.picture("b.png", 2)];
    let words =
        bench(&place).arg("--image").args(&images).args(["--repeat", "3", "--threads", "1", "--json"]);
    let report = words.run().json();
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, [&["decode", "resize"], &OPS[..], &["rest", "encode", "whole"]].concat());
    assert!(rows.iter().all(|row| seconds(row).len() == 3));
    assert_eq!((&report["repeat"], &report["positions"]), (&json!(3), &json!(50)));
    assert_eq!(report["images"], json!(images.map(|path| path.to_string_lossy().into_owned())));
    assert!(report["device"].as_str().unwrap().contains("1 thread"), "{report}");
    assert!(report["images_per_s"].as_f64().unwrap() > 0.0);

    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
    for run in 0..3 {
        let at = |name: &str| seconds(row(name))[run];
        let inside: f64 = OPS.iter().chain(&["rest"]).map(|name| at(name)).sum();
        assert!((inside - at("encode")).abs() < 1e-6, "run {run}: {inside} is not {}", at("encode"));
        assert!(at("decode") + at("resize") + at("encode") <= at("whole"));
    }
    let mut flop = 0;
    for row in rows {
        let mut sorted = seconds(row);
        sorted.sort_by(f64::total_cmp);
        assert_eq!((row["best_s"].as_f64(), row["median_s"].as_f64()), (Some(sorted[0]), Some(sorted[1])));
        if OPS.contains(&row["name"].as_str().unwrap()) {
            flop += row["flop"].as_u64().unwrap();
        }
    }
    assert_eq!(json!(flop), row("encode")["flop"]);
    // Two images of 26 tokens, 128 channels, in this model's layers.
    let layers = report["config"]["layers"].as_u64().unwrap();
    assert_eq!(row("qkv")["flop"], json!(2 * layers * 2 * 26 * 128 * 384));
}

#[test]
fn shares_are_those_of_a_peak_that_was_measured() {
    let place = Place::new();
    let report = bench(&place).args(["--repeat", "2", "--json"]).run().json();
    let peak = &report["peaks"][0];
    assert_eq!(peak["name"], json!("fma"));
    let flops = peak["flops"].as_f64().unwrap();
    assert!(flops > 1e8, "{flops}");
    // Tiles multiply faster than what the peak is of.
    let most = if report["device"].as_str().unwrap().contains("amx") { 40.0 } else { 1.5 };
    for row in report["rows"].as_array().unwrap() {
        let share = &row["shares"]["fma"];
        assert_eq!(share.is_null(), row["flop"] == json!(0), "{row}");
        if let Some(share) = share.as_f64() {
            assert!(share > 0.0 && share < most, "{row}");
            assert!((share * flops / row["flops"].as_f64().unwrap() - 1.0).abs() < 1e-9);
        }
    }
}

#[test]
fn a_line_for_each_step() {
    let place = Place::new();
    let text = bench(&place).args(["--repeat", "1"]).run().ok();
    assert!(text.starts_with("1 run of 1 image on cpu (") && text.contains(": a drawing"), "{text}");
    for part in OPS.iter().chain(&["decode", "resize", "rest", "encode", "whole"]) {
        let name = part.replace('_', " ");
        let lines = text.lines().filter(|line| line.starts_with(&format!("{name}  ")));
        assert_eq!(lines.count(), 1, "{name} in {text}");
    }
    for part in [
        "f32 multiply-adds reach ",
        "GFLOP/s",
        "of fma",
        "of encode",
        "100.0 %",
        "images/s",
        "2 sequences verified",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn mistakes_are_found_before_anything_is_measured() {
    let place = Place::new();
    bench(&place).args(["--image", "missing.png"]).run().mistake(&["missing.png"]);
    bench(&place).args(["--repeat", "0"]).run().mistake(&["--repeat", "at least 1"]);
    let broken = place.file("broken.png", "no image");
    bench(&place).arg("--image").arg(broken).run().mistake(&["broken.png"]);
    let words = Words::new("bench").arg("--model").arg(place.path("nothing"));
    words.run().mistake(&["nothing"]);
}
