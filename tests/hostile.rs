//! Files made to hurt, in `hostile/<target>/`: each is refused with a clear error, or read and found to keep every
//! promise, within a second and 50 MB. What ever broke a reader is among them; `fuzz/` looks for more.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[path = "hostile/bounded.rs"]
mod bounded;
#[path = "hostile/targets.rs"]
mod targets;

/// Time for one file.
const LIMIT: Duration = Duration::from_secs(1);
/// Times that a file may try: the machine may have had other things to do.
const TRIES: usize = 3;

fn files(target: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile").join(target);
    let listed = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files: Vec<PathBuf> = listed.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

// One test, for the whole process is looked at.
#[test]
fn every_file_is_refused_or_read_within_a_second_and_50_megabytes() {
    let mut failures = Vec::new();
    let mut total = 0;
    for (target, body) in targets::all() {
        let files = files(target);
        assert!(files.len() >= 3, "{target} has {} files", files.len());
        for path in files {
            let bytes = fs::read(&path).unwrap();
            assert!(bytes.len() < 4096, "{} has {} bytes", path.display(), bytes.len());
            total += bytes.len();
            let mut fastest = Duration::MAX;
            for _ in 0..TRIES {
                let start = Instant::now();
                if catch_unwind(AssertUnwindSafe(|| bounded::bounded(|| body(&bytes)))).is_err() {
                    failures.push(path.display().to_string());
                }
                fastest = fastest.min(start.elapsed());
                if fastest < LIMIT {
                    break;
                }
            }
            if fastest >= LIMIT {
                failures.push(format!("{} took {fastest:?}", path.display()));
            }
        }
    }
    assert!(total < 300_000, "all files together have {total} bytes");
    assert!(failures.is_empty(), "{failures:#?}");
}
