use super::driver::DevicePtr;
use super::launch::{Entry, Kernel, parameters};
use super::layer_norm::LayerNormParameters;
use super::testkit::{Bench, gpu};
use super::*;

mod emulated;

parameters! {
    /// `layer_norm`, as somebody might remember it.
    struct Swapped {
        y: DevicePtr<half::f16>,
        parts: DevicePtr<linear::RowPart>,
        x: DevicePtr<half::f16>,
        weight: DevicePtr<half::f16>,
        rows: i32,
        width: i32,
        bias: DevicePtr<half::f16>,
        pitch: i32,
        eps: f32,
    }
}

parameters! {
    /// `layer_norm` without its last parameter.
    struct Short {
        y: DevicePtr<half::f16>,
        parts: DevicePtr<linear::RowPart>,
        x: DevicePtr<half::f16>,
        weight: DevicePtr<half::f16>,
        bias: DevicePtr<half::f16>,
        rows: i32,
        width: i32,
        pitch: i32,
    }
}

#[test]
fn names_the_device() {
    let name = gpu().describe();
    assert!(name.starts_with("cuda:0 (") && name.ends_with(" kernels)"), "{name}");
}

#[test]
fn parameters_are_compared_with_the_kernel() {
    let gpu = gpu();
    let images = super::testkit::images();
    let image = images.iter().find(|image| image.name == "layer_norm").unwrap();
    let module = Module::load(&gpu.context, image.name, image.bytes).unwrap();
    let error = Kernel::<Swapped>::load(&module, layer_norm::ENTRY).unwrap_err().to_string();
    assert!(error.contains("launch of layer_norm: parameter 4 (`rows`) is 4 bytes at 32 here"), "{error}");
    let error = Kernel::<Short>::load(&module, layer_norm::ENTRY).unwrap_err().to_string();
    assert!(error.contains("more than 8 parameters"), "{error}");
    let entry = Entry { name: "no_such_kernel", ..layer_norm::ENTRY };
    let error = Kernel::<Short>::load(&module, entry).unwrap_err().to_string();
    assert!(error.contains("no kernel `no_such_kernel`"), "{error}");
}

#[test]
fn a_missing_image_is_named() {
    let error = Kernels::load(&gpu().context, &[], Family::Portable).unwrap_err().to_string();
    assert!(error.contains("no image of the kernels in linear_sm80.cu"), "{error}");
}

#[test]
fn launches_outside_the_grid_are_refused() {
    let bench = Bench::new();
    let image = super::testkit::images().iter().find(|image| image.name == "layer_norm").unwrap();
    let module = Module::load(&bench.gpu.context, image.name, image.bytes).unwrap();
    let kernel = Kernel::<LayerNormParameters>::load(&module, layer_norm::ENTRY).unwrap();
    let null = DevicePtr::NULL;
    let parameters = LayerNormParameters {
        y: null,
        parts: DevicePtr::NULL,
        x: null,
        weight: null,
        bias: null,
        rows: 0,
        width: 8,
        pitch: 8,
        eps: 0.0,
    };
    for grid in [[0, 1, 1], [1 << 31, 1, 1], [1, 1 << 16, 1], [1, 1, 1 << 16]] {
        // SAFETY: refused before anything is launched.
        let error = unsafe { launch::launch(&bench.stream, &kernel, grid, &parameters) }.unwrap_err();
        assert!(error.to_string().contains("launch of layer_norm: a grid of"), "{error}");
    }
    assert!(launch::int("x", "rows", 1 << 31).is_err() && launch::int("x", "rows", (1 << 31) - 1).is_ok());
}

#[test]
#[cfg_attr(has_kernels, ignore = "this build has kernels")]
fn without_kernels_it_says_what_to_run() {
    let error = Gpu::open(0).unwrap_err().to_string();
    assert!(error.contains("no CUDA kernels") && error.contains("kernels/fetch-nvcc"), "{error}");
}
