//! What every file of a checkpoint must live up to, whatever its bytes; see [`crate::fuzzing`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use half::f16;
use serde_json::Value;

use super::convert::RangePolicy;
use super::dtype::Format;
use super::index::{ConfigFile, is_plain_file_name, parse_index};
use super::names::read_sizes;
use super::shard::{Place, Shard};
use super::{pickle, safetensors};
use crate::config::{Size, TensorNames};
use crate::fuzzing::{check_error, check_message, with_file};

/// Most elements of a tensor that are read: a view may repeat its elements without end.
const READ: usize = 4096;

/// A pickle on its own.
pub(crate) fn pickle(bytes: &[u8]) {
    match pickle::read_state_dict(bytes) {
        Err(error) => {
            assert!(error.at <= bytes.len(), "{error}");
            check_message(&error.to_string());
        }
        Ok(dict) => {
            let names: BTreeSet<&str> = dict.tensors.iter().map(|(name, _)| *name).collect();
            assert_eq!(names.len(), dict.tensors.len(), "a name twice");
            for (name, tensor) in &dict.tensors {
                assert_eq!(tensor.shape.len(), tensor.strides.len(), "{name}");
                assert!(tensor.shape.len() <= 64, "{name}");
            }
        }
    }
}

/// An archive of `torch.save`: directory, pickle, tensors.
pub(crate) fn torch_zip(bytes: &[u8]) {
    shard(bytes, Format::Bin);
}

/// A safetensors file: header, tensors.
pub(crate) fn safetensors(bytes: &[u8]) {
    let Ok(table) = safetensors::read_table(bytes) else {
        return check_message(&safetensors::read_table(bytes).expect_err("it was refused before"));
    };
    // The spans cover the data without overlap.
    let mut spans: Vec<_> = table
        .values()
        .map(|entry| match &entry.place {
            Place::Span(span) => (span.start, span.end),
            Place::Storage { .. } => panic!("a storage in a safetensors file"),
        })
        .collect();
    spans.sort_unstable();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let end = spans.iter().fold(data, |end, span| {
        assert!(span.0 == end && span.1 >= end, "{spans:?}");
        span.1
    });
    assert_eq!(end, bytes.len());

    // Written again, it is the same table.
    let lines = table.iter().map(|(name, entry)| {
        let Place::Span(span) = &entry.place else { unreachable!() };
        let line = serde_json::json!({
            "dtype": entry.dtype.name(Format::Safetensors),
            "shape": entry.shape,
            "data_offsets": [span.start - data, span.end - data],
        });
        (name.clone(), line)
    });
    let header = Value::Object(lines.collect()).to_string();
    let mut again = (header.len() as u64).to_le_bytes().to_vec();
    again.extend(header.as_bytes());
    again.extend(&bytes[data..]);
    let reread = safetensors::read_table(&again).expect("it was read before");
    assert!(
        table
            .iter()
            .map(|(name, entry)| (name, &entry.shape, entry.dtype))
            .eq(reread.iter().map(|(name, entry)| (name, &entry.shape, entry.dtype)))
    );

    if !bytes.is_empty() {
        shard(bytes, Format::Safetensors);
    }
}

/// Opens a file of weights as a checkpoint's, and reads every tensor of it.
fn shard(bytes: &[u8], format: Format) {
    with_file(bytes, |path| {
        let shard = match Shard::open(path, format) {
            Ok(shard) => shard,
            Err(error) => return check_error(&error),
        };
        for (name, entry) in shard.table() {
            match shard.tensor(name) {
                Err(error) => check_error(&error),
                Ok(tensor) => {
                    assert_eq!(tensor.shape(), entry.shape);
                    let mut row = vec![f16::ZERO; tensor.elements().min(READ)];
                    let last = tensor.elements() - row.len();
                    for first in [0, last] {
                        if let Err(error) = tensor.read(first, &mut row, RangePolicy::Saturate) {
                            check_error(&error);
                        }
                        assert_eq!(
                            tensor.survey(first..first + row.len()).elements,
                            row.len() as u64,
                            "{name}"
                        );
                    }
                }
            }
        }
    });
}

/// The index of shards.
pub(crate) fn index(bytes: &[u8]) {
    match parse_index(Path::new("model.safetensors.index.json"), bytes) {
        Err(error) => check_error(&error),
        Ok(files) => {
            // On no platform does a name lead out of the directory.
            assert!(files.values().all(|file| is_plain_file_name(file) && !file.contains("/")));
            let again = serde_json::json!({ "weight_map": files }).to_string();
            let reread = parse_index(Path::new("again"), again.as_bytes()).expect("it was read before");
            assert_eq!(files, reread);
        }
    }
}

/// `config.json`, beside weights of a small model.
pub(crate) fn config(bytes: &[u8]) {
    let config = match ConfigFile::parse("config.json".into(), bytes.to_vec()) {
        Ok(config) => config,
        Err(error) => return check_error(&error),
    };
    let json: Value = serde_json::from_slice(bytes).expect("it was read before");
    for &(size, key, default) in config.profile.sizes {
        let said = key.split('.').fold(&json, |value, part| &value[part]).as_u64();
        let size = config.size(size);
        assert_eq!(said.or(default.map(|default| default as u64)), size.map(|size| size as u64), "{key}");
        assert_ne!(size, Some(0), "{key}");
    }
    let names = &config.profile.names[0];
    let shapes = shapes(names, 2);
    let shape_of = |name: &str| Some((shapes.get(name)?.as_slice(), Path::new("model.safetensors")));
    match read_sizes(2, names, &config, shape_of) {
        Err(error) => check_error(&error),
        Ok(sizes) => {
            assert_eq!((sizes.image_size, sizes.hidden_size, sizes.layers), (28, 96, 2));
            assert_eq!(sizes.max_length, config.size(Size::MaxLength));
        }
    }
}

/// The shapes of a small model's needed tensors.
fn shapes(names: &TensorNames, layers: usize) -> BTreeMap<String, Vec<usize>> {
    use super::names::Dim;
    let size = |dim: &Dim| match dim {
        Dim::C => 64,
        Dim::F => 128,
        Dim::T => 5,
        Dim::Patch => 14,
        Dim::Projector | Dim::H => 96,
        Dim::Vocab => 512,
        Dim::Rgb => 3,
    };
    let shape = |(name, letters): (String, &'static [Dim])| (name, letters.iter().map(size).collect());
    names.needed(layers).into_iter().map(shape).collect()
}
