//! What only the emulated device shows: numbers of the kernels' headers, failures on order, a second device.

use crate::cuda::driver::{self, Context, DevicePtr};
use crate::cuda::launch::{Kernel, launch};
use crate::cuda::testkit::{self, Bench, gpu};
use crate::cuda::{layer_norm, linear};
use crate::error::Error;

#[test]
fn launches_have_the_kernels_own_constants() {
    let constant = testkit::emulated_constant;
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
    testkit::in_child(&format!("cuda::tests::emulated::{test}"), environment);
}

/// A layer norm of some rows, to the end of its stream.
fn layer_norm_fails() -> Error {
    testkit::needs_emulated();
    let bench = Bench::new();
    let (_x, x) = bench.matrix(&[half::f16::ONE; 64], 8, 8, half::f16::ZERO);
    let weights = bench.array(&[half::f16::ONE; 8]);
    let norm = layer_norm::Norm { weight: weights.span(), bias: weights.span() };
    let done = bench.gpu.kernels.layer_norm.enqueue(&bench.stream, &x, &x, &norm);
    done.and_then(|()| bench.stream.synchronize()).unwrap_err()
}

#[test]
fn a_failing_kernel_is_named_when_launches_are_waited_for() {
    in_child(
        "child_names_the_kernel",
        &[("EMU_FAIL", "launch:layer_norm:700"), ("IMAGEHERE_CUDA_SYNC", "1")],
    );
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
    in_child("child_is_refused", &[("EMU_FAIL", "launch:layer_norm:719")]);
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

/// A programmatic launch of a kernel that never waits for the launch before it.
fn programmatic(bench: &Bench) -> Result<(), Error> {
    let image = testkit::images().iter().find(|image| image.name == "layer_norm").unwrap();
    let module = driver::Module::load(&bench.gpu.context, image.name, image.bytes)?;
    let kernel = Kernel::load(&module, layer_norm::ENTRY.programmatic())?;
    let (_x, x) = bench.matrix(&[half::f16::ONE; 64], 8, 8, half::f16::ZERO);
    let weights = bench.array(&[half::f16::ONE; 8]);
    let parameters = layer_norm::LayerNormParameters {
        parts: DevicePtr::NULL,
        y: x.span.ptr(),
        x: x.span.ptr(),
        weight: weights.span().ptr(),
        bias: weights.span().ptr(),
        rows: 8,
        width: 8,
        pitch: 8,
        eps: 1e-5,
    };
    // SAFETY: 8 rows of 8 in place, and 8 weights, that live until the stream was waited for.
    unsafe { launch(&bench.stream, &kernel, [2, 1, 1], &parameters) }?;
    bench.stream.synchronize()
}

#[test]
fn programmatic_launches_say_so_to_the_driver() {
    in_child("child_launches_programmatically", &[("EMU_CC", "9.0")]);
    in_child("child_is_too_old_for_that", &[("EMU_CC", "8.9")]);
    for plainly in [("IMAGEHERE_CUDA_SYNC", "1"), ("IMAGEHERE_CUDA_PDL", "0")] {
        in_child("child_launches_plainly", &[("EMU_CC", "9.0"), plainly]);
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_launches_programmatically() {
    let bench = Bench::new();
    let log = testkit::logged(|| {
        let error = programmatic(&bench).unwrap_err().to_string();
        assert!(error.contains("CUDA_ERROR_LAUNCH_FAILED (719)"), "{error}");
    });
    let launched = |line: &serde_json::Value| line["kernel"] == "layer_norm" && line["programmatic"] == true;
    assert!(log.iter().any(launched), "{log:?}");
    assert!(log.iter().any(|line| line["kind"] == "dependency never waited for"), "{log:?}");
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_is_too_old_for_that() {
    let error = programmatic(&Bench::new()).unwrap_err().to_string();
    let refused =
        "cuLaunchKernelEx of layer_norm in 2x1x1 blocks of 128 threads failed: CUDA_ERROR_NOT_SUPPORTED";
    assert!(error.contains(refused), "{error}");
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_launches_plainly() {
    let bench = Bench::new();
    let log = testkit::logged(|| programmatic(&bench).unwrap());
    assert!(
        log.iter().any(|line| line["kernel"] == "layer_norm" && line["programmatic"].is_null()),
        "{log:?}"
    );
}

#[test]
fn two_devices_reach_one_another() {
    in_child("child_with_two_devices", &[("EMU_DEVICES", "2")]);
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn child_with_two_devices() {
    testkit::needs_emulated();
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
