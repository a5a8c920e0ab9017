//! The library as its users call it: one sequence, many, staged, in their memory, from many threads.

use std::ops::ControlFlow;

use half::f16;
use imagehere::checkpoint::Checkpoint;
use imagehere::encoder::{Encoder, EncoderOptions};
use imagehere::features::FeatureCache;
use imagehere::image::{ImageSource, RgbImage};
use imagehere::packing::PackedPlan;
use imagehere::prompt::{Meta, Planner, Request, SequencePlan};
use imagehere::sequence::SequenceBuffer;
use imagehere::synth::{self, Preset, SynthOptions};
use imagehere::tokenizer::Tokenizer;
use imagehere::{Category, Error};

/// A tiny checkpoint in a folder that goes away with it.
fn checkpoint() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    synth::write(Preset::Tiny, &SynthOptions::default(), dir.path().join("model")).unwrap();
    dir
}

fn open(dir: &tempfile::TempDir) -> Encoder {
    Encoder::open(dir.path().join("model")).unwrap()
}

/// Noise of an odd size, different for each seed.
fn picture(seed: u64) -> RgbImage {
    let (width, height) = (31 + 17 * (seed % 5) as u32, 83 - 9 * (seed % 4) as u32);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    RgbImage { width, height, data: (0..3 * width * height).map(|_| next()).collect() }
}

fn sources(pictures: &[RgbImage]) -> Vec<ImageSource<'_>> {
    pictures.iter().map(|picture| picture.view().into()).collect()
}

fn request(query: &str, images: usize) -> Request {
    Request::new(query).image_count(images).meta_instruction(Meta::None)
}

fn encode(encoder: &Encoder, plan: &SequencePlan, pictures: &[RgbImage]) -> Vec<f16> {
    let mut sequence = SequenceBuffer::new();
    encoder.encode_into(plan, &sources(pictures), &mut sequence).unwrap();
    sequence.verify().unwrap();
    sequence.as_slice().unwrap().to_vec()
}

fn bits(values: &[f16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The rows of slot `k` of a plan in a filled buffer `[L, H]`.
fn slot<'s>(encoder: &Encoder, plan: &SequencePlan, filled: &'s [f16], k: usize) -> &'s [f16] {
    let hidden = encoder.config().hidden_size;
    let slot = plan.slots[k];
    &filled[slot.offset * hidden..(slot.offset + slot.len) * hidden]
}

#[test]
fn a_sequence_is_complete_and_its_slots_differ() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let pictures = [picture(1), picture(2)];
    let plan = encoder.plan(&request("<ImageHere> and <ImageHere>", 2)).unwrap();
    let filled = encode(&encoder, &plan, &pictures);
    assert_ne!(bits(slot(&encoder, &plan, &filled, 0)), bits(slot(&encoder, &plan, &filled, 1)));

    // The same picture twice gives the same rows twice.
    let twice = encode(&encoder, &plan, &[picture(1), picture(1)]);
    assert_eq!(bits(slot(&encoder, &plan, &twice, 0)), bits(slot(&encoder, &plan, &twice, 1)));
    assert_eq!(bits(slot(&encoder, &plan, &twice, 0)), bits(slot(&encoder, &plan, &filled, 0)));
}

#[test]
fn rows_do_not_depend_on_batch_order_or_threads() {
    let dir = checkpoint();
    let pictures: Vec<RgbImage> = (0..5).map(picture).collect();
    let alone = open(&dir).features(&sources(&pictures[3..4])).unwrap();
    for threads in [1, 2, 3, 5] {
        let options = EncoderOptions::new().threads(threads);
        let encoder = Encoder::open_with(dir.path().join("model"), options).unwrap();
        let together = encoder.features(&sources(&pictures)).unwrap();
        assert_eq!(bits(together[3].as_slice()), bits(alone[0].as_slice()), "{threads} threads");
        let reversed: Vec<RgbImage> = pictures.iter().rev().cloned().collect();
        let together = encoder.features(&sources(&reversed)).unwrap();
        assert_eq!(bits(together[1].as_slice()), bits(alone[0].as_slice()), "{threads} threads, reversed");
    }
}

