//! The zip archives of `torch.save`: `<prefix>/data.pkl` and one stored entry per storage.
//!
//! ```text
//!  local header · data.pkl │ local header · padding · data/0 │ … │ central directory │ zip64 end │ end
//!                                                     ▲                 │ name, size, place of the local header
//!                                                     └─────────────────┘
//! ```
//!
//! An own reader, because its file is mapped, may have 10 GB, and is not trusted: it looks at the end, the
//! central directory and the local headers of the entries that are asked for, and at nothing else. It does
//! not search the file, does not check a sum over data that nobody reads, does not allocate by a count that
//! the file declares, and knows neither compression nor encryption, which `torch.save` never uses. Offsets
//! beyond 4 GiB are zip64's.
//!
//! # Source
//! PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3; `caffe2/serialize/inline_container.cc` for the layout.

use std::collections::BTreeMap;
use std::ops::Range;

use super::printable;

/// An entry of the archive, stored as it is.
#[derive(Clone, Copy, Debug)]
struct Stored {
    /// Where the local header lies, in bytes of the file.
    header: usize,
    /// Bytes of data.
    len: usize,
    /// Where the next thing begins that is not this entry's: it ends before.
    limit: usize,
}

/// The central directory of an archive.
#[derive(Debug)]
pub(crate) struct Archive {
    /// By name without the prefix: `data.pkl`, `data/0`.
    entries: BTreeMap<String, Stored>,
}

/// Little-endian fields of a record.
struct Record<'a>(&'a [u8]);

impl Record<'_> {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.0[at], self.0[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }
}

const LOCAL: &[u8; 4] = b"PK\x03\x04";
const CENTRAL: &[u8; 4] = b"PK\x01\x02";
const END: &[u8; 4] = b"PK\x05\x06";
const END_64: &[u8; 4] = b"PK\x06\x06";
const LOCATOR_64: &[u8; 4] = b"PK\x06\x07";

const LOCAL_LEN: usize = 30;
const CENTRAL_LEN: usize = 46;
const END_LEN: usize = 22;
const END_64_LEN: usize = 56;
const LOCATOR_64_LEN: usize = 20;
/// Longest archive comment, in bytes: the end record lies no further from the end of the file.
const MAX_COMMENT: usize = u16::MAX as usize;

/// Returns the fixed part of the record at `at`, if its signature is there and all of it.
fn record<'a>(bytes: &'a [u8], at: u64, signature: &[u8; 4], len: usize) -> Option<Record<'a>> {
    let at = usize::try_from(at).ok()?;
    let record = bytes.get(at..at.checked_add(len)?)?;
    record.starts_with(signature).then_some(Record(record))
}

/// Where the central directory lies, and how many entries it declares.
struct Directory {
    range: Range<usize>,
    entries: u64,
}

impl Archive {
    /// Reads the central directory.
    ///
    /// # Errors
    /// What is wrong with the archive, as a sentence without its subject.
    pub fn open(bytes: &[u8]) -> Result<Self, String> {
        let directory = find_directory(bytes)?;
        let mut listed = Vec::new();
        let mut at = directory.range.start;
        while at < directory.range.end {
            let (name, entry, next) = central_entry(bytes, at, directory.range.end)?;
            if entry.header.saturating_add(LOCAL_LEN) > directory.range.start {
                return Err(format!("its entry `{}` points outside the archive", printable(&name)));
            }
            listed.push((name, entry));
            at = next;
        }
        if listed.len() as u64 != directory.entries {
            return Err(format!(
                "its directory announces {} entries and lists {}",
                directory.entries,
                listed.len()
            ));
        }

        // Each entry ends before the next begins; that of the last is the directory.
        listed.sort_by_key(|(_, entry)| entry.header);
        let mut limit = directory.range.start;
        for (name, entry) in listed.iter_mut().rev() {
            entry.limit = limit;
            // Not overflowing: both were just seen to lie in the file.
            if entry.header + LOCAL_LEN > limit || entry.len > limit - entry.header - LOCAL_LEN {
                return Err(format!(
                    "its entry `{}` of {} bytes overlaps what follows",
                    printable(name),
                    entry.len
                ));
            }
            limit = entry.header;
        }

        // `torch.save` puts everything into one folder, named after the file.
        let prefix =
            listed.first().and_then(|(name, _)| name.split_once('/')).map(|(prefix, _)| prefix.to_owned());
        let mut entries = BTreeMap::new();
        for (name, entry) in listed {
            let inside = prefix.as_deref().and_then(|prefix| name.strip_prefix(prefix)?.strip_prefix('/'));
            let Some(inside) = inside else { continue };
            if entries.insert(inside.to_owned(), entry).is_some() {
                return Err(format!("its entry `{}` is there twice", printable(&name)));
            }
        }
        Ok(Self { entries })
    }

    /// Whether there is an entry of this name, given without the prefix.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Returns where an entry's data lie in the file, after a look at its local header.
    ///
    /// # Errors
    /// What is wrong with the entry, as a sentence without its subject.
    pub fn data(&self, bytes: &[u8], name: &str) -> Result<Range<usize>, String> {
        let Some(entry) = self.entries.get(name) else {
            return Err(format!("it has no entry `{}`", printable(name)));
        };
        let Some(local) = record(bytes, entry.header as u64, LOCAL, LOCAL_LEN) else {
            return Err(format!("its entry `{}` has no header at byte {}", printable(name), entry.header));
        };
        let start = entry.header + LOCAL_LEN + usize::from(local.u16(26)) + usize::from(local.u16(28)); // name, extra
        let end = start + entry.len;
        if end > entry.limit {
            return Err(format!("its entry `{}` overlaps what follows", printable(name)));
        }
        Ok(start..end)
    }
}

