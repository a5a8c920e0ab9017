//! `imagehere encode`: the file, the report, and that they agree with the library and with `plan`.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use half::f16;
use imagehere::Encoder;
use imagehere::image::ImageSource;
use imagehere::prompt::Request;
use imagehere::sequence::SequenceBuffer;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

mod support;
use support::{Ended, Place, command};

const PROMPT: &str = "First picture:<ImageHere>, second picture:<ImageHere>. What changed?";

/// A tensor's values.
fn values<T: bytemuck::Pod>(file: &SafeTensors<'_>, name: &str) -> Vec<T> {
    bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data())
}

#[test]
fn the_file_holds_what_the_library_gives_and_what_plan_promises() {
    let place = Place::new();
    let (a, b) = (place.picture("a.png", 1), place.picture("b.png", 2));
    let out = place.path("s.safetensors");
    let words = place.on_model("encode", PROMPT).arg("--image").arg(&a).arg(&b);
    let report = words.clone().arg("--out").arg(&out).arg("--json").run().json();
    let mut planned = words;
    planned.0[0] = "plan".into();
    let planned = planned.arg("--json").run().json();

    let encoder = Encoder::open(place.path("model")).unwrap();
    let plan = encoder.plan(&Request::new(PROMPT).image_count(2)).unwrap();
    let mut sequence = SequenceBuffer::new();
    let images: [ImageSource<'_>; 2] = [(&a).into(), (&b).into()];
    encoder.encode_into(&plan, &images, &mut sequence).unwrap();

    let bytes = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (length, hidden) = (plan.input_ids.len(), encoder.config().hidden_size);
    for (name, dtype, shape) in [
        ("inputs_embeds", Dtype::F16, vec![1, length, hidden]),
        ("im_mask", Dtype::BOOL, vec![1, length]),
        ("input_ids", Dtype::I64, vec![1, length]),
        ("slots", Dtype::I64, vec![2, 2]),
    ] {
        let tensor = file.tensor(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (dtype, shape.as_slice()), "{name}");
    }
    let rows: Vec<u16> = values(&file, "inputs_embeds");
    let expected: Vec<u16> = sequence.as_slice().unwrap().iter().map(|x: &f16| x.to_bits()).collect();
    assert!(rows == expected, "the rows differ from the library's");
    assert_eq!(values::<i64>(&file, "input_ids"), plan.input_ids);
    let slots: Vec<i64> = values(&file, "slots");
    assert_eq!(
        slots,
        plan.slots.iter().flat_map(|s| [s.offset, s.offset + s.len]).map(|x| x as i64).collect::<Vec<_>>()
    );
    let mask: Vec<u8> = values(&file, "im_mask");
    assert_eq!(mask, plan.im_mask.iter().map(|&x| u8::from(x)).collect::<Vec<_>>());

    for key in ["length", "input_ids", "slots", "segments"] {
        assert_eq!(report[key], planned[key], "{key}");
    }
    assert_eq!(report["length"], json!(length));
    assert_eq!(report["input_ids"], json!(plan.input_ids));
    assert_eq!(report["slots"], json!([[slots[0], slots[1]], [slots[2], slots[3]]]));
    assert_eq!(report["warnings"], json!([]));
    for key in ["open_s", "decode_s", "resize_s", "encode_s", "write_s"] {
        assert!(report["timings"][key].as_f64().unwrap() >= 0.0, "{key}");
    }
    if cfg!(target_os = "linux") {
        assert!(report["peak_bytes"].as_u64().unwrap() > 1 << 20);
    }

    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["fingerprint"], encoder.fingerprint());
    assert!(metadata["version"].contains(env!("CARGO_PKG_VERSION")));
    let options: Value = serde_json::from_str(&metadata["options"]).unwrap();
    assert_eq!(options["raw"], json!(false));
    assert_eq!(serde_json::from_str::<Value>(&metadata["warnings"]).unwrap(), json!([]));
    assert_eq!(place.names(), ["a.png", "b.png", "model", "s.safetensors"]);
}

#[test]
fn the_same_command_makes_the_same_file_with_any_number_of_threads() {
    let place = Place::new();
    let image = place.picture("a.png", 3);
    let once = |threads: &str, name: &str| {
        let words = place.on_model("encode", "<ImageHere>What is it?").arg("--image").arg(&image);
        words.arg("--out").arg(place.path(name)).args(["--threads", threads]).run().ok();
        fs::read(place.path(name)).unwrap()
    };
    let first = once("1", "1");
    assert!(first == once("1", "2") && first == once("3", "3"));
}

#[test]
fn without_json_it_prints_the_layout_timings_and_where_the_output_is() {
    let place = Place::new();
    let image = place.picture("a.png", 1);
    let words = place.on_model("encode", "<ImageHere>What is it?").arg("--image").arg(&image);
    let text = words.arg("--out").arg(place.path("s.safetensors")).run().ok();
    for part in ["= 25 in 1 image + ", "image 1  ", "a.png", "1111", "open ", "encode ", "device: ", "wrote "]
    {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains('\x1b'), "no colour in a pipe");
}