#[test]
fn a_packing_encodes_each_image_once_and_equals_its_parts() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let pictures = [picture(1), picture(2), picture(3)];
    let first = encoder.plan(&request("<ImageHere>Which is larger?<ImageHere>", 2)).unwrap();
    let second = encoder.plan(&request("No image here.", 0)).unwrap();
    let third = encoder.plan(&request("<ImageHere><ImageHere><ImageHere>All?", 3)).unwrap();
    let mut packed = PackedPlan::new();
    packed.push(&first, [2, 0]).unwrap();
    packed.push(&second, []).unwrap();
    packed.push(&third, [0, 1, 2]).unwrap();

    let mut sequence = SequenceBuffer::new();
    let report = encoder.encode_into(&packed, &sources(&pictures), &mut sequence).unwrap();
    assert_eq!(report.images_encoded, 3, "five slots, three images");
    let verified = sequence.verify().unwrap();
    assert_eq!(verified.slots.iter().map(|slot| slot.image).collect::<Vec<_>>(), [2, 0, 0, 1, 2]);
    let lens = [&first, &second, &third].map(|plan| plan.input_ids.len());
    assert_eq!(sequence.cu_seqlens(), [0, lens[0], lens[0] + lens[1], lens.iter().sum()]);

    let [a, b, c] = pictures;
    let mut parts = encode(&encoder, &first, &[c.clone(), a.clone()]);
    parts.extend(encode(&encoder, &second, &[]));
    parts.extend(encode(&encoder, &third, &[a, b, c]));
    assert_eq!(bits(sequence.as_slice().unwrap()), bits(&parts));
}

#[test]
fn staged_use_places_features_without_encoding_again() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let pictures = [picture(4), picture(5)];
    let kept = encoder.features(&sources(&pictures)).unwrap();

    // First each image by itself.
    let alone = encoder.plan(&request("<ImageHere>Describe it.", 1)).unwrap();
    for (features, picture) in kept.iter().zip(&pictures) {
        let mut sequence = SequenceBuffer::new();
        encoder.place_into(&alone, std::slice::from_ref(features), &mut sequence).unwrap();
        sequence.verify().unwrap();
        let encoded = encode(&encoder, &alone, std::slice::from_ref(picture));
        assert_eq!(bits(sequence.as_slice().unwrap()), bits(&encoded));
    }

    // Then all together, with the text that came back in between.
    let said = request("<ImageHere>A cat. <ImageHere>A dog. Compare them.", 2);
    let all = encoder.plan(&said).unwrap();
    let mut sequence = SequenceBuffer::new();
    encoder.place_into(&all, &kept, &mut sequence).unwrap();
    sequence.verify().unwrap();
    assert_eq!(bits(sequence.as_slice().unwrap()), bits(&encode(&encoder, &all, &pictures)));
}

#[test]
fn rows_kept_elsewhere_are_features_again() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let made = encoder.features(&sources(&[picture(1)])).unwrap().remove(0);
    let adopted = encoder.adopt_features(made.as_slice().to_vec()).unwrap();
    let plan = encoder.plan(&request("<ImageHere>", 1)).unwrap();
    let mut sequence = SequenceBuffer::new();
    encoder.place_into(&plan, &[adopted], &mut sequence).unwrap();
    assert_eq!(bits(sequence.as_slice().unwrap()), bits(&encode(&encoder, &plan, &[picture(1)])));
    let error = encoder.adopt_features(made.as_slice()[1..].to_vec()).unwrap_err();
    assert_eq!(error.category(), Category::Input, "{error}");
}

#[test]
fn features_of_another_checkpoint_are_refused() {
    let (dir, other) = (checkpoint(), tempfile::tempdir().unwrap());
    let options = SynthOptions { seed: 7, ..SynthOptions::default() };
    synth::write(Preset::Tiny, &options, other.path().join("model")).unwrap();
    let foreign = open(&other).features(&sources(&[picture(1)])).unwrap();
    let encoder = open(&dir);
    let plan = encoder.plan(&request("<ImageHere>?", 1)).unwrap();
    let error = encoder.place_into(&plan, &foreign, &mut SequenceBuffer::new()).unwrap_err();
    assert_eq!(error.category(), Category::Input);
    assert!(error.to_string().contains("Encode the image again"), "{error}");
}

