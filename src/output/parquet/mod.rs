//! Features of many images as one Parquet file: a row for each image.
//!
//! ```text
//!   name         string           what the image is called: its path
//!   pixels       string           SHA-256 of the pixels that the tower saw, in hexadecimal
//!   checkpoint   string           fingerprint of the checkpoint that made the features
//!   rows         int64            P
//!   hidden       int64            H
//!   features     list<float16>    P × H elements, row-major
//!
//!   PAR1 │ features of image 0 │ image 1 │ … │ the other columns │ next row group … │ footer │ PAR1
//!        └──────────────── a row group of about 128 MiB ─────────┘
//! ```
//!
//! No column has nulls. In Python: `pyarrow.parquet.read_table(path)`, and of a row
//! `row["features"].values.to_numpy().reshape(rows, hidden)`, which copies nothing.
//!
//! An image's elements are one uncompressed page, written from where they lie as soon as it is there: of a file of any
//! size, its footer is all that is kept. That is why this is written here: the `parquet` crate takes each value of a fixed
//! length as an object of its own, of five million in an image of the published model, and takes fp16 no other way.
//! The noise in the low bits of features leaves nothing to compress.
//!
//! # Source
//! `parquet.thrift`, `LogicalTypes.md` (FLOAT16, LIST) and `Encodings.md` (PLAIN, RLE) of apache/parquet-format 2.10.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use thrift::{Struct, varint};

use super::{AtomicFile, Rows};
use crate::error::Result;

mod thrift;

/// What a file begins and ends with.
const MAGIC: &[u8] = b"PAR1";
/// Bytes of features from which a row group is ended.
const GROUP: u64 = 128 << 20;
/// The most elements of a page: its size is told in 31 bits. Longer lists go on in the next page.
const PAGE: usize = 1 << 28;

// Values of enums of the format.
const INT64: i32 = 2;
const BYTE_ARRAY: i32 = 6;
const FIXED_LEN_BYTE_ARRAY: i32 = 7;
const REQUIRED: i32 = 0;
const REPEATED: i32 = 2;
const PLAIN: i32 = 0;
const RLE: i32 = 3;
const UNCOMPRESSED: i32 = 0;
const DATA_PAGE: i32 = 0;

/// A row of the table: an image.
#[derive(Clone, Copy, Debug)]
pub struct ImageRow<'a> {
    /// What it is called.
    pub name: &'a str,
    /// SHA-256 of the pixels that the tower saw, in hexadecimal.
    pub pixels: &'a str,
    /// The fingerprint of the checkpoint that made the features.
    pub checkpoint: &'a str,
    /// The features, `[P, H]`.
    pub features: Rows<'a>,
}

/// A Parquet file of features being written, to anything that takes bytes.
///
/// # Examples
/// ```
/// use imagehere::output::{Rows, parquet::{ImageRow, TableWriter}};
///
/// let values = [half::f16::ONE; 6];
/// let mut table = TableWriter::new(Vec::new())?;
/// let features = Rows::new(&values, 3)?;
/// table.push(&ImageRow { name: "a.jpg", pixels: "", checkpoint: "", features })?;
/// let (bytes, _) = table.finish(&Default::default())?;
/// assert!(bytes.starts_with(b"PAR1") && bytes.ends_with(b"PAR1"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TableWriter<W> {
    out: W,
    position: u64, // bytes written
    images: i64,
    groups: Vec<Group>,
    open: Group,
    kept: Kept, // of the open group
}

/// A row group, for the footer.
#[derive(Debug, Default)]
struct Group {
    images: i64,
    start: u64,
    columns: [Column; 6],
}

/// Where the bytes of a column of a row group are.
#[derive(Clone, Copy, Debug, Default)]
struct Column {
    start: u64,
    bytes: u64, // page headers included
    values: i64,
}

/// The values of all columns but the last, encoded: a page each.
#[derive(Debug, Default)]
struct Kept([Vec<u8>; 5]);

/// Names and types of the columns in front of the features.
const COLUMNS: [(&str, i32); 5] = [
    ("name", BYTE_ARRAY),
    ("pixels", BYTE_ARRAY),
    ("checkpoint", BYTE_ARRAY),
    ("rows", INT64),
    ("hidden", INT64),
];
/// The place of the features among the columns, and the path to their elements.
const FEATURES: usize = 5;
const FEATURES_PATH: [&str; 3] = ["features", "list", "element"];

