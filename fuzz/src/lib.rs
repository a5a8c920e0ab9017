//! What the targets share: the bodies and the bound are those of `tests/hostile.rs`.

#[path = "../../tests/hostile/bounded.rs"]
mod bounded;
#[path = "../../tests/hostile/targets.rs"]
mod targets;

/// Runs the body of a target once.
pub fn run(target: &str, bytes: &[u8]) {
    thread_local!(static ALL: Vec<imagehere::fuzzing::Target> = targets::all());
    ALL.with(|all| {
        let (_, body) = all.iter().find(|(name, _)| *name == target).expect("a target of this name");
        bounded::bounded(|| body(bytes));
    });
}

/// The whole of a file in `fuzz_targets/`.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::run($name, bytes));
    };
}
