use super::*;
use crate::config::ModelSizes;
use crate::image::{Alpha, DecodeOptions, Resample};
use crate::warning::WarningKind;

/// A model with 4 patches an image and rows of 3.
fn config() -> ModelConfig {
    ModelConfig::from_sizes(ModelSizes {
        image_size: 28,
        patch_size: 14,
        width: 64,
        layers: 1,
        mlp_width: 64,
        projector_width: 64,
        hidden_size: 3,
        vocab_size: 8,
    })
    .unwrap()
}

fn rules() -> Preprocessing {
    Preprocessing::new(&config(), &DecodeOptions::default(), Resample::Pillow)
}

fn note(name: &str) -> ImageNote {
    let warning = Warning::new(WarningKind::AlphaDropped, format!("image 5 ({name}): alpha was dropped"));
    ImageNote::new(name.to_owned(), "00".repeat(32), vec![warning])
}

fn set(value: f32) -> FeatureSet {
    let features = |seed: f32| Features::new(vec![f16::from_f32(seed); 12], 3, "checkpoint".into());
    let images = vec![(features(value), note("a (1).png")), (features(2.0), note("b.png"))];
    let of_weights = vec![Warning::new(WarningKind::Checkpoint, "7 values were cut")];
    FeatureSet::new(images, "checkpoint".into(), rules(), "cpu (test)".into(), of_weights)
}

#[test]
fn all_that_was_saved_is_there_again() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("f");
    let set = set(1.0);
    assert_eq!(set.save(&path).unwrap(), std::fs::metadata(&path).unwrap().len());
    let file = FeatureFile::open(&path).unwrap();
    assert_eq!((file.notes(), file.fingerprint()), (set.notes(), "checkpoint"));
    assert_eq!((file.preprocessing(), file.numerics()), (&rules(), "cpu (test)"));
    assert_eq!(file.warnings()[0].message, "7 values were cut");
    file.check("checkpoint", &config(), &rules()).unwrap();
    for (read, written) in file.read().unwrap().iter().zip(set.features()) {
        assert_eq!(read.as_slice(), written.as_slice());
        assert_eq!((read.hidden(), read.len(), read.fingerprint()), (3, 4, "checkpoint"));
    }
}

#[test]
fn what_does_not_fit_is_named_with_the_next_step() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("f");
    set(1.0).save(&path).unwrap();
    let file = FeatureFile::open(&path).unwrap();
    let refused = |fingerprint: &str, config: &ModelConfig, rules: &Preprocessing, parts: &[&str]| {
        let error = file.check(fingerprint, config, rules).unwrap_err();
        assert!(matches!(error, Error::Features { .. }), "{error}");
        for part in parts {
            assert!(error.to_string().contains(part), "no {part} in {error}");
        }
    };
    refused("other", &config(), &rules(), &["checkpoint checkpoint made", "this one is other", "--model"]);
    let of = |decode: DecodeOptions, resample| Preprocessing::new(&config(), &decode, resample);
    let pink = of(DecodeOptions::default().with_alpha(Alpha::Over([255, 0, 128])), Resample::Pillow);
    refused("checkpoint", &config(), &pink, &["alpha `drop`", "`#ff0080`", "`--alpha drop` here"]);
    let newer = of(DecodeOptions::default(), Resample::Pillow13);
    refused("checkpoint", &config(), &newer, &["resample `pillow`", "`pillow13`"]);
    let mut larger = config();
    larger.image_size = 42;
    let larger = Preprocessing::new(&larger, &DecodeOptions::default(), Resample::Pillow);
    refused("checkpoint", &config(), &larger, &["image_size `28`", "`42`", "Make it again"]);
    let cropped = config().with_profile(&crate::config::LLAVA);
    let cropped = Preprocessing::new(&cropped, &DecodeOptions::default(), Resample::Pillow);
    refused("checkpoint", &config(), &cropped, &["fit `stretch`", "`centre-crop`", "Make it again"]);
    // A file may say that it fits, and not.
    let mut wider = config();
    wider.hidden_size = 4;
    refused("checkpoint", &wider, &rules(), &["(4, 3) rows and channels", "(4, 4)"]);
}

#[test]
fn a_rule_that_only_one_of_them_knows_is_a_difference() {
    let future = Preprocessing::from_json(&rules().to_json().replace('{', "{\"gamma\":\"kept\",")).unwrap();
    for (one, other) in [(&future, &rules()), (&rules(), &future)] {
        let found = one.difference(other).unwrap();
        assert_eq!(found.rule, "gamma");
        assert!([found.has.as_str(), &found.other].contains(&"nothing"));
    }
    assert!(rules().difference(&rules()).is_none());
    assert!(Preprocessing::from_json("[]").is_none());
}

#[test]
fn metadata_that_are_not_complete_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("f");
    let complete = || {
        BTreeMap::from([
            ("checkpoint".to_owned(), "c".to_owned()),
            ("preprocessing".to_owned(), rules().to_json()),
            ("numerics".to_owned(), "n".to_owned()),
            ("images".to_owned(), serde_json::json!([note("a")]).to_string()),
            ("warnings".to_owned(), "[]".to_owned()),
        ])
    };
    let rows = vec![f16::ONE; 12];
    let open = |metadata: BTreeMap<String, String>| {
        format::stage(&path, KIND, metadata, &[&rows], 3).unwrap().0.commit().unwrap();
        FeatureFile::open(&path)
    };
    open(complete()).unwrap();
    let mut bad: Vec<(String, Option<String>)> = complete().into_keys().map(|key| (key, None)).collect();
    let two = serde_json::json!([note("a"), note("b")]).to_string();
    let unknown = serde_json::json!([note("a")]).to_string().replace("alpha_dropped", "sun_too_low");
    for images in ["", "{}", "[]", "[1]", "[{}]", &two, &unknown] {
        bad.push(("images".to_owned(), Some(images.to_owned())));
    }
    bad.push(("preprocessing".to_owned(), Some("{\"exif\":1}".to_owned())));
    bad.push(("warnings".to_owned(), Some("[1]".to_owned())));
    for (key, value) in bad {
        let mut metadata = complete();
        match value {
            Some(value) => metadata.insert(key, value),
            None => metadata.remove(&key),
        };
        let error = open(metadata.clone()).unwrap_err();
        assert!(error.to_string().contains("not complete"), "{error}: {metadata:?}");
    }
}

#[test]
fn nothing_is_written_that_could_not_be_read() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("f");
    let error = set(f32::NAN).save(&path).unwrap_err();
    assert!(matches!(&error, Error::Incomplete { .. }), "{error}");
    assert!(error.to_string().contains("the features of a (1).png have NaN in row 0, channel 0"), "{error}");
    assert!(!path.exists());
}

#[test]
fn warnings_are_counted_where_the_image_stands() {
    let message = |name: &str| note(name).warnings_at(12)[0].message.clone();
    assert_eq!(message("a (1).png"), "image 12 (a (1).png): alpha was dropped");
    for other in ["no image", "image x (a)", "image 3", "image  (a)"] {
        let mut note = note("a");
        note.warnings[0].message = other.to_owned();
        assert_eq!(note.warnings_at(12)[0].message, other);
    }
}