impl<W: Write> TableWriter<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// What `out` answers.
    pub fn new(out: W) -> io::Result<Self> {
        let mut table = Self::empty(out);
        table.write(MAGIC)?;
        Ok(table)
    }

    fn empty(out: W) -> Self {
        Self {
            out,
            position: 0,
            images: 0,
            groups: Vec::new(),
            open: Group::default(),
            kept: Kept::default(),
        }
    }

    /// Adds an image. Its features are written at once, and nothing of them is kept.
    ///
    /// # Errors
    /// What the target answers.
    pub fn push(&mut self, image: &ImageRow<'_>) -> io::Result<()> {
        if self.open.images == 0 {
            self.open.start = self.position;
            self.open.columns[FEATURES].start = self.position;
        }
        let ImageRow { name, pixels, checkpoint, features } = image;
        let mut first = true;
        let mut values = features.values();
        while first || !values.is_empty() {
            let (page, rest) = values.split_at(values.len().min(PAGE));
            let levels = list_levels(page.len(), first);
            self.page(FEATURES, page.len().max(1) as i32, &[&levels, bytemuck::cast_slice(page)])?;
            (values, first) = (rest, false);
        }
        for (kept, text) in self.kept.0.iter_mut().zip([name, pixels, checkpoint]) {
            kept.extend((text.len() as u32).to_le_bytes());
            kept.extend(text.as_bytes());
        }
        for (kept, number) in self.kept.0[3..].iter_mut().zip([features.len(), features.hidden()]) {
            kept.extend((number as i64).to_le_bytes());
        }
        self.open.images += 1;
        self.images += 1;
        match self.open.columns[FEATURES].bytes < GROUP {
            true => Ok(()),
            false => self.end_group(),
        }
    }

    /// Ends the file, with texts by name in its footer, and returns the target and the bytes written.
    ///
    /// # Errors
    /// What the target answers.
    pub fn finish(mut self, metadata: &BTreeMap<String, String>) -> io::Result<(W, u64)> {
        self.end_file(metadata)?;
        Ok((self.out, self.position))
    }

    fn end_file(&mut self, metadata: &BTreeMap<String, String>) -> io::Result<()> {
        self.end_group()?;
        let pairs = metadata.iter().map(|(key, value)| Struct::new().text(1, key).text(2, value));
        let footer = Struct::new()
            .i32(1, 2) // version
            .structs(2, schema().into_iter())
            .i64(3, self.images)
            .structs(4, self.groups.iter().map(Group::describe))
            .structs(5, pairs)
            .text(6, &format!("imagehere {}", crate::VERSION))
            .end();
        let length = u32::try_from(footer.len()).map_err(io::Error::other)?;
        self.write(&footer)?;
        self.write(&length.to_le_bytes())?;
        self.write(MAGIC)?;
        self.out.flush()
    }

    /// Writes what was kept of the open row group, if it has an image.
    fn end_group(&mut self) -> io::Result<()> {
        if self.open.images == 0 {
            return Ok(());
        }
        for (column, page) in std::mem::take(&mut self.kept).0.iter().enumerate() {
            self.open.columns[column].start = self.position;
            self.page(column, self.open.images as i32, &[page])?;
        }
        self.groups.push(std::mem::take(&mut self.open));
        Ok(())
    }

    /// Writes a page of a column of the open row group.
    fn page(&mut self, column: usize, values: i32, parts: &[&[u8]]) -> io::Result<()> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let bytes = i32::try_from(bytes).map_err(io::Error::other)?;
        let of_data = Struct::new().i32(1, values).i32(2, PLAIN).i32(3, RLE).i32(4, RLE);
        let header = Struct::new().i32(1, DATA_PAGE).i32(2, bytes).i32(3, bytes).inner(5, of_data).end();
        let start = self.position;
        self.write(&header)?;
        parts.iter().try_for_each(|part| self.write(part))?;
        let place = &mut self.open.columns[column];
        place.bytes += self.position - start;
        place.values += i64::from(values);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }
}

/// A Parquet file of features that appears whole or not at all.
#[derive(Debug)]
pub struct TableFile(TableWriter<AtomicFile>);

impl TableFile {
    /// Starts a file that will be `path`.
    ///
    /// # Errors
    /// [`crate::Error::Write`] as [`AtomicFile::create`].
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let mut table = TableWriter::empty(AtomicFile::create(path)?);
        match table.write(MAGIC) {
            Ok(()) => Ok(Self(table)),
            Err(error) => Err(table.out.failed(error)),
        }
    }

    /// Adds an image; see [`TableWriter::push`].
    ///
    /// # Errors
    /// [`crate::Error::Write`] if the disk is full or fails.
    pub fn push(&mut self, image: &ImageRow<'_>) -> Result<()> {
        self.0.push(image).map_err(|error| self.0.out.failed(error))
    }

    /// Ends the file, with texts by name in its footer, gives it its name and returns its bytes.
    ///
    /// # Errors
    /// [`crate::Error::Write`] if the disk is full or fails; nothing is left behind then.
    pub fn commit(mut self, metadata: &BTreeMap<String, String>) -> Result<u64> {
        self.0.end_file(metadata).map_err(|error| self.0.out.failed(error))?;
        self.0.out.commit()?;
        Ok(self.0.position)
    }
}

