//! Faults planted in the kernels: what the tests of `tests/emu/kernels/` are worth.
//!
//! A mutant is a kernel with one fault: a few words of its text replaced. The kernel's own test is compiled with it
//! and must fail, under every seed, by one of the means that the mutant names: a kind of report of the emulated
//! device, or WRONG, a comparison of the test. A crash, a run without end and a mutant that does not compile are
//! failures here, and so is a text that the kernel no longer has: write the fault anew for the new text.
//!
//! Each program is also compiled and run without a fault, under eight seeds: there nothing may be reported.
//!
//! `MUTANT_SEEDS=0..32` tries other seeds than the four. `cargo test --test kernel_mutants -- --nocapture attention`
//! shows how each is caught.

#![cfg(all(feature = "cuda", target_os = "linux"))]

mod attention;
mod attention_sm90;
mod fold;
mod linear;
mod linear_sm90;
mod pixels;
mod rows;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A comparison of the kernel's test; the others are kinds of reports of the emulated device.
const WRONG: &str = "FAILED";
const RACE: &str = "race in shared memory";
const COPY: &str = "race with cp.async";
const GLOBAL_RACE: &str = "race in global memory";
const UNSET: &str = "uninitialised shared memory";
const BOUNDS: &str = "out of bounds";
const SHARED_BOUNDS: &str = "shared memory out of bounds";
const NOT_SHARED: &str = "not shared memory";
const ALIGNMENT: &str = "misaligned address";
const BARRIER: &str = "barrier divergence";
const DIVERGENCE: &str = "warp divergence";
const IN_FLIGHT: &str = "exit with cp.async in flight";
// Hopper's.
const BULK: &str = "race with a bulk copy";
const EXIT_BULK: &str = "exit with bulk copies in flight";
const WGMMA: &str = "race with wgmma";
const EXIT_WGMMA: &str = "exit with wgmma in flight";
const SUMS: &str = "wgmma in flight";
const FENCE: &str = "missing wgmma_fence";
const PROXY: &str = "missing proxy fence";
const NO_MBARRIER: &str = "no mbarrier";
const OVERRUN: &str = "mbarrier overrun";
const DEADLOCK: &str = "deadlock";
const TOUCHED: &str = "mbarrier touched";
const DESCRIPTOR: &str = "matrix descriptor";
const REGISTERS: &str = "register budget";
const CLUSTER: &str = "missing cluster_barrier";
const CLUSTER_WAIT: &str = "missing mbarrier_wait_cluster";
const CLUSTER_EXIT: &str = "cluster exit";
const LATE: &str = "dependency wait missing or late";

/// How long a run may take; the slowest needs ten seconds for eight seeds, more where others work too.
const SECONDS: &str = "120";

struct Mutant {
    /// The test: `tests/emu/kernels/PROGRAM_test.cpp`. `linear_E` is linear_test.cpp with that epilogue alone,
    /// `linear_sm90_E` linear_sm90_test.cpp.
    program: &'static str,
    name: &'static str,
    /// Of `kernels/`.
    file: &'static str,
    /// What must catch it: one of these.
    means: &'static [&'static str],
    /// Old text, which the file has once, and new.
    edits: &'static [(&'static str, &'static str)],
}

