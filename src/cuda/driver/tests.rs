use half::f16;

use super::*;
use crate::cuda::testkit::{Bench, gpu};
use crate::{Category, Error};

/// Memory of the host's to copy from and to.
fn numbers(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect()
}

fn memory(bytes: usize) -> DeviceMemory {
    DeviceMemory::new(&gpu().context, bytes, "a test").unwrap()
}

#[test]
fn a_context_knows_its_device() {
    let context = &gpu().context;
    assert!(context.capability() >= (8, 0));
    assert!(context.multiprocessors() > 0 && context.shared_per_block() >= 99 * 1024);
    let (free, total) = context.memory().unwrap();
    assert!(free <= total && total > 0);
    assert_eq!(format!("{context:?}").split(' ').next(), Some("cuda:0"));
    assert!(context.synchronize().is_ok());
}

#[test]
fn a_device_that_is_not_there() {
    let _ = gpu();
    let error = Context::open(99).unwrap_err();
    assert_eq!(error.category(), Category::Device);
    assert!(error.to_string().starts_with("device `cuda:99`: there is no such device"), "{error}");
}

#[test]
fn copies_there_and_back() {
    let bench = Bench::new();
    let from = numbers(1000);
    let memory = memory(8000);
    // SAFETY: the memory lives to the end of this test.
    let span = unsafe { memory.span() }.cast::<u32>().unwrap();
    let (first, second) = (span.slice(0..1000).unwrap(), span.slice(1000..2000).unwrap());
    bench.stream.upload_and_wait(first, &from).unwrap();
    bench.stream.copy(second, first).unwrap();
    let mut to = vec![0; 1000];
    bench.stream.download_and_wait(second, &mut to).unwrap();
    assert_eq!(to, from);

    bench.stream.fill(second, 0xab).unwrap();
    bench.stream.download_and_wait(second, &mut to).unwrap();
    assert!(to.iter().all(|x| *x == 0xabab_abab));
    bench.stream.fill_16(second.cast().unwrap(), 0x1234).unwrap();
    bench.stream.download_and_wait(second, &mut to).unwrap();
    assert!(to.iter().all(|x| *x == 0x1234_1234));

    assert!(matches!(bench.stream.upload_and_wait(first, &from[..999]), Err(Error::Internal(_))));
    assert!(matches!(bench.stream.copy(first, span), Err(Error::Internal(_))));
    assert!(span.slice(1999..2001).is_err() && span.slice(5..5).is_ok());
    assert!(span.cast::<u8>().unwrap().slice(1..5).unwrap().cast::<u32>().is_err());
}

#[test]
fn copies_rows_between_pitches() {
    let bench = Bench::new();
    let from = numbers(15);
    let memory = memory(5 * 8 * 4);
    // SAFETY: the memory lives to the end of this test.
    let span = unsafe { memory.span() }.cast::<u32>().unwrap();
    bench.stream.fill(span, 0).unwrap();
    bench.stream.upload_rows_and_wait(span, 8, &from, 3).unwrap();
    let mut all = vec![1; 40];
    bench.stream.download_and_wait(span, &mut all).unwrap();
    for (row, from) in all.chunks_exact(8).zip(from.chunks_exact(3)) {
        assert_eq!((&row[..3], &row[3..]), (from, &[0; 5][..]));
    }
    let mut rows = vec![7; 5 * 4];
    // SAFETY: there is room for all rows; the wait is below.
    unsafe { bench.stream.download_rows(span, 8, (5, 3), rows.as_mut_ptr(), 4).unwrap() };
    bench.stream.synchronize().unwrap();
    for (row, from) in rows.chunks_exact(4).zip(from.chunks_exact(3)) {
        assert_eq!((&row[..3], row[3]), (from, 7));
    }
    assert!(bench.stream.upload_rows_and_wait(span, 2, &from, 3).is_err(), "a pitch below the width");
    assert!(bench.stream.upload_rows_and_wait(span, 8, &numbers(18), 3).is_err(), "a row too many");
}

#[test]
fn pinned_memory_is_read_when_the_stream_comes_to_it() {
    let bench = Bench::new();
    let mut pinned = PinnedMemory::new(&bench.gpu.context, 64).unwrap();
    assert!(pinned.iter().all(|x| *x == 0));
    pinned[16..32].fill(5);
    let memory = memory(16);
    // SAFETY: the memory lives to the end of this test.
    let span = unsafe { memory.span() };
    let done = Event::new(&bench.gpu.context).unwrap();
    // SAFETY: `pinned` is left alone until the event.
    unsafe { bench.stream.upload(span, &pinned, 16).unwrap() };
    done.record(&bench.stream).unwrap();
    done.synchronize().unwrap();
    assert!(done.is_past().unwrap() && bench.stream.is_idle().unwrap());
    pinned[16..32].fill(6);
    let mut to = [0; 16];
    bench.stream.download_and_wait(span, &mut to).unwrap();
    assert_eq!(to, [5; 16]);
    // SAFETY: refused before anything is copied.
    assert!(unsafe { bench.stream.upload(span, &pinned, 60) }.is_err());
}

