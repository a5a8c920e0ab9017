use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};

use rayon::prelude::*;

use super::*;
use crate::image::room::{Heap, Held};
use crate::image::{DecodeOptions, ImageSource, RgbImage};

/// A room that takes its time.
struct Slow;

impl Room for Slow {
    fn lend(&self, _: usize) -> Option<Box<dyn Held>> {
        std::thread::sleep(Duration::from_millis(3));
        None
    }
}

fn picture(value: u8) -> RgbImage {
    RgbImage { width: 5, height: 3, data: vec![value; 45] }
}

fn file(value: u8) -> ImageSource<'static> {
    let mut file = Vec::new();
    picture(value).write_png(&mut file).unwrap();
    file.into()
}

/// Decodes all, and checks that each comes once, as itself.
fn decode_all(sources: &[ImageSource<'_>], room: &dyn Room) -> Duration {
    let options = DecodeOptions::default();
    let pictures = Pictures { sources, decode: &options, resample: crate::image::Resample::default() };
    let indices: Vec<usize> = (0..sources.len()).rev().collect();
    let mut seen = vec![0; sources.len()];
    let waited = decode_each(&pictures, &indices, room, |i, decoded| {
        seen[i] += 1;
        assert_eq!(decoded.into_image(), picture(i as u8));
        Ok(())
    });
    assert!(seen.iter().all(|&times| times == 1), "{seen:?}");
    waited.unwrap()
}

/// Does `work` on a thread of its own; a test that would never end fails instead.
fn within_a_minute(what: &str, work: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || {
        work();
        done.send(()).unwrap();
    });
    wait.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|error| panic!("{what}: {error}"));
}

#[test]
fn each_image_comes_once_wherever_it_is_decoded() {
    let lent: Vec<_> = (0..9).map(picture).collect();
    for count in [0, 1, 2, 9] {
        let files: Vec<_> = (0..count).map(file).collect();
        let pixels: Vec<_> = lent.iter().take(count.into()).map(ImageSource::from).collect();
        let mixed: Vec<_> =
            (0..count).map(|i| if i % 2 == 0 { file(i) } else { (&lent[usize::from(i)]).into() }).collect();
        for sources in [&files, &pixels, &mixed] {
            decode_all(sources, &Heap);
        }
    }
    let waited = decode_all(&[file(0)], &Slow);
    assert!(waited >= Duration::from_millis(3), "{waited:?}");
}

/// Calls as an encoder makes them: each has the devices for itself, to its end.
fn call(devices: &Mutex<()>, files: &[ImageSource<'_>]) {
    let _alone = devices.lock().unwrap();
    decode_all(files, &Slow);
}

#[test]
fn calls_on_threads_of_a_pool_end() {
    for threads in [1, 2, 4] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        within_a_minute(&format!("{threads} threads"), move || {
            let (devices, files) = (Mutex::new(()), (0..6).map(file).collect::<Vec<_>>());
            pool.install(|| (0..10).into_par_iter().for_each(|_| call(&devices, &files)));
            // Calls that come while others wait for their images.
            pool.in_place_scope(|scope| {
                for _ in 0..10 {
                    scope.spawn(|_| call(&devices, &files));
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
        });
    }
}

#[test]
fn a_call_beside_a_pool_whose_threads_wait_for_it_ends() {
    within_a_minute("a call that all threads of the global pool wait for", || {
        let (devices, files) = (Mutex::new(()), (0..4).map(file).collect::<Vec<_>>());
        let waiting = AtomicUsize::new(0);
        let alone = devices.lock().unwrap();
        rayon::in_place_scope(|scope| {
            for _ in 0..rayon::current_num_threads() {
                scope.spawn(|_| {
                    waiting.fetch_add(1, Ordering::Relaxed);
                    drop(devices.lock().unwrap());
                });
            }
            while waiting.load(Ordering::Relaxed) < rayon::current_num_threads() {
                std::thread::yield_now();
            }
            decode_all(&files, &Heap);
            drop(alone);
        });
    });
}

#[test]
fn the_first_broken_image_is_named_and_the_others_are_no_loss() {
    let options = DecodeOptions::default();
    let bad = || ImageSource::from(&b"no image"[..]);
    let sources = [file(0), bad(), file(2), bad(), file(4)];
    let pictures =
        Pictures { sources: &sources, decode: &options, resample: crate::image::Resample::default() };
    for indices in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]] {
        let error = decode_each(&pictures, &indices, &Heap, |_, _| Ok(())).unwrap_err();
        assert!(matches!(error, Error::Image { index: 1, .. }), "{error}");
    }
    let refuse = |_, _: Decoded<'_>| Err(Error::Internal("stop".into()));
    let error = decode_each(&pictures, &[0, 2, 4], &Heap, refuse).unwrap_err();
    assert!(error.to_string().contains("stop"), "{error}");
}
