//! Every kernel at the real model's sizes, and whole encodes, on GPU 0. Times are the device's own, between events.
//!
//! ```text
//!   linear/NAME/B          a layer with its epilogue        attention/B  layer_norm/B  patches/B  verify/B
//!   resize/MEGAPIXELS      both passes                      embed_tokens/ROWS
//!   encode/from_pixels/B   pixels on the device to filled slots, the device's time
//!   encode/encode_into/B   Encoder::encode_into a sequence on the device, wall time
//!
//!   cuda latency [MODEL]   a checkpoint opened, the first call, percentiles of the later ones: wall time, JSON lines
//!   cuda files [MODEL]     JPEG files to slots, with the time of decoding; MODEL: a directory, else a random one
//!   cuda tune FILE B ...   every kernel of Hopper's for linear layers and attention at groups of B images, as JSON
//!                          lines; FILE: the best tiles, as lines of src/cuda/linear/tiles.txt
//!   cuda model             what the model of linear layers on Hopper takes, as a table; needs no device
//!   cuda rounds            from_pixels for each line `IMAGES SAMPLES` on stdin, to take turns with others
//! ```
//!
//! B images run in groups, as an encode runs them. Each result is checked before it is timed: outputs are poisoned,
//! every element must be written, some are compared with f64, bytes with the CPU's, an encode with the CPU's. Inputs
//! are fresh noise (`IMAGEHERE_BENCH_SEED` repeats a run), weights too, and enough of both that no cache holds all.
//! Kernels are timed as recorded graphs of many launches. An "element" is a floating point operation: `Gelem/s` reads
//! as GFLOP/s.
//!
//! Without a GPU or without kernels it says so and does nothing. `IMAGEHERE_BENCH_TINY=1` shrinks all sizes, so that
//! the emulated device of the tests runs it (and makes a missing device an error):
//!
//! ```text
//! bash tests/emu/build
//! LD_LIBRARY_PATH=target/emu IMAGEHERE_BENCH_TINY=1 cargo test --bench cuda
//! ```

#[cfg(feature = "cuda")]
fn main() {
    suite::main();
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("skipped: the feature `cuda` is off");
}

#[cfg(feature = "cuda")]
#[path = "cuda/calls.rs"]
mod calls;
#[cfg(feature = "cuda")]
#[path = "cuda/encode.rs"]
mod encode;
#[cfg(feature = "cuda")]
#[path = "cuda/kernels.rs"]
mod kernels;
#[cfg(feature = "cuda")]
#[path = "cuda/linear.rs"]
mod linear;
#[cfg(feature = "cuda")]
#[path = "cuda/suite.rs"]
mod suite;
#[cfg(feature = "cuda")]
#[path = "cuda/tune.rs"]
mod tune;
