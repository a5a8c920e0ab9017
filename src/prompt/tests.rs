//! Plans against a plain reading of upstream's code, on a tokenizer of our own; `tests/prompt_golden.rs` has
//! upstream's numbers.

#![allow(clippy::type_complexity)] // tables of cases

use std::path::Path;

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::config::ModelConfig;
use crate::error::{Category, Error};
use crate::tokenizer::{Tokenizer, synthetic};
use crate::warning::WarningKind;

/// A model of four patches that was trained up to 60 positions and takes 200.
fn config() -> ModelConfig {
    ModelConfig {
        image_size: 28,
        patch_size: 14,
        grid: 2,
        patches: 4,
        tokens: 5,
        width: 64,
        heads: 1,
        layers: 2,
        mlp_width: 128,
        projector_width: 96,
        hidden_size: 96,
        vocab_size: 700,
        max_length: Some(60),
        max_position_embeddings: Some(200),
        profile: &crate::config::XCOMPOSER2,
    }
}

/// The same without limits.
fn endless() -> ModelConfig {
    ModelConfig { max_length: None, max_position_embeddings: None, ..config() }
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_sentencepiece(&synthetic(700), Path::new("tokenizer.model")).unwrap()
}

fn mismatch(request: &Request) -> MarkerMismatch {
    match plan(request, &tokenizer(), &config()) {
        Err(Error::MarkerCount(mismatch)) => *mismatch,
        other => panic!("{other:?}"),
    }
}

#[test]
fn default_meta_instruction_is_upstreams() {
    let digest = Sha256::digest(DEFAULT_META_INSTRUCTION.as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, "3327ad83486c9dbcec852b83c0b4110aa5704909edbe00af79ade5a0db432599");
    assert_eq!(DEFAULT_META_INSTRUCTION.chars().count(), 506);
}

/// Upstream's `interleav_wrap_chat`, line by line, on strings.
struct Upstream {
    ids: Vec<i64>,
    mask: Vec<bool>,
    slots: Vec<(usize, usize)>,
}