#[test]
fn wrapped_memory_is_filled_in_place_and_nothing_else_is_touched() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let hidden = encoder.config().hidden_size;
    let pictures = [picture(1), picture(2)];
    let plan = encoder.plan(&request("<ImageHere>, <ImageHere>", 2)).unwrap();
    let owned = encode(&encoder, &plan, &pictures);
    let (rows, stride) = (plan.input_ids.len(), hidden + 24);

    let sentinel = f16::from_bits(0x5555);
    let mut theirs = vec![sentinel; (rows + 3) * stride];
    let before = theirs.as_ptr();
    let mut sequence = SequenceBuffer::wrap(&mut theirs, stride);
    encoder.encode_into(&plan, &sources(&pictures), &mut sequence).unwrap();
    sequence.verify().unwrap();
    assert!(sequence.as_slice().is_none(), "rows lie apart");
    assert_eq!(sequence.row(0).as_ptr(), before);
    for i in 0..rows {
        assert_eq!(bits(sequence.row(i)), bits(&owned[i * hidden..(i + 1) * hidden]), "row {i}");
    }
    for (i, x) in theirs.iter().enumerate() {
        let inside = i / stride < rows && i % stride < hidden;
        assert!(inside || x.to_bits() == sentinel.to_bits(), "element {i} outside the sequence was written");
    }

    // The last row needs no stride after it.
    let mut exact = vec![sentinel; (rows - 1) * stride + hidden];
    let mut sequence = SequenceBuffer::wrap(&mut exact, stride);
    encoder.encode_into(&plan, &sources(&pictures), &mut sequence).unwrap();
    sequence.verify().unwrap();
}

#[test]
fn what_fails_writes_nothing() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let hidden = encoder.config().hidden_size;
    let plan = encoder.plan(&request("<ImageHere>, <ImageHere>", 2)).unwrap();
    let good = picture(1);
    let rows = plan.input_ids.len();
    let sentinel = f16::from_bits(0x5555);

    let mut theirs = vec![sentinel; rows * hidden];
    let mut sequence = SequenceBuffer::wrap(&mut theirs, hidden);
    let images = [good.view().into(), ImageSource::from(&b"no image"[..])];
    let error = encoder.encode_into(&plan, &images, &mut sequence).unwrap_err();
    assert!(matches!(error, Error::Image { index: 1, .. }), "{error}");
    assert!(sequence.verify().is_err());
    assert!(theirs.iter().all(|x| x.to_bits() == sentinel.to_bits()));

    let mut short = vec![sentinel; (rows - 1) * hidden];
    let mut sequence = SequenceBuffer::wrap(&mut short, hidden);
    let images = [good.view().into(), good.view().into()];
    let error = encoder.encode_into(&plan, &images, &mut sequence).unwrap_err();
    assert_eq!(error.category(), Category::Input, "{error}");
    assert!(short.iter().all(|x| x.to_bits() == sentinel.to_bits()));

    let error = encoder.encode_into(&plan, &images[..1], &mut SequenceBuffer::new()).unwrap_err();
    assert!(error.to_string().contains("2 images"), "{error}");
}

#[test]
fn a_cut_inside_an_image_keeps_its_first_rows() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let pictures = [picture(1), picture(2)];
    let query = format!("<ImageHere>{}<ImageHere>never read", "word ".repeat(1350)); // 3 tokens each
    let cut = encoder.plan(&request(&query, 2).truncate(true)).unwrap();
    let limit = encoder.config().max_length.unwrap();
    assert_eq!(cut.input_ids.len(), limit);
    let whole = encoder.features(&sources(&pictures)).unwrap();
    let filled = encode(&encoder, &cut, &pictures);
    assert_eq!(bits(slot(&encoder, &cut, &filled, 0)), bits(whole[0].as_slice()));
    let kept = slot(&encoder, &cut, &filled, 1);
    assert!(!kept.is_empty() && kept.len() < whole[1].as_slice().len(), "{:?}", cut.slots);
    assert_eq!(bits(kept), bits(&whole[1].as_slice()[..kept.len()]));
}

