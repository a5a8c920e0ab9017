use half::f16;

use super::*;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::testkit::{Bench, Random};

/// What `sequence` marks unwritten rows with.
const POISON: f16 = f16::from_bits(0x7d5a);

/// Memory for `count` of `T`; kept by the caller.
fn room<T>(bench: &Bench, count: usize) -> (DeviceMemory, Span<T>) {
    let memory = DeviceMemory::new(&bench.gpu.context, count * size_of::<T>(), "a test").unwrap();
    // SAFETY: the caller keeps the memory beside the span.
    let span = unsafe { memory.span() }.cast().unwrap();
    (memory, span)
}

#[test]
fn finds_what_is_not_complete() {
    let bench = Bench::new();
    for (hidden, pitch) in [(72, 72), (17, 19), (1100, 1104)] {
        let rows = 11;
        let mut values = Random::new(hidden as u64).halves(rows * hidden, 0.0, 2.0);
        values[hidden + 5] = f16::NAN;
        values[2 * hidden + hidden - 1] = f16::NEG_INFINITY;
        values[2 * hidden + 3] = f16::INFINITY;
        values[4 * hidden..5 * hidden].fill(POISON);
        values[9 * hidden + 9] = POISON;
        let (_memory, matrix) = bench.matrix(&values, hidden, pitch, f16::NAN);
        let (_checks, check) = room::<RowCheck>(&bench, rows);
        bench.gpu.kernels.verify.enqueue_rows(&bench.stream, check, &matrix).unwrap();
        let mut found = vec![RowCheck { bad_channel: 0, poisoned: 0, norm: 0.0 }; rows];
        bench.stream.download_and_wait(check, &mut found).unwrap();
        for (i, (found, row)) in found.iter().zip(values.chunks_exact(hidden)).enumerate() {
            assert_eq!(found.bad_channel(), row.iter().position(|x| !x.is_finite()), "row {i} of {hidden}");
            assert_eq!(found.is_poisoned(), row.iter().any(|x| x.to_bits() == POISON.to_bits()), "row {i}");
            if found.bad_channel().is_none() {
                let norm = row.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt();
                assert!(
                    (f64::from(found.norm) / norm - 1.0).abs() < 1e-5,
                    "row {i}: {} not {norm}",
                    found.norm
                );
            }
        }
    }
}

#[test]
fn slots_have_the_mean_of_their_rows() {
    let bench = Bench::new();
    let (rows, hidden) = (100, 24);
    let values = Random::new(1).halves(rows * hidden, 0.0, 1.0);
    let (_memory, matrix) = bench.matrix(&values, hidden, hidden, f16::ZERO);
    let (_checks, check) = room::<RowCheck>(&bench, rows);
    let slots = [(0, 1), (3, 40), (50, 0), (43, 57), (99, 1)];
    let ranges = slots.map(|(offset, len)| SlotRange { offset, len });
    let (_ranges, on_device) = room::<SlotRange>(&bench, slots.len());
    bench.stream.upload_and_wait(on_device, &ranges).unwrap();
    let (_norms, norms) = room::<f32>(&bench, slots.len());
    bench.gpu.kernels.verify.enqueue_rows(&bench.stream, check, &matrix).unwrap();
    bench.gpu.kernels.verify.enqueue_slots(&bench.stream, norms, check, on_device).unwrap();
    let mut got = [0.0; 5];
    bench.stream.download_and_wait(norms, &mut got).unwrap();
    for (got, (offset, len)) in got.into_iter().zip(slots) {
        let norm = |row: &[f16]| row.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt();
        let rows = values.chunks_exact(hidden).skip(offset as usize).take(len as usize);
        let expected = rows.map(norm).sum::<f64>() / f64::from(len.max(1));
        assert!(
            (f64::from(got) - expected).abs() <= 1e-5 * expected,
            "{offset}+{len}: {got}, not {expected}"
        );
    }
}

#[test]
fn refuses_what_breaks_the_contract() {
    let bench = Bench::new();
    let (_memory, matrix) = bench.poisoned(4, 8, 8);
    let (_checks, check) = room::<RowCheck>(&bench, 3);
    let verify = &bench.gpu.kernels.verify;
    let error = verify.enqueue_rows(&bench.stream, check, &matrix).unwrap_err().to_string();
    assert!(error.contains("launch of verify_rows: 4 rows into"), "{error}");
    let (_ranges, ranges) = room::<SlotRange>(&bench, 2);
    let error = verify.enqueue_slots(&bench.stream, Span::NONE, check, ranges).unwrap_err().to_string();
    assert!(error.contains("launch of verify_slots"), "{error}");
}
