//! The header of a safetensors file: names, types, shapes, and where the bytes lie.
//!
//! ```text
//! ┌ 8 bytes ┬ n bytes ──────────────────────────────────────────┬ data ───────────────────┐
//! │ n (LE)  │ {"name": {"dtype", "shape", "data_offsets": [b,e]}} │ tensor │ tensor │ …     │
//! └─────────┴───────────────────────────────────────────────────┴─────────────────────────┘
//! ```
//!
//! The header is read here, rather than with the `safetensors` crate, for the sake of what a refusal says:
//! which tensor, which bytes, which of two tensors that overlap; and because a name given twice is refused.
//! The rules are the format's: the tensors cover the data without overlap, hole or rest.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::dtype::{Format, StoredType};
use super::printable;
use super::shard::{Entry, Place};
use super::tensor::element_count;

/// Longest header accepted, in bytes: the format's own limit.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes of the length in front of the header.
const PREFIX: usize = 8;

/// Reads the table of a safetensors file.
///
/// # Errors
/// What is wrong with it, as a sentence without its subject.
pub(crate) fn read_table(bytes: &[u8]) -> Result<BTreeMap<String, Entry>, String> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
        return Err(format!("it has {} bytes, too few for a safetensors header", bytes.len()));
    };
    let header_len = u64::from_le_bytes(*prefix);
    if header_len > MAX_HEADER {
        return Err(format!("it is not a safetensors file (its header would have {header_len} bytes)"));
    }
    let header_len = header_len as usize;
    let Some((header, data)) = rest.split_at_checked(header_len) else {
        return Err(format!(
            "it is truncated: the header alone has {header_len} bytes, the file {}",
            bytes.len()
        ));
    };
    if header.first() != Some(&b'{') {
        return Err("it is not a safetensors file (its header is no JSON object)".into());
    }
    let Header(tensors) =
        serde_json::from_slice(header).map_err(|error| format!("its header cannot be read: {error}"))?;

    check_cover(&tensors, data.len())?;
    let mut table = BTreeMap::new();
    for (name, info) in tensors {
        let dtype = StoredType::from_safetensors(&info.dtype).ok_or_else(|| {
            format!("tensor `{}` has the unknown dtype {}", printable(&name), printable(&info.dtype))
        })?;
        let [begin, end] = info.data_offsets;
        let declared = element_count(&info.shape).and_then(|n| n.checked_mul(dtype.bits()));
        if declared.is_none_or(|bits| bits.div_ceil(8) != end - begin) {
            return Err(format!(
                "tensor `{}` of shape {:?} and dtype {} has {} bytes",
                printable(&name),
                info.shape,
                dtype.name(Format::Safetensors),
                end - begin
            ));
        }
        let first = PREFIX + header_len;
        let place = Place::Span(first + begin..first + end);
        table.insert(name, Entry { dtype, shape: info.shape, place });
    }
    Ok(table)
}

/// Checks that the tensors cover `data_len` bytes exactly.
fn check_cover(tensors: &[(String, Info)], data_len: usize) -> Result<(), String> {
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|(_, info)| info.data_offsets);
    let (mut covered, mut before) = (0, None);
    for (name, info) in by_place {
        let [begin, end] = info.data_offsets;
        let name = printable(name);
        if begin > end {
            return Err(format!("tensor `{name}` ends before it begins (bytes {begin} to {end})"));
        }
        if begin < covered {
            let before = before.unwrap_or_default();
            return Err(format!(
                "tensors `{before}` and `{name}` overlap (the first ends at byte {covered}, the second begins at {begin})"
            ));
        }
        if begin > covered {
            return Err(format!("no tensor covers the bytes {covered} to {begin}, before `{name}`"));
        }
        (covered, before) = (end, Some(name));
    }
    match covered.cmp(&data_len) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(format!(
            "it is truncated: its tensors need {covered} bytes after the header, and it has {data_len}"
        )),
        std::cmp::Ordering::Less => {
            Err(format!("{} bytes at its end belong to no tensor", data_len - covered))
        }
    }
}

#[derive(Debug, Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// The header, with the order and the repetitions that a map would hide.
struct Header(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut tensors: Vec<(String, Info)> = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let info = map.next_value()?;
                    if !seen.insert(name.clone()) {
                        let problem = format!("tensor `{}` is there twice", printable(&name));
                        return Err(serde::de::Error::custom(problem));
                    }
                    tensors.push((name, info));
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn refused(header: &str, data: usize, word: &str) {
        let problem = read_table(&file(header, data)).unwrap_err();
        assert!(problem.contains(word), "{problem}");
    }

    #[test]
    fn a_table_says_where_each_tensor_lies() {
        let header = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"F32","shape":[2],"data_offsets":[6,14]},
            "a":{"dtype":"BF16","shape":[3,1],"data_offsets":[0,6]}}   "#;
        let table = read_table(&file(header, 14)).unwrap();
        let first = PREFIX + header.len();
        assert_eq!(table["a"].shape, [3, 1]);
        assert_eq!(table["a"].place, Place::Span(first..first + 6));
        assert_eq!(table["b"].place, Place::Span(first + 6..first + 14));
    }

    #[test]
    fn overlaps_holes_and_rests_are_refused_by_name() {
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
            )
        };
        assert!(read_table(&file(&two("[0,4]", "[4,8]"), 8)).is_ok());
        refused(&two("[0,4]", "[3,7]"), 7, "tensors `a` and `b` overlap");
        refused(&two("[0,4]", "[0,4]"), 4, "overlap");
        refused(&two("[0,4]", "[5,9]"), 9, "no tensor covers the bytes 4 to 5, before `b`");
        refused(&two("[1,5]", "[5,9]"), 9, "no tensor covers the bytes 0 to 1, before `a`");
        refused(&two("[0,4]", "[4,8]"), 9, "1 bytes at its end");
        refused(&two("[0,4]", "[4,8]"), 7, "truncated");
        refused(&two("[4,0]", "[4,8]"), 8, "ends before it begins");
    }

    #[test]
    fn headers_that_lie_are_refused() {
        refused(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, "has 4 bytes");
        refused(r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,4]}}"#, 4, "unknown dtype F99");
        refused(
            r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
            4,
            "has 4 bytes",
        );
        refused(r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,4]}}"#, 4, "cannot be read");
        let twice = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#;
        refused(twice, 4, "`a` is there twice");
        refused("[]", 0, "no JSON object");
        refused(&"{\"a\":".repeat(2000), 0, "cannot be read");
        let far = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,18446744073709551615]}}"#;
        refused(far, 2, "truncated");
    }

    #[test]
    fn a_file_that_ends_in_its_header_is_refused() {
        let whole = file(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4);
        for n in 0..whole.len() {
            assert!(read_table(&whole[..n]).is_err(), "{n} bytes");
        }
        assert!(read_table(&u64::MAX.to_le_bytes()).unwrap_err().contains("not a safetensors file"));
    }
}
