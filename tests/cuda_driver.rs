//! Asking for CUDA where there is no driver, or one that will not do: an error that says so, never a panic.
//!
//! Each case runs in a process of its own, with a library in front of whatever driver this machine has.

#![cfg(all(feature = "cuda", target_os = "linux"))]

use std::path::Path;
use std::process::Command;

/// Compiles a `libcuda.so` of this text and returns what a process that finds it says about device 0.
fn with_driver(source: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("cuda.c"), source).unwrap();
    let mut cc = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    cc.args(["-shared", "-fPIC", "-o", "libcuda.so", "cuda.c"]).current_dir(folder.path());
    assert!(cc.status().unwrap().success());
    ask(folder.path())
}

/// What a process with `folder` in its library path says about device 0.
fn ask(folder: &Path) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "child_asks_for_a_device", "--ignored", "--nocapture"]);
    let output = child.env("LD_LIBRARY_PATH", folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said.lines().find_map(|line| line.split_once("answer: ")).unwrap().1.to_owned()
}

#[test]
#[ignore = "run by the other tests, in a process of its own"]
fn child_asks_for_a_device() {
    match imagehere::cuda::describe(0) {
        Ok(name) => println!("answer: {name}"),
        Err(error) => {
            assert_eq!(error.category(), imagehere::Category::Device);
            println!("answer: {error}");
        }
    }
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn a_driver_that_will_not_do() {
    let answer = with_driver("int something(void) { return 0; }");
    assert!(answer.contains("has no `cuDriverGetVersion`"), "{answer}");

    let answer = with_driver("int cuDriverGetVersion(int *v) { *v = 12090; return 0; }");
    assert!(
        answer.contains("too old: it has CUDA 12.9, the kernels need 13.0. Update it to 580"),
        "{answer}"
    );

    let answer = with_driver(
        "int cuDriverGetVersion(int *v) { *v = 13000; return 0; }\nint cuInit(unsigned f) { return 100; }",
    );
    assert!(answer.contains("has no `cuDeviceGetCount`"), "{answer}");
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn no_driver_or_one_that_works() {
    // Machines differ; none of them panics.
    let answer = ask(Path::new("/nonexistent"));
    let absent = "device `cuda:0`: there is no NVIDIA driver: libcuda.so was not found. Install the driver";
    assert!(answer.starts_with("cuda:0 (") || answer.contains("device `cuda"), "{answer}");
    if !Path::new("/proc/driver/nvidia").exists() {
        assert!(answer.starts_with(absent), "{answer}");
    }
}

#[test]
#[cfg_attr(has_kernels, ignore = "this build has kernels")]
fn a_build_without_kernels() {
    let answer = ask(Path::new("/nonexistent"));
    assert!(answer.contains("run `bash kernels/fetch-nvcc` and build again"), "{answer}");
}
