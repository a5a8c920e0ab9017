//! Checkpoints made to hurt: nothing is executed, nothing panics, nothing is allocated on a file's word.

#[path = "checkpoint_support/asserts.rs"]
mod asserts;
mod checkpoint_support;

use std::path::Path;
use std::time::{Duration, Instant};

use asserts::*;
use checkpoint_support::*;
use half::f16;
use imagehere::Category;
use imagehere::checkpoint::{Checkpoint, RangePolicy};
use proptest::prelude::*;

/// A directory with this `pytorch_model.bin`.
fn bin_dir(bytes: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("pytorch_model.bin"), bytes).unwrap();
    dir
}

fn bin_with_pickle(pickle: Vec<u8>) -> tempfile::TempDir {
    bin_dir(&archive_bytes(pickle, vec![("0".into(), vec![0; 64])]))
}

/// Opens whatever lies there and reads everything that opening lets through. Panics only if the reader does.
fn read_everything(dir: &Path) -> Result<(), imagehere::Error> {
    let checkpoint = Checkpoint::open(dir)?;
    let (config, table) = (checkpoint.config(), checkpoint.embedding());
    let (weights, _) = checkpoint.vision_weights(RangePolicy::Saturate)?;
    assert_eq!(weights.layers.len(), config.layers);
    assert_eq!(weights.position_embedding.len(), config.tokens * config.width);
    assert_eq!((table.rows(), table.hidden()), (config.vocab_size, config.hidden_size));
    let mut row = vec![f16::ZERO; table.hidden()];
    for id in 0..table.rows().min(1000) {
        let _ = table.gather_row(id as u32, &mut row);
    }
    assert_eq!(checkpoint.fingerprint().len(), 64);
    checkpoint.inspect(true).map(drop)
}

// ---- pickles -----------------------------------------------------------------------------------------

#[test]
fn a_pickle_that_calls_os_system_is_refused_by_name_and_not_run() {
    let proof = tempfile::tempdir().unwrap();
    let marker = proof.path().join("executed");
    let command = format!("touch {}", marker.display());
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "call"),
        ("builtins", "eval"),
    ] {
        // The textbook payload, as GLOBAL and as STACK_GLOBAL, and hidden behind a whole good state_dict.
        let mut plain = Pickle::default();
        plain.op(b"\x80\x02").global(module, name).op(b"(").text(&command).op(b"tR.");
        let mut stacked = Pickle::default();
        stacked.op(b"\x80\x04").text(module).text(name).op(b"\x93(").text(&command).op(b"tR.");
        let model = small_model(SMALL, Dt::Bf16);
        let views: Vec<View> = model.iter().enumerate().map(|(i, tensor)| View::dense(tensor, i)).collect();
        let mut hidden = Pickle(Pickle::state_dict(&views));
        hidden.0.pop(); // STOP
        hidden.text("payload").global(module, name).op(b"(").text(&command).op(b"tRs.");
        for pickle in [plain, stacked, hidden] {
            let dir = bin_with_pickle(pickle.0);
            let message = refusal(dir.path());
            assert_names(
                &message,
                &["pytorch_model.bin", &format!("`{module}.{name}`"), "nothing of it was executed"],
            );
        }
    }
    assert!(!marker.exists());
}

