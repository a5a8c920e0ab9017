//! What every reader of foreign bytes must live up to, whatever the bytes: one function for each kind of input.
//!
//! Not for use: the bodies of the fuzz targets in `fuzz/` and of `tests/hostile.rs`, which replays what these found.
//! A body returns where a reader refuses its input with an error that a user can act on, or takes it and keeps its
//! promises; everything else is a panic. Who calls it watches time and memory.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::config::{ModelConfig, ModelSizes};
use crate::error::{Category, Error};
use crate::image::resize::resize;
use crate::image::{Alpha, DecodeOptions, Exif, ImageSource, Limits, Resample, decode};
use crate::packing::PackedPlan;
use crate::prompt::{
    Bos, LengthOptions, MARKER, Meta, Request, SegmentKind, SequencePlan, TokenSegment, plan_tokens,
};
use crate::tokenizer::{Tokenizer, synthetic};
use crate::{checkpoint, features, tokenizer};

/// A target's name, which is that of its folder of files, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// The targets of the library.
pub const TARGETS: [Target; 10] = [
    ("pickle", checkpoint::fuzzing::pickle),
    ("torch_zip", checkpoint::fuzzing::torch_zip),
    ("safetensors", checkpoint::fuzzing::safetensors),
    ("index", checkpoint::fuzzing::index),
    ("config", checkpoint::fuzzing::config),
    ("tokenizer_model", tokenizer::fuzzing::model),
    ("tokenizer_json", tokenizer::fuzzing::json),
    ("plan", plan),
    ("image", image),
    ("features", features::fuzzing::features),
];

/// The longest message about a small input, in bytes: one that lists and quotes without end helps nobody.
const LONGEST: usize = 64 << 10;

/// Asserts that an error is somebody's turn, and says something.
pub(crate) fn check_error(error: &Error) {
    assert_ne!(error.category(), Category::Internal, "{error}");
    let message = error.to_string();
    assert!((1..LONGEST).contains(&message.len()), "{message}");
}

/// Asserts that the text of a refusal can be shown.
pub(crate) fn check_message(message: &str) {
    assert!((1..LONGEST).contains(&message.len()) && !message.contains(char::is_control), "{message:?}");
}

/// Calls `f` with a file that holds these bytes.
pub(crate) fn with_file<T>(bytes: &[u8], f: impl FnOnce(&Path) -> T) -> T {
    // One for each thread, in memory where there is such a place: making one costs more than most bodies.
    thread_local!(static PLACE: RefCell<Option<(File, PathBuf, tempfile::TempDir)>> = const { RefCell::new(None) });
    PLACE.with_borrow_mut(|place| {
        let (file, path, _) = place.get_or_insert_with(|| {
            let memory = Path::new("/dev/shm");
            let dir = tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir()).expect("a directory");
            let path = dir.path().join("input");
            (File::create(&path).expect("a file"), path, dir)
        });
        use std::io::Seek as _;
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(bytes)).expect("room");
        f(path)
    })
}

/// Bytes as a file of an image. Its length decides between the rules.
pub(crate) fn image(bytes: &[u8]) {
    let limits = Limits::default().with_pixels(1 << 18).with_alloc_bytes(8 << 20);
    let options = DecodeOptions::default()
        .with_limits(limits)
        .with_exif([Exif::Apply, Exif::Ignore][bytes.len() % 2])
        .with_alpha([Alpha::Drop, Alpha::WHITE][bytes.len() / 2 % 2]);
    let decoded = match decode::decode(0, &ImageSource::from(bytes), &options) {
        Ok(decoded) => decoded,
        Err(error) => return check_error(&error),
    };
    assert!(decoded.warnings.iter().all(|warning| warning.message.starts_with("image 0 (")));
    let image = decoded.into_image();
    let (width, height) = (image.width as usize, image.height as usize);
    assert!(width > 0 && height > 0 && width * height <= 1 << 18, "{width}x{height}");
    assert_eq!(image.data.len(), 3 * width * height);
    if width * height <= 1 << 12 {
        let mut file = Vec::new();
        image.write_png(&mut file).expect("memory has room");
        let again = decode::decode(0, &file.into(), &options).expect("a picture that was just written");
        assert!(again.into_image() == image, "the same picture, written and read");
        let seen = resize(image.view(), 14, 14, Resample::Pillow);
        assert_eq!(seen.data.len(), 3 * 14 * 14);
    }
}

/// A prompt and its options, from eight bytes of choices and texts between unit separators.
struct Asked {
    request: Request,
    config: ModelConfig,
    length: LengthOptions,
    cut: bool,
    texts: Vec<String>,
    raw: bool,
}

