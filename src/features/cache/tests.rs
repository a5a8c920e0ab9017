use std::collections::HashSet;
use std::fs::File;

use proptest::prelude::*;

use super::*;

const HIDDEN: usize = 3;

fn rows(seed: u32) -> Vec<f16> {
    (0..12).map(|i| f16::from_f32((i * 7 + seed) as f32 / 4.0)).collect() // [4, 3]
}

fn key(seed: u32) -> Key {
    Key::new("checkpoint", "cpu (portable)", &seed.to_string())
}

/// Bytes of one entry, whichever.
fn entry_bytes() -> u64 {
    let place = tempfile::tempdir().unwrap();
    put(&FeatureCache::open(place.path()).unwrap(), 1);
    fs::read_dir(place.path()).unwrap().next().unwrap().unwrap().metadata().unwrap().len()
}

fn put(cache: &FeatureCache, seed: u32) {
    assert_eq!(cache.put(&[(key(seed), &rows(seed))], HIDDEN).unwrap(), 1);
}

fn get(cache: &FeatureCache, seed: u32) -> Option<Vec<f16>> {
    cache.get(&key(seed), 4, HIDDEN)
}

/// Makes an entry look as if it was used so many seconds ago.
fn age(cache: &FeatureCache, seed: u32, seconds: u64) {
    let then = SystemTime::now() - Duration::from_secs(seconds);
    File::open(cache.path(&key(seed))).unwrap().set_modified(then).unwrap();
}

#[test]
fn what_was_put_is_found_by_all_of_its_key_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let cache = FeatureCache::open(place.path().join("new/deep")).unwrap();
    assert_eq!(get(&cache, 1), None);
    put(&cache, 1);
    assert_eq!(get(&cache, 1), Some(rows(1)));
    assert_eq!(get(&FeatureCache::open(cache.dir()).unwrap(), 1), Some(rows(1)));
    for other in [
        Key::new("other", "cpu (portable)", "1"),
        Key::new("checkpoint", "cpu (avx2)", "1"),
        Key::new("checkpoint", "cpu (portable)", "2"),
        Key::new("checkpointcpu", " (portable)", "1"),
    ] {
        assert_eq!(cache.get(&other, 4, HIDDEN), None);
    }
    assert_eq!(cache.get(&key(1), 3, 4), None, "another shape");
    assert!(entry_bytes() <= HEADER + size_of_val(rows(1).as_slice()) as u64);
}

#[test]
fn a_bad_entry_is_a_miss_and_is_replaced() {
    let place = tempfile::tempdir().unwrap();
    let cache = FeatureCache::open(place.path()).unwrap();
    put(&cache, 1);
    put(&cache, 2);
    let path = cache.path(&key(1));
    let good = fs::read(&path).unwrap();
    let mut turned = good.clone();
    *turned.last_mut().unwrap() ^= 1;
    let other = fs::read(cache.path(&key(2))).unwrap();
    for bad in [&good[..good.len() - 1], &good[..9], b"", &turned, &other] {
        fs::write(&path, bad).unwrap();
        assert_eq!(get(&cache, 1), None);
        put(&cache, 1);
        assert_eq!((get(&cache, 1), fs::read(&path).unwrap()), (Some(rows(1)), good.clone()));
    }
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(get(&cache, 1), None);
    let error = cache.put(&[(key(1), &rows(1))], HIDDEN).unwrap_err();
    assert!(matches!(error, Error::Write { .. }), "{error}");
}

#[test]
fn what_is_not_finite_is_not_kept() {
    let place = tempfile::tempdir().unwrap();
    let cache = FeatureCache::open(place.path()).unwrap();
    let mut bad = rows(1);
    bad[5] = f16::NAN;
    assert_eq!(cache.put(&[(key(1), &bad), (key(2), &rows(2))], HIDDEN).unwrap(), 1);
    assert_eq!((get(&cache, 1), get(&cache, 2)), (None, Some(rows(2))));
}

#[test]
fn what_was_not_used_for_longest_goes_first() {
    let place = tempfile::tempdir().unwrap();
    let room = 3 * entry_bytes() + HEADER; // what is to come is reckoned generously
    let cache = FeatureCache::open(place.path()).unwrap().with_size(room);
    for seed in [1, 2, 3] {
        put(&cache, seed);
        age(&cache, seed, 100 - u64::from(seed));
    }
    assert_eq!(get(&cache, 1), Some(rows(1)), "used: now the youngest");
    put(&cache, 4);
    let there: Vec<bool> = (1..=4).map(|seed| cache.path(&key(seed)).exists()).collect();
    assert_eq!(there, [true, false, true, true]);
}

