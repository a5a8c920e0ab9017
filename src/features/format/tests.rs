use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

const KIND: &str = "imagehere test";

fn rows(seed: u32) -> Vec<f16> {
    (0..12).map(|i| f16::from_f32((i * 7 + seed) as f32 / 4.0 - 3.0)).collect() // [4, 3]
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("f.safetensors")
    }

    /// A good file of two images.
    fn good(&self) -> Vec<u8> {
        let metadata = BTreeMap::from([("note".to_owned(), "\"ünï\n".to_owned())]);
        let (file, bytes) = stage(&self.path(), KIND, metadata, &[&rows(0), &rows(1)], 3).unwrap();
        file.commit().unwrap();
        let written = fs::read(self.path()).unwrap();
        assert_eq!(written.len() as u64, bytes);
        written
    }

    /// Reads a file to its end.
    fn read(&self, bytes: &[u8]) -> Result<Vec<Vec<f16>>, Fault> {
        fs::write(self.path(), bytes).unwrap();
        let mut stored = open(&self.path(), KIND)?;
        (0..stored.images).map(|_| stored.next_rows()).collect()
    }

    #[track_caller]
    fn refused(&self, bytes: &[u8]) -> String {
        match self.read(bytes) {
            Err(Fault::Bad(problem) | Fault::Other(problem)) => problem,
            other => panic!("{other:?}"),
        }
    }
}

/// A file with this dtype, shape and metadata, all digests of which are right.
fn crafted(
    dtype: &str,
    shape: &[u64],
    change: impl FnOnce(&mut BTreeMap<String, String>),
    data: &[u8],
) -> Vec<u8> {
    let images = shape.first().map_or(1, |&n| n as usize);
    let digests: Vec<String> = match data.len().checked_div(images) {
        Some(size) if size > 0 => data.chunks(size).map(sha256).collect(),
        _ => vec![],
    };
    let mut metadata = BTreeMap::from([
        ("format_version".to_owned(), VERSION.to_owned()),
        ("kind".to_owned(), KIND.to_owned()),
        ("rows".to_owned(), serde_json::json!(digests).to_string()),
    ]);
    change(&mut metadata);
    metadata.insert("digest".to_owned(), digest(&metadata, shape));
    let features = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [0, data.len()] });
    with_header(&serde_json::json!({ "__metadata__": metadata, "features": features }).to_string(), data)
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

#[test]
fn what_was_written_is_read_and_another_reader_opens_it() {
    let place = Place::new();
    let bytes = place.good();
    assert_eq!(place.read(&bytes).unwrap(), [rows(0), rows(1)]);
    let stored = open(&place.path(), KIND).unwrap();
    assert_eq!((stored.images, stored.patches, stored.hidden), (2, 4, 3));
    assert_eq!(stored.metadata["note"], "\"ünï\n");
    assert_eq!(bytes, place.good(), "the same features make the same bytes");
    let other = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(other.tensor("features").unwrap().shape(), [2, 4, 3]);
    assert!(matches!(open(&place.path(), "imagehere other"), Err(Fault::Other(_))));
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused() {
    let place = Place::new();
    let bytes = place.good();
    for length in 0..bytes.len() {
        place.refused(&bytes[..length]);
    }
    assert!(place.refused(&bytes[..bytes.len() - 1]).contains("it is cut: its features need 48 bytes"));
    assert!(place.refused(&[&bytes[..], b"x"].concat()).contains("1 bytes at its end"));
}

#[test]
fn a_bit_turned_over_anywhere_is_found() {
    let place = Place::new();
    let bytes = place.good();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << bit;
            place.refused(&bad);
        }
    }
    let mut bad = bytes.clone();
    *bad.last_mut().unwrap() ^= 1;
    assert!(place.refused(&bad).contains("the rows of image 1 are not those written"));
}