/// Takes bytes for a prompt.
fn asked(bytes: &[u8]) -> Option<Asked> {
    let (&[flags, size, surplus, limit_low, limit_high, cut_low, cut_high, turns], rest) =
        bytes.split_first_chunk::<8>()?;
    let flag = |bit: u8| flags >> bit & 1 == 1;
    let grid = [1, 2, 3, 5, 35, 1000, 1 << 20, 1 << 31][usize::from(size % 8)];
    let sizes = ModelSizes {
        image_size: 14 * grid,
        patch_size: 14,
        width: 64,
        layers: 1,
        mlp_width: 64,
        projector_width: 64,
        hidden_size: 64,
        vocab_size: 512,
    };
    let mut config = ModelConfig::from_sizes(sizes).expect("sizes that a tower can have");
    let wide = |low, high| usize::from(u16::from_le_bytes([low, high]));
    config.max_length = flag(6).then(|| 1 + wide(cut_low, cut_high));
    config.max_position_embeddings = flag(7).then(|| 1 + 64 * wide(limit_low, limit_high));

    let text = String::from_utf8_lossy(rest);
    let texts: Vec<String> = text.split('\u{1f}').map(str::to_owned).collect();
    let mut rest = texts.iter().cloned();
    let mut request =
        Request::new(rest.next().unwrap_or_default()).raw(flag(0)).allow_control_tokens(flag(2));
    let meta = match turns & 3 {
        0 => Meta::Default,
        1 => Meta::None,
        _ => Meta::Text(rest.next().unwrap_or_default()),
    };
    let mut history = Vec::new();
    while let Some(query) = rest.next() {
        history.push((query, rest.next().unwrap_or_default()));
    }
    let markers: usize = texts.iter().map(|text| text.matches(MARKER).count()).sum();
    let images = markers.saturating_add_signed(isize::from(surplus as i8));
    request = match flag(5) {
        true => request.images((0..images).map(|i| format!("{i}.jpg"))),
        false => request.image_count(images),
    };
    request = request.meta_instruction(meta).history(history).truncate(flag(3));
    request = request.bos(if flag(1) { Bos::First } else { Bos::PerSegment });
    let mut length = LengthOptions::new().truncate(flag(3));
    if flag(4) {
        let limit = 1 + wide(limit_low, limit_high);
        (request, length) = (request.max_length(limit), length.max_length(limit));
    }
    Some(Asked { request, config, length, cut: flag(3), texts, raw: flag(0) })
}

/// A prompt, and the same bytes as ids.
pub(crate) fn plan(bytes: &[u8]) {
    static TOKENIZER: OnceLock<Vec<u8>> = OnceLock::new();
    let Some(Asked { request, config, length, cut, texts, raw }) = asked(bytes) else { return };
    thread_local!(static PLANNER: Tokenizer = {
        let model = TOKENIZER.get_or_init(|| synthetic(512));
        Tokenizer::from_sentencepiece(model, Path::new("tokenizer.model")).expect("our own")
    });
    PLANNER.with(|tokenizer| {
        let planned = crate::prompt::plan(&request, tokenizer, &config);
        match &planned {
            Ok(plan) => {
                check_plan(plan, &config, cut);
                if raw && !plan.is_empty() && !cut {
                    // What the query has between its markers is what the segments of text have.
                    let spelled = plan.segments.iter().filter(|segment| segment.kind == SegmentKind::Text);
                    let between = texts[0].split(MARKER).filter(|text| !text.is_empty());
                    assert!(spelled.map(|segment| segment.text.as_str()).eq(between));
                }
            }
            Err(Error::MarkerCount(mismatch)) => {
                if let Some(corrected) = &mismatch.corrected {
                    let again = request.clone().with_query(corrected.clone());
                    let again = crate::prompt::plan(&again, tokenizer, &config);
                    assert!(!matches!(again, Err(Error::MarkerCount(_))), "{corrected:?}: {again:?}");
                }
            }
            Err(_) => {}
        }
        if let Err(error) = &planned {
            check_error(error);
        }
    });

    let ids: Vec<u32> = bytes[8..].iter().map(|&byte| u32::from(byte) * 3).collect();
    let mut segments = Vec::new();
    for run in ids.split(|id| *id == 0) {
        segments.extend([TokenSegment::Text(run.to_vec()), TokenSegment::Image]);
    }
    match plan_tokens(&segments, &config, length) {
        Ok(plan) => check_plan(&plan, &config, cut),
        Err(error) => check_error(&error),
    }
}

/// Asserts what holds between the parts of a plan, and of two of them laid end to end.
fn check_plan(plan: &SequencePlan, config: &ModelConfig, cut: bool) {
    plan.check().expect("a plan whose parts agree");
    let rows: usize = plan.slots.iter().map(|slot| slot.len).sum();
    assert_eq!(rows, plan.im_mask.iter().filter(|&&inside| inside).count());
    assert_eq!(plan.len(), plan.segments.iter().map(|segment| segment.len).sum::<usize>());
    assert!(cut || plan.slots.iter().all(|slot| slot.len == config.patches));

    let images: Vec<usize> = (0..plan.image_count()).collect();
    let mut packed = PackedPlan::new();
    for _ in 0..2 {
        packed.push(plan, images.clone()).expect("as many images as slots");
    }
    assert_eq!(packed.total_len(), 2 * plan.len());
    assert_eq!(packed.cu_seqlens(), [0, plan.len(), 2 * plan.len()]);
    let mut taken = BTreeSet::new();
    for (_, slot) in packed.slots() {
        assert!(slot.len == 0 || taken.insert(slot.offset));
        assert!(slot.offset + slot.len <= packed.total_len());
    }
}
