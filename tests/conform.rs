//! Every function of `kernels/ptx.cuh` and `kernels/ptx_sm90.cuh` by itself: what it must answer, what GPUs answered, what
//! the emulated device does.
//!
//! `tests/conform/conform.py` runs the micro-kernels and does the comparing, on a GPU as here; these tests run it on the
//! emulated device.

#![cfg(all(feature = "cuda", target_os = "linux"))]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use support::Ended;

/// The emulated device with the micro-kernels inside, built once.
fn driver() -> &'static Path {
    static DRIVER: OnceLock<PathBuf> = OnceLock::new();
    DRIVER.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut build = Command::new("bash");
        build.arg(root.join("tests/emu/build")).env("EMU_KERNELS", "tests/conform/kernels");
        assert!(build.status().unwrap().success());
        root.join("target/emu/conform/libcuda.so")
    })
}

/// Runs `conform.py` on the emulated device, of this compute capability.
fn conform_on(capability: &str, seed: u32, arguments: &[&str]) -> Ended {
    let mut python = Command::new("python3");
    python.arg("tests/conform/conform.py").arg("--driver").arg(driver()).args(arguments);
    python
        .env("EMU_SEED", seed.to_string())
        .env("EMU_CC", capability)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    Ended::of(python.output().unwrap())
}

/// Where everything is.
fn conform(seed: u32, arguments: &[&str]) -> Ended {
    conform_on("9.0", seed, arguments)
}

/// Primitives whose way, not only whose answer, depends on the order of lanes, warps and copies.
const TOGETHER: &str = "shared_16_8,atomic_min_u64,atomic_add_u32,cp_async_16,cp_async_groups,block_barrier,\
    warp_barrier,shuffle_xor,shuffle,ballot,ldmatrix_x4,ldmatrix_x4_trans,product,swizzle_64,swizzle_128,mbarrier,\
    named_barrier,set_registers,grid_wait,tma_load_2d,tma_load_2d_plain,tma_load_3d,tma_load_3d_planes,\
    tma_load_3d_plain,tma_load_2d_multicast,cluster_rank,wgmma_16,wgmma_groups,wgmma_64,wgmma_80,wgmma_176,wgmma_208,\
    wgmma_256";

#[test]
fn every_primitive_answers_as_expected() {
    let said = conform(0, &["--check"]).ok();
    assert!(said.contains("all well"), "{said}");
    for seed in 1..4 {
        conform(seed, &["--check", "--only", TOGETHER]).ok();
    }
    let said = conform_on("8.0", 0, &["--check", "--only", "product,mbarrier,wgmma_16"]).ok();
    assert!(said.contains("device lacks them: mbarrier, wgmma_16\n"), "{said}");
    assert!(said.contains("1 primitives: all well"), "{said}");
}

#[test]
#[cfg_attr(
    not(has_conform_goldens),
    ignore = "no GPU has written goldens yet: python3 run --only conform on one, see benches/README.md"
)]
fn the_emulated_device_answers_as_gpus_did() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/conform");
    let mut compared = 0;
    for place in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if place.is_dir() {
            conform(0, &["--compare", place.to_str().unwrap()]).ok();
            compared += 1;
        }
    }
    assert!(compared > 0);
}

/// Changes a result file and asserts that the comparison says so, or accepts it.
#[track_caller]
fn perturbed(place: &Path, name: &str, refused: bool, change: impl Fn(&mut Vec<u8>)) {
    let file = place.join(format!("{name}.bin"));
    let before = fs::read(&file).unwrap();
    let mut bytes = before.clone();
    change(&mut bytes);
    assert_ne!(bytes, before);
    fs::write(&file, &bytes).unwrap();
    let ended = conform(0, &["--compare", place.to_str().unwrap(), "--only", name]);
    let said = format!("{name}: NOT as the golden: 1 of ");
    assert_eq!((ended.code, ended.stdout.contains(&said)), (i32::from(refused), refused), "{ended:#?}");
    fs::write(&file, before).unwrap();
}