#[test]
fn events_order_streams_and_take_time() {
    let bench = Bench::new();
    let context = &bench.gpu.context;
    let other = Stream::new(context).unwrap();
    let memory = memory(4096);
    // SAFETY: the memory lives to the end of this test.
    let span = unsafe { memory.span() };
    let [start, end] = [0, 1].map(|_| Event::with_time(context).unwrap());
    start.record(&bench.stream).unwrap();
    bench.stream.fill(span, 1).unwrap();
    end.record(&bench.stream).unwrap();
    other.wait_for(&end).unwrap();
    let mut to = vec![0; 4096];
    other.download_and_wait(span, &mut to).unwrap();
    assert!(to.iter().all(|x| *x == 1));
    assert!(end.milliseconds_since(&start).unwrap() >= 0.0);
    let never = Event::new(context).unwrap();
    assert!(never.synchronize().is_ok() && never.is_past().unwrap());
}

#[test]
fn a_graph_is_replayed_and_runs_nothing_when_captured() {
    let bench = Bench::new();
    let memory = memory(64);
    // SAFETY: the memory lives to the end of this test.
    let span = unsafe { memory.span() };
    let (from, to) = (span.slice(0..32).unwrap(), span.slice(32..64).unwrap());
    bench.stream.fill(span, 0).unwrap();
    let graph = bench
        .stream
        .capture(|| {
            assert!(bench.stream.is_capturing()?);
            bench.stream.copy(to, from)
        })
        .unwrap();
    assert!(!bench.stream.is_capturing().unwrap());
    let mut read = [9; 32];
    for value in [3, 4] {
        bench.stream.fill(from, value).unwrap();
        bench.stream.download_and_wait(to, &mut read).unwrap();
        assert_ne!(read, [value; 32]);
        // SAFETY: the memory is still there.
        unsafe { bench.stream.replay(&graph).unwrap() };
        bench.stream.download_and_wait(to, &mut read).unwrap();
        assert_eq!(read, [value; 32]);
    }

    let error = bench.stream.capture(|| Err(Error::Internal("stop".into()))).unwrap_err();
    assert!(error.to_string().contains("stop"), "{error}");
    assert!(!bench.stream.is_capturing().unwrap());
    assert!(bench.stream.fill(span, 0).is_ok() && bench.stream.synchronize().is_ok());
}

#[test]
fn no_room_is_an_answer_or_an_error_with_the_numbers() {
    let context = &gpu().context;
    assert!(DeviceMemory::if_room(context, 1 << 60).unwrap().is_none());
    let error = DeviceMemory::new(context, 1 << 60, "a sequence").unwrap_err().to_string();
    assert!(error.contains("no room for a sequence: 1099511627776 MiB are needed"), "{error}");
}

#[test]
fn results_that_break_a_context() {
    use CUresult::*;
    for sticky in [CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_LAUNCH_FAILED, CUDA_ERROR_MISALIGNED_ADDRESS] {
        assert!(is_sticky(sticky));
    }
    for harmless in [CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES] {
        assert!(!is_sticky(harmless));
    }
    // An ordinal that no test uses.
    check_not_refused(77).unwrap();
    let error = check(77, || "cuSomething".into(), CUDA_ERROR_INVALID_VALUE).unwrap_err();
    assert!(error.to_string().contains("cuSomething failed: CUDA_ERROR_INVALID_VALUE (1)"), "{error}");
    check_not_refused(77).unwrap();
    let error = check(77, || "kernel x".into(), CUDA_ERROR_ILLEGAL_ADDRESS).unwrap_err();
    assert!(error.to_string().contains("IMAGEHERE_CUDA_SYNC=1"), "{error}");
    let error = check_not_refused(77).unwrap_err().to_string();
    assert!(
        error.contains("broke earlier") && error.contains("kernel x failed") && error.contains("PyTorch")
    );
}

#[test]
fn pointers_count_elements() {
    let pointer = DevicePtr::<f16>::new(0x1000);
    assert_eq!(pointer.add(3).address(), 0x1006);
    assert!(pointer.is_aligned(256) && !pointer.add(1).is_aligned(4));
}
