//! Whole calls as a program makes them, in wall time: one JSON object a line.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use image::codecs::jpeg::JpegEncoder;
use imagehere::image::{ImageSource, RgbView};
use imagehere::prompt::{Request, SequencePlan};
use imagehere::synth::{self, Preset, SynthOptions};
use imagehere::{Encoder, EncoderOptions};
use serde_json::{Map, Value, json};

use crate::suite::{Suite, bytes};

const WORKS: &str = "a device that works";

/// A checkpoint directory: the caller's, or a random one that lives as long as this.
pub struct Model {
    dir: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl Model {
    pub fn new(suite: &Suite, dir: Option<&str>) -> Self {
        if let Some(dir) = dir {
            return Self { dir: dir.into(), _temporary: None };
        }
        let temporary = tempfile::tempdir().expect("a place for a checkpoint");
        let preset = if suite.tiny { Preset::Tiny } else { Preset::Vl7bVision };
        synth::write(preset, &SynthOptions::default(), temporary.path()).expect("room for a checkpoint");
        // As many images as anybody asks for.
        let config = temporary.path().join("config.json");
        let text = std::fs::read(&config).expect("a configuration");
        let mut values: Map<String, Value> = serde_json::from_slice(&text).expect("JSON");
        values.retain(|key, _| key != "max_length" && key != "max_position_embeddings");
        std::fs::write(&config, Value::from(values).to_string()).expect("room for a file");
        Self { dir: temporary.path().into(), _temporary: Some(temporary) }
    }
}

/// A model that is open, and how long that took.
struct Open {
    encoder: Encoder,
    seconds: f64,
}

fn open(dir: &Path) -> Open {
    let start = Instant::now();
    let options = EncoderOptions::new().device("cuda:0".parse().expect("a device's name"));
    let encoder = Encoder::open_with(dir, options).expect(WORKS);
    Open { encoder, seconds: start.elapsed().as_secs_f64() }
}

impl Open {
    fn plan(&self, images: usize) -> SequencePlan {
        let request = Request::new("<ImageHere>".repeat(images) + "Compare.").image_count(images);
        self.encoder.plan(&request).expect("a marker per image")
    }

    /// The most images whose slots a sequence of this checkpoint holds, of those asked for.
    fn fits<'s>(&self, images: &'s [usize]) -> impl Iterator<Item = usize> + use<'s> {
        let config = self.encoder.config();
        let (rows, most) = (config.patches, config.max_length.unwrap_or(usize::MAX));
        images.iter().copied().filter(move |images| images * rows + 100 < most)
    }
}

fn say(name: String, what: Value) {
    let mut line = Map::from_iter([("name".to_owned(), json!(name))]);
    line.extend(what.as_object().expect("an object").clone());
    println!("{}", Value::from(line));
}

/// The middle, and what one call in ten and one in a hundred exceed; nearest rank.
fn percentiles(mut seconds: Vec<f64>) -> Value {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| seconds[((seconds.len() as f64 * share).ceil() as usize).max(1) - 1];
    json!({ "seconds": at(0.5), "p90": at(0.9), "p99": at(0.99), "samples": seconds.len() })
}

/// Calls `work` with 0, 1, … at least `least` times and for `time`; seconds of each.
fn repeat(least: usize, time: Duration, mut work: impl FnMut(usize)) -> Vec<f64> {
    let (start, mut seconds) = (Instant::now(), vec![]);
    while seconds.len() < least || start.elapsed() < time {
        let call = Instant::now();
        work(seconds.len());
        seconds.push(call.elapsed().as_secs_f64());
    }
    seconds
}

