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
mod linear;
mod pixels;
mod rows;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::SystemTime;

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

/// How long a run may take; the slowest needs two seconds.
const SECONDS: &str = "60";

struct Mutant {
    /// The test: `tests/emu/kernels/PROGRAM_test.cpp`. `linear_E` is linear_test.cpp with that epilogue alone.
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
    let built = build(program, "as_it_is", |_, text| text);
    let seeds = seeds(0..8);
    let output = run(&built, &format!("{}..{}", seeds.start, seeds.end));
    assert!(output.status.success(), "{program}, {}: {}", output.status, said(&output));
}

fn is_caught(mutant: &Mutant) {
    let built = build(mutant.program, mutant.name, |file, text| {
        if file == mutant.file { mutant.edits.iter().fold(text, |text, edit| edited(mutant, &text, edit)) } else { text }
    });
    let mut missed = String::new();
    for seed in seeds(0..4) {
        let output = run(&built, &seed.to_string());
        let said = said(&output);
        let words = said.lines().find_map(|line| Some(line.strip_prefix("emulated device: ").unwrap_or(line).split_once(": ")?.0));
        let found = said.lines().find_map(|line| {
            let line = line.strip_prefix("emulated device: ").unwrap_or(line);
            mutant.means.iter().find(|means| line.strip_prefix(**means).is_some_and(|rest| rest.starts_with(": ")))
        });
        println!("{} {}, seed {seed}: {}", mutant.program, mutant.name, found.or(words.as_ref()).unwrap_or(&"nothing"));
        if found.is_none() || output.status.code() != Some(1) {
            missed += &format!("\nseed {seed}, {}: {said}", output.status);
        }
    }
    assert!(missed.is_empty(), "{} is not caught by {:?}:{missed}", mutant.name, mutant.means);
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

/// Compiles a program with the kernels as `change(file, text)` leaves them, if anything it is made of is newer.
fn build(program: &str, name: &str, change: impl Fn(&str, String) -> String) -> PathBuf {
    let tools = tools();
    let folder = tools.folder.join(program).join(name);
    fs::create_dir_all(&folder).unwrap();
    let (test, epilogue) = match program.strip_prefix("linear_") {
        Some(epilogue) => ("linear", Some(format!("-DEPILOGUES=TEST({}, {program});", epilogue.to_uppercase()))),
        None => (program, None),
    };
    for entry in fs::read_dir(root().join("kernels")).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        if !file.ends_with(".cu") && !file.ends_with(".cuh") {
            continue;
        }
        let mut text = change(&file, fs::read_to_string(root().join("kernels").join(&file)).unwrap());
        if epilogue.is_some() && file == "linear_sm80.cu" {
            text = entries_of(program, &text);
        }
        let copy = folder.join(&file);
        if fs::read(&copy).ok().as_deref() != Some(text.as_bytes()) {
            fs::write(&copy, text).unwrap();
        }
    }
    let mut arguments: Vec<OsString> = vec!["-include".into(), tools.first.clone().into()];
    arguments.extend(epilogue.map(OsString::from));
    let mut kernels = OsString::from("-I");
    kernels.push(&folder);
    arguments.extend([kernels, "-Ikernels".into(), "-c".into()]);
    arguments.push(format!("tests/emu/kernels/{test}_test.cpp").into());

    let built = folder.join("test");
    let key = format!("{:?} {:?}", tools.flags, arguments);
    if !fresh(&built, &key) || modified(&tools.engine) > modified(&built) {
        let object = folder.join("test.o");
        tools.compile(&built, &object, &arguments);
        let mut link = Command::new(&tools.compiler);
        link.arg(&object).arg(&tools.engine).args(["-ldl", "-lpthread", "-o"]).arg(&built);
        finish(&mut link);
        fs::remove_file(object).unwrap();
        fs::write(built.with_extension("key"), key).unwrap();
    }
    built
}

/// linear_sm80.cu without the entry points of other programs, which are most of what there is to compile.
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

/// What every mutant is compiled with.
struct Tools {
    compiler: OsString,
    flags: Vec<String>,
    /// `target/emu/mutants`
    folder: PathBuf,
    engine: PathBuf,
    /// What does not depend on the kernel, compiled once: half of the time.
    first: PathBuf,
}

fn tools() -> &'static Tools {
    static TOOLS: OnceLock<Tools> = OnceLock::new();
    TOOLS.get_or_init(|| {
        finish(Command::new("bash").arg("tests/emu/build").env("EMU_ENGINE_ONLY", "1").current_dir(root()));
        let emu = root().join("target/emu");
        let folder = emu.join("mutants");
        fs::create_dir_all(&folder).unwrap();
        let mut flags: Vec<String> =
            fs::read_to_string(emu.join("flags")).unwrap().lines().map(str::to_owned).collect();
        flags.extend(["-O1", "-g0", "-w", "-Itests/emu"].map(str::to_owned));
        let tools = Tools {
            compiler: std::env::var_os("CXX").unwrap_or_else(|| "g++".into()),
            flags,
            first: folder.join("first.h"),
            engine: emu.join("libengine.a"),
            folder,
        };
        let first = "#include <algorithm>\n#include <cmath>\n#include <random>\n#include \"harness.h\"\n";
        if fs::read_to_string(&tools.first).ok().as_deref() != Some(first) {
            fs::write(&tools.first, first).unwrap();
        }
        let header = tools.folder.join("first.h.gch");
        let arguments: [OsString; 3] = ["-x".into(), "c++-header".into(), tools.first.clone().into()];
        let key = format!("{:?}", tools.flags);
        if !fresh(&header, &key) {
            tools.compile(&header, &header, &arguments);
            fs::write(header.with_extension("key"), key).unwrap();
        }
        tools
    })
}

impl Tools {
    /// Compiles to `object`, and notes beside `built` which files were read.
    fn compile(&self, built: &Path, object: &Path, arguments: &[OsString]) {
        let mut command = Command::new(&self.compiler);
        command.args(&self.flags).args(arguments).arg("-MMD").arg("-MF").arg(built.with_extension("d"));
        finish(command.arg("-o").arg(object).current_dir(root()));
    }
}

/// Whether `built` was made with this key and after all that it was made of.
fn fresh(built: &Path, key: &str) -> bool {
    let (Some(made), Ok(files)) = (modified(built), fs::read_to_string(built.with_extension("d"))) else {
        return false;
    };
    let known = fs::read_to_string(built.with_extension("key"));
    let (_, files) = files.split_once(':').unwrap();
    let mut files = files.split_whitespace().filter(|word| *word != "\\");
    known.is_ok_and(|known| known == key)
        && files.all(|file| modified(&root().join(file)).is_some_and(|time| time <= made))
}

fn modified(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|data| data.modified()).ok()
}

fn finish(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, said(&output));
}
