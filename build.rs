//! Says what this build can see, and compiles the CUDA kernels where there is an nvcc.
//!
//! - cfg `has_shared`: the reference data lies beside the checkout.
//! - cfg `has_conform_goldens`: some GPU's answers lie under `tests/goldens/conform`.
//! - cfg `has_kernels`: nvcc was found, so the table of kernel images is full. Without it, or without the
//!   feature `cuda`, the Rust code is the same and the table empty.
//! - cfg `has_nvdisasm`: with it came NVIDIA's disassembler, which `IMAGEHERE_NVDISASM` then names to the tests.

use std::path::{Path, PathBuf};

#[path = "build/nvcc.rs"]
mod nvcc;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(has_shared)");
    println!("cargo::rustc-check-cfg=cfg(has_conform_goldens)");
    println!("cargo::rustc-check-cfg=cfg(has_kernels)");
    println!("cargo::rustc-check-cfg=cfg(has_nvdisasm)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let data = root.join("../shared/data");
    if data.is_dir() {
        println!("cargo::rerun-if-changed={}", data.display());
        println!("cargo::rustc-cfg=has_shared");
    }
    let goldens = root.join("tests/goldens/conform");
    if let Ok(places) = goldens.read_dir() {
        println!("cargo::rerun-if-changed={}", goldens.display());
        if places.flatten().any(|place| place.path().join("manifest.json").is_file()) {
            println!("cargo::rustc-cfg=has_conform_goldens");
        }
    }
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        kernels(&root, &out);
    }
}

/// Compiles `kernels/*.cu` if it can, and writes the table `images.rs` in any case.
fn kernels(root: &Path, out: &Path) {
    let compiled = nvcc::find(root).and_then(|found| match found {
        Some(nvcc) => {
            if let Some(path) = nvcc.disassembler() {
                println!("cargo::rustc-cfg=has_nvdisasm");
                println!("cargo::rustc-env=IMAGEHERE_NVDISASM={}", path.display());
            }
            nvcc::compile_all(&nvcc, &root.join("kernels"), &out.join("kernels")).map(Some)
        }
        None => Ok(None),
    });
    match compiled {
        Ok(images) => {
            if images.as_ref().is_some_and(|images| !images.is_empty()) {
                println!("cargo::rustc-cfg=has_kernels");
            }
            let table = nvcc::table(images.as_deref().unwrap_or_default());
            std::fs::write(out.join("images.rs"), table).expect("OUT_DIR can be written");
        }
        Err(message) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
        }
    }
}
