//! Odd image files, and what Pillow makes of them: `tests/goldens/image/make.py` drew both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use imagehere::WarningKind;
use imagehere::image::decode::{Decoded, decode};
use imagehere::image::resize::resize;
use imagehere::image::{Alpha, DecodeOptions, Exif, JPEG_EXACT, Resample, RgbView};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Pillow's answer to one file; hashes are the first 16 digits of SHA-256 over the RGB bytes.
#[derive(Debug, Deserialize)]
struct Golden {
    size: Option<(u32, u32)>,
    rgb: Option<String>,
    upright: Option<String>,
    over_white: Option<String>,
    resized: Option<String>,
    resized_pillow12: Option<String>,
    refused: Option<String>,
}

const SIDE: u32 = 24;

/// Files that Pillow refuses for want of an end marker, which is no reason to.
const PILLOW_IS_STRICTER: [&str; 4] =
    ["no_end.jpg", "no_end_progressive.jpg", "no_end_restarts.jpg", "no_end_sequential_scans.jpg"];
/// Files that Pillow paints grey where data are missing.
const PILLOW_IS_LAXER: [&str; 2] = ["cut_and_ended.jpg", "first_scan_ended.jpg"];
/// Files whose transparent colour Pillow compares with samples of another depth, and so never or wrongly finds.
const PILLOW_MISTAKES_THE_KEY: [&str; 2] = ["grey_2_key.png", "rgb_16_key.png"];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/image")
}

fn goldens() -> BTreeMap<String, Golden> {
    let text = std::fs::read_to_string(directory().join("goldens.json")).unwrap();
    let goldens: BTreeMap<String, Golden> = serde_json::from_str(&text).unwrap();
    assert!(goldens.len() > 200, "goldens.json lost its entries");
    goldens
}

fn hash(view: RgbView<'_>) -> String {
    let mut sha = Sha256::new();
    (0..view.height()).for_each(|y| sha.update(view.row(y)));
    sha.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Whether the pixels of a file are promised to be Pillow's in this build.
fn exact(name: &str) -> bool {
    JPEG_EXACT || !(name.ends_with(".jpg") || name.starts_with("jpeg"))
}

fn open(name: &str, options: &DecodeOptions) -> imagehere::Result<Decoded<'static>> {
    decode(0, &directory().join(name).into(), options)
}

#[test]
fn pixels_equal_pillows() {
    let stored = DecodeOptions::default().with_exif(Exif::Ignore);
    let (mut compared, mut differ) = (0, 0);
    for (name, golden) in goldens() {
        let Some(expected) = golden.rgb.filter(|_| !PILLOW_IS_LAXER.contains(&&*name)) else { continue };
        if !exact(&name) {
            continue;
        }
        let decoded = open(&name, &stored).unwrap_or_else(|error| panic!("{error}"));
        let view = decoded.view();
        assert_eq!((view.width(), view.height()), golden.size.unwrap(), "{name}");
        assert_eq!(hash(view), expected, "{name}");

        let resized = golden.resized.unwrap();
        assert_eq!(hash(resize(view, SIDE, SIDE, Resample::Pillow13).view()), resized, "{name}, Pillow 13");
        differ += usize::from(golden.resized_pillow12.is_some());
        let resized = golden.resized_pillow12.unwrap_or(resized);
        assert_eq!(hash(resize(view, SIDE, SIDE, Resample::Pillow).view()), resized, "{name}, Pillow 12");
        compared += 1;
    }
    assert!(
        compared > 130 && differ > 0,
        "{compared} files were compared, {differ} of which tell the rules apart"
    );
}

#[test]
fn upright_pixels_equal_pillows() {
    let mut turned = 0;
    for (name, golden) in goldens() {
        let (Some(stored), true) = (golden.rgb, exact(&name)) else { continue };
        let Ok(decoded) = open(&name, &DecodeOptions::default()) else { continue };
        let applied = decoded.warnings.iter().find(|warning| warning.kind == WarningKind::ExifApplied);
        if let Some(expected) = golden.upright {
            assert_eq!(hash(decoded.view()), expected, "{name}");
            let warning = applied.unwrap_or_else(|| panic!("{name} was turned without a word")).to_string();
            assert!(warning.contains(&name) && warning.contains("`--exif ignore`"), "{warning}");
            let kept = open(&name, &DecodeOptions::default().with_exif(Exif::Ignore)).unwrap();
            let warning = kept.warnings.iter().find(|warning| warning.kind == WarningKind::ExifIgnored);
            let warning = warning.unwrap_or_else(|| panic!("{name}: ignored without a word")).to_string();
            assert!(warning.contains(&name) && warning.contains("`--exif apply`"), "{warning}");
            turned += 1;
        } else {
            assert_eq!(hash(decoded.view()), stored, "{name}");
            assert!(applied.is_none() || name.ends_with(".tiff"), "{name}: {applied:?}");
        }
    }
    assert!(turned >= if JPEG_EXACT { 12 } else { 5 }, "only {turned} files were turned");
}