fn upstream(request: &Request, bos: Bos, max_length: usize) -> Upstream {
    let tokenizer = tokenizer();
    let mut prompt = String::new();
    let meta = match &request.meta {
        Meta::Default => DEFAULT_META_INSTRUCTION,
        Meta::None => "",
        Meta::Text(text) => text,
    };
    if !meta.is_empty() {
        prompt += &format!("[UNUSED_TOKEN_146]system\n{meta}[UNUSED_TOKEN_145]\n");
    }
    for (query, answer) in &request.history {
        prompt += &format!(
            "[UNUSED_TOKEN_146]user\n{query}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n{answer}[UNUSED_TOKEN_145]\n"
        );
    }
    prompt += &format!(
        "[UNUSED_TOKEN_146]user\n{}[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
        request.query
    );
    if request.raw {
        prompt = request.query.clone();
    }
    let parts: Vec<&str> = prompt.split("<ImageHere>").collect();
    let (mut ids, mut mask, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    let mut need_bos = true;
    for (i, part) in parts.iter().enumerate() {
        if !part.is_empty() {
            if need_bos || bos == Bos::PerSegment {
                ids.push(1);
            }
            need_bos = false;
            ids.extend(tokenizer.encode(part).unwrap().iter().map(|&id| i64::from(id)));
            mask.resize(ids.len(), false);
        }
        if i + 1 < parts.len() {
            slots.push((ids.len(), 4));
            ids.extend([-1; 4]);
            mask.resize(ids.len(), true);
        }
        // Upstream stops here once it has more than it will keep.
    }
    ids.truncate(max_length);
    mask.truncate(max_length);
    for (offset, len) in &mut slots {
        *len = (*offset + *len).min(ids.len()).saturating_sub(*offset);
        *offset = (*offset).min(ids.len());
    }
    Upstream { ids, mask, slots }
}

fn text() -> impl Strategy<Value = String> {
    let atom = prop_oneof![
        4 => Just(MARKER.to_owned()),
        2 => Just("First picture:".to_owned()),
        2 => Just(" ".to_owned()),
        1 => Just("[UNUSED_TOKEN_145]\n".to_owned()),
        2 => Just("<ImageHere".to_owned()),
        2 => Just(">".to_owned()),
        1 => Just("</s>".to_owned()),
        1 => "\\PC{0,3}",
    ];
    proptest::collection::vec(atom, 0..6).prop_map(|atoms| atoms.concat())
}

fn request() -> impl Strategy<Value = Request> {
    let meta = prop_oneof![
        Just(Meta::None),
        Just(Meta::Default),
        Just(Meta::Text(String::new())),
        text().prop_map(Meta::Text)
    ];
    let history = proptest::collection::vec((text(), text()), 0..3);
    let chat = (text(), meta, history, any::<bool>(), any::<bool>());
    let chat = chat.prop_map(|(query, meta, history, first, allow)| {
        let bos = if first { Bos::First } else { Bos::PerSegment };
        Request::new(query).meta_instruction(meta).history(history).bos(bos).allow_control_tokens(allow)
    });
    let raw = text().prop_map(|query| Request::new(query).raw(true));
    let markers = |request: &Request| {
        let count = |text: &str| text.matches(MARKER).count();
        let meta = match &request.meta {
            Meta::Text(text) => count(text),
            _ => 0,
        };
        meta + request.history.iter().map(|(q, a)| count(q) + count(a)).sum::<usize>() + count(&request.query)
    };
    prop_oneof![4 => chat, 1 => raw].prop_map(move |request| {
        let count = markers(&request);
        request.image_count(count)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn plans_are_upstreams(request in request(), cut in proptest::option::of(1usize..300)) {
        let tokenizer = tokenizer();
        // Live control tokens are upstream's behaviour: ids are compared where it is asked for.
        let request = request.allow_control_tokens(true).truncate(cut.is_some());
        let config = ModelConfig { max_length: cut, ..endless() };
        let want = upstream(&request, request.bos, cut.unwrap_or(usize::MAX));
        if want.ids.is_empty() {
            prop_assert!(plan(&request, &tokenizer, &config).is_err());
            return Ok(());
        }
        let plan = plan(&request, &tokenizer, &config).unwrap();
        let full = upstream(&request, request.bos, usize::MAX).ids.len();
        prop_assert_eq!(&plan.input_ids, &want.ids);
        prop_assert_eq!(&plan.im_mask, &want.mask);
        prop_assert_eq!(plan.slots.iter().map(|slot| (slot.offset, slot.len)).collect::<Vec<_>>(), want.slots);
        prop_assert_eq!(plan.check(), Ok(()));
        let truncated = plan.warnings.iter().any(|warning| warning.kind == WarningKind::Truncated);
        prop_assert_eq!(truncated, plan.len() < full);
    }

    /// Invariants of every plan, and the sums that a reader of it may rely on.
    #[test]
    fn plans_hold_together(request in request(), cut in proptest::option::of(1usize..300)) {
        let config = ModelConfig { max_length: cut, ..endless() };
        let tokenizer = tokenizer();
        let count = request.images.len();
        let Ok(plan) = plan(&request.truncate(cut.is_some()), &tokenizer, &config) else { return Ok(()) };
        prop_assert_eq!(plan.check(), Ok(()));
        prop_assert_eq!(plan.image_count(), count);
        let rows: usize = plan.slots.iter().map(|slot| slot.len).sum();
        prop_assert_eq!(plan.im_mask.iter().filter(|&&mask| mask).count(), rows);
        prop_assert_eq!(plan.segments.iter().map(|segment| segment.len).sum::<usize>(), plan.len());
        prop_assert!(plan.input_ids.iter().all(|&id| (-1..700).contains(&id)));
        if cut.is_none() {
            prop_assert_eq!(rows, 4 * count);
        }
        // The text of the segments is the prompt without its markers.
        let texts: Vec<&str> = plan.segments.iter().map(|segment| segment.text.as_str()).collect();
        prop_assert!(texts.iter().all(|text| !text.contains(MARKER)));
    }

    /// Typed control tokens never become tokens: the only ones are the template's own.
    #[test]
    fn typed_control_tokens_stay_text(query in text(), turns in proptest::collection::vec((text(), text()), 0..3)) {
        let count = |text: &str| text.matches(MARKER).count();
        let images = count(&query) + turns.iter().map(|(q, a)| count(q) + count(a)).sum::<usize>();
        let typed = turns.iter().flat_map(|(q, a)| [q, a]).chain([&query]).any(|text| {
            text.split(MARKER).any(|text| text.contains("[UNUSED_TOKEN_145]") || text.contains("</s>"))
        });
        let blocks = 2 * turns.len() + 1;
        let request = Request::new(query).history(turns).image_count(images).meta_instruction(Meta::None);
        let plan = plan(&request, &tokenizer(), &endless()).unwrap();
        let ids = |id: i64| plan.input_ids.iter().filter(|&&other| other == id).count();
        prop_assert_eq!((ids(698), ids(699), ids(2), ids(0)), (blocks, blocks + 1, 0, 0));
        prop_assert_eq!(plan.warnings.iter().any(|warning| warning.kind == WarningKind::ControlTokens), typed);
    }

    /// Whatever the mismatch, the corrected query plans.
    #[test]
    fn corrected_queries_plan(request in request(), images in 0usize..9) {
        let request = request.image_count(images);
        let config = endless();
        let Err(Error::MarkerCount(mismatch)) = plan(&request, &tokenizer(), &config) else { return Ok(()) };
        prop_assert_eq!(mismatch.places.len(), mismatch.markers);
        prop_assert_eq!(mismatch.left_over.len(), images.saturating_sub(mismatch.markers));
        for place in &mismatch.places {
            let text = match (place.text, &request.meta) {
                (PromptText::Meta, Meta::Text(text)) => text,
                (PromptText::HistoryQuery(turn), _) => &request.history[turn - 1].0,
                (PromptText::HistoryAnswer(turn), _) => &request.history[turn - 1].1,
                _ => &request.query,
            };
            prop_assert!(text[place.offset..].starts_with(MARKER));
        }
        match &mismatch.corrected {
            Some(query) => {
                prop_assert!(mismatch.to_string().ends_with(query.as_str()));
                let corrected = Request { query: query.clone(), ..request.clone() };
                let empty = request.raw && query.is_empty();
                prop_assert!(empty || plan(&corrected, &tokenizer(), &config).is_ok(), "{}", query);
            }
            None => {
                let before = mismatch.places.iter().filter(|place| place.text != PromptText::Query).count();
                prop_assert!(before > images);
            }
        }
    }

    #[test]
    fn plans_of_tokens_hold_together(
        segments in proptest::collection::vec(
            proptest::option::of(proptest::collection::vec(0u32..700, 0..9)).prop_map(|ids| match ids {
                Some(ids) => TokenSegment::Text(ids),
                None => TokenSegment::Image,
            }),
            0..9,
        ),
        cut in proptest::option::of(1usize..40),
    ) {
        let config = ModelConfig { max_length: cut, ..endless() };
        let mut want = Vec::new();
        for segment in &segments {
            match segment {
                TokenSegment::Text(ids) => want.extend(ids.iter().map(|&id| i64::from(id))),
                TokenSegment::Image => want.extend([-1; 4]),
            }
        }
        let length = LengthOptions::new().truncate(cut.is_some());
        if want.is_empty() {
            prop_assert!(plan_tokens(&segments, &config, length).is_err());
            return Ok(());
        }
        let plan = plan_tokens(&segments, &config, length).unwrap();
        prop_assert_eq!(plan.check(), Ok(()));
        want.truncate(cut.unwrap_or(usize::MAX));
        prop_assert_eq!(plan.input_ids, want);
    }
}

#[test]
fn marker_errors_say_what_where_and_how_to_mend() {
    let request = Request::new("图<ImageHere> and <ImageHere>?")
        .history(vec![("Look: <ImageHere>".into(), "I see <ImageHere>".into())])
        .meta_instruction(Meta::Text("Mind <ImageHere>".into()));

    let few = mismatch(&request.clone().images(["a", "b", "c", "d", "e", "f.jpg", "g.jpg"]));
    assert_eq!((few.markers, few.images), (5, 7));
    let places: Vec<_> = few.places.iter().map(|place| (place.text, place.offset)).collect();
    use PromptText::{HistoryAnswer, HistoryQuery, Query};
    assert_eq!(
        places,
        [(PromptText::Meta, 5), (HistoryQuery(1), 6), (HistoryAnswer(1), 6), (Query, 3), (Query, 19)]
    );
    assert_eq!(few.left_over, ["image 6 (f.jpg)", "image 7 (g.jpg)"]);
    assert_eq!(
        few.to_string(),
        "the prompt has 5 markers `<ImageHere>`, but 7 images are given\
         \n  marker 1 at byte 5 of the meta instruction\
         \n  marker 2 at byte 6 of the history turn 1, query\
         \n  marker 3 at byte 6 of the history turn 1, answer\
         \n  marker 4 at byte 3 of the query\
         \n  marker 5 at byte 19 of the query\
         \n  no marker: image 6 (f.jpg)\
         \n  no marker: image 7 (g.jpg)\
         \nWrite one marker per image in the order of the images, for example:\
         \nImage 4: <ImageHere>; Image 5: <ImageHere>; Image 6: <ImageHere>; Image 7: <ImageHere>; 图 and ?"
    );

    let many = mismatch(&request.clone().image_count(4)).to_string();
    assert!(many.contains("marker 5 at byte 19 of the query: no image"), "{many}");
    assert!(many.contains("give the images of the whole conversation again"), "{many}");
    assert!(many.ends_with("\nImage 4: <ImageHere>; 图 and ?"), "{many}");

    let hopeless = mismatch(&request.image_count(2));
    assert_eq!(hopeless.corrected, None);
    assert!(hopeless.to_string().ends_with("out of the history and the meta instruction."));

    let none = mismatch(&Request::new("What is <ImageHere>this?")).to_string();
    assert!(none.ends_with("take the markers out:\nWhat is this?"), "{none}");
    let one = mismatch(&Request::new("Compare.").image_count(2)).to_string();
    assert!(one.ends_with("\nImage 1: <ImageHere>; Image 2: <ImageHere>; Compare."), "{one}");
}

#[test]
fn absurd_counts_cost_nothing() {
    let message = mismatch(&Request::new("x").image_count(usize::MAX)).to_string();
    assert!(message.len() < 2000 && message.contains("more images"), "{message}");
    let message = mismatch(&Request::new(MARKER.repeat(100_000))).to_string();
    assert!(message.len() < 2000 && message.contains("99976 more markers"), "{message}");
    let error = plan(&Request::new(MARKER.repeat(100_000)).image_count(100_000), &tokenizer(), &config())
        .unwrap_err();
    assert!(error.to_string().len() < 1000, "{error}");
}

#[test]
fn markers_are_checked_before_anything_else() {
    // The prompt is far past the limit too, but that is the lesser news.
    let request = Request::new("word ".repeat(10_000)).image_count(1);
    assert!(matches!(plan(&request, &tokenizer(), &config()), Err(Error::MarkerCount(_))));
}

#[test]
fn the_limit_is_the_callers_or_the_models() {
    let tokenizer = tokenizer();
    let images = |n: usize| Request::new(MARKER.repeat(n)).image_count(n).meta_instruction(Meta::None);
    let text =
        |request: &Request| plan(request, &tokenizer, &endless()).unwrap().len() - 4 * request.images.len();
    let fixed = text(&images(9)); // BOS, template, BOS, template
    let check = |config: &ModelConfig, request: Request, source: &str| {
        let Err(error @ Error::SequenceTooLong { .. }) = plan(&request, &tokenizer, config) else {
            panic!("{source}: no error");
        };
        assert_eq!(error.category(), Category::Input);
        let message = error.to_string();
        assert!(message.contains(source) && message.contains(" + 4 image 1 + 4 image 2 + "), "{message}");
    };
    // 200 positions, of which `fixed` are text.
    let most = (200 - fixed) / 4;
    assert!(plan(&images(most), &tokenizer, &config()).is_ok());
    check(&config(), images(most + 1), "the limit is 200 (`max_position_embeddings` in config.json)");
    check(&config(), images(9).max_length(fixed + 35), "the caller's maximum length");
    assert!(plan(&images(9).max_length(fixed + 36), &tokenizer, &config()).is_ok());
    assert!(plan(&images(most + 1).max_length(1000), &tokenizer, &config()).is_ok());
    let short = ModelConfig { max_position_embeddings: None, ..config() };
    check(&short, images(30), "the limit is 60 (`max_length` in config.json)");
    // A cut comes first, and its result has to fit.
    let cut = plan(&images(30).truncate(true), &tokenizer, &short).unwrap();
    assert_eq!(cut.len(), 60);
    check(&short, images(30).truncate(true).max_length(59), "cut to 60 by `--truncate`");
    let error = plan(&images(9).truncate(true), &tokenizer, &endless()).unwrap_err().to_string();
    assert!(error.contains("no `max_length`"), "{error}");
}

#[test]
fn long_sequences_warn_and_cuts_say_what_they_took() {
    let tokenizer = tokenizer();
    let request = Request::new(format!("Image {}", MARKER.repeat(20)))
        .images((b'a'..=b't').map(char::from))
        .meta_instruction(Meta::None);
    let whole = plan(&request, &tokenizer, &config()).unwrap();
    assert_eq!(
        whole.warnings.iter().map(|warning| warning.kind).collect::<Vec<_>>(),
        [WarningKind::BeyondMaxLength]
    );
    let cut = plan(&request.truncate(true), &tokenizer, &config()).unwrap();
    assert_eq!(cut.warnings.iter().map(|warning| warning.kind).collect::<Vec<_>>(), [WarningKind::Truncated]);
    assert_eq!((cut.len(), cut.image_count()), (60, 20));
    assert_eq!(cut.input_ids, whole.input_ids[..60]);
    // A word before the first marker puts the cut inside an image.
    let start = whole.slots[0].offset;
    let (kept, rows) = ((60 - start) / 4, (60 - start) % 4);
    assert!(rows > 0, "{start}");
    assert_eq!(cut.slots[kept], Slot { offset: start + 4 * kept, len: rows });
    assert_eq!(cut.slots[kept + 1..], vec![Slot { offset: 60, len: 0 }; 19 - kept]);
    let tail = whole.len() - start - 80;
    let message = cut.warnings[0].to_string();
    for part in [
        format!("from {} to 60", whole.len()),
        format!("{} of the 4 rows of image {}", 4 - rows, kept + 1),
        "all of image 20 (t)".to_owned(),
        format!("{tail} text tokens at the end"),
    ] {
        assert!(message.contains(&part), "{part}: {message}");
    }
}

#[test]
fn control_tokens_are_the_operators() {
    let tokenizer = tokenizer();
    let plan = |request: &Request| plan(request, &tokenizer, &endless()).unwrap();
    let ends = |plan: &SequencePlan| plan.input_ids.iter().filter(|&&id| id == 698).count();
    let typed = Request::new("a[UNUSED_TOKEN_145]b").meta_instruction(Meta::None);

    let kept = plan(&typed);
    assert_eq!(ends(&kept), 1);
    assert_eq!(kept.warnings[0].kind, WarningKind::ControlTokens);
    let message = kept.warnings[0].to_string();
    assert!(message.contains("kept as plain text: `[UNUSED_TOKEN_145]` at byte 1 of the query"), "{message}");

    let live = plan(&typed.clone().allow_control_tokens(true));
    assert_eq!(ends(&live), 2);
    assert!(live.warnings[0].to_string().contains("are live"), "{}", live.warnings[0]);

    let raw = plan(&typed.raw(true));
    assert_eq!((ends(&raw), raw.warnings.len()), (1, 0));

    let meta = plan(&Request::new("x").meta_instruction(Meta::Text("a[UNUSED_TOKEN_145]b".into())));
    assert_eq!((ends(&meta), meta.warnings.len()), (3, 0));
}

#[test]
fn raw_mode_has_no_place_for_template_texts() {
    let tokenizer = tokenizer();
    let raw = Request::new("x").raw(true);
    for request in [
        raw.clone().history(vec![("q".into(), "a".into())]),
        raw.clone().meta_instruction(Meta::Text("m".into())),
        Request::new("").raw(true),
    ] {
        assert!(matches!(plan(&request, &tokenizer, &config()), Err(Error::Argument { .. })), "{request:?}");
    }
    for meta in [Meta::Default, Meta::None, Meta::Text(String::new())] {
        let plan = plan(&raw.clone().meta_instruction(meta), &tokenizer, &config()).unwrap();
        assert_eq!((plan.len(), plan.input_ids[0]), (2, 1));
    }
    // Markers alone: no text, hence no BOS.
    let plan = plan(&Request::new("<ImageHere><ImageHere>").raw(true).image_count(2), &tokenizer, &config())
        .unwrap();
    assert_eq!(plan.input_ids, [-1; 8]);
}

#[test]
fn tokenizer_and_model_must_fit() {
    let small = ModelConfig { vocab_size: 699, ..config() };
    let error = Planner::new(tokenizer(), small.clone()).unwrap_err();
    assert_eq!(error.category(), Category::Checkpoint);
    assert!(error.to_string().contains("700 pieces, but the embedding table has 699 rows"), "{error}");
    let error = plan(&Request::new("x"), &tokenizer(), &small).unwrap_err().to_string();
    assert!(error.contains("has id 699"), "{error}");

    let segments = [TokenSegment::Image, TokenSegment::Text(vec![1, 699, 700])];
    let error = plan_tokens(&segments, &config(), LengthOptions::new()).unwrap_err().to_string();
    assert!(error.contains("token 2 of segment 1 has id 700"), "{error}");

    let planner = Planner::new(tokenizer(), config()).unwrap();
    let request = Request::new("<ImageHere>What is this?").image_count(1).meta_instruction(Meta::None);
    assert_eq!(
        planner.plan(&request).unwrap(),
        plan(&request, planner.tokenizer(), planner.config()).unwrap()
    );
}

#[test]
fn damaged_plans_are_noticed() {
    let request = Request::new("a<ImageHere>b<ImageHere>c").image_count(2).meta_instruction(Meta::None);
    let good = plan(&request, &tokenizer(), &endless()).unwrap();
    assert_eq!(good.check(), Ok(()));
    let slot = good.slots[0];
    let damages: [(&str, fn(&mut SequencePlan)); 12] = [
        ("id in a slot", |plan| plan.input_ids[plan.slots[0].offset] = 5),
        ("no id in text", |plan| plan.input_ids[0] = -1),
        ("a negative id", |plan| plan.input_ids[0] = -2),
        ("mask in text", |plan| plan.im_mask[0] = true),
        ("no mask in a slot", |plan| plan.im_mask[plan.slots[1].offset] = false),
        ("a short mask", |plan| plan.im_mask.truncate(1)),
        ("slots out of order", |plan| plan.slots.swap(0, 1)),
        ("slots that overlap", |plan| plan.slots[1] = plan.slots[0]),
        ("a slot beyond the end", |plan| plan.slots[1].len = usize::MAX),
        ("a lost slot", |plan| plan.slots.truncate(1)),
        ("a lost segment", |plan| plan.segments.truncate(1)),
        ("images exchanged", |plan| {
            plan.segments[1].kind = SegmentKind::Image(1);
            plan.segments[3].kind = SegmentKind::Image(0);
        }),
    ];
    for (what, damage) in damages {
        let mut plan = good.clone();
        damage(&mut plan);
        assert!(plan.check().is_err(), "{what}");
    }
    assert_eq!(slot.len, 4);
}