/// Tests of one program: that it passes as it is, and a test for each mutant:
///
/// ```text
/// name: "file of kernels/", MEANS | OTHER_MEANS, "old text" => "new text", "old text elsewhere" => "new text";
/// ```
macro_rules! mutants {
    ($program:ident: $(
        $(#[$doc:meta])*
        $name:ident: $file:literal, $($means:ident)|+, $($old:literal => $new:literal),+;
    )*) => {
        mod $program {
            #[test]
            fn the_kernel_as_it_is_passes() {
                crate::passes(stringify!($program));
            }
            $(
                $(#[$doc])*
                #[test]
                fn $name() {
                    crate::is_caught(&crate::Mutant {
                        program: stringify!($program),
                        name: stringify!($name),
                        file: $file,
                        means: &[$(crate::$means),+],
                        edits: &[$(($old, $new)),+],
                    });
                }
            )*
        }
    };
}
use mutants;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// No report and no wrong value, from the same program that finds the mutants.
fn passes(program: &str) {
    let built = tools().program(&tools().folder.join(program).join("as_it_is"), &[test_object(program)]);
    let seeds = seeds(0..8);
    let output = run(&built, &format!("{}..{}", seeds.start, seeds.end));
    assert!(output.status.success(), "{program}, {}: {}", output.status, said(&output));
}

#[test]
fn every_file_has_mutants() {
    let tables = [
        include_str!("attention.rs"),
        include_str!("attention_sm90.rs"),
        include_str!("fold.rs"),
        include_str!("linear.rs"),
        include_str!("linear_sm90.rs"),
        include_str!("pixels.rs"),
        include_str!("rows.rs"),
    ]
    .concat();
    // linear_sm90.cu is a table of entries, in tiles too large for here: their tests are those of the launchers.
    for file in kernel_files().filter(|file| !file.starts_with("ptx") && file != "linear_sm90.cu") {
        assert!(tables.contains(&format!(": \"{file}\", ")), "kernels/{file}");
    }
}

fn is_caught(mutant: &Mutant) {
    let folder = tools().folder.join(mutant.program).join(mutant.name);
    let objects = [mutated_object(mutant, &folder), test_object(mutant.program)];
    let built = tools().program(&folder.join("test"), &objects);
    let mut missed = String::new();
    for seed in seeds(0..4) {
        let output = run(&built, &seed.to_string());
        let said = said(&output);
        let ended = ending(&said);
        println!("{} {}, seed {seed}: {}", mutant.program, mutant.name, ended.unwrap_or("nothing"));
        if output.status.code() != Some(1) || !ended.is_some_and(|means| mutant.means.contains(&means)) {
            missed += &format!("\nseed {seed}, {}: {said}", output.status);
        }
    }
    assert!(missed.is_empty(), "{} is not caught by {:?}:{missed}", mutant.name, mutant.means);
}

/// What ended a run: the kind of the report, or WRONG.
fn ending(said: &str) -> Option<&str> {
    said.lines().find_map(|line| match line.strip_prefix("emulated device: ") {
        Some(report) => report.split_once(": ").map(|(kind, _)| kind),
        None => line.starts_with("FAILED: ").then_some(WRONG),
    })
}

fn edited(mutant: &Mutant, text: &str, (old, new): &(&str, &str)) -> String {
    let times = text.matches(old).count();
    assert_eq!(times, 1, "{}: kernels/{} has this text {times} times: {old}", mutant.name, mutant.file);
    text.replace(old, new)
}

/// `MUTANT_SEEDS=from..to`, or `usual`.
fn seeds(usual: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("MUTANT_SEEDS") else { return usual };
    let (from, to) = text.split_once("..").expect("MUTANT_SEEDS=from..to");
    from.parse().unwrap()..to.parse().unwrap()
}

fn run(program: &Path, seeds: &str) -> Output {
    Command::new("timeout").arg(SECONDS).arg(program).env("EMU_SEED", seeds).output().unwrap()
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

/// The kernel's own test, compiled once.
fn test_object(program: &str) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _held = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (stem, epilogue) = stem_and_epilogue(program);
    let source = root().join("tests/emu/kernels").join(format!("{stem}_test.cpp"));
    let mut flags = vec!["-Ikernels".to_owned()];
    flags.extend(epilogue.map(|epilogue| epilogue_alone(program, epilogue)));
    tools().object(&tools().folder.join(program).join("test.o"), &source, &flags)
}

/// The kernel's source with the fault in it. Its entry points come before those that the test's object has.
fn mutated_object(mutant: &Mutant, folder: &Path) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let mut found = false;
    for file in kernel_files() {
        let mut text = fs::read_to_string(root().join("kernels").join(&file)).unwrap();
        if file == mutant.file {
            text = mutant.edits.iter().fold(text, |text, edit| edited(mutant, &text, edit));
            found = true;
        }
        if file == "linear_sm80.cu" {
            text = entries_of(mutant.program, &text);
        }
        let copy = folder.join(&file);
        if fs::read(&copy).ok().as_deref() != Some(text.as_bytes()) {
            fs::write(&copy, text).unwrap();
        }
    }
    assert!(found, "{}: no kernels/{}", mutant.name, mutant.file);
    let (stem, epilogue) = stem_and_epilogue(mutant.program);
    // Functions that no kernel file shows have their kernel in the test, or in a file beside it.
    let tests = root().join("tests/emu/kernels");
    let sources = [
        tests.join(format!("{stem}_entries.h")),
        folder.join(format!("{stem}.cu")),
        folder.join(format!("{stem}_sm80.cu")),
        tests.join(format!("{stem}_test.cpp")),
    ];
    let source = sources.into_iter().find(|file| file.exists()).unwrap();
    let mut flags = vec![format!("-I{}", folder.display()), "-Ikernels".to_owned()];
    flags.extend(epilogue.map(|epilogue| epilogue_alone(mutant.program, epilogue)));
    tools().object(&folder.join("kernel.o"), &source, &flags)
}

/// The names of `kernels/*.cu` and `*.cuh`.
fn kernel_files() -> impl Iterator<Item = String> {
    let names = fs::read_dir(root().join("kernels")).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.into_string().unwrap());
    names.filter(|name| name.ends_with(".cu") || name.ends_with(".cuh"))
}