#[test]
fn globals_that_tensors_do_not_need_are_refused_by_name() {
    for (module, name) in [
        ("torch", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("collections", "defaultdict"),
        ("collections.OrderedDict", ""),
        ("", ""),
    ] {
        let mut pickle = Pickle::default();
        pickle.op(b"\x80\x02").global(module, name).op(b".");
        assert_names(&refusal(bin_with_pickle(pickle.0).path()), &[&format!("`{module}.{name}`")]);
    }
    for (module, name) in
        [("torch._utils", "_rebuild_qtensor"), ("torch", "QInt8Storage"), ("torch", "quint4x2")]
    {
        let mut pickle = Pickle::default();
        pickle.op(b"\x80\x02").global(module, name).op(b".");
        assert_names(&refusal(bin_with_pickle(pickle.0).path()), &["quantised", name]);
    }
    // A name may hold anything; a message may not.
    let mut pickle = Pickle::default();
    pickle.global("os\u{1b}[31m", &"x".repeat(100_000)).op(b".");
    let message = refusal(bin_with_pickle(pickle.0).path());
    assert!(message.len() < 600 && !message.contains('\u{1b}'), "{message}");
}

#[test]
fn pickle_bombs_end_quickly() {
    let repeat = |head: &[u8], body: &[u8], times: usize, tail: &[u8]| {
        let mut bytes = head.to_vec();
        bytes.extend(body.repeat(times));
        bytes.extend(tail);
        bytes
    };
    let bombs: Vec<(&str, Vec<u8>)> = vec![
        ("a tuple nested ten million deep", repeat(b")", b"\x85", 10_000_000, b".")),
        ("billion laughs", repeat(b")q\x00", b"h\x00h\x00\x86q\x00", 2_000_000, b".")),
        ("a flood of values", repeat(b"(", b"N", 20_000_000, b"t.")),
        ("a flood of marks", repeat(b"", b"(", 20_000_000, b".")),
        ("a flood of memo entries", repeat(b"\x80\x04N", b"\x94", 20_000_000, b".")),
        ("a flood of dictionaries", repeat(b"", b"}0", 10_000_000, b".")),
        ("a dictionary set without end", repeat(b"}", b"NNs", 8_000_000, b".")),
        ("a string of 4 GiB", b"X\xff\xff\xff\xffabc".to_vec()),
        ("a string of 2^64 bytes", b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc".to_vec()),
        ("an integer of 255 bytes", repeat(b"\x8a\xff", b"\x01", 255, b".")),
        ("a frame of 2^64 bytes", b"\x95\xff\xff\xff\xff\xff\xff\xff\xff".to_vec()),
        ("an endless name", repeat(b"c", b"x", 1_000_000, b"")),
        ("a list that holds itself", b"]q\x00h\x00a.".to_vec()),
        ("a dictionary that holds itself", b"}q\x00X\x01\x00\x00\x00ah\x00s.".to_vec()),
        ("nothing", Vec::new()),
        ("too much of nothing", vec![b'0'; 40 << 20]),
    ];
    for (what, pickle) in bombs {
        let dir = bin_with_pickle(pickle);
        let start = Instant::now();
        refusal(dir.path());
        let took = start.elapsed();
        assert!(took < Duration::from_secs(20), "{what}: {took:?}");
    }
}

#[test]
fn tensors_that_a_pickle_misdescribes_are_refused() {
    let model = small_model(SMALL, Dt::Bf16);
    let name = "vision_proj.2.weight";
    let at = model.iter().position(|tensor| tensor.name == name).unwrap(); // [48, 80]
    let with = |change: &dyn Fn(&mut View)| {
        let mut views: Vec<View> =
            model.iter().enumerate().map(|(i, tensor)| View::dense(tensor, i)).collect();
        change(&mut views[at]);
        let storages = model.iter().enumerate().map(|(i, tensor)| (i.to_string(), tensor.bytes())).collect();
        refusal(bin_dir(&archive_bytes(Pickle::state_dict(&views), storages)).path())
    };
    type Change<'a> = &'a dyn Fn(&mut View);
    let changes: [(&str, Change<'_>); 9] = [
        ("offset", &|view| view.offset = 1),
        ("huge offset", &|view| view.offset = usize::MAX / 2),
        ("stride", &|view| view.strides = vec![80, 2]),
        ("huge stride", &|view| view.strides = vec![usize::MAX / 2, 1]),
        ("rank", &|view| view.strides = vec![80]),
        ("shape", &|view| view.shape = vec![48, 81]),
        ("overflow", &|view| view.shape = vec![usize::MAX / 2, usize::MAX / 2]),
        ("storage length", &|view| view.storage_len += 1),
        ("absent storage", &|view| view.storage = "999".into()),
    ];
    for (what, change) in changes {
        let message = with(change);
        // A different rank is a broken pickle, the rest a tensor that does not fit; each is named.
        assert!(message.contains(name) || message.contains("strides"), "{what}: {message}");
    }
    let message = with(&|view| view.storage = "../data.pkl".into());
    assert_names(&message, &[name, "no entry `data/../data.pkl`"]);
}

#[test]
fn views_that_expand_without_end_are_refused_before_any_memory_is_asked_for() {
    // 64 elements that claim to be a tower of 2^20 channels: 24 TB of weights.
    let c = 1 << 20;
    let sizes = Small { width: c, mlp: c, projector: c, hidden: c, vocab: 1, layers: 1, ..SMALL };
    let dense = small_model(Small { width: 64, layers: 1, ..SMALL }, Dt::Bf16);
    let grow = |n: usize| if [64, 96, 80, 48].contains(&n) { c } else { n };
    let views: Vec<View> = dense
        .iter()
        .map(|tensor| View {
            storage_len: 64,
            storage: "0".into(),
            shape: tensor.shape.iter().map(|&n| grow(n)).collect(),
            strides: vec![0; tensor.shape.len()],
            ..View::dense(tensor, 0)
        })
        .collect();
    let dir = bin_dir(&archive_bytes(Pickle::state_dict(&views), vec![("0".into(), vec![0; 128])]));
    write_config(dir.path(), &config_json(sizes));
    assert_names(&refusal(dir.path()), &["repeat their elements", "contiguous"]);

    // The same with the embedding table alone, and with a tensor that only `inspect --all` would read.
    let model = small_model(SMALL, Dt::Bf16);
    let mut views: Vec<View> = model.iter().enumerate().map(|(i, tensor)| View::dense(tensor, i)).collect();
    let storages: Vec<(String, Vec<u8>)> =
        model.iter().enumerate().map(|(i, tensor)| (i.to_string(), tensor.bytes())).collect();
    let last = views.len() - 1;
    (views[last].shape, views[last].strides) = (vec![1 << 50, 48], vec![0, 1]);
    let dir = bin_dir(&archive_bytes(Pickle::state_dict(&views), storages.clone()));
    assert_names(&refusal(dir.path()), &["repeat their elements"]);
    views[last] = View::dense(&model[last], last);
    views.push(View {
        name: "output.weight".into(),
        shape: vec![1 << 50],
        strides: vec![0],
        ..views[0].clone()
    });
    let dir = bin_dir(&archive_bytes(Pickle::state_dict(&views), storages));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.inspect(false).unwrap();
    assert_names(&checkpoint.inspect(true).unwrap_err().to_string(), &["repeat their elements"]);
}

// ---- archives ----------------------------------------------------------------------------------------

#[test]
fn archives_that_contradict_themselves_are_refused() {
    let whole = torch_bytes(&small_model(SMALL, Dt::Bf16));
    assert!(Checkpoint::open(bin_dir(&whole).path()).is_ok());
    let find = |signature: &[u8]| whole.windows(4).rposition(|window| window == signature).unwrap();
    let first_central = whole.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    let (end, locator, end_64) = (find(b"PK\x05\x06"), find(b"PK\x06\x07"), find(b"PK\x06\x06"));
    let patched = |at: usize, bytes: &[u8]| {
        let mut patched = whole.clone();
        patched[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(bin_dir(&patched).path())
    };
    let all = [0xff; 8];
    assert_names(&patched(end, b"xxxx"), &["truncated"]);
    assert_names(&patched(end + 20, &[1, 0]), &["truncated"]); // a comment that is not there
    assert_names(&patched(locator + 8, &all), &["zip64 end record"]);
    assert_names(&patched(locator + 8, &0u64.to_le_bytes()), &["zip64 end record"]);
    assert_names(&patched(end_64 + 20, &[1]), &["several"]);
    assert_names(&patched(end_64 + 32, &all), &["several"]); // entries: not those of this disk
    let mut counts = all.to_vec();
    counts.extend(all);
    assert_names(&patched(end_64 + 24, &counts), &["announces 18446744073709551615 entries"]);
    assert_names(&patched(end_64 + 40, &all), &["directory"]); // its length
    assert_names(&patched(end_64 + 48, &all), &["directory"]); // its place
    assert_names(&patched(first_central, b"xxxx"), &["directory is broken"]);
    assert_names(&patched(first_central + 8, &[1, 8]), &["encrypted"]);
    assert_names(&patched(first_central + 10, &[8]), &["compressed"]);
    assert_names(&patched(first_central + 20, &[0]), &["bytes but should have"]);
    assert_names(&patched(first_central + 28, &[0xff, 0xff]), &["directory is broken"]);
    assert_names(&patched(first_central + 42, &[0xfe; 4]), &["outside the archive"]);
    assert_names(&patched(first_central + 42, &all[..4]), &["directory is broken"]); // no zip64 field follows
    let sizes = [0xf0, 0xff, 0xff, 0x7f, 0xf0, 0xff, 0xff, 0x7f];
    assert_names(&patched(first_central + 20, &sizes), &["overlaps"]);
    assert_names(&patched(0, b"xxxx"), &["not a zip archive"]);
    assert_names(&patched(26, &all[..2]), &["overlaps"]); // the local header's name covers the data
    let mut local = whole.clone();
    local[..4].copy_from_slice(b"PK??");
    assert_names(&refusal(bin_dir(&local).path()), &["no header at byte 0"]);
}

#[test]
fn two_entries_at_one_place_are_refused() {
    let whole = torch_bytes(&small_model(SMALL, Dt::Bf16));
    let centrals: Vec<usize> =
        (0..whole.len() - 4).filter(|&at| &whole[at..at + 4] == b"PK\x01\x02").collect();
    let mut shared = whole.clone();
    let (from, to) = (centrals[4] + 42, centrals[5] + 42);
    shared.copy_within(from..from + 4, to);
    assert_names(&refusal(bin_dir(&shared).path()), &["overlaps"]);
}

#[test]
fn other_archives_are_told_apart() {
    let model = small_model(SMALL, Dt::Bf16);
    let mut out = std::io::Cursor::new(Vec::new());
    write_zip(&mut out, &[("weights.npy".into(), Content::Bytes(vec![0; 100]))]).unwrap();
    assert_names(&refusal(bin_dir(&out.into_inner()).path()), &["not one of `torch.save`", "data.pkl"]);

    let mut out = std::io::Cursor::new(Vec::new());
    let mut entries = archive_entries(b"\x80\x02}.".to_vec(), vec![]);
    entries[1].1 = Content::Bytes(b"big".to_vec());
    write_zip(&mut out, &entries).unwrap();
    assert_names(&refusal(bin_dir(&out.into_inner()).path()), &["byte order is `big`"]);

    let legacy = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.";
    assert_names(&refusal(bin_dir(legacy).path()), &["legacy format", "PyTorch 1.6", "safetensors"]);
    assert_names(&refusal(bin_dir(b"<!DOCTYPE html>").path()), &["not a zip archive", "<!DOCTYPE html>"]);
    assert_names(&refusal(bin_dir(&safetensors_bytes(&model)).path()), &["not a zip archive"]);
    let mut nested = Pickle::default();
    nested.op(b"\x80\x02}").text("state_dict").op(b"}s.");
    assert_names(&refusal(bin_with_pickle(nested.0).path()), &["nested under `state_dict`"]);

    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("model.safetensors"), torch_bytes(&model)).unwrap();
    assert_names(&refusal(dir.path()), &["not a safetensors file"]);
}

// ---- safetensors, JSON, files ------------------------------------------------------------------------

#[test]
fn overlapping_safetensors_are_refused() {
    let model = small_model(SMALL, Dt::Bf16);
    let whole = safetensors_bytes(&model);
    let header_len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&whole[8..8 + header_len]).unwrap();
    // The second tensor is moved to the beginning of the first, whose bytes it then shares.
    let moved = header.replace("[128,1664]", "[0,1536]");
    assert!(moved.len() < header.len());
    let mut bytes = (moved.len() as u64).to_le_bytes().to_vec();
    bytes.extend(moved.as_bytes());
    bytes.extend(&whole[8 + header_len..]);
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    assert_names(&refusal(dir.path()), &["class_embedding", "patch_embedding", "overlap"]);
}

#[test]
fn json_that_nests_without_end_is_refused() {
    let deep = "[".repeat(1_000_000);
    let dir = model_dir(&small_model(SMALL, Dt::Bf16), "safetensors");
    std::fs::write(dir.path().join("config.json"), format!("{{\"a\":{deep}")).unwrap();
    assert_names(&refusal(dir.path()), &["config.json", "no JSON object"]);

    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("model.safetensors.index.json"), format!("{{\"weight_map\":{deep}"))
        .unwrap();
    assert_names(&refusal(dir.path()), &["no index of shards"]);

    let header = format!("{{\"a\":{deep}");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    assert_names(&refusal(dir.path()), &["header cannot be read"]);
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert_names(&refusal(dir.path()), &["model.safetensors", "not a regular file"]);

    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    let pipe = dir.path().join("pytorch_model.bin");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_names(&refusal(dir.path()), &["pytorch_model.bin", "not a regular file"]);

    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::os::unix::fs::symlink("model.safetensors", dir.path().join("model.safetensors")).unwrap();
    assert_names(&refusal(dir.path()), &["model.safetensors", "cannot open"]);

    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    std::fs::write(dir.path().join("model.safetensors"), b"").unwrap();
    assert_names(&refusal(dir.path()), &["model.safetensors", "empty"]);
}

// ---- beyond 4 GiB ------------------------------------------------------------------------------------

#[test]
fn a_sparse_archive_beyond_4_gib_is_read() {
    let model = small_model(SMALL, Dt::Bf16);
    // First a storage of 5 GiB, so that it has zip64 sizes and everything after it zip64 offsets; then
    // the needed ones; a last one of 6 GiB for good measure. All holes.
    let huge = |name: &str, storage: &str, elements: usize| View {
        storage_len: elements,
        storage: storage.into(),
        shape: vec![elements],
        strides: vec![1],
        ..View::dense(&Named::zeros(name, Dt::Bf16, &[1]), 0)
    };
    let mut views = vec![huge("model.layers.0.first", "first", 5 << 29)];
    views.extend(model.iter().enumerate().map(|(i, tensor)| View::dense(tensor, i)));
    views.push(huge("model.layers.1.last", "last", 6 << 29));
    let mut storages = vec![("first".to_owned(), Content::Hole(5 << 30))];
    storages
        .extend(model.iter().enumerate().map(|(i, tensor)| (i.to_string(), Content::Bytes(tensor.bytes()))));
    storages.push(("last".to_owned(), Content::Hole(6 << 30)));

    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    let path = dir.path().join("pytorch_model.bin");
    write_archive(&path, Pickle::state_dict(&views), storages);
    assert!(path.metadata().unwrap().len() > 11 << 30);
    assert_reads_quickly(dir.path(), &model);

    // Cut off inside the last hole: the directory is gone.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(8 << 30).unwrap();
    let start = Instant::now();
    assert_names(&refusal(dir.path()), &["truncated", "8589934592 bytes"]);
    assert!(start.elapsed() < Duration::from_secs(5), "the file was searched: {:?}", start.elapsed());
}

#[test]
fn sparse_safetensors_beyond_4_gib_are_read() {
    use std::io::{Seek, SeekFrom, Write};
    let model = small_model(SMALL, Dt::Bf16);
    let whole = safetensors_bytes(&model);
    let header_len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let hole = 5u64 << 30;
    let mut lines = vec![("model.layers.0.first".to_owned(), "BF16", vec![5 << 29], 0, hole)];
    let mut at = hole;
    for tensor in &model {
        let end = at + tensor.bytes().len() as u64;
        lines.push((tensor.name.clone(), "BF16", tensor.shape.clone(), at, end));
        at = end;
    }
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    let mut file = std::fs::File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all(&safetensors_header(&lines)).unwrap();
    file.seek(SeekFrom::Current(hole as i64)).unwrap();
    file.write_all(&whole[8 + header_len..]).unwrap();
    assert_reads_quickly(dir.path(), &model);
}

/// Reads the needed tensors, and in a time in which nobody reads gigabytes.
fn assert_reads_quickly(dir: &Path, model: &[Named]) {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (weights, _) = checkpoint.vision_weights(RangePolicy::Refuse).unwrap();
    assert!(weights.projector_out.weight == find(model, "vision_proj.2.weight").rounded());
    assert!(weights.class_embedding == find(model, &format!("{TOWER}embeddings.class_embedding")).rounded());
    let table = find(model, "model.tok_embeddings.weight").rounded();
    let mut row = vec![f16::ZERO; 48];
    checkpoint.embedding().gather_row(39, &mut row).unwrap();
    assert_eq!(row, &table[39 * 48..]);
    assert_eq!(checkpoint.fingerprint().len(), 64);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

// ---- damage at random --------------------------------------------------------------------------------

/// A model small enough to be damaged many times.
fn damaged_dir(format: &str, damage: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
    let sizes = Small { layers: 1, grid: 2, mlp: 8, projector: 8, hidden: 8, vocab: 6, ..SMALL };
    let model = small_model(sizes, Dt::Bf16);
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(sizes));
    let (file, mut bytes) = match format {
        "bin" => ("pytorch_model.bin", torch_bytes(&model)),
        _ => ("model.safetensors", safetensors_bytes(&model)),
    };
    damage(&mut bytes);
    std::fs::write(dir.path().join(file), bytes).unwrap();
    dir
}

#[test]
fn undamaged_it_is_read() {
    for format in ["bin", "safetensors"] {
        read_everything(damaged_dir(format, |_| ()).path()).unwrap();
    }
}

#[test]
fn no_beginning_of_a_file_passes_for_the_file() {
    for format in ["bin", "safetensors"] {
        let mut len = 0;
        damaged_dir(format, |bytes| len = bytes.len());
        // All lengths near both ends, some in between.
        let cuts = (0..len).filter(|&n| n < 200 || len - n < 400 || n % 1009 == 0);
        for cut in cuts {
            let dir = damaged_dir(format, |bytes| bytes.truncate(cut));
            let error = read_everything(dir.path()).expect_err("a truncated file must be refused");
            assert_eq!(error.category(), Category::Checkpoint, "{format} cut to {cut} bytes: {error}");
        }
    }
}

/// Places in the tables: the beginning of a safetensors file; the pickle and the directory of an archive.
fn table_places(format: &str, bytes: &[u8]) -> Vec<usize> {
    if format == "safetensors" {
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        return (0..8 + header_len as usize).collect();
    }
    let find = |from: usize, signature: &[u8]| {
        from + bytes[from..].windows(4).position(|window| window == signature).unwrap()
    };
    let (second_entry, directory) = (find(4, b"PK\x03\x04"), find(0, b"PK\x01\x02"));
    (0..second_entry).chain(directory..bytes.len()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Flipped bits either are noticed, or change values alone: nothing panics, nothing is read elsewhere.
    #[test]
    fn flipped_bits_never_panic(
        bin in any::<bool>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u32..8, any::<bool>()), 1..4),
    ) {
        let format = if bin { "bin" } else { "safetensors" };
        let dir = damaged_dir(format, |bytes| {
            let tables = table_places(format, bytes);
            for (index, bit, anywhere) in flips {
                let at = if anywhere { index.index(bytes.len()) } else { tables[index.index(tables.len())] };
                bytes[at] ^= 1 << bit;
            }
        });
        if let Err(error) = read_everything(dir.path()) {
            prop_assert_eq!(error.category(), Category::Checkpoint, "{}", error);
        }
    }

    /// Bytes replaced by bytes that mean something to a reader: opcodes, signatures, huge numbers.
    #[test]
    fn replaced_bytes_never_panic(
        bin in any::<bool>(),
        at in any::<prop::sample::Index>(),
        with in prop::sample::select(vec![
            &b"\xff\xff\xff\xff\xff\xff\xff\xff"[..], b"\0\0\0\0", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06",
            b"(((", b"ttt", b"RRR", b".", b"}s", b"\x94", b"h\x00", b"Q", b"b", b"\x8a\xff", b"X\xff\xff\xff\xff",
            b"cos\nsystem\n", b"9999999999", b"\"", b"}", b"[-1]", b"null",
        ]),
    ) {
        let format = if bin { "bin" } else { "safetensors" };
        let dir = damaged_dir(format, |bytes| {
            let tables = table_places(format, bytes);
            let at = tables[at.index(tables.len())];
            let n = with.len().min(bytes.len() - at);
            bytes[at..at + n].copy_from_slice(&with[..n]);
        });
        if let Err(error) = read_everything(dir.path()) {
            prop_assert_eq!(error.category(), Category::Checkpoint, "{}", error);
        }
    }
}