#[test]
fn a_buffer_is_reused_from_a_long_sequence_to_a_short_one() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let long = encoder.plan(&request("<ImageHere><ImageHere><ImageHere>long", 3)).unwrap();
    let short = encoder.plan(&request("<ImageHere>short", 1)).unwrap();
    let pictures = [picture(1), picture(2), picture(3)];
    let mut sequence = SequenceBuffer::new();
    encoder.encode_into(&long, &sources(&pictures), &mut sequence).unwrap();
    encoder.encode_into(&short, &sources(&pictures[2..]), &mut sequence).unwrap();
    assert_eq!(sequence.verify().unwrap().rows, short.input_ids.len());
    assert_eq!(bits(sequence.as_slice().unwrap()), bits(&encode(&encoder, &short, &pictures[2..])));
}

#[test]
fn concurrent_calls_give_what_single_calls_give() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let plan = encoder.plan(&request("<ImageHere> or <ImageHere>?", 2)).unwrap();
    let pairs: Vec<[RgbImage; 2]> = (0..6).map(|i| [picture(i), picture(i + 10)]).collect();
    let alone: Vec<Vec<f16>> = pairs.iter().map(|pair| encode(&encoder, &plan, pair)).collect();
    std::thread::scope(|scope| {
        for (pair, alone) in pairs.iter().zip(&alone) {
            let (encoder, plan) = (&encoder, &plan);
            scope.spawn(move || {
                for _ in 0..3 {
                    assert_eq!(bits(&encode(encoder, plan, pair)), bits(alone));
                }
            });
        }
    });
}

#[test]
fn progress_runs_from_little_to_one() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let plan = encoder.plan(&request("<ImageHere>", 1)).unwrap();
    let pictures = [picture(1)];
    let mut seen = Vec::new();
    let mut sequence = SequenceBuffer::new();
    let watch = &mut |done| {
        seen.push(done);
        ControlFlow::Continue(())
    };
    encoder.encode_watched(&plan, &sources(&pictures), &mut sequence, watch).unwrap();
    assert!(seen.is_sorted() && seen.len() > 1, "{seen:?}");
    assert_eq!(*seen.last().unwrap(), 1.0);
}

#[test]
fn who_watches_may_stop() {
    let dir = checkpoint();
    let pictures = [picture(1), picture(2)];
    for encoder in [open(&dir), open_cached(&dir)] {
        let plan = encoder.plan(&request("<ImageHere><ImageHere>", 2)).unwrap();
        let mut sequence = SequenceBuffer::new();
        let images = sources(&pictures);
        let mut calls = 0;
        let stop = &mut |done: f32| {
            calls += 1;
            assert!(done < 1.0);
            ControlFlow::Break(())
        };
        let error = encoder.encode_watched(&plan, &images, &mut sequence, stop).unwrap_err();
        assert_eq!(error.category(), Category::Stopped, "{error}");
        assert_eq!((calls, sequence.len()), (1, 0), "the buffer is empty again");
        // Stopped when all is done is not stopped.
        let at_the_end = &mut |done: f32| match done < 1.0 {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        };
        encoder.encode_watched(&plan, &images, &mut sequence, at_the_end).unwrap();
        sequence.verify().unwrap();
    }
}

/// Compiles only if an encoder can be shared between threads.
#[test]
fn an_encoder_is_send_and_sync() {
    fn shared<T: Send + Sync>() {}
    shared::<Encoder>();
}

/// An encoder of the checkpoint with a cache beside it.
fn open_cached(dir: &tempfile::TempDir) -> Encoder {
    let cache = FeatureCache::open(dir.path().join("cache")).unwrap();
    let options = EncoderOptions::new().feature_cache(cache);
    Encoder::open_with(dir.path().join("model"), options).unwrap()
}