#[test]
fn a_golden_that_differs_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let names = "ldmatrix_x4,mma_16816,exp2_approx,f32_to_fp16";
    let (raw, small) = (folder.path().join("raw"), folder.path().join("small"));
    let places = ["--out", raw.to_str().unwrap(), "--store", small.to_str().unwrap(), "--only", names];
    conform(0, &places).ok();
    for place in [&raw, &small] {
        conform(0, &["--compare", place.to_str().unwrap(), "--only", names]).ok();
    }

    // One bit of what is exact.
    perturbed(&raw, "ldmatrix_x4", true, |bytes| bytes[100] ^= 4);
    perturbed(&raw, "f32_to_fp16", true, |bytes| bytes[2000] ^= 1);
    // Twice the bound of 2 x 2^-22 that two devices may be apart, in the last of the sweep's own numbers; then half.
    let scaled = |by: f32| {
        move |bytes: &mut Vec<u8>| {
            let last = bytes.len() - 4;
            let value = f32::from_le_bytes(bytes[last..].try_into().unwrap());
            assert!(value.is_normal());
            bytes[last..].copy_from_slice(&(value * by).to_le_bytes());
        }
    };
    let bound = 2.0 * 2.0f32.powi(-22);
    perturbed(&raw, "exp2_approx", true, scaled(1.0 + 2.0 * bound));
    perturbed(&raw, "exp2_approx", false, scaled(1.0 + 0.5 * bound));
    // A sum of products, by far more than any order of summing explains.
    perturbed(&raw, "mma_16816", true, |bytes| bytes[3] ^= 1);

    // Results that were kept by their hash alone.
    let manifest = small.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    assert!(!small.join("ldmatrix_x4.z").exists() && small.join("mma_16816.z").exists());
    let at = text.rfind("\"output\": \"").unwrap() + 11;
    fs::write(&manifest, format!("{}{}{}", &text[..at], "0".repeat(64), &text[at + 64..])).unwrap();
    assert_eq!(conform(0, &["--compare", small.to_str().unwrap(), "--only", names]).code, 1);
}

#[test]
fn every_function_of_ptx_cuh_has_a_micro_kernel() {
    let kernels = include_str!("conform/kernels/conform.cu");
    assert!(have_micro_kernels(include_str!("../kernels/ptx.cuh"), kernels) > 45);
    let kernels = include_str!("conform/kernels/conform_sm90.cu");
    assert!(have_micro_kernels(include_str!("../kernels/ptx_sm90.cuh"), kernels) > 20);
}

/// Asserts that `kernels` use all functions of a header; how many there are.
#[track_caller]
fn have_micro_kernels(header: &str, kernels: &str) -> usize {
    let mut functions = vec![];
    for line in header.lines() {
        if let Some((_, rest)) = line.split_once("PTX_INLINE ") {
            let name = rest.split_once('(').and_then(|(head, _)| head.split(' ').next_back());
            functions.extend(name.map(|name| name.trim_start_matches('*')));
        } else if let Some(rest) = line.strip_prefix("PTX_UNARY(") {
            functions.extend(rest.split(',').next());
        }
    }
    functions.retain(|name| !["name", "__attribute__"].contains(name)); // of macros
    let used = |name: &str| {
        [format!("{name}("), format!("{name}<"), format!("<{name}>")]
            .iter()
            .any(|use_| kernels.contains(use_))
    };
    let missing: Vec<_> = functions.iter().filter(|name| !used(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    functions.len()
}

#[test]
#[cfg_attr(not(has_kernels), ignore = "there was no nvcc when this was built: bash kernels/fetch-nvcc")]
fn nvcc_takes_the_micro_kernels() {
    let folder = tempfile::tempdir().unwrap();
    for (stem, arch) in [("conform", "sm_80"), ("conform_sm90", "sm_90a")] {
        let mut build = Command::new("bash");
        build.arg("tests/conform/build").arg(folder.path().join(stem).with_extension("fatbin"));
        build.env("SOURCE", format!("tests/conform/kernels/{stem}.cu")).env("ARCHS", arch);
        let ended = Ended::of(build.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap());
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:#?}");
    }
}

#[test]
fn the_gpu_suite_can_start() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gpu-suite");
    let python = |arguments: &[&str]| {
        let mut python = Command::new("python3");
        Ended::of(
            python.args(arguments).env("PYTHONDONTWRITEBYTECODE", "1").current_dir(folder).output().unwrap(),
        )
        .ok()
    };
    assert!(python(&["run", "--help"]).contains("--against"));
    // Those that need torch, too.
    let compile =
        "import glob\nfor name in glob.glob('*.py'): compile(open(name).read(), name, 'exec')\nprint('ok')";
    assert_eq!(python(&["-c", compile]), "ok\n");
}