#[test]
fn a_call_larger_than_the_cache_keeps_its_last() {
    let place = tempfile::tempdir().unwrap();
    let need = size_of_val(rows(0).as_slice()) as u64 + HEADER;
    let cache = FeatureCache::open(place.path()).unwrap().with_size(2 * need);
    let all: Vec<Vec<f16>> = (0..5).map(rows).collect();
    let entries: Vec<(Key, &[f16])> = (0..5).map(|seed| (key(seed), all[seed as usize].as_slice())).collect();
    assert_eq!(cache.put(&entries, HIDDEN).unwrap(), 2);
    let found: Vec<bool> = (0..5).map(|seed| get(&cache, seed).is_some()).collect();
    assert_eq!(found, [false, false, false, true, true]);
    assert_eq!(cache.with_size(need - 1).put(&entries, HIDDEN).unwrap(), 0);
}

#[test]
fn other_files_stay_and_abandoned_ones_go() {
    let place = tempfile::tempdir().unwrap();
    let cache = FeatureCache::open(place.path()).unwrap().with_size(entry_bytes() + HEADER);
    let file = |name: &str, seconds: u64| {
        let path = place.path().join(name);
        fs::write(&path, vec![1; 5000]).unwrap();
        let then = SystemTime::now() - Duration::from_secs(seconds);
        File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
    };
    let hex = "0123456789abcdef".repeat(4);
    let old = 7200;
    let upper = format!("{}.safetensors", hex.to_uppercase());
    let mine =
        ["photo.jpg", ".hidden", ".x.tmp", "a.safetensors", ".a.safetensors.x.tmp", "notes.tmp", &upper];
    mine.iter().for_each(|name| file(name, old));
    let half = [".imagehere.123.0.tmp".to_owned(), format!(".{hex}.safetensors.abc123.tmp")];
    half.iter().for_each(|name| file(name, old));
    file(".imagehere.124.0.tmp", 10);
    fs::create_dir(place.path().join(format!("{hex}.safetensors"))).unwrap();
    put(&cache, 1);
    put(&cache, 2);
    let there: HashSet<String> = fs::read_dir(place.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(mine.iter().all(|name| there.contains(*name)), "{there:?}");
    assert!(half.iter().all(|name| !there.contains(name)), "{there:?}");
    assert!(there.contains(".imagehere.124.0.tmp"), "somebody may be writing it");
    assert_eq!((get(&cache, 1), get(&cache, 2)), (None, Some(rows(2))));
}

#[test]
fn what_cannot_be_a_cache_is_refused() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("file"), "").unwrap();
    let error = FeatureCache::open("").unwrap_err();
    assert!(error.to_string().contains("it has no name"), "{error}");
    for (name, part) in [("file", "it is a file"), ("file/cache", "cannot be a feature cache")] {
        let error = FeatureCache::open(place.path().join(name)).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn taken_away_while_it_is_read_it_stays_readable() {
    let place = tempfile::tempdir().unwrap();
    let cache = FeatureCache::open(place.path()).unwrap();
    put(&cache, 1);
    let mut open = format::open(&cache.path(&key(1)), KIND).unwrap();
    fs::remove_file(cache.path(&key(1))).unwrap();
    if cfg!(unix) {
        assert_eq!(open.next_rows().unwrap(), rows(1));
    }
    assert_eq!(get(&cache, 1), None);
}

#[test]
fn threads_that_read_write_and_evict_find_right_rows_or_none() {
    let place = tempfile::tempdir().unwrap();
    let limit = 4 * (entry_bytes() + HEADER);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let cache = FeatureCache::open(place.path()).unwrap().with_size(limit);
            scope.spawn(move || {
                for step in 0..60 {
                    let seed = (thread * 7 + step * 3) % 11;
                    match get(&cache, seed) {
                        Some(found) => assert_eq!(found, rows(seed)),
                        None => put(&cache, seed),
                    }
                }
            });
        }
    });
    let cache = FeatureCache::open(place.path()).unwrap().with_size(limit);
    put(&cache, 99);
    let bytes: u64 =
        fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= limit, "{bytes} of {limit}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn it_never_holds_more_than_it_may(size in 1u64..8000, seeds in proptest::collection::vec(0u32..20, 1..25)) {
        let place = tempfile::tempdir().unwrap();
        let cache = FeatureCache::open(place.path()).unwrap().with_size(size);
        for seed in seeds {
            let kept = cache.put(&[(key(seed), &rows(seed))], HIDDEN).unwrap();
            prop_assert_eq!(get(&cache, seed).is_some(), kept == 1, "the newest is there if it fits at all");
            let files = fs::read_dir(place.path()).unwrap();
            let bytes: u64 = files.map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
            prop_assert!(bytes <= size);
        }
    }
}