fn stem_and_epilogue(program: &str) -> (&str, Option<&str>) {
    match program.strip_prefix("linear_") {
        None => (program, None),
        Some(epilogue) => match epilogue.strip_prefix("sm90_") {
            None => ("linear", Some(epilogue)),
            Some(epilogue) => ("linear_sm90", Some(epilogue)),
        },
    }
}

/// What the compiler is told, so that it sees one epilogue only.
fn epilogue_alone(program: &str, epilogue: &str) -> String {
    let epilogue = epilogue.to_uppercase();
    if program.starts_with("linear_sm90_") {
        format!("-DEPILOGUES=EACH({epilogue})")
    } else {
        format!("-DEPILOGUES=TEST({epilogue}, {program});")
    }
}

/// linear_sm80.cu without the entry points of other epilogues, which are most of what there is to compile.
fn entries_of(program: &str, text: &str) -> String {
    const ENTRY: &str = "extern \"C\"";
    let mut parts = text.split(ENTRY);
    let mut kept = parts.next().unwrap().to_owned();
    for part in parts.filter(|part| part.contains(&format!(" {program}_"))) {
        kept += ENTRY;
        kept += part;
    }
    kept
}

struct Tools {
    compiler: String,
    /// Those of the emulated device, but for speed: less optimisation, no lines in reports.
    flags: Vec<String>,
    engine: PathBuf,
    /// `target/emu/mutants`
    folder: PathBuf,
}

fn tools() -> &'static Tools {
    static TOOLS: OnceLock<Tools> = OnceLock::new();
    TOOLS.get_or_init(|| {
        finish(Command::new("bash").arg("tests/emu/build").env("EMU_ENGINE_ONLY", "1").current_dir(root()));
        let emu = root().join("target/emu");
        let flags = fs::read_to_string(emu.join("flags")).unwrap();
        let faster = ["-O1", "-g0", "-w", "-Itests/emu"];
        Tools {
            compiler: std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned()),
            flags: flags.lines().chain(faster).map(str::to_owned).collect(),
            engine: emu.join("libengine.a"),
            folder: emu.join("mutants"),
        }
    })
}

impl Tools {
    /// Compiles, unless that was done with these flags, after all that was read then.
    fn object(&self, object: &Path, source: &Path, flags: &[String]) -> PathBuf {
        fs::create_dir_all(object.parent().unwrap()).unwrap();
        let read = object.with_extension("d");
        let mut command = Command::new(&self.compiler);
        command.args(&self.flags).args(flags).arg("-MMD").arg("-MF").arg(&read).args(["-x", "c++", "-c"]);
        command.arg(source).arg("-o").arg(unfinished(object)).current_dir(root());
        let (line, lines) = (format!("{command:?}"), object.with_extension("cmd"));
        let same = fs::read_to_string(&lines).is_ok_and(|before| before == line);
        if !same || !fs::read_to_string(&read).is_ok_and(|read| newer(object, &named(&read))) {
            finish(&mut command);
            fs::rename(unfinished(object), object).unwrap();
            fs::write(lines, line).unwrap();
        }
        object.to_owned()
    }

    /// Links, where the first of equal names counts.
    fn program(&self, program: &Path, objects: &[PathBuf]) -> PathBuf {
        let mut parts = objects.to_vec();
        parts.push(self.engine.clone());
        if !newer(program, &parts) {
            let mut command = Command::new(&self.compiler);
            command.args(["-s", "-Wl,-z,muldefs"]).args(&parts).args(["-ldl", "-lpthread", "-o"]);
            finish(command.arg(unfinished(program)));
            fs::rename(unfinished(program), program).unwrap();
        }
        program.to_owned()
    }
}

/// Where something is made that has its name only when it is whole.
fn unfinished(made: &Path) -> PathBuf {
    made.with_extension("new")
}

/// The files that a make rule of the compiler names.
fn named(rule: &str) -> Vec<PathBuf> {
    let files = rule.split_once(':').map_or("", |(_, files)| files).split_whitespace();
    files.filter(|word| *word != "\\").map(|file| root().join(file)).collect()
}

/// Whether `made` is there, and no older than any of these.
fn newer(made: &Path, parts: &[PathBuf]) -> bool {
    let time = |file: &Path| fs::metadata(file).and_then(|data| data.modified()).ok();
    time(made).is_some_and(|made| parts.iter().all(|part| time(part).is_some_and(|part| part <= made)))
}

fn finish(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, said(&output));
}
