//! Every kernel that Hopper has for a layer, in turns: which is best, and how far the one that is taken is from it.

use std::fmt::Write as _;

use imagehere::cuda::bench::{Blocks, Launch, Recording, Variant, predictions};
use serde_json::{Value, json};

use crate::kernels::{Case, Cost, Fields, attention, attention_cost};
use crate::linear::{Made, layer, shapes};
use crate::suite::Suite;

const WORKS: &str = "a device that works";

/// One kernel: what takes turns with the others.
struct Runner<'m> {
    recording: Recording<'m>,
    iterations: usize,
    seconds: Vec<f64>, // of a launch
}

impl Runner<'_> {
    fn median(&self) -> f64 {
        self.seconds[self.seconds.len() / 2]
    }
}

/// Seconds of a launch by each of `kernels`, in their order, and the fastest of them. `make`: the launch with data of its
/// own. `thorough`: the results of all are checked, not the best's alone.
fn race<'a, K: Copy>(
    suite: &Suite,
    cost: Cost,
    kernels: &[K],
    thorough: bool,
    make: &dyn Fn(usize, K) -> Case<'a>,
) -> (Vec<f64>, usize) {
    let machine = &suite.machine;
    let iterations = cost.iterations(suite.tiny);
    let check = |kernel: K| {
        let case = make(0, kernel);
        (case.poison)();
        machine.run(&case.launch).expect(WORKS);
        (case.check)();
    };
    let runner = |&kernel: &K| {
        if thorough {
            check(kernel);
        }
        let launches: Vec<Launch> = (0..iterations).map(|set| make(set, kernel).launch).collect();
        let recording = machine.record(&launches).expect(WORKS);
        recording.time(1).expect(WORKS);
        Runner { recording, iterations, seconds: vec![] }
    };
    let mut runners: Vec<Runner<'_>> = kernels.iter().map(runner).collect();
    for _ in 0..if suite.tiny { 1 } else { 15 } {
        for runner in &mut runners {
            let time = runner.recording.time(1).expect(WORKS).as_secs_f64();
            runner.seconds.push(time / runner.iterations as f64);
        }
    }
    for runner in &mut runners {
        runner.seconds.sort_by(f64::total_cmp);
    }
    let seconds: Vec<f64> = runners.iter().map(Runner::median).collect();
    let best = (0..seconds.len()).min_by(|&a, &b| seconds[a].total_cmp(&seconds[b])).expect("a kernel");
    if !thorough {
        check(kernels[best]);
    }
    (seconds, best)
}

/// Times every kernel of Hopper's for every linear layer and for attention at groups of so many images, and writes the
/// best tiles to a file that `IMAGEHERE_CUDA_TILES` takes. One JSON object a line.
pub fn tune(suite: &Suite, path: &str, images: &[usize]) {
    if !suite.machine.is_hopper() {
        return println!("skipped: no kernels of Hopper's on {}", suite.machine.describe());
    }
    let fields = Fields::new(suite);
    let mut lines = format!("# {}\n", suite.machine.describe());
    for (i, &images) in images.iter().enumerate() {
        for shape in shapes(suite) {
            let (line, said) = linear(suite, &Made::new(&fields, shape), images, i == 0);
            println!("{said}");
            let _ = writeln!(lines, "{line}");
            // Whole at any time: a run may be cut off.
            std::fs::write(path, &lines).expect("room for a file");
        }
        println!("{}", attentions(suite, &fields, images, i == 0));
    }
}

/// The line of the best tile for a layer, and what was found.
fn linear(suite: &Suite, made: &Made<'_>, images: usize, thorough: bool) -> (String, Value) {
    let machine = &suite.machine;
    let (cost, name) = (made.shape.cost(images), made.shape.name);
    let case = made.case(0, images, None);
    let of = layer(&case);
    let chosen = machine.chosen(of).expect("a layer");
    let mut kernels = machine.variants(of).expect("a layer");
    // The portable ones do some of these layers as well; benchmarks of their own time them.
    kernels.retain(|variant| variant.tile().is_some());
    let make = |set: usize, variant: Variant| made.case(set, images, Some(variant));
    let (seconds, best) = race(suite, cost, &kernels, thorough, &make);
    let taken = kernels.iter().position(|&variant| variant == chosen).expect("it does the layer");
    let (epilogue, [m, n, k]) = of.shape();
    let predicted = predictions(epilogue, [m, n, k], machine.multiprocessors());
    let about = |i: usize| {
        let cut = machine.cut(of, kernels[i]);
        let model = predicted.iter().find(|of| Some(&of.tile) == kernels[i].tile().as_ref());
        json!({
            "kernel": kernels[i].to_string(), "seconds": seconds[i], "waves": cut.waves,
            "useful": cut.useful / cut.room, "predicted": model.map(|model| model.seconds),
        })
    };
    let said = json!({
        "name": format!("{name}/{images}"), "shape": [m, n, k], "operations": cost.operations,
        "best": about(best), "chosen": about(taken), "behind": seconds[taken] / seconds[best] - 1.0,
        "all": (0..kernels.len()).map(about).collect::<Vec<_>>(),
    });
    let tile = kernels[best].tile().expect("Hopper's");
    let [by_best, by_choice] = [best, taken].map(|i| seconds[i] * 1e6);
    (format!("{epilogue} {m} {n} {k} {tile} # {by_best:.1} us, {by_choice:.1} as chosen"), said)
}

/// What was found for attention.
fn attentions(suite: &Suite, fields: &Fields<'_>, images: usize, thorough: bool) -> Value {
    let machine = &suite.machine;
    let cost = attention_cost(&suite.config, images);
    let kernels = machine.attention_blocks();
    let make = |set: usize, blocks: Blocks| attention(fields, set, images, Some(blocks));
    let (seconds, best) = race(suite, cost, &kernels, thorough, &make);
    let case = attention(fields, 0, images, None);
    let Launch::Attention(of) = &case.launch else { unreachable!("made above") };
    let chosen = machine.chosen_blocks(of);
    let taken = kernels.iter().position(|&blocks| blocks == chosen).expect("one of all");
    let about = |i: usize| json!({ "kernel": kernels[i].to_string(), "seconds": seconds[i] });
    json!({
        "name": format!("attention/{images}"), "operations": cost.operations, "best": about(best),
        "chosen": about(taken), "behind": seconds[taken] / seconds[best] - 1.0,
        "all": (0..kernels.len()).map(about).collect::<Vec<_>>(),
    })
}
