use half::{bf16, f16};

use super::*;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::testkit::{Bench, Random, bits};

const MARK: f16 = f16::from_bits(0x7e55);

/// Values as stored in `dtype`.
fn stored(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// What a value is once it was stored in `dtype`.
fn as_stored(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::F32 => value,
    }
}

/// Converts `[rows, columns]` and returns all elements of the output, and the report.
fn run(
    bench: &Bench,
    values: &[f32],
    (columns, pitch): (usize, usize),
    dtype: DType,
    scale: f32,
    policy: RangePolicy,
) -> (Vec<f16>, RangeReport) {
    let rows = values.len() / columns;
    let bytes = stored(values, dtype);
    let [from, report] = [bytes.len(), size_of::<RangeReport>()]
        .map(|bytes| DeviceMemory::new(&bench.gpu.context, bytes, "a test").unwrap());
    // SAFETY: the memory lives to the end of this function.
    let [from, report] = [&from, &report].map(|memory| unsafe { memory.span() });
    let report = report.cast::<RangeReport>().unwrap();
    bench.stream.upload_and_wait(from, &bytes).unwrap();
    bench.stream.upload_and_wait(report, &[RangeReport::CLEAN]).unwrap();
    let (memory, out) = bench.matrix(&vec![MARK; rows * columns], columns, pitch, MARK);
    let convert = &bench.gpu.kernels.convert;
    convert.enqueue(&bench.stream, &out, Stored { values: from, dtype }, scale, policy, report).unwrap();
    let mut said = [RangeReport::CLEAN];
    bench.stream.download_and_wait(report, &mut said).unwrap();
    (bench.read(&memory), said[0])
}

const DTYPES: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

#[test]
fn rounds_to_nearest_and_zeroes_the_padding() {
    let bench = Bench::new();
    for dtype in DTYPES {
        for (rows, columns, pitch) in [(1, 1, 1), (3, 7, 8), (5, 64, 64), (4, 100, 109), (70, 33, 40)] {
            let mut random = Random::new((rows * columns) as u64);
            // From subnormals to thousands.
            let value = |_| (random.normal() * 10f64.powi(random.below(10) as i32 - 7)) as f32;
            let values: Vec<f32> = (0..rows * columns).map(value).collect();
            for scale in [1.0, 0.125] {
                let (out, report) = run(&bench, &values, (columns, pitch), dtype, scale, RangePolicy::Refuse);
                assert_eq!(report, RangeReport::CLEAN);
                for (row, (out, values)) in
                    out.chunks_exact(pitch).zip(values.chunks_exact(columns)).enumerate()
                {
                    let rounded = |x: &f32| f16::from_f32(as_stored(*x, dtype) * scale);
                    let mut expected: Vec<f16> = values.iter().map(rounded).collect();
                    expected.resize(pitch, f16::ZERO);
                    assert_eq!(bits(out), bits(&expected), "{dtype:?} [{rows}, {columns}], row {row}");
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_or_cut() {
    let bench = Bench::new();
    let mut values: Vec<f32> = (0..300).map(|i| i as f32).collect();
    values[250] = f32::INFINITY;
    let columns = 20;
    for dtype in DTYPES {
        let mut values = values.clone();
        let mut beyond = 1;
        if dtype != DType::F16 {
            (values[37], values[38], beyond) = (-1e6, 70_000.0, 3);
        }
        let first = values.iter().position(|x| x.abs() > 65504.0).unwrap() as u64;
        let (_, report) = run(&bench, &values, (columns, 24), dtype, 1.0, RangePolicy::Refuse);
        assert_eq!((report.refused(), report.out_of_range()), (Some(first), beyond), "{dtype:?}");
        let (out, report) = run(&bench, &values, (columns, 24), dtype, 1.0, RangePolicy::Saturate);
        assert_eq!((report.refused(), report.out_of_range()), (None, beyond), "{dtype:?}");
        assert_eq!(out[250 / columns * 24 + 250 % columns], f16::MAX);
        if dtype != DType::F16 {
            assert_eq!((out[37 / columns * 24 + 37 % columns], out[24 + 18]), (f16::MIN, f16::MAX));
        }
        values[200] = f32::NAN;
        let (_, report) = run(&bench, &values, (columns, 24), dtype, 1.0, RangePolicy::Saturate);
        assert_eq!(report.refused(), Some(200), "{dtype:?}");
    }
}

#[test]
fn refuses_what_breaks_the_contract() {
    let bench = Bench::new();
    let memory = DeviceMemory::new(&bench.gpu.context, 64, "a test").unwrap();
    // SAFETY: the memory lives to the end of this test.
    let span = unsafe { memory.span() };
    let (_out, out) = bench.poisoned(4, 8, 8);
    let refuse = |values: Span<u8>, dtype: DType, report: Span<RangeReport>, expected: &str| {
        let convert = &bench.gpu.kernels.convert;
        let result =
            convert.enqueue(&bench.stream, &out, Stored { values, dtype }, 1.0, RangePolicy::Refuse, report);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("launch of convert_") && error.contains(expected), "{error}");
    };
    let report = span.cast().unwrap();
    refuse(span, DType::F32, report, "128 bytes of values");
    refuse(span.slice(1..64).unwrap(), DType::Bf16, report, "64 bytes of values");
    refuse(span, DType::Bf16, Span::NONE, "a report");
}
