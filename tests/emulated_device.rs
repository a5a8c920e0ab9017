//! The emulated device itself, and every kernel on it without a launcher between: the C++ tests under `tests/emu/`.
//!
//! Activations are swept over all finite fp16 there; shapes have tails and wrap every pipeline; each kernel runs under
//! several seeds.

#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::process::Command;

/// Runs a script of `tests/emu/` and shows what it says if it fails.
fn passes(script: &str, arguments: &[&str]) {
    let mut bash = Command::new("bash");
    let output = bash.arg(script).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(
        output.status.success(),
        "{script} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn finds_planted_faults_and_answers_as_a_driver() {
    passes("tests/emu/selftest/run", &[]);
}

/// Hopper's primitives in all their widths: no spills, no wgmma made to wait for the one before it.
#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn nvcc_takes_hoppers_primitives() {
    nvcc_takes("tests/emu/selftest/kernels/hopper_sm90.cu", 20);
    nvcc_takes("tests/emu/selftest/kernels/cluster_sm90.cu", 2);
}

/// A file of so many entries, for Hopper alone.
fn nvcc_takes(source: &str, expected: usize) {
    let folder = tempfile::tempdir().unwrap();
    let mut build = Command::new("bash");
    build.arg("tests/conform/build").arg(folder.path().join("hopper.fatbin"));
    build.env("SOURCE", source).env("REPORT", "1");
    let output = build.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    let count = |part: &str| said.matches(part).count();
    assert!(output.status.success(), "{said}");
    let entries = count("Compiling entry function");
    assert!(entries == expected && count("for 'sm_90a'") == entries, "{said}");
    assert_eq!(
        count("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"),
        entries,
        "{said}"
    );
    assert_eq!(count("(C75") + count("warning"), 0, "{said}");
}

/// One test for each `tests/emu/kernels/*_test.cpp`.
macro_rules! kernels {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            passes("tests/emu/try", &[concat!("tests/emu/kernels/", stringify!($name), "_test.cpp")]);
        }
    )*

        #[test]
        fn every_kernel_test_runs() {
            let mut listed = vec![$(concat!(stringify!($name), "_test.cpp").to_owned()),*];
            listed.sort();
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/emu/kernels");
            let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
            let mut there: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
            there.retain(|name| name.ends_with("_test.cpp"));
            there.sort();
            assert_eq!(there, listed);
        }
    };
}

kernels!(activation attention attention_sm90 convert embed_tokens fold layer_norm linear linear_sm90 patches resize verify);
