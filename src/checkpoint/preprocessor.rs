//! `preprocessor_config.json`: whether it asks for the pixels that the profile makes.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::index::shown;
use super::mapped::read_small;
use crate::config::{Fit, ModelConfig, PIXEL_MEAN, PIXEL_STD};
use crate::error::{Error, Result};

/// Longest such file, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// The file, and that of newer processors, which has it under a key.
const FILES: [(&str, Option<&str>); 2] =
    [("preprocessor_config.json", None), ("processor_config.json", Some("image_processor"))];

/// Checks the file that a directory has, if it has one.
///
/// # Errors
/// [`Error::Checkpoint`] if it is no JSON object, or asks for anything but what the profile does; the message names both.
pub(super) fn check(dir: &Path, config: &ModelConfig) -> Result<()> {
    for (name, key) in FILES {
        let path = dir.join(name);
        if path.symlink_metadata().is_err() {
            continue;
        }
        let all: Map<String, Value> =
            serde_json::from_slice(&read_small(&path, MAX_FILE)?).map_err(|error| {
                Error::checkpoint(&path, format!("it is no JSON object: {error}"), "Download the file again")
            })?;
        let processor = match key {
            None => Some(&all),
            Some(key) => all.get(key).and_then(Value::as_object),
        };
        if let Some(processor) = processor {
            return disagreement(processor, config).map_or(Ok(()), |problem| {
                let remedy =
                    "Use the file that belongs to these weights; no other preprocessing is supported";
                Err(Error::checkpoint(&path, problem, remedy))
            });
        }
    }
    Ok(())
}

/// The first key whose value is not what the profile does.
fn disagreement(processor: &Map<String, Value>, config: &ModelConfig) -> Option<String> {
    let crop = config.profile.fit == Fit::CentreCrop;
    let side = config.image_size;
    let size = if crop { json!({ "shortest_edge": side }) } else { json!({ "height": side, "width": side }) };
    // Key, what is meant where it is not there, what is expected. The defaults are those of transformers' CLIP.
    let expected = [
        ("do_resize", json!(true), json!(true)),
        ("size", json!({ "shortest_edge": 224 }), size),
        ("resample", json!(3), json!(3)), // bicubic
        ("do_center_crop", json!(true), json!(crop)),
        ("crop_size", json!({ "height": 224, "width": 224 }), json!({ "height": side, "width": side })),
        ("do_pad", json!(false), json!(false)),
        ("do_rescale", json!(true), json!(true)),
        ("rescale_factor", json!(1.0 / 255.0), json!(1.0 / 255.0)),
        ("do_normalize", json!(true), json!(true)),
        ("image_mean", json!(PIXEL_MEAN), json!(PIXEL_MEAN)),
        ("image_std", json!(PIXEL_STD), json!(PIXEL_STD)),
    ];
    let expected = expected.into_iter().filter(|(key, ..)| crop || *key != "crop_size");
    for (key, default, expected) in expected {
        let found = processor.get(key).filter(|value| !value.is_null()).unwrap_or(&default);
        // Older files give a size as a number: of the shortest edge, or of both sides of a crop.
        let spelled = match (key, found.as_u64()) {
            ("size", Some(edge)) if crop => json!({ "shortest_edge": edge }),
            ("size" | "crop_size", Some(side)) => json!({ "height": side, "width": side }),
            _ => found.clone(),
        };
        if !same(&spelled, &expected) {
            let from =
                if processor.contains_key(key) { "" } else { ", as it is where the file does not say" };
            let title = config.profile.title;
            return Some(format!(
                "`{key}` is {}{from}, where {title} with images of {side} pixels has {expected}",
                shown(found)
            ));
        }
    }
    None
}

/// Equality, of numbers as f32, and of objects without regard to nulls.
fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one.as_f64().map(|one| one as f32) == other.as_f64().map(|other| other as f32)
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            let keys = one.keys().chain(other.keys());
            let value = |of: &Map<String, Value>, key: &str| of.get(key).cloned().unwrap_or(Value::Null);
            keys.into_iter().all(|key| same(&value(one, key), &value(other, key)))
        }
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LLAVA, ModelSizes};

    fn config() -> ModelConfig {
        let sizes = ModelSizes {
            image_size: 336,
            patch_size: 14,
            width: 1024,
            layers: 23,
            mlp_width: 4096,
            projector_width: 4096,
            hidden_size: 4096,
            vocab_size: 32064,
        };
        ModelConfig::from_sizes(sizes).unwrap().with_profile(&LLAVA)
    }

    fn published() -> Value {
        json!({
            "crop_size": { "height": 336, "width": 336 },
            "do_center_crop": true, "do_convert_rgb": true, "do_normalize": true,
            "do_rescale": true, "do_resize": true,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "CLIPImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3, "rescale_factor": 0.00392156862745098,
            "size": { "shortest_edge": 336 },
        })
    }

    fn problem(value: &Value) -> Option<String> {
        disagreement(value.as_object().unwrap(), &config())
    }

    #[test]
    fn the_published_file_agrees_however_it_is_spelled() {
        assert_eq!(problem(&published()), None);
        let mut other = published();
        (other["size"], other["crop_size"]) = (json!(336), json!(336));
        (other["do_pad"], other["resample"]) = (json!(null), json!(null));
        assert_eq!(problem(&other), None);
        other["size"] = json!({ "shortest_edge": 336, "longest_edge": null });
        assert_eq!(problem(&other), None);
    }

    #[test]
    fn every_other_value_is_named_beside_the_expected_one() {
        for (key, value, words) in [
            ("size", json!({ "shortest_edge": 224 }), "`size` is {\"shortest_edge\":224}, where LLaVA-1.5"),
            ("size", json!({ "height": 336, "width": 336 }), "has {\"shortest_edge\":336}"),
            ("size", json!({ "shortest_edge": 336, "longest_edge": 500 }), "longest_edge"),
            ("crop_size", json!({ "height": 336, "width": 224 }), "`crop_size` is"),
            ("resample", json!(2), "`resample` is 2, where LLaVA-1.5 with images of 336 pixels has 3"),
            ("do_center_crop", json!(false), "has true"),
            ("do_pad", json!(true), "has false"),
            ("rescale_factor", json!(0.5), "`rescale_factor` is 0.5"),
            ("image_mean", json!([0.5, 0.5, 0.5]), "`image_mean` is [0.5,0.5,0.5]"),
            ("image_std", json!([0.26862954, 0.26130258]), "`image_std`"),
            ("do_normalize", json!("yes"), "`do_normalize` is \"yes\""),
        ] {
            let mut file = published();
            file[key] = value;
            let message = problem(&file).unwrap();
            assert!(message.contains(words), "no {words} in {message}");
        }
        let mut silent = published();
        silent.as_object_mut().unwrap().remove("size");
        assert!(problem(&silent).unwrap().contains("where the file does not say"));
    }
}