/// Finds the central directory from the end of the file.
fn find_directory(bytes: &[u8]) -> Result<Directory, String> {
    // The end record, which only its comment may follow. `torch.save` writes none, but a byte of the
    // comment could look like a signature: the record is the one whose comment ends with the file.
    let tail = bytes.len().saturating_sub(END_LEN + MAX_COMMENT);
    let found = (tail..(bytes.len() + 1).saturating_sub(END_LEN)).rev().find_map(|at| {
        let end = record(bytes, at as u64, END, END_LEN)?;
        (at + END_LEN + usize::from(end.u16(20)) == bytes.len()).then_some((at, end))
    });
    let Some((end_at, end)) = found else {
        return Err(format!(
            "it is truncated: a zip archive ends with a directory, and this one of {} bytes does not",
            bytes.len()
        ));
    };

    let (mut entries, mut len, mut start) =
        (u64::from(end.u16(10)), u64::from(end.u32(12)), u64::from(end.u32(16)));
    let mut expected_end = end_at;
    let mut disks = (end.u16(4), end.u16(6)) == (0, 0) && end.u16(8) == end.u16(10);
    let locator = end_at.checked_sub(LOCATOR_64_LEN);
    if let Some(at) = locator
        && let Some(locator) = record(bytes, at as u64, LOCATOR_64, LOCATOR_64_LEN)
    {
        let end_64_at = locator.u64(8);
        let Some(end_64) = record(bytes, end_64_at, END_64, END_64_LEN) else {
            return Err(format!("its zip64 end record is not at byte {end_64_at}, where it should be"));
        };
        (entries, len, start) = (end_64.u64(32), end_64.u64(40), end_64.u64(48));
        disks = (end_64.u32(16), end_64.u32(20)) == (0, 0) && end_64.u64(24) == entries;
        // The bounds were checked with the record.
        expected_end = end_64_at as usize;
    }
    if !disks {
        return Err("it is one part of an archive of several".into());
    }
    let directory = usize::try_from(start).ok().zip(usize::try_from(len).ok());
    match directory.and_then(|(start, len)| Some(start..start.checked_add(len)?)) {
        Some(range) if range.end == expected_end => Ok(Directory { range, entries }),
        _ => Err(format!(
            "its directory of {len} bytes at byte {start} does not end where the end record begins, at byte {expected_end}"
        )),
    }
}

/// Reads the entry of the central directory at `at`; the last value returned is where the next one begins.
fn central_entry(bytes: &[u8], at: usize, directory_end: usize) -> Result<(String, Stored, usize), String> {
    let bytes = &bytes[..directory_end];
    let broken = || format!("its directory is broken at byte {at}");
    let central = record(bytes, at as u64, CENTRAL, CENTRAL_LEN).ok_or_else(broken)?;
    let name_end = at + CENTRAL_LEN + usize::from(central.u16(28));
    let extra_end = name_end + usize::from(central.u16(30));
    let next = extra_end + usize::from(central.u16(32));
    let (Some(name), Some(extra), true) =
        (bytes.get(at + CENTRAL_LEN..name_end), bytes.get(name_end..extra_end), next <= bytes.len())
    else {
        return Err(broken());
    };
    let name = String::from_utf8_lossy(name).into_owned();

    let flags = central.u16(8);
    if flags & 1 != 0 {
        return Err(format!("its entry `{}` is encrypted", printable(&name)));
    }
    let method = central.u16(10);
    if method != 0 {
        return Err(format!(
            "its entry `{}` is compressed (method {method}), which `torch.save` never does",
            printable(&name)
        ));
    }

    // A field that is all ones stands in the zip64 extra field, in this order.
    let mut wide = zip64_extra(extra);
    let mut field = |narrow: u32| -> Result<u64, String> {
        if narrow != u32::MAX {
            return Ok(u64::from(narrow));
        }
        let (value, rest) = wide.split_first_chunk::<8>().ok_or_else(broken)?;
        wide = rest;
        Ok(u64::from_le_bytes(*value))
    };
    let (len, packed, header) = (field(central.u32(24))?, field(central.u32(20))?, field(central.u32(42))?);
    if len != packed {
        return Err(format!("its entry `{}` has {packed} bytes but should have {len}", printable(&name)));
    }
    match (usize::try_from(header), usize::try_from(len)) {
        (Ok(header), Ok(len)) => Ok((name, Stored { header, len, limit: 0 }, next)),
        _ => Err(format!("its entry `{}` points outside the archive", printable(&name))),
    }
}

/// Returns the content of the zip64 field among the extra fields: empty if there is none.
fn zip64_extra(mut extra: &[u8]) -> &[u8] {
    while let Some((head, rest)) = extra.split_first_chunk::<4>() {
        let head = Record(head);
        let Some((field, rest)) = rest.split_at_checked(usize::from(head.u16(2))) else { break };
        if head.u16(0) == 1 {
            return field;
        }
        extra = rest;
    }
    &[]
}
