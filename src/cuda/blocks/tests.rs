use super::*;
use crate::cuda::driver::DeviceMemory;
use crate::cuda::testkit::{Bench, gpu};

fn pool(blocks: usize) -> Arc<Pool> {
    Pool::bounded(vec![gpu().context.clone()], blocks * STEP)
}

fn lend(pool: &Arc<Pool>, bytes: usize) -> Option<Box<dyn Held>> {
    let held = pool.lend(bytes)?;
    assert_eq!(held.bytes().len(), bytes);
    Some(held)
}

/// Where it lies, and how long the block is.
fn of(held: &dyn Held) -> (*const u8, usize) {
    let held: &dyn std::any::Any = held;
    let lent: &Lent = held.downcast_ref().unwrap();
    (held_address(lent), lent.block.as_ref().unwrap().memory.len())
}

fn held_address(lent: &Lent) -> *const u8 {
    lent.bytes().as_ptr()
}

#[test]
fn blocks_are_used_again_the_smallest_that_fits() {
    let pool = pool(9);
    let [small, large] = [100, STEP + 1].map(|bytes| lend(&pool, bytes).unwrap());
    assert_eq!((of(&*small).1, of(&*large).1, pool.size()), (STEP, 2 * STEP, (2, 3 * STEP)));
    let (at_small, at_large) = (of(&*small).0, of(&*large).0);
    drop(large);
    drop(small);
    let [first, second] = [STEP, 5].map(|bytes| lend(&pool, bytes).unwrap());
    assert_eq!((of(&*first).0, of(&*second).0), (at_small, at_large), "what fits best, then what is there");
    assert_eq!(pool.size(), (2, 3 * STEP));
}

#[test]
fn the_pool_is_bounded_and_larger_blocks_take_the_place_of_smaller_ones() {
    let pool = pool(6);
    assert!(lend(&pool, 0).is_none() && lend(&pool, 2 * STEP + 1).is_none(), "a third of all at most");
    pool.prepare(2);
    assert_eq!(pool.size(), (2, 2 * STEP));
    pool.prepare(100);
    assert_eq!(pool.size(), (6, 6 * STEP));
    let all: Vec<_> = (0..6).map(|_| lend(&pool, 7).unwrap()).collect();
    assert!(lend(&pool, 7).is_none(), "nothing is free, and nobody is waited for");
    drop(all);
    let _two = [lend(&pool, 7).unwrap(), lend(&pool, 7).unwrap()];
    let large = [0, 1].map(|_| lend(&pool, STEP + 1).unwrap());
    assert_eq!(pool.size(), (4, 6 * STEP), "four small ones made room for two");
    assert!(lend(&pool, STEP + 1).is_none() && lend(&pool, 7).is_none());
    drop(large);
    assert_eq!(of(&*lend(&pool, 7).unwrap()).1, 2 * STEP);
}

#[test]
fn what_the_system_does_not_pin_is_decoded_to_the_heap() {
    let pool = Pool::bounded(vec![gpu().context.clone()], 1 << 62);
    assert!(lend(&pool, 1 << 60).is_none());
    assert_eq!(pool.size(), (0, 0), "what was not made does not count");
    assert!(lend(&pool, 10).is_some(), "and it tries again");
    assert!(lend(&Pool::new(vec![]), 10).is_none());
}

/// Decodes and uploads through fewer blocks than there are images, and looks at what arrives.
fn uploads_arrive_whole() {
    let bench = Bench::new();
    let (rows, columns, pitch, images) = (40, 300, 304, 24);
    let memory = DeviceMemory::new(&bench.gpu.context, images * rows * pitch, "a test").unwrap();
    // SAFETY: the memory lives to the end of this function.
    let all = unsafe { memory.span() };
    bench.stream.fill(all, 0xee).unwrap();
    let pool = pool(3);
    let value = |image: usize, i: usize| (image * 31 + i * 7 + i / columns) as u8;
    let mut blocks = std::collections::BTreeSet::new();
    let mut send = |image: usize, held: &mut dyn Held| {
        for (i, byte) in held.bytes_mut().iter_mut().enumerate() {
            *byte = value(image, i);
        }
        blocks.insert(of(held).0);
        let held: &mut dyn std::any::Any = held;
        let to = all.slice(image * rows * pitch..(image + 1) * rows * pitch).unwrap();
        held.downcast_mut::<Lent>().unwrap().send_rows(&bench.stream, to, pitch, columns).unwrap();
    };
    for image in 0..images {
        let mut held = lend(&pool, rows * columns).unwrap();
        if image % 5 == 0 {
            send(image ^ 1, &mut *held); // written again right after an upload from it
        }
        send(image, &mut *held);
    }
    assert_eq!((pool.size().0, blocks.len()), (blocks.len(), pool.size().0));
    let mut found = vec![0; all.len()];
    bench.stream.download_and_wait(all, &mut found).unwrap();
    for (image, found) in found.chunks_exact(rows * pitch).enumerate() {
        for (y, row) in found.chunks_exact(pitch).enumerate() {
            let expected = |(x, byte): (usize, &u8)| *byte == value(image, y * columns + x);
            assert!(row[..columns].iter().enumerate().all(expected), "image {image}, row {y}");
            assert!(row[columns..].iter().all(|&byte| byte == 0xee), "between the rows");
        }
    }
}

#[test]
fn no_block_is_lent_again_before_its_upload_is_done() {
    uploads_arrive_whole();
}

#[test]
fn refuses_what_does_not_fit() {
    let bench = Bench::new();
    let memory = DeviceMemory::new(&bench.gpu.context, 100, "a test").unwrap();
    // SAFETY: nothing is enqueued.
    let span = unsafe { memory.span() };
    let mut held = lend(&pool(3), 200).unwrap();
    let any: &mut dyn std::any::Any = &mut *held;
    let lent: &mut Lent = any.downcast_mut().unwrap();
    let error = lent.send_rows(&bench.stream, span, 10, 10).unwrap_err().to_string();
    assert!(error.contains("20 rows of 10"), "{error}");
    assert!(lent.block.as_ref().unwrap().pending.is_none());
}

/// The same with streams that are as late as can be, late at odd moments, and never late.
mod emulated {
    use crate::cuda::testkit::{in_child, needs_emulated};

    #[test]
    fn no_block_is_lent_again_before_its_upload_is_done_however_late() {
        for seed in ["0", "1", "2", "3", "4"] {
            in_child("cuda::blocks::tests::emulated::child_uploads", &[("EMU_SEED", seed)]);
        }
    }

    #[test]
    #[ignore = "run by the test above, in a process of its own"]
    fn child_uploads() {
        needs_emulated();
        super::uploads_arrive_whole();
    }
}
