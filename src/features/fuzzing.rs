//! What a file of features must live up to, whatever its bytes; see [`crate::fuzzing`].

use serde_json::{Value, json};

use super::file::{FeatureFile, FeatureSet};
use super::format;
use crate::fuzzing::{check_error, with_file};

/// The bytes, and the bytes with digests that agree, which a fuzzer would not come by in years.
pub(crate) fn features(bytes: &[u8]) {
    check(bytes);
    if let Some(signed) = signed(bytes) {
        check(&signed);
    }
}

fn check(bytes: &[u8]) {
    let Some(set) = with_file(bytes, |path| {
        let file = match FeatureFile::open(path) {
            Ok(file) => file,
            Err(error) => {
                check_error(&error);
                return None;
            }
        };
        let (notes, fingerprint) = (file.notes().to_vec(), file.fingerprint().into());
        let (preprocessing, numerics) = (file.preprocessing().clone(), file.numerics().to_owned());
        let warnings = file.warnings().to_vec();
        assert!(file.preprocessing().difference(&preprocessing).is_none());
        notes.iter().enumerate().for_each(|(place, note)| drop(note.warnings_at(place)));
        match file.read() {
            Err(error) => {
                check_error(&error);
                None
            }
            Ok(features) => {
                assert_eq!(features.len(), notes.len());
                let images = features.into_iter().zip(notes).collect();
                Some(FeatureSet::new(images, fingerprint, preprocessing, numerics, warnings))
            }
        }
    }) else {
        return;
    };
    // Written again, it is the same set.
    let place = tempfile::tempdir().expect("a directory for a file of features");
    let path = place.path().join("f");
    set.save(&path).expect("what was read can be written");
    let again = FeatureFile::open(&path).expect("what was written can be read");
    assert_eq!(again.notes(), set.notes());
    let rows = again.read().expect("what was written can be read");
    assert!(rows.iter().zip(set.features()).all(|(a, b)| a.as_slice() == b.as_slice()));
}

/// Puts digests that agree into a file whose header can be read.
fn signed(bytes: &[u8]) -> Option<Vec<u8>> {
    let (prefix, rest) = bytes.split_first_chunk::<8>()?;
    let (header, data) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*prefix)).ok()?)?;
    let format::Header { mut metadata, features } = serde_json::from_slice(header).ok()?;
    let image = features.shape.iter().skip(1).try_fold(2usize, |n, &size| n.checked_mul(size as usize))?;
    let rows = data.chunks(image.max(1)).map(format::sha256).collect::<Vec<_>>();
    metadata.insert("rows".to_owned(), json!(rows).to_string());
    let digest = format::digest(&metadata, &features.shape);
    metadata.insert("digest".to_owned(), digest);
    let format::Info { dtype, shape, data_offsets } = features;
    let header: Value = json!({
        "__metadata__": metadata,
        "features": { "dtype": dtype, "shape": shape, "data_offsets": data_offsets },
    });
    let header = header.to_string();
    Some([&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat())
}