#[test]
fn what_is_wrong_though_its_digests_are_right() {
    let place = Place::new();
    let good = bytemuck::cast_slice::<_, u8>(&rows(0)).to_vec();
    assert_eq!(place.read(&crafted("F16", &[1, 4, 3], |_| (), &good)).unwrap(), [rows(0)]);
    let refused = |dtype, shape: &[u64], part: &str| {
        let problem = place.refused(&crafted(dtype, shape, |_| (), &good));
        assert!(problem.contains(part), "{problem}");
    };
    refused("BF16", &[1, 4, 3], "\"BF16\", not \"F16\"");
    for shape in [&[4, 3][..], &[], &[1, 1, 4, 3], &[0, 4, 3], &[1, 0, 3], &[1, 4, 0]] {
        refused("F16", shape, "[N, P, H] is expected");
    }
    for shape in [[1, 4, 4], [2, 4, 3], [1 << 40, 4, 3], [1, 1 << 20, 64]] {
        refused("F16", &shape, "from 0 on");
    }
    for shape in [[1, 1 << 40, 1 << 40], [u64::MAX, 1 << 62, 2], [1, u64::MAX, 3], [u64::MAX, 4, 3]] {
        refused("F16", &shape, "[N, P, H] is expected");
    }
    let changed = |key: &str, value: &str| {
        let change = |all: &mut BTreeMap<String, String>| drop(all.insert(key.to_owned(), value.to_owned()));
        place.refused(&crafted("F16", &[1, 4, 3], change, &good))
    };
    assert!(changed("format_version", "2").contains("format version \"2\""));
    assert!(changed("kind", "other").contains("none that this program keeps"));
    for rows in ["", "[]", "[1]", "{}", "[\"a\", \"b\"]"] {
        assert!(changed("rows", rows).contains("not one digest of rows for each"), "{rows}");
    }
    for (bad, what) in [(f16::NAN, "NaN"), (f16::INFINITY, "inf"), (f16::NEG_INFINITY, "-inf")] {
        let mut rows = rows(0);
        rows[7] = bad;
        let problem = place.refused(&crafted("F16", &[1, 4, 3], |_| (), bytemuck::cast_slice(&rows)));
        assert!(problem.contains(&format!("image 0 has {what} in row 2, channel 1")), "{problem}");
    }
}

#[test]
fn a_claim_of_the_header_takes_no_memory() {
    let place = Place::new();
    for length in [u64::MAX, 1 << 62, MAX_HEADER + 1, MAX_HEADER] {
        place.refused(&[&length.to_le_bytes()[..], b"{}"].concat());
    }
    // A header that promises 1 GiB an image, and a file that has it as a hole: the digests are looked at first.
    let shape = [1000, 1 << 19, 1 << 10];
    let header = serde_json::json!({
        "__metadata__": { "format_version": VERSION, "kind": KIND, "rows": "[]", "digest": "0" },
        "features": { "dtype": "F16", "shape": shape, "data_offsets": [0, 1000u64 << 30] },
    });
    let bytes = with_header(&header.to_string(), b"");
    assert!(place.refused(&bytes).contains("it is cut"));
    let file = fs::OpenOptions::new().write(true).open(place.path()).unwrap();
    if file.set_len(bytes.len() as u64 + (1000 << 30)).is_ok() {
        assert!(matches!(open(&place.path(), KIND), Err(Fault::Bad(problem)) if problem.contains("damaged")));
    }
}

#[test]
fn other_files_are_told_from_damaged_ones() {
    let place = Place::new();
    for (header, part) in [
        ("[]", "no JSON object"),
        ("{}", "missing field"),
        (r#"{"inputs_embeds": {}, "__metadata__": {}}"#, "it holds \"inputs_embeds\""),
        (r#"{"a":1,"b":1,"c":1,"d":1,"e":1}"#, r#"it holds "a", "b", "c", "d""#),
        (r#"{"features": {}, "features": {}}"#, "damaged"),
        (
            r#"{"features": {"dtype":"F16","shape":[1],"data_offsets":[0,0]}, "__metadata__": {"kind": 1}}"#,
            "damaged",
        ),
    ] {
        let problem = place.refused(&with_header(header, b""));
        assert!(problem.contains(part), "{problem}");
    }
    let nested = format!("{{\"features\": {}", "[".repeat(100_000));
    place.refused(&with_header(&nested, b""));
    let directory = open(place.0.path(), KIND).unwrap_err();
    assert!(matches!(directory, Fault::Io(error) if error.kind() == io::ErrorKind::IsADirectory));
    #[cfg(unix)]
    assert!(matches!(open(Path::new("/dev/zero"), KIND), Err(Fault::Io(_))));
}

proptest! {
    #[test]
    fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0u64..300) {
        let place = Place::new();
        place.refused(&bytes);
        let mut prefixed = length.to_le_bytes().to_vec();
        prefixed.push(b'{');
        prefixed.extend(bytes);
        place.refused(&prefixed);
    }
}
