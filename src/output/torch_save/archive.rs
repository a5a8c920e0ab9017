//! The zip archive that `torch.save` makes, written from its first byte to its last without going back.

use std::io::{self, Write};

use zip::write::{SimpleFileOptions, StreamWriter};
use zip::{CompressionMethod, ZipWriter};

/// Where torch begins the bytes of a storage, so that they can be mapped and read as any dtype.
const ALIGNMENT: u16 = 64;
/// The extra field that holds the padding, as torch names it: `FB`.
const PADDING_ID: u16 = u16::from_le_bytes(*b"FB");
/// Entries beyond this many bytes need zip64 sizes, which must be announced before they are written.
const ZIP64_FROM: usize = u32::MAX as usize;

/// An archive being written: `data.pkl`, then the storages in their order.
///
/// Sizes and checksums follow each entry's bytes, as in torch's own files, so that any `Write` will do.
pub(crate) struct Archive<'a, W: Write> {
    zip: ZipWriter<StreamWriter<Latch<'a, W>>>,
    stem: &'a str,
    storages: usize,
}

impl<'a, W: Write> Archive<'a, W> {
    /// Begins an archive whose entries are called `stem/…`.
    pub fn begin(out: &'a mut W, stem: &'a str, pickle: &[u8]) -> io::Result<Self> {
        let zip = ZipWriter::new_stream(Latch { out, bytes: 0, failed: None });
        let mut archive = Self { zip, stem, storages: 0 };
        archive.entry("data.pkl", 0)?;
        archive.zip.write_all(pickle)?;
        archive.entry("byteorder", 0)?;
        archive.zip.write_all(b"little")?;
        Ok(archive)
    }

    /// Adds the next storage, of so many bytes, which `fill` writes. Does nothing once something has failed.
    pub fn storage(
        &mut self,
        bytes: usize,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        self.entry(&format!("data/{}", self.storages), bytes)?;
        self.storages += 1;
        match self.zip.get_ref().is_some_and(|out| out.get_ref().failed.is_some()) {
            true => Ok(()), // no use in making it
            false => fill(&mut self.zip),
        }
    }

    /// Ends the archive and returns its bytes.
    pub fn end(mut self) -> io::Result<u64> {
        self.entry("version", 0)?;
        self.zip.write_all(b"3\n")?;
        let Latch { bytes, failed, .. } = self.zip.finish()?.into_inner();
        failed.map_or(Ok(bytes), Err)
    }

    fn entry(&mut self, name: &str, bytes: usize) -> io::Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .with_alignment_and_header_id(ALIGNMENT, PADDING_ID);
        let name = format!("{}/{name}", self.stem);
        Ok(self.zip.start_file(name, options.large_file(bytes >= ZIP64_FROM))?)
    }
}

/// Keeps the first failure and lets everything after it pass unwritten.
///
/// [`ZipWriter`] prints to stderr when it is dropped after a failure; a library must not, so it sees none.
struct Latch<'a, W> {
    out: &'a mut W,
    bytes: u64, // that would be there, had nothing failed
    failed: Option<io::Error>,
}

impl<W: Write> Latch<'_, W> {
    fn attempt(&mut self, act: impl FnOnce(&mut W) -> io::Result<()>) {
        if self.failed.is_none() {
            self.failed = act(self.out).err();
        }
    }
}

impl<W: Write> Write for Latch<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.attempt(|out| out.write_all(bytes));
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.attempt(W::flush);
        Ok(())
    }
}
