use super::driver::DevicePtr;
use super::launch::{Entry, Kernel, parameters};
use super::layer_norm::LayerNormParameters;
use super::testkit::{Bench, gpu};
use super::*;

parameters! {
    /// `layer_norm`, as somebody might remember it.
    struct Swapped {
        y: DevicePtr<half::f16>,
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
    assert!(name.starts_with("cuda:0 (") && name.ends_with(", sm80 kernels)"), "{name}");
}

#[test]
fn parameters_are_compared_with_the_kernel() {
    let gpu = gpu();
    let images = super::testkit::images();
    let image = images.iter().find(|image| image.name == "layer_norm").unwrap();
    let module = Module::load(&gpu.context, image.name, image.bytes).unwrap();
    let error = Kernel::<Swapped>::load(&module, layer_norm::ENTRY).unwrap_err().to_string();
    assert!(error.contains("launch of layer_norm: parameter 3 (`rows`) is 4 bytes at 24 here"), "{error}");
    let error = Kernel::<Short>::load(&module, layer_norm::ENTRY).unwrap_err().to_string();
    assert!(error.contains("more than 7 parameters"), "{error}");
    let entry = Entry { name: "no_such_kernel", ..layer_norm::ENTRY };
    let error = Kernel::<Short>::load(&module, entry).unwrap_err().to_string();
    assert!(error.contains("no kernel `no_such_kernel`"), "{error}");
}

#[test]
fn a_missing_image_is_named() {
    let error = Kernels::load(&gpu().context, &[]).unwrap_err().to_string();
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
fn launches_have_the_kernels_own_constants() {
    let _ = gpu();
    if super::testkit::emulated_constant("warp").is_none() {
        return; // the machine's own GPU does not tell
    }
    let constant = |name: &str| super::testkit::emulated_constant(name).unwrap();
    for ([large, small], epilogue) in linear::ENTRIES.into_iter().zip(0..) {
        for (entry, tile) in [(large, linear::Tile::Large), (small, linear::Tile::Small)] {
            let stem = if tile == linear::Tile::Large { "linear_128x128" } else { "linear_64x64" };
            let is = |name: &str| constant(&format!("{stem}.{name}"));
            assert_eq!(is("threads"), i64::from(entry.threads), "epilogue {epilogue}");
            assert_eq!(is("shared_bytes"), i64::from(entry.shared));
            assert_eq!((is("bm"), is("bn")), (tile.side() as i64, tile.side() as i64));
        }
    }
    assert_eq!(constant("linear.args_bytes"), size_of::<linear::LinearArgs>() as i64);
}

/// Runs one of the tests below in a process of its own.
fn in_child(test: &str, environment: &[(&str, &str)]) {
    super::testkit::in_child(&format!("cuda::tests::{test}"), environment);
}

/// A layer norm of some rows, to the end of its stream.
fn layer_norm_fails() -> Error {
    let bench = Bench::new();
    let (_x, x) = bench.matrix(&[half::f16::ONE; 64], 8, 8, half::f16::ZERO);
    let weights = bench.array(&[half::f16::ONE; 8]);
    let norm = layer_norm::Norm { weight: weights.span(), bias: weights.span() };
    let done = bench.gpu.kernels.layer_norm.enqueue(&bench.stream, &x, &x, &norm);
    done.and_then(|()| bench.stream.synchronize()).unwrap_err()
}

#[test]
fn a_failing_kernel_is_named_when_launches_are_waited_for() {
    if !super::testkit::on_real_gpu() {
        in_child(
            "child_names_the_kernel",
            &[("EMU_FAIL", "launch:layer_norm:700"), ("IMAGEHERE_CUDA_SYNC", "1")],
        );
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_names_the_kernel() {
    let error = layer_norm_fails().to_string();
    assert!(error.contains("layer_norm in 2x1x1 blocks of 128 threads failed"), "{error}");
    assert!(error.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"), "{error}");
}

#[test]
fn a_broken_device_is_refused_from_then_on() {
    if !super::testkit::on_real_gpu() {
        in_child("child_is_refused", &[("EMU_FAIL", "launch:layer_norm:719")]);
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_is_refused() {
    let error = layer_norm_fails();
    assert_eq!(error.category(), crate::Category::Device);
    // Whichever call came next.
    assert!(error.to_string().contains(" failed: CUDA_ERROR_LAUNCH_FAILED (719)"), "{error}");
    assert!(error.to_string().contains("IMAGEHERE_CUDA_SYNC=1"), "{error}");
    let error = Context::open(0).unwrap_err().to_string();
    let broke = error.contains("its context broke earlier in this process: cu");
    assert!(broke && error.contains("CUDA_ERROR_LAUNCH_FAILED"), "{error}");
}

#[test]
fn two_devices_reach_one_another() {
    if !super::testkit::on_real_gpu() {
        in_child("child_with_two_devices", &[("EMU_DEVICES", "2")]);
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_with_two_devices() {
    let first = &gpu().context;
    let second = Context::open(1).unwrap();
    assert!(first.reach(&second).unwrap() && first.reach(&second).unwrap(), "twice is well");
    let [here, there] =
        [first, &second].map(|context| driver::DeviceMemory::new(context, 64, "a test").unwrap());
    // SAFETY: the memory lives to the end of this test.
    let [from, to] = [&here, &there].map(|memory| unsafe { memory.span() });
    let [stream, other] = [first, &second].map(|context| driver::Stream::new(context).unwrap());
    stream.upload_and_wait(from, &[7; 64]).unwrap();
    assert!(first.may_write(to.ptr()).unwrap() && first.may_write(from.ptr()).unwrap());
    assert!(!second.may_write(from.ptr()).unwrap(), "that way it was not opened");
    assert!(!first.may_write(DevicePtr::<u8>::new(4096)).unwrap());
    let [done, before] = [first, &second].map(|context| driver::Event::new(context).unwrap());
    for (pitch, expected) in [(4, [7; 16]), (6, [7, 7, 7, 7, 1, 1, 7, 7, 7, 7, 1, 1, 7, 7, 7, 7])] {
        other.fill(to, 1).unwrap();
        before.record(&other).unwrap();
        stream.wait_for(&before).unwrap();
        let rows = from.slice(0..16).unwrap();
        stream.copy_rows_to_peer(&second, to, pitch, rows, 4).unwrap();
        done.record(&stream).unwrap();
        other.wait_for(&done).unwrap();
        let mut read = [0; 64];
        other.download_and_wait(to, &mut read).unwrap();
        assert_eq!(read[..16], expected);
        assert!(read[22..].iter().all(|byte| *byte == 1));
        let narrow = to.slice(0..15).unwrap();
        assert!(stream.copy_rows_to_peer(&second, narrow, pitch, rows, 4).is_err(), "no room");
    }
}

#[test]
#[cfg_attr(has_kernels, ignore = "this build has kernels")]
fn without_kernels_it_says_what_to_run() {
    let error = Gpu::open(0).unwrap_err().to_string();
    assert!(error.contains("no CUDA kernels") && error.contains("kernels/fetch-nvcc"), "{error}");
}