#[test]
fn composed_pixels_equal_pillows() {
    let white = DecodeOptions::default().with_exif(Exif::Ignore).with_alpha(Alpha::WHITE);
    let mut compared = 0;
    for (name, golden) in goldens() {
        let Some(expected) = golden.over_white else { continue };
        let decoded = open(&name, &white).unwrap();
        let same = hash(decoded.view()) == expected;
        assert_eq!(same, !PILLOW_MISTAKES_THE_KEY.contains(&&*name), "{name}");
        assert!(decoded.warnings.iter().all(|warning| warning.kind != WarningKind::AlphaDropped), "{name}");

        let dropped = open(&name, &DecodeOptions::default()).unwrap();
        let warning = dropped.warnings.iter().find(|warning| warning.kind == WarningKind::AlphaDropped);
        // at most one pixel in a hundred is transparent in these
        let few = ["palette_8_hole.png", "rgb_8_key.png", "rgb_16_key.png"].contains(&&*name);
        assert_eq!(warning.is_none(), few, "{name}");
        if let Some(warning) = warning {
            let text = warning.to_string();
            assert!(text.contains(&name) && text.contains("`--alpha white`"), "{text}");
        }
        compared += 1;
    }
    assert!(compared > 20, "only {compared} files were composed");
}

#[test]
fn what_pillow_refuses_is_refused() {
    for (name, golden) in goldens() {
        if golden.refused.is_none() && !PILLOW_IS_LAXER.contains(&&*name) {
            continue;
        }
        let result = open(&name, &DecodeOptions::default());
        if PILLOW_IS_STRICTER.contains(&&*name) {
            if JPEG_EXACT {
                let decoded = result.unwrap_or_else(|error| panic!("{error}"));
                let whole = name.replace("no_end_", "").replace("no_end.jpg", "420.jpg");
                assert_eq!(
                    hash(decoded.view()),
                    hash(open(&whole, &DecodeOptions::default()).unwrap().view())
                );
            }
            continue;
        }
        let error = result.err().unwrap_or_else(|| panic!("{name} was decoded")).to_string();
        let (names_it, helps) = (error.contains(&format!("{name}): ")), error.matches(". ").count() >= 1);
        assert!(error.starts_with("image 0 (") && names_it && helps, "{error}");
    }
}

#[test]
fn a_missing_end_marker_is_worth_a_word() {
    for (name, _) in goldens() {
        let missing = name.starts_with("no_end") || name == "half_an_end.png";
        if !missing || !exact(&name) {
            continue;
        }
        let decoded = open(&name, &DecodeOptions::default()).unwrap_or_else(|error| panic!("{error}"));
        let warning = decoded.warnings.iter().find(|warning| warning.kind == WarningKind::ImageTolerated);
        let warning = warning.unwrap_or_else(|| panic!("{name} was decoded without a word")).to_string();
        assert!(warning.contains(&name) && warning.contains("end marker"), "{warning}");
    }
}

#[test]
#[cfg_attr(not(has_shared), ignore = "needs ../shared/data")]
fn photos_equal_pillows() {
    #[derive(Deserialize)]
    struct Photo {
        size: (u32, u32),
        rgb_sha256: String,
        resized_sha256: String,
        resized_sha256_pillow12: String,
    }
    #[derive(Deserialize)]
    struct Photos {
        images: BTreeMap<String, Photo>,
    }
    let data = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"));
    let text = std::fs::read_to_string(data.join("pillow.json")).unwrap();
    let photos: Photos = serde_json::from_str(&text).unwrap();
    assert!(!photos.images.is_empty());
    let options = DecodeOptions::default().with_exif(Exif::Ignore);
    for (name, photo) in photos.images {
        if !JPEG_EXACT && (name.ends_with(".jpg") || name.ends_with(".jpeg")) {
            continue;
        }
        let decoded = decode(0, &data.join(&name).into(), &options).unwrap_or_else(|error| panic!("{error}"));
        let view = decoded.view();
        assert_eq!((view.width(), view.height()), photo.size, "{name}");
        let sha = |view: RgbView<'_>| {
            let bytes: Vec<u8> = (0..view.height()).flat_map(|y| view.row(y)).copied().collect();
            Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        assert_eq!(sha(view), photo.rgb_sha256, "{name}");
        let resized = |rule| sha(resize(view, 490, 490, rule).view());
        assert_eq!(resized(Resample::Pillow), photo.resized_sha256_pillow12, "{name}");
        assert_eq!(resized(Resample::Pillow13), photo.resized_sha256, "{name}");
    }
}