#[test]
fn with_a_cache_every_call_gives_what_it_gives_without() {
    let dir = checkpoint();
    let (plain, cached) = (open(&dir), open_cached(&dir));
    let pictures: Vec<RgbImage> = (0..3).map(picture).collect();
    let images = [sources(&pictures), sources(&pictures[1..2])].concat(); // the second once more
    let one = plain.plan(&request("<ImageHere>, <ImageHere>", 2)).unwrap();
    let cut =
        plain.plan(&request(&format!("{}<ImageHere>", "word ".repeat(1356)), 1).truncate(true)).unwrap();
    assert!(cut.slots[0].len > 0 && cut.slots[0].len < plain.config().patches, "{:?}", cut.slots);
    let mut packed = PackedPlan::new();
    packed.push(&one, [3, 0]).unwrap();
    packed.push(&cut, [2]).unwrap();
    packed.push(&one, [1, 1]).unwrap();

    let mut expected = SequenceBuffer::new();
    plain.encode_into(&packed, &images, &mut expected).unwrap();
    let (hidden, stride) = (plain.config().hidden_size, plain.config().hidden_size + 5);
    for round in 0..2 {
        let mut theirs = vec![f16::from_bits(0x5555); packed.total_len() * stride];
        let mut sequence = SequenceBuffer::wrap(&mut theirs, stride);
        let mut seen = Vec::new();
        let watch = &mut |done| {
            seen.push(done);
            ControlFlow::Continue(())
        };
        let report = cached.encode_watched(&packed, &images, &mut sequence, watch).unwrap();
        let counts = (report.images_encoded, report.images_cached);
        assert_eq!(counts, if round == 0 { (3, 0) } else { (0, 3) });
        assert!(seen.is_sorted() && seen.last() == Some(&1.0), "{seen:?}");
        sequence.verify().unwrap();
        for i in 0..packed.total_len() {
            assert_eq!(bits(sequence.row(i)), bits(expected.row(i)), "row {i}");
        }
        assert!(theirs.chunks(stride).all(|row| row[hidden..].iter().all(|x| x.to_bits() == 0x5555)));
    }
    for (one, other) in plain.features(&images).unwrap().iter().zip(cached.features(&images).unwrap()) {
        assert_eq!(bits(one.as_slice()), bits(other.as_slice()));
    }
}

#[test]
fn with_a_cache_what_fails_writes_nothing_either() {
    let dir = checkpoint();
    let encoder = open_cached(&dir);
    let plan = encoder.plan(&request("<ImageHere>, <ImageHere>", 2)).unwrap();
    let good = picture(1);
    let mut sequence = SequenceBuffer::new();
    encoder.encode_into(&plan, &[good.view().into(), good.view().into()], &mut sequence).unwrap();
    let images = [good.view().into(), ImageSource::from(&b"no image"[..])];
    let error = encoder.encode_into(&plan, &images, &mut sequence).unwrap_err();
    assert!(matches!(error, Error::Image { index: 1, .. }), "{error}");
    assert!(sequence.verify().is_err(), "what was there before is not taken for this call's");
    let mut short = vec![f16::from_bits(0x5555); 10];
    let images = [good.view().into(), good.view().into()];
    let error = encoder.encode_into(&plan, &images, &mut SequenceBuffer::wrap(&mut short, 5)).unwrap_err();
    assert_eq!(error.category(), Category::Input, "{error}");
    assert!(short.iter().all(|x| x.to_bits() == 0x5555));
}

#[test]
fn an_encoder_without_tower_places_features_of_a_file() {
    let dir = checkpoint();
    let encoder = open(&dir);
    let pictures = [picture(1), picture(2)];
    let (set, report) = encoder.feature_set(&sources(&pictures), &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(report.images_encoded, 2);
    let path = dir.path().join("f.safetensors");
    set.save(&path).unwrap();

    let model = dir.path().join("model");
    let checkpoint = Checkpoint::open(&model).unwrap();
    let planner = Planner::new(Tokenizer::from_dir(&model).unwrap(), checkpoint.config().clone()).unwrap();
    let placer = Encoder::load_without_tower(&checkpoint, planner, EncoderOptions::new());
    let plan = placer.plan(&request("<ImageHere> or <ImageHere>?", 2)).unwrap();
    let mut sequence = SequenceBuffer::new();
    placer.place_into(&plan, &placer.read_features(&path).unwrap(), &mut sequence).unwrap();
    sequence.verify().unwrap();
    assert_eq!(bits(sequence.as_slice().unwrap()), bits(&encode(&encoder, &plan, &pictures)));

    let error = placer.encode_into(&plan, &sources(&pictures), &mut sequence).unwrap_err();
    assert!(error.to_string().contains("without tower"), "{error}");
    assert!(sequence.verify().is_err());
    assert_eq!(placer.features(&sources(&pictures)).unwrap_err().category(), Category::Input);
    let none = encoder.feature_set(&[], &mut |_| ControlFlow::Continue(())).unwrap().0;
    assert!(matches!(none.save(&path), Err(Error::Argument { .. })));
}