// ---- files that change under the reader ----------------------------------------------------------------

#[cfg(unix)]
#[test]
fn weights_that_are_cut_after_they_were_opened_are_an_error_and_no_signal() {
    use imagehere::convert::{self, ConvertOptions};
    for (format, name) in [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")] {
        let dir = model_dir(&small_model(SMALL, Dt::Bf16), format);
        let file = dir.path().join(name);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let table = checkpoint.embedding();
        let out = tempfile::tempdir().unwrap();
        std::fs::File::options().write(true).open(&file).unwrap().set_len(100).unwrap();

        let shorter = [name, "it got shorter while it was read", "Run it again"];
        let error = checkpoint.vision_weights(RangePolicy::Refuse).unwrap_err();
        assert_eq!(error.category(), Category::Checkpoint);
        assert_names(&error.to_string(), &shorter);
        let mut row = vec![f16::ZERO; table.hidden()];
        assert_names(&table.gather_row(0, &mut row).unwrap_err().to_string(), &shorter);
        let written = convert::write(&checkpoint, ConvertOptions::default(), out.path().join("m"));
        assert_names(&written.unwrap_err().to_string(), &shorter);
        assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
    }
}

#[test]
fn weights_that_are_replaced_or_removed_after_they_were_opened_are_those_that_were_opened() {
    let dir = model_dir(&small_model(SMALL, Dt::Bf16), "safetensors");
    let file = dir.path().join("model.safetensors");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let (before, _) = checkpoint.vision_weights(RangePolicy::Refuse).unwrap();
    let other = dir.path().join("other");
    std::fs::write(&other, "something else").unwrap();
    std::fs::rename(&other, &file).unwrap();
    let (after, _) = checkpoint.vision_weights(RangePolicy::Refuse).unwrap();
    assert!(before.position_embedding == after.position_embedding);
    std::fs::remove_file(&file).unwrap();
    let (after, _) = checkpoint.vision_weights(RangePolicy::Refuse).unwrap();
    assert!(before.position_embedding == after.position_embedding);
}
