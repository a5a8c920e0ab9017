//! What the tests of the CUDA parts share: a device, memory on it, comparisons.
//!
//! The device is the emulated one, which these tests build (`tests/emu/build`) and load before anything asks
//! for the driver; with `IMAGEHERE_TEST_GPU=1` it is the machine's own GPU. Tests that need the emulated one (its log,
//! its faults, a second device) are in modules `emulated`: they fail on a GPU, where whoever runs tests leaves them out
//! with `--skip ::emulated::` and says so.

use std::sync::OnceLock;

use half::f16;

use super::driver::{DeviceMemory, Span, Stream};
use super::images::Image;
use super::matrix::Matrix;
use super::{Gpu, images};

#[path = "../../tests/support/emulator.rs"]
mod emulator;

pub(crate) use crate::cpu::testkit::{
    Model, Random, bits, erfc, least_cosine, poison, relative_l2, ulps, wide,
};
pub(crate) use emulator::{on_real_gpu, planted, provide as provide_device};

/// Opens the device of the tests, once.
pub(crate) fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| {
        provide_device();
        if on_real_gpu() {
            return Gpu::open(0).unwrap();
        }
        Gpu::open_with(0, images()).unwrap()
    })
}

/// Fails on a GPU.
#[track_caller]
pub(crate) fn needs_emulated() {
    assert!(
        !on_real_gpu(),
        "this test needs the emulated device, and IMAGEHERE_TEST_GPU=1 asks for a GPU: leave it out with \
         `--skip ::emulated::`"
    );
}

/// Loads the emulated device.
#[track_caller]
pub(crate) fn load_emulator() -> &'static libloading::Library {
    needs_emulated();
    emulator::load()
}

/// Changes a setting of the emulated device.
#[track_caller]
pub(crate) fn set_emulated(name: &str, value: &str) {
    needs_emulated();
    emulator::set(name, value);
}

/// Pieces of work that the emulated device has not done.
#[track_caller]
pub(crate) fn emulated_pending() -> usize {
    needs_emulated();
    emulator::pending()
}

/// A number of the kernels' headers, which the emulated device knows.
#[track_caller]
pub(crate) fn emulated_constant(name: &str) -> i64 {
    needs_emulated();
    emulator::constant(name).unwrap_or_else(|| panic!("the emulated device knows no `{name}`"))
}

/// Runs a test, by its path in this crate and ignored, in a process of its own with this environment, which is for the
/// emulated device. What it said.
#[track_caller]
pub(crate) fn in_child(test: &str, environment: &[(&str, &str)]) -> String {
    needs_emulated();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    let output = command.envs(environment.iter().copied()).output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "{environment:?}: {said}");
    said
}

/// What the emulated device did during `work`: a line of its log each. For tests in a process of their own.
pub(crate) fn logged(work: impl FnOnce()) -> Vec<serde_json::Value> {
    needs_emulated();
    let file = tempfile::NamedTempFile::new().unwrap();
    emulator::set("LOG", file.path().to_str().unwrap());
    work();
    emulator::set("LOG", "");
    let log = std::fs::read_to_string(file.path()).unwrap();
    log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The images that [`gpu`] was opened with. The emulated device has the kernels compiled in and looks at a
/// magic number alone: so these tests need no nvcc.
pub(crate) fn images() -> &'static [Image] {
    /// Begins a fat binary.
    const MAGIC: u32 = 0xba55_ed50;
    static IMAGES: OnceLock<Vec<Image>> = OnceLock::new();
    if on_real_gpu() {
        return images::IMAGES;
    }
    IMAGES.get_or_init(|| {
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        let bytes: &'static [u8] = bytes.leak();
        images::STEMS.iter().map(|&name| Image { name, bytes }).collect()
    })
}

/// A stream and memory for one test.
pub(crate) struct Bench {
    pub(crate) gpu: &'static Gpu,
    pub(crate) stream: Stream,
}

/// Memory on the device, kept for the length of a test.
pub(crate) struct Array {
    memory: DeviceMemory,
    len: usize, // fp16
}

impl Bench {
    pub(crate) fn new() -> Self {
        let gpu = gpu();
        Self { gpu, stream: Stream::new(&gpu.context).unwrap() }
    }

    /// Allocates and fills with `values`.
    pub(crate) fn array(&self, values: &[f16]) -> Array {
        let memory = DeviceMemory::new(&self.gpu.context, size_of_val(values), "a test").unwrap();
        let array = Array { memory, len: values.len() };
        self.stream.upload_and_wait(array.span(), values).unwrap();
        array
    }

    /// `[rows, columns]` from `values`, rows `pitch` apart with `between` between them.
    pub(crate) fn matrix(
        &self,
        values: &[f16],
        columns: usize,
        pitch: usize,
        between: f16,
    ) -> (Array, Matrix) {
        let rows = values.len() / columns;
        let mut padded = vec![between; rows * pitch];
        for (padded, row) in padded.chunks_exact_mut(pitch).zip(values.chunks_exact(columns)) {
            padded[..columns].copy_from_slice(row);
        }
        let array = self.array(&padded);
        let matrix = Matrix::new(array.span(), rows, columns, pitch).unwrap();
        (array, matrix)
    }

    /// `[rows, columns]` that hold nothing but poison.
    pub(crate) fn poisoned(&self, rows: usize, columns: usize, pitch: usize) -> (Array, Matrix) {
        self.matrix(&poison(rows * columns), columns, pitch, f16::NAN)
    }

    /// All elements, after the work given to the stream.
    pub(crate) fn read(&self, array: &Array) -> Vec<f16> {
        let mut values = vec![f16::ZERO; array.len];
        self.stream.download_and_wait(array.span(), &mut values).unwrap();
        values
    }

    /// The rows of a matrix; what lies between them must be what [`Bench::matrix`] left there.
    #[track_caller]
    pub(crate) fn rows(&self, array: &Array, matrix: &Matrix, between: f16) -> Vec<f16> {
        let all = self.read(array);
        let mut rows = Vec::with_capacity(matrix.rows * matrix.columns);
        for row in all.chunks_exact(matrix.pitch) {
            rows.extend_from_slice(&row[..matrix.columns]);
            assert!(
                row[matrix.columns..].iter().all(|x| x.to_bits() == between.to_bits()),
                "between the rows"
            );
        }
        rows
    }
}

impl Array {
    pub(crate) fn span(&self) -> Span<f16> {
        // SAFETY: tests keep arrays until they have read the results.
        unsafe { self.memory.span() }.cast().unwrap()
    }
}
