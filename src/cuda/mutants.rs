//! Mutation tests: faults planted where launchers and runtime speak to the driver (`tests/emu/driver/plant.h`), each of
//! which an encode must not survive, whatever the seed. Those of kernels are in `tests/kernel_mutants.rs`.
//!
//! A fault is found by the emulated device's report, or by the numbers: the bounds are those of the other tests.

use super::backend::tests::{alike, close, files, on_gpus, pictures, sources};
use super::testkit::{in_child, load_emulator, planted, set_emulated};
use crate::Encoder;
use crate::encoder::EncoderOptions;
use crate::image::{ImageSource, RgbImage};
use crate::prompt::{Request, SequencePlan};
use crate::sequence::SequenceBuffer;
use crate::synth::{self, Preset, SynthOptions};

/// Seeds under which each fault must be found: one for each temper of streams, or `MUTANT_SEEDS` of them.
fn seeds() -> std::ops::Range<u32> {
    0..std::env::var("MUTANT_SEEDS").map_or(3, |seeds| seeds.parse().unwrap())
}

/// A small model on the CPU and on as many devices as there are.
struct Case {
    cpu: Encoder,
    cuda: Encoder,
}

impl Case {
    fn open(dir: &std::path::Path) -> Result<Self, String> {
        let cpu = EncoderOptions::new().device(crate::backend::Device::Cpu);
        let ordinals: &[usize] = if std::env::var("EMU_DEVICES").is_ok() { &[0, 1] } else { &[0] };
        let cuda = std::panic::catch_unwind(|| on_gpus(ordinals, dir, &EncoderOptions::new()));
        Ok(Self { cpu: Encoder::open_with(dir, cpu).unwrap(), cuda: cuda.map_err(|_| "it does not open")? })
    }

    fn plan(&self, prompt: &str) -> SequencePlan {
        let images = prompt.matches("<ImageHere>").count();
        self.cpu.plan(&Request::new(prompt).image_count(images)).unwrap()
    }

    /// Compares features, which need no sequence.
    fn features(&self, images: &[ImageSource<'_>]) -> Result<(), String> {
        let [expected, found] = [&self.cpu, &self.cuda].map(|encoder| encoder.features(images));
        for (expected, found) in expected.unwrap().iter().zip(&found.map_err(|error| error.to_string())?) {
            close(found.hidden(), found.as_slice(), expected.as_slice())?;
        }
        Ok(())
    }

    /// Fills a sequence on both, and compares all that is said of them.
    fn encode(&self, prompt: &str, images: &[ImageSource<'_>], on_device: bool) -> Result<(), String> {
        let plan = self.plan(prompt);
        let mut expected = SequenceBuffer::new();
        self.cpu.encode_into(&plan, images, &mut expected).unwrap();
        let mut found = if on_device { self.cuda.device_sequence().unwrap() } else { SequenceBuffer::new() };
        let say = |error: crate::Error| error.to_string();
        self.cuda.encode_into(&plan, images, &mut found).map_err(say)?;
        let (on_cpu, on_cuda) = (expected.verify().unwrap(), found.verify().map_err(say)?);
        for (cpu, cuda) in on_cpu.slots.iter().zip(&on_cuda.slots) {
            if (cuda.mean_norm / cpu.mean_norm - 1.0).abs().partial_cmp(&1e-2)
                != Some(std::cmp::Ordering::Less)
            {
                return Err(format!("differs: a norm of {}, {} on the CPU", cuda.mean_norm, cpu.mean_norm));
            }
        }
        let (expected, found) = (expected.to_host().unwrap(), found.to_host().map_err(say)?);
        alike(&plan, self.cpu.config().hidden_size, &found, &expected)
    }
}

/// What a process does with its encoder: features alone, sequences by the same graph, and once there is hardly any
/// room, an image at a time.
///
/// The first and the last have files of the tower's size, decoded into pinned blocks: so few uploads that the ring's
/// slots hide no event that is missing elsewhere.
fn life() -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    synth::write(Preset::Tiny, &SynthOptions::default(), dir.path().join("model")).unwrap();
    let case = Case::open(&dir.path().join("model"))?;
    let few = pictures(6);
    let small: Vec<&RgbImage> = few.iter().cycle().take(10).collect();
    let mut turned = few[0].clone();
    turned.data.reverse();
    let of_tower: Vec<_> = files(&[few[0].clone(), turned]).into_iter().cycle().take(8).collect();
    case.features(&of_tower[..2])?;
    case.encode(&format!("first {}", "<ImageHere> and ".repeat(7)), &sources(&small[..7]), false)?;
    case.encode(&format!("{}last", "<ImageHere>; then ".repeat(7)), &sources(&small[3..]), true)?;
    // More rows must be held. Each time that there is no room, three allocations of the next smaller group follow.
    set_emulated("FAIL", "alloc:1,alloc:5,alloc:9");
    case.encode(&"and at last one that is longer: <ImageHere>; ".repeat(8), &of_tower, false)
}

/// Lives with a fault on a device of Hopper's, on one that runs the portable kernels, or on two; all that was said.
fn live(plant: &str, on: &str, seed: u32) -> String {
    let seed = seed.to_string();
    let mut environment = vec![("EMU_PLANT", plant), ("EMU_SEED", &seed)];
    match on {
        "one" => {}
        "portable" => environment.push(("IMAGEHERE_CUDA_KERNELS", "sm80")),
        _ => environment.push(("EMU_DEVICES", "2")),
    }
    in_child("cuda::mutants::emulated::child_lives", &environment)
}

mod emulated {
    use super::*;

