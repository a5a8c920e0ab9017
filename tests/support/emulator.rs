//! The emulated device (`tests/emu`), built where it is out of date and put in the NVIDIA driver's place.
//!
//! One body for the tests inside the crate and for those beside it. With `IMAGEHERE_TEST_GPU=1` the machine's
//! own GPU takes its place where a test can do with either.

#![allow(dead_code, reason = "every test file uses its own part of this")]

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Asks for the machine's own GPU.
pub fn on_real_gpu() -> bool {
    std::env::var_os("IMAGEHERE_TEST_GPU").is_some_and(|value| value == "1")
}

/// Builds the emulated device, once; the folder that holds its `libcuda.so`, for LD_LIBRARY_PATH.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let built = Command::new("bash").arg(root.join("tests/emu/build")).status().unwrap();
        assert!(built.success(), "tests/emu/build: {built}");
        root.join("target/emu")
    })
}

/// Loads the emulated device into this process, once: who asks for the driver from now on gets it.
pub fn load() -> &'static libloading::Library {
    static LOADED: OnceLock<libloading::Library> = OnceLock::new();
    LOADED.get_or_init(|| {
        let path = folder().join("libcuda.so");
        // SAFETY: a library of this repository's own; it is never unloaded.
        unsafe { libloading::Library::new(&path) }
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    })
}

/// Sees to it that this process finds the device of the tests: the emulated one, or the machine's GPU.
pub fn provide() {
    if !on_real_gpu() {
        load();
    }
}

/// Changes a setting of the loaded device, say ("SEED", "3"): see tests/emu/README.md.
pub fn set(name: &str, value: &str) {
    let [name, value] = [name, value].map(|text| CString::new(text).unwrap());
    type Set = unsafe extern "C" fn(*const c_char, *const c_char) -> c_int;
    // SAFETY: a function of this repository's own (tests/emu/driver/settings.cpp), of this type.
    let refused = unsafe { load().get::<Set>("emu_set").unwrap()(name.as_ptr(), value.as_ptr()) };
    assert_eq!(refused, 0, "emu_set({name:?}, {value:?})");
}

/// Pieces of work that the loaded device was given and has not done.
pub fn pending() -> usize {
    type Pending = unsafe extern "C" fn() -> usize;
    // SAFETY: a function of this repository's own (tests/emu/driver/settings.cpp), of this type.
    unsafe { load().get::<Pending>("emu_pending").unwrap()() }
}

/// Times that a fault of EMU_PLANT changed something.
pub fn planted() -> usize {
    type Planted = unsafe extern "C" fn() -> usize;
    // SAFETY: a function of this repository's own (tests/emu/driver/plant.cpp), of this type.
    unsafe { load().get::<Planted>("emu_planted").unwrap()() }
}

/// A number of the kernels' headers, which the emulated device knows.
pub fn constant(name: &str) -> Option<i64> {
    let name = CString::new(name).unwrap();
    type Constant = unsafe extern "C" fn(*const c_char) -> i64;
    // SAFETY: a function of this repository's own (tests/emu/driver/constants.cpp), of this type.
    let value = unsafe { load().get::<Constant>("emu_constant").unwrap()(name.as_ptr()) };
    (value >= 0).then_some(value)
}