/// Open to ready, the first call, then calls by number of images: pixels in memory to a sequence on the device.
pub fn latency(suite: &Suite, model: &Model) {
    let first = open(&model.dir);
    let side = first.encoder.config().image_size;
    let pictures: Vec<Vec<u8>> = (0..64).map(|i| bytes(suite.seed + i, 3 * side * side)).collect();
    let views = |from: usize, count: usize| -> Vec<ImageSource<'_>> {
        let view = |rgb| RgbView::new(rgb, side as u32, side as u32, 3 * side).expect("a picture").into();
        (from..from + count).map(|i| view(&pictures[i % pictures.len()])).collect()
    };
    let call = |open: &Open, plan: &SequencePlan, from: usize| {
        let mut sequence = open.encoder.device_sequence().expect(WORKS);
        open.encoder.encode_into(plan, &views(from, plan.slots.len()), &mut sequence).expect(WORKS);
        sequence.verify().expect("a complete sequence");
    };
    say("open".into(), json!({ "seconds": first.seconds }));
    let start = Instant::now();
    call(&first, &first.plan(1), 0);
    say("first/1".into(), json!({ "seconds": start.elapsed().as_secs_f64() }));
    drop(first);

    // Again, with the driver and the file system warm, and all graphs made before the first call.
    let open = open(&model.dir);
    say("open_again".into(), json!({ "seconds": open.seconds }));
    let counts: Vec<usize> = open.fits(suite.images).collect();
    let start = Instant::now();
    open.encoder.warm_up(&counts).expect(WORKS);
    say("warm_up".into(), json!({ "seconds": start.elapsed().as_secs_f64() }));
    let start = Instant::now();
    call(&open, &open.plan(1), 0);
    say("first_warm/1".into(), json!({ "seconds": start.elapsed().as_secs_f64() }));
    let (least, time) = if suite.tiny { (3, 0.0) } else { (100, 1.0) };
    for images in counts {
        let plan = open.plan(images);
        let mut sequence = open.encoder.device_sequence().expect(WORKS);
        let seconds = repeat(least, Duration::from_secs_f64(time), |i| {
            open.encoder.encode_into(&plan, &views(i, images), &mut sequence).expect(WORKS);
        });
        sequence.verify().expect("a complete sequence");
        say(format!("encode_into/{images}"), percentiles(seconds));
    }
}

/// A photo, more or less: shades, edges and a little noise, as JPEG of quality 90.
fn photo(seed: u64, width: u32, height: u32) -> Vec<u8> {
    let grain = bytes(seed, (width * height) as usize);
    let mut rgb = Vec::with_capacity(3 * grain.len());
    for (i, &grain) in (0u32..).zip(&grain) {
        let (x, y) = (i % width, i / width);
        let edge = if (x / 97 + y / 61) % 2 == 0 { 60 } else { seed as u32 % 40 };
        let shade = |v: u32| (v + edge + u32::from(grain >> 5)) as u8;
        rgb.extend([shade(x * 150 / width), shade(y * 150 / height), shade(40)]);
    }
    let mut file = vec![];
    let mut encoder = JpegEncoder::new_with_quality(&mut file, 90);
    encoder.encode(&rgb, width, height, image::ExtendedColorType::Rgb8).expect("a vector takes it");
    file
}

/// JPEG files to slots, by size and number, and the share of decoding in the call.
pub fn files(suite: &Suite, model: &Model) {
    let open = open(&model.dir);
    let sizes: [(u32, u32); 3] =
        if suite.tiny { [(80, 61), (93, 131), (160, 120)] } else { [(816, 612), (1632, 1224), (4000, 3000)] };
    let folder = tempfile::tempdir().expect("a place for files");
    let images = if suite.tiny { &suite.images[..2] } else { &suite.images[suite.images.len() - 3..] };
    let counts: Vec<usize> = open.fits(images).collect();
    for ((width, height), name) in sizes.into_iter().zip(["0.5MP", "2MP", "12MP"]) {
        let paths: Vec<PathBuf> = (0..8).map(|i| folder.path().join(format!("{name}-{i}.jpg"))).collect();
        let mut stored = 0;
        for (i, path) in (0..).zip(&paths) {
            let file = photo(suite.seed + i, width, height);
            stored += file.len();
            std::fs::write(path, file).expect("room for files");
        }
        for &images in &counts {
            let plan = open.plan(images);
            let mut sequence = open.encoder.device_sequence().expect(WORKS);
            let (least, time) = if suite.tiny { (2, 0.0) } else { (10, 1.5) };
            let mut parts = [0.0; 3];
            let mut call = |i: usize| {
                let sources: Vec<ImageSource<'_>> =
                    (i..i + images).map(|k| paths[k % paths.len()].as_path().into()).collect();
                let report = open.encoder.encode_into(&plan, &sources, &mut sequence).expect(WORKS);
                for (sum, part) in parts.iter_mut().zip([report.decode, report.resize, report.encode]) {
                    *sum += part.as_secs_f64();
                }
            };
            call(0);
            let seconds = repeat(least, Duration::from_secs_f64(time), &mut call);
            sequence.verify().expect("a complete sequence");
            let calls = (seconds.len() + 1) as f64;
            let mut what = percentiles(seconds);
            for (key, sum) in ["decode", "resize", "encode"].into_iter().zip(parts) {
                what[key] = json!(sum / calls);
            }
            what["file_bytes"] = json!(stored / paths.len());
            say(format!("{name}/{images}"), what);
        }
    }
}
