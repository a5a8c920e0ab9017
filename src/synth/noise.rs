//! Noise that depends on nothing but seed, tensor name and element index.
//!
//! Element `i` of a tensor is a hash of (seed, name, i), so any range can be made on any thread in any order
//! and the whole is always the same. A 64-bit hash is cut into four 16-bit uniforms whose sum is close to a
//! normal distribution (Irwin–Hall, n = 4: bounded by ±3.46 standard deviations, which suits weights that
//! fp16 must hold). One hash and three additions: 1.4 GB of it take seconds.

use std::io::{self, Write};

use half::f16;
use rayon::prelude::*;

use super::DType;
use super::layout::Tensor;

/// Elements made and written at a time.
const BLOCK: usize = 1 << 22;
/// Elements made by one thread at a time.
const PIECE: usize = 1 << 15;

/// Writes a tensor's values to `sink`, in order, making the next block while the last is being written.
pub(super) fn stream(
    seed: u64,
    tensor: &Tensor,
    dtype: DType,
    sink: &mut dyn Write,
    progress: &mut dyn FnMut(usize),
) -> io::Result<()> {
    let key = key(seed, &tensor.name);
    let total = tensor.elements();
    let make = |start: usize, block: &mut Vec<u8>| {
        block.resize(BLOCK.min(total - start) * dtype.size(), 0);
        block.par_chunks_mut(PIECE * dtype.size()).enumerate().for_each(|(i, piece)| {
            fill(key, start + i * PIECE, tensor.mean, tensor.std, dtype, piece);
        });
    };
    let (mut ready, mut next) = (Vec::new(), Vec::new());
    make(0, &mut ready);
    for start in (0..total).step_by(BLOCK) {
        let after = start + BLOCK;
        let made = std::thread::scope(|scope| {
            // A thread that waits for the disk must not be one of rayon's.
            let making = (after < total).then(|| scope.spawn(|| make(after, &mut next)));
            let written = sink.write_all(&ready);
            if let Some(making) = making {
                making.join().expect("making noise does not panic");
            }
            written
        });
        made?;
        progress(ready.len() / dtype.size());
        std::mem::swap(&mut ready, &mut next);
    }
    Ok(())
}

/// The first `count` elements of a tensor of fp16, of the given mean and deviation.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "weights of the CUDA benchmarks"))]
pub(crate) fn halves(seed: u64, name: &str, count: usize, mean: f32, std: f32) -> Vec<f16> {
    let key = key(seed, name);
    let mut values = vec![f16::ZERO; count];
    values.par_chunks_mut(PIECE).enumerate().for_each(|(i, piece)| {
        fill(key, i * PIECE, mean, std, DType::F16, bytemuck::cast_slice_mut(piece));
    });
    values
}

/// Fills `bytes` with the elements from `start` on.
fn fill(key: u64, start: usize, mean: f32, std: f32, dtype: DType, bytes: &mut [u8]) {
    let value = |i: usize| mean + std * normal(hash(key, (start + i) as u64));
    match dtype {
        DType::Bf16 => {
            for (i, out) in bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *out = to_bf16(value(i)).to_le_bytes();
            }
        }
        DType::F16 => {
            for (i, out) in bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                *out = f16::from_f32(value(i)).to_le_bytes();
            }
        }
        DType::F32 => {
            for (i, out) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                *out = value(i).to_le_bytes();
            }
        }
    }
}

/// Rounds a finite number to bf16, to nearest, ties to even: `bf16::from_f32` without its look at NaN, which
/// costs half the time of the whole.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Makes the key of a tensor: FNV-1a over its name, mixed with the seed.
fn key(seed: u64, name: &str) -> u64 {
    let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    hash(seed, name.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, fnv))
}

/// Mixes a key and a counter (the output function of SplitMix64).
fn hash(key: u64, counter: u64) -> u64 {
    let mut z = key.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Turns 64 random bits into a number of mean 0 and standard deviation 1.
fn normal(bits: u64) -> f32 {
    const MEAN: f32 = 4.0 * 65535.0 / 2.0;
    const STD: f32 = 37837.227; // √(4 · (65536² − 1) / 12)
    let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    (sum as f32 - MEAN) / STD
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn tensor(name: &str, elements: usize) -> Tensor {
        Tensor { name: name.to_owned(), shape: vec![elements], mean: 1.0, std: 0.5 }
    }

    fn bytes(seed: u64, tensor: &Tensor, dtype: DType) -> Vec<u8> {
        let mut out = Vec::new();
        stream(seed, tensor, dtype, &mut out, &mut |_| ()).unwrap();
        assert_eq!(out.len(), tensor.elements() * dtype.size());
        out
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(bytes)
    }

    #[test]
    fn it_has_the_mean_and_deviation_asked_for_and_no_outliers() {
        let values = floats(&bytes(3, &tensor("x", 1 << 20), DType::F32));
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        assert!((mean - 1.0).abs() < 3e-3, "{mean}");
        assert!((variance.sqrt() - 0.5).abs() < 2e-3, "{}", variance.sqrt());
        assert!(values.iter().all(|x| (x - 1.0).abs() < 0.5 * 3.47));
        // Neighbours have nothing to do with one another.
        let product: f64 =
            values.windows(2).map(|w| f64::from(w[0] - 1.0) * f64::from(w[1] - 1.0)).sum::<f64>() / n;
        assert!(product.abs() < 2e-3, "{product}");
    }

    #[test]
    fn seed_and_name_matter_and_nothing_else_does() {
        let one = tensor("one", BLOCK + PIECE + 77);
        let made = bytes(1, &one, DType::F32);
        assert_eq!(made, bytes(1, &one, DType::F32));
        assert_ne!(made, bytes(2, &one, DType::F32));
        assert_ne!(made, bytes(1, &tensor("two", BLOCK + PIECE + 77), DType::F32));
        // Blocks and threads leave no seam: the shorter tensor is a prefix of the longer one.
        let short = bytes(1, &tensor("one", PIECE + 5), DType::F32);
        assert_eq!(made[..short.len()], short);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(made, pool.install(|| bytes(1, &one, DType::F32)));
    }

    #[test]
    fn narrow_dtypes_are_the_wide_one_rounded_to_nearest_even() {
        let wide = floats(&bytes(5, &tensor("x", 1000), DType::F32));
        let half: Vec<u8> = wide.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let brain: Vec<u8> = wide.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        assert_eq!(bytes(5, &tensor("x", 1000), DType::F16), half);
        assert_eq!(bytes(5, &tensor("x", 1000), DType::Bf16), brain);
    }
}