impl Group {
    fn describe(&self) -> Struct {
        let bytes: u64 = self.columns.iter().map(|column| column.bytes).sum();
        let column = |(i, column): (usize, &Column)| {
            let (path, kind, encodings) = match COLUMNS.get(i) {
                Some((name, kind)) => (std::slice::from_ref(name), *kind, &[PLAIN][..]),
                None => (&FEATURES_PATH[..], FIXED_LEN_BYTE_ARRAY, &[PLAIN, RLE][..]),
            };
            let described = Struct::new()
                .i32(1, kind)
                .enums(2, encodings)
                .texts(3, path)
                .i32(4, UNCOMPRESSED)
                .i64(5, column.values)
                .i64(6, column.bytes as i64)
                .i64(7, column.bytes as i64)
                .i64(9, column.start as i64);
            Struct::new().i64(2, column.start as i64).inner(3, described)
        };
        Struct::new()
            .structs(1, self.columns.iter().enumerate().map(column))
            .i64(2, bytes as i64)
            .i64(3, self.images)
            .i64(5, self.start as i64)
            .i64(6, bytes as i64)
    }
}

/// The columns, depth first.
fn schema() -> Vec<Struct> {
    const UTF8: i32 = 0;
    const OLD_LIST: i32 = 3;
    // Each kind of meaning is a field of a union that holds an empty struct.
    let meaning = |kind| Struct::new().inner(kind, Struct::new());
    let (string, list, float16) = (1, 3, 15);
    let mut all = vec![Struct::new().text(4, "schema").i32(5, COLUMNS.len() as i32 + 1)];
    all.extend(COLUMNS.map(|(name, kind)| {
        let column = Struct::new().i32(1, kind).i32(3, REQUIRED).text(4, name);
        if kind == BYTE_ARRAY { column.i32(6, UTF8).inner(10, meaning(string)) } else { column }
    }));
    let [features, repeated, element] = FEATURES_PATH;
    all.push(
        Struct::new().i32(3, REQUIRED).text(4, features).i32(5, 1).i32(6, OLD_LIST).inner(10, meaning(list)),
    );
    all.push(Struct::new().i32(3, REPEATED).text(4, repeated).i32(5, 1));
    let element = Struct::new().i32(1, FIXED_LEN_BYTE_ARRAY).i32(2, 2).i32(3, REQUIRED).text(4, element);
    all.push(element.inner(10, meaning(float16)));
    all
}

/// The levels in front of a page of one list: where lists begin (0, then 1s), and that there are elements (1s).
fn list_levels(values: usize, first: bool) -> Vec<u8> {
    let mut levels = Vec::new();
    let mut add = |runs: &[(usize, u8)]| {
        let mut bytes = Vec::new();
        for &(count, level) in runs.iter().filter(|(count, _)| *count > 0) {
            varint(&mut bytes, (count as u64) << 1); // a run of equal levels …
            bytes.push(level); // … of one bit
        }
        levels.extend((bytes.len() as u32).to_le_bytes());
        levels.extend(bytes);
    };
    let begins = usize::from(first);
    add(&[(begins, 0), (values.saturating_sub(begins), 1)]);
    if values > 0 {
        add(&[(values, 1)])
    } else {
        add(&[(1, 0)])
    }
    levels
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn levels_say_where_a_list_begins_and_whether_it_is_empty() {
        assert_eq!(list_levels(3, true), [4, 0, 0, 0, 2, 0, 4, 1, 2, 0, 0, 0, 6, 1]);
        assert_eq!(list_levels(1, true), [2, 0, 0, 0, 2, 0, 2, 0, 0, 0, 2, 1]);
        assert_eq!(list_levels(200, false), [3, 0, 0, 0, 0x90, 3, 1, 3, 0, 0, 0, 0x90, 3, 1]);
        assert_eq!(list_levels(0, true), [2, 0, 0, 0, 2, 0, 2, 0, 0, 0, 2, 0]);
    }

    #[test]
    fn the_elements_are_there_and_a_failure_is_told() {
        let place = tempfile::tempdir().unwrap();
        let values: Vec<f16> = (0..12).map(|i| f16::from_f32(i as f32 - 7.5)).collect();
        let row = |name| ImageRow {
            name,
            pixels: "12",
            checkpoint: "34",
            features: Rows::new(&values, 3).unwrap(),
        };
        let mut table = TableWriter::new(Vec::new()).unwrap();
        ["a", "b"].iter().for_each(|name| table.push(&row(name)).unwrap());
        let (bytes, written) = table.finish(&BTreeMap::new()).unwrap();
        assert_eq!(bytes.len() as u64, written);
        let elements: &[u8] = bytemuck::cast_slice(&values);
        assert_eq!(bytes.windows(elements.len()).filter(|window| *window == elements).count(), 2);

        let path = place.path().join("t.parquet");
        let mut file = TableFile::create(&path).unwrap();
        ["a", "b"].iter().for_each(|name| file.push(&row(name)).unwrap());
        assert!(!path.exists());
        assert_eq!(file.commit(&BTreeMap::new()).unwrap(), written);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let mut dropped = TableFile::create(place.path().join("half")).unwrap();
        dropped.push(&row("a")).unwrap();
        drop(dropped);
        assert_eq!(crate::output::testkit::names(place.path()), ["t.parquet"]);
        assert!(TableFile::create(place.path().join("no/such")).is_err());
    }
}