    #[test]
    #[ignore = "run by the tests below, in a process of its own"]
    fn child_lives() {
        load_emulator();
        let outcome = std::panic::catch_unwind(life).unwrap_or_else(|_| Err("panicked".into()));
        println!("outcome: {}", outcome.err().unwrap_or_else(|| "well".into()));
        println!("planted: {}", planted());
    }

    #[test]
    fn without_a_fault_all_is_well() {
        for (on, seeds) in [("one", 0..8), ("portable", 0..3), ("two", 0..3)] {
            for seed in seeds {
                let said = live("", on, seed);
                assert!(said.contains("outcome: well\nplanted: 0\n"), "seed {seed}: {said}");
            }
        }
    }

    /// A test for each fault, the plant of it, where, and what finds it: one of these.
    macro_rules! mutants {
        ($($name:ident: $plant:literal on $on:literal by $($found:literal)|+;)*) => {$(
            #[test]
            fn $name() {
                for seed in seeds() {
                    let said = live($plant, $on, seed);
                    assert!(!said.contains("planted: 0\n"), "seed {seed}: nothing was planted: {said}");
                    assert!(!said.contains("outcome: well\n"), "seed {seed}: NOT FOUND: {said}");
                    let found = [$($found),+].iter().any(|found| said.contains(found));
                    assert!(found, "seed {seed}: found by something else: {said}");
                }
            }
        )*};
    }