#[test]
fn a_text_without_images_is_a_sequence_too() {
    let place = Place::new();
    let words = place.on_model("encode", "Just text.").arg("--out").arg(place.path("s.safetensors"));
    let report = words.arg("--json").run().json();
    assert_eq!(report["slots"], json!([]));
    assert_eq!(report["images_encoded"], json!(0));
    let bytes = fs::read(place.path("s.safetensors")).unwrap();
    assert_eq!(SafeTensors::deserialize(&bytes).unwrap().tensor("slots").unwrap().shape(), [0, 2]);
}

#[test]
fn an_image_can_come_from_stdin() {
    let place = Place::new();
    let image = place.picture("a.png", 4);
    let words = |image: &std::path::Path, out: &str| {
        let words = place.on_model("encode", "<ImageHere>?").arg("--image").arg(image);
        words.arg("--out").arg(place.path(out))
    };
    words(&image, "file").run().ok();
    let mut child = command(&words("-".as_ref(), "stdin").arg("--json").0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&fs::read(&image).unwrap()).unwrap();
    let report = Ended::of(child.wait_with_output().unwrap()).json();
    assert_eq!(report["images"][0]["name"], json!("stdin"));
    let (file, stdin) = (fs::read(place.path("file")).unwrap(), fs::read(place.path("stdin")).unwrap());
    assert!(file == stdin, "the same image makes the same file");
}

#[test]
fn an_existing_output_is_replaced_whole() {
    let place = Place::new();
    let image = place.picture("a.png", 1);
    let out = place.file("s.safetensors", "old");
    place.on_model("encode", "<ImageHere>").arg("--image").arg(&image).arg("--out").arg(&out).run().ok();
    assert!(SafeTensors::deserialize(&fs::read(&out).unwrap()).is_ok());
    assert_eq!(place.names(), ["a.png", "model", "s.safetensors"]);
}

/// Half of this picture is transparent.
fn half_transparent(place: &Place) -> std::path::PathBuf {
    let pixels = image::RgbaImage::from_fn(40, 30, |x, y| {
        image::Rgba([x as u8 * 5, y as u8 * 7, 90, if x < 20 { 0 } else { 255 }])
    });
    pixels.save_with_format(place.path("t.png"), image::ImageFormat::Png).unwrap();
    place.path("t.png")
}

#[test]
fn warnings_go_to_stderr_to_the_report_and_into_the_file() {
    let place = Place::new();
    let image = half_transparent(&place);
    let words = place.on_model("encode", "<ImageHere>").arg("--image").arg(&image);
    let words = words.arg("--out").arg(place.path("s.safetensors")).arg("--json");
    let ended = words.run();
    assert!(ended.stderr.starts_with("warning: ") && ended.stderr.contains("alpha"), "{}", ended.stderr);
    assert!(ended.stderr.contains("t.png"), "{}", ended.stderr);
    let report = ended.json();
    assert_eq!(report["warnings"][0]["kind"], json!("alpha_dropped"));
    let bytes = fs::read(place.path("s.safetensors")).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let kept: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["warnings"]).unwrap();
    assert_eq!(kept, report["warnings"]);

    let composed = words.args(["--alpha", "white"]).run();
    assert_eq!(composed.stderr, "");
    assert_eq!(composed.json()["warnings"], json!([]));
    assert_ne!(bytes, fs::read(place.path("s.safetensors")).unwrap());
}

#[test]
fn image_options_reach_the_pixels() {
    let place = Place::new();
    let tall = image::RgbImage::from_fn(30, 700, |x, y| image::Rgb([(x * y) as u8, (y / 3) as u8, x as u8]));
    tall.save_with_format(place.path("tall.png"), image::ImageFormat::Png).unwrap();
    let with = |options: &[&str]| {
        let words = place.on_model("encode", "<ImageHere>").arg("--image").arg(place.path("tall.png"));
        words.arg("--out").arg(place.path("s")).args(options).run().ok();
        let bytes = fs::read(place.path("s")).unwrap();
        values::<u16>(&SafeTensors::deserialize(&bytes).unwrap(), "inputs_embeds")
    };
    let default = with(&[]);
    assert!(default == with(&["--resample", "pillow"]));
    assert!(default != with(&["--resample", "pillow13"]), "Pillow 13 differs on tall images");
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn exif_is_applied_unless_asked_not_to() {
    let place = Place::new();
    let photo = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/odd/exif6.jpg");
    let with = |options: &[&str]| {
        let words = place.on_model("encode", "<ImageHere>").args(["--image", photo]);
        let report = words.arg("--out").arg(place.path("s")).arg("--json").args(options).run().json();
        (report["warnings"].clone(), fs::read(place.path("s")).unwrap())
    };
    let (applied, turned) = with(&[]);
    assert_eq!(applied[0]["kind"], json!("exif_applied"));
    assert!(applied[0]["message"].as_str().unwrap().contains("exif ignore"));
    let (ignored, stored) = with(&["--exif", "ignore"]);
    assert_ne!(turned, stored);
    let (upstream, same) = with(&["--compat", "upstream"]);
    assert_eq!(ignored, upstream);
    let rows = |bytes: &[u8]| values::<u16>(&SafeTensors::deserialize(bytes).unwrap(), "inputs_embeds");
    assert!(rows(&stored) == rows(&same));
}
