use half::{bf16, f16};

use super::*;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::testkit::{Bench, Random, bits};

const MARK: f16 = f16::from_bits(0x7e55);

/// A table of random values, rows of text, and a report, on the device.
struct Case {
    bench: Bench,
    values: Vec<f32>, // [vocab, hidden], as stored
    table: TokenTable,
    report: Span<RangeReport>,
    _memory: [DeviceMemory; 2],
}

impl Case {
    fn new(vocab: usize, hidden: usize, dtype: DType, beyond: Option<usize>) -> Self {
        let bench = Bench::new();
        let mut values: Vec<f32> =
            Random::new(hidden as u64).halves(vocab * hidden, 0.0, 1.0).iter().map(|x| x.to_f32()).collect();
        if let Some(at) = beyond {
            values[at] = f32::INFINITY;
        }
        let mut bytes = Vec::new();
        for value in &mut values {
            match dtype {
                DType::Bf16 => {
                    *value = bf16::from_f32(*value).to_f32();
                    bytes.extend(bf16::from_f32(*value).to_le_bytes());
                }
                DType::F16 => bytes.extend(f16::from_f32(*value).to_le_bytes()),
                DType::F32 => bytes.extend(value.to_le_bytes()),
            }
        }
        let memory = [bytes.len(), size_of::<RangeReport>()]
            .map(|bytes| DeviceMemory::new(&bench.gpu.context, bytes, "a test").unwrap());
        // SAFETY: the memory is kept beside the spans.
        let [table, report] = [0, 1].map(|i| unsafe { memory[i].span() });
        bench.stream.upload_and_wait(table, &bytes).unwrap();
        let report = report.cast().unwrap();
        bench.stream.upload_and_wait(report, &[RangeReport::CLEAN]).unwrap();
        let table = TokenTable { values: table, dtype, rows: vocab, hidden };
        Self { bench, values, table, report, _memory: memory }
    }

    /// Fills rows `stride` elements apart, the first one after `skip` elements; returns everything, and the
    /// report.
    fn run(&self, ids: &[i32], stride: usize, skip: usize, policy: RangePolicy) -> (Vec<f16>, RangeReport) {
        let bench = &self.bench;
        let sequence = bench.array(&vec![MARK; skip + ids.len() * stride]);
        let first = sequence.span().ptr().add(skip);
        let row = |(i, id): (usize, &i32)| TextRow { to: first.add(i * stride), id: *id, pad: 0 };
        let rows: Vec<TextRow> = ids.iter().enumerate().map(row).collect();
        let memory = DeviceMemory::new(&bench.gpu.context, size_of_val(&rows[..]), "rows").unwrap();
        // SAFETY: the memory lives to the end of this function.
        let span = unsafe { memory.span() }.cast().unwrap();
        bench.stream.upload_and_wait(span, &rows).unwrap();
        let kernel = &bench.gpu.kernels.embed_tokens;
        kernel.enqueue(&bench.stream, span, &self.table, policy, self.report).unwrap();
        let mut report = [RangeReport::CLEAN];
        bench.stream.download_and_wait(self.report, &mut report).unwrap();
        (bench.read(&sequence), report[0])
    }
}

#[test]
fn fills_each_row_and_nothing_else() {
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        for (hidden, stride, skip) in [(72, 72, 0), (17, 19, 1), (1100, 1104, 8), (1, 1, 0)] {
            let case = Case::new(30, hidden, dtype, None);
            let ids = [29, 0, 7, 7, 13];
            let (all, report) = case.run(&ids, stride, skip, RangePolicy::Refuse);
            assert_eq!(report, RangeReport::CLEAN);
            assert!(all[..skip].iter().all(|x| x.to_bits() == MARK.to_bits()));
            for (row, id) in all[skip..].chunks_exact(stride).zip(ids) {
                let values = &case.values[id as usize * hidden..][..hidden];
                let expected: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
                assert_eq!(bits(&row[..hidden]), bits(&expected), "{dtype:?}, {hidden} channels, id {id}");
                assert!(row[hidden..].iter().all(|x| x.to_bits() == MARK.to_bits()), "between the rows");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_or_cut() {
    let at = 12 * 40 + 33;
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        let case = Case::new(30, 40, dtype, Some(at));
        let (_, report) = case.run(&[3, 4], 40, 0, RangePolicy::Refuse);
        assert_eq!(report, RangeReport::CLEAN, "rows that nobody asked for");
        let (all, report) = case.run(&[3, 12], 40, 0, RangePolicy::Saturate);
        assert_eq!((report.refused(), report.out_of_range(), all[40 + 33]), (None, 1, f16::MAX));
        let (_, report) = case.run(&[12, 3], 40, 0, RangePolicy::Refuse);
        assert_eq!((report.refused(), report.out_of_range()), (Some(at as u64), 2), "reports add up");
    }
}

#[test]
fn an_id_that_is_not_there_leaves_its_row() {
    let case = Case::new(30, 40, DType::F16, None);
    let (all, _) = case.run(&[30, 1, -1], 40, 0, RangePolicy::Refuse);
    assert!(all[..40].iter().chain(&all[80..]).all(|x| x.to_bits() == MARK.to_bits()));
    assert_eq!(all[40], f16::from_f32(case.values[40]));
}

#[test]
fn refuses_what_breaks_the_contract() {
    let case = Case::new(30, 40, DType::F32, None);
    let refuse = |table: TokenTable, report: Span<RangeReport>, expected: &str| {
        let kernel = &case.bench.gpu.kernels.embed_tokens;
        let result = kernel.enqueue(&case.bench.stream, Span::NONE, &table, RangePolicy::Refuse, report);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("launch of embed_tokens_") && error.contains(expected), "{error}");
    };
    refuse(TokenTable { rows: 31, ..case.table }, case.report, "4960 bytes of values");
    refuse(case.table, Span::NONE, "a report");
    let kernel = &case.bench.gpu.kernels.embed_tokens;
    kernel.enqueue(&case.bench.stream, Span::NONE, &case.table, RangePolicy::Refuse, case.report).unwrap();
}