    mutants! {
        // ---- the runtime: streams, events, slots, memory ----
        compute_does_not_wait_for_uploads: "skip:cuStreamWaitEvent:1" on "one" by "race between launches" | "uninitialised";
        uploads_do_not_wait_for_readers: "skip:cuStreamWaitEvent:2" on "one" by "race between launches";
        uploads_record_no_event: "skip:cuEventRecord:2" on "one" by "race between launches" | "page-locked" | "uninitialised";
        readers_record_no_event: "skip:cuEventRecord:1" on "one" by "race between launches" | "page-locked";
        an_upload_slot_is_refilled_early: "skip:cuEventSynchronize" on "one" by "page-locked";
        patches_are_cut_on_another_stream: "stream:patches" on "one" by "race between launches" | "uninitialised";
        a_resize_pass_runs_on_another_stream: "stream:resize_vertical" on "one" by "race between launches" | "uninitialised";
        text_rows_go_to_another_stream: "stream:embed_tokens*" on "one" by "race between launches";
        a_group_keeps_the_slots_of_the_last: "skip:upload:168" on "one" by "use after free" | "uninitialised";
        slots_are_off_by_one_image: "change8:linear_sm90_scatter*:304:4" on "one" by "uninitialised" | "differs";
        slots_begin_at_the_next_image: "roll:32:4" on "one" by "not complete";
        a_graph_holds_memory_that_is_gone: "instantiate:3" on "one" by "use after free";
        the_second_device_does_not_wait_for_the_first: "skip:cuStreamWaitEvent:3:1" on "two" by "race between launches";
        // ---- launchers: order, sizes, places ----
        layer_norm_swaps_weight_and_bias: "swap:layer_norm:24:32:8" on "one" by "differs";
        layer_norm_has_a_wrong_eps: "scale:layer_norm:52:1000" on "portable" by "differs";
        layer_norm_leaves_the_last_rows: "grid:layer_norm:-1:0" on "one" by "differs" | "uninitialised";
        a_norm_is_not_folded: "skip:fold_norm" on "one" by "differs";
        a_fold_leaves_the_last_rows: "grid:fold_norm:-1:0" on "one" by "differs";
        attention_has_a_wrong_pitch: "change:attention_sm90*:332:8" on "one" by "differs" | "out of bounds";
        attention_leaves_the_last_token: "change:attention_sm90*:320:-1" on "one" by "uninitialised" | "differs";
        attention_has_half_the_scale: "scale:attention_sm90*:336:0.5" on "one" by "differs";
        attention_swaps_its_pitches: "swap:attention*:24:28:4" on "portable" by "differs";
        all_rows_are_dropped: "change:linear_sm90_residual*:388:1" on "one" by "differs" | "uninitialised" | "out of bounds";
        the_class_row_is_not_skipped: "change:linear_gelu*:92:-1" on "portable" by "differs";
        patches_embed_at_a_wrong_row: "change:linear_sm90_embed*:344:-1" on "one" by "differs" | "uninitialised";
        the_residual_has_a_wrong_pitch: "change:linear_sm90_residual*:332:8" on "one" by "out of bounds" | "uninitialised" | "race";
        a_product_ends_early: "change:linear_sm90_quick_gelu*:320:-64" on "one" by "differs";
        a_product_misses_a_column: "change:linear_sm90_bias*:316:-8" on "one" by "uninitialised" | "differs";
        a_product_has_too_little_shared_memory: "shared:linear_sm90_bias*:-2048" on "one" by "shared memory out of bounds" | "not shared memory";
        a_product_ends_early_on_others: "change:linear_quick_gelu*:64:-8" on "portable" by "differs";
        the_maps_are_swapped: "swap:linear_sm90_bias*:0:128:128" on "one" by "dependency wait" | "race with a bulk copy" | "differs";
        a_folded_norm_has_a_wrong_eps: "scale:linear_sm90_*:384:10000" on "one" by "differs";
        statistics_are_of_other_columns: "change8:linear_sm90_bias*:352:64" on "one" by "differs" | "uninitialised" | "out of bounds";
        resize_swaps_firsts_and_counts: "swap:resize_horizontal:16:24:8" on "one" by "out of bounds" | "differs";
        patches_read_at_a_wrong_pitch: "change:patches:36:3" on "one" by "out of bounds" | "uninitialised" | "differs";
        the_last_text_row_is_left: "change:embed_tokens*:8:-1" on "one" by "not complete";
        the_last_row_of_a_weight_is_left: "change8:convert*:16:-1" on "one" by "differs" | "uninitialised";
        a_weight_is_scaled_twice: "scale:convert*:44:2" on "one" by "differs";
        the_last_slot_is_not_measured: "change:verify_slots:24:-1" on "one" by "differs";
    }
}
