//! JPEG as Pillow decodes it: libjpeg-turbo's integer arithmetic (slow-integer DCT, smooth upsampling), from the
//! `mozjpeg-sys` crate, whose decoder is libjpeg-turbo's, built by a C compiler alone.
//!
//! libjpeg cannot return an error: its error handler must not come back. Ours unwinds ([`resume_unwind`] runs no
//! panic hook, so nothing is printed) through C frames that were compiled for it (`-fexceptions`), and is caught
//! before it leaves this file. Whether the data reach the last row is not libjpeg's to say: it paints grey over what
//! is missing and calls that a warning; [`Decoder::verdict`] reads those warnings.

use std::cell::RefCell;
use std::ffi::{CStr, c_int, c_ulong, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use mozjpeg_sys as sys;

use super::{Headers, Samples, Stored};
use crate::error::ImageProblem;
use crate::image::Limits;
use crate::image::room::Room;

/// Scans beyond this number only serve to waste time: an honest progressive file has about ten.
const MAX_SCANS: c_int = 500;

/// Decodes the file to grey, RGB or (inverted) CMYK.
pub(super) fn decode(
    bytes: &[u8],
    headers: &Headers,
    stored: Stored,
    limits: &Limits,
    room: &dyn Room,
) -> Result<Samples, ImageProblem> {
    let mut decoder = Decoder::new()?;
    let mut samples = caught(|| decoder.rows(bytes, stored, limits, room))?;
    // What follows the last row may be as broken as it likes; it only earns a word.
    if let Err(problem) = caught(|| decoder.finish()) {
        decoder.warnings.borrow_mut().note(format!("after its last row: {problem}"));
    }
    samples.faults = decoder.verdict(bytes, headers)?;
    Ok(samples)
}

/// What our error handler unwinds with.
struct Abort(ImageProblem);

/// Runs libjpeg, and turns its way of giving up into an error.
fn caught<T>(work: impl FnOnce() -> Result<T, ImageProblem>) -> Result<T, ImageProblem> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| match payload.downcast::<Abort>() {
        Ok(abort) => Err(abort.0),
        Err(panic) => resume_unwind(panic), // a bug of ours: not to be hidden
    })
}

/// What libjpeg warned of. It lives behind `client_data`, where the handlers find it.
#[derive(Default)]
struct Warnings {
    /// The decoder needed bits where a marker or the end of the file stood.
    starved: bool,
    /// The end of the file was reached before the end marker.
    end_of_file: bool,
    /// The first of the others, and how many there were.
    other: Option<String>,
    others: usize,
}

impl Warnings {
    fn note(&mut self, message: String) {
        self.other.get_or_insert(message);
        self.others += 1;
    }

    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.end_of_file {
            faults.push("its end marker (EOI) is missing".into());
        }
        if let Some(other) = &self.other {
            let more = self.others - 1;
            faults.push(match more {
                0 => other.clone(),
                _ => format!("{other} (and {more} more)"),
            });
        }
        faults
    }
}

/// A decompressor and what it points to. The parts that libjpeg holds pointers to are held as pointers here too, so
/// that moving this struct moves none of them.
struct Decoder<'a> {
    info: Box<sys::jpeg_decompress_struct>,
    errors: *mut sys::jpeg_error_mgr,
    progress: *mut sys::jpeg_progress_mgr,
    warnings: Rc<RefCell<Warnings>>,
    /// What the scans left out; `None` where scans do not refine one another.
    refinement: Option<Refinement>,
    /// The end of the file was reached while rows were still wanted.
    end_of_file_within_rows: bool,
    _source: PhantomData<&'a [u8]>,
}

/// How far the scans of a progressive file came.
#[derive(Clone, Copy)]
struct Refinement {
    /// Components of which nothing arrived.
    absent: usize,
    /// Coefficients of which not every bit arrived.
    unfinished: usize,
}

impl Drop for Decoder<'_> {
    fn drop(&mut self) {
        // SAFETY: `info` was created by libjpeg (or its creation failed, which this call copes with) and is
        // destroyed once; the managers came from `Box::into_raw` and nothing points to them any more.
        unsafe {
            sys::jpeg_destroy_decompress(&mut self.info);
            drop(Box::from_raw(self.errors));
            drop(Box::from_raw(self.progress));
        }
    }
}

impl<'a> Decoder<'a> {
    fn new() -> Result<Self, ImageProblem> {
        // SAFETY: these C structs are made of numbers, enums with a variant 0, and nullable pointers; libjpeg's
        // own examples start by zeroing them.
        let mut decoder = unsafe {
            Self {
                info: Box::new(std::mem::zeroed()),
                errors: Box::into_raw(Box::new(std::mem::zeroed())),
                progress: Box::into_raw(Box::new(std::mem::zeroed())),
                warnings: Rc::default(),
                refinement: None,
                end_of_file_within_rows: false,
                _source: PhantomData,
            }
        };
        // SAFETY: both managers are live and nobody else holds them.
        unsafe {
            decoder.info.common.err = sys::jpeg_std_error(&mut *decoder.errors);
            (*decoder.errors).error_exit = Some(on_error);
            (*decoder.errors).emit_message = Some(on_message);
            (*decoder.progress).progress_monitor = Some(on_progress);
        }
        decoder.info.common.client_data = Rc::as_ptr(&decoder.warnings).cast_mut().cast::<c_void>();
        caught(|| {
            // SAFETY: `info` is zeroed memory of the struct's size with an error manager in place, as this call
            // asks; it keeps `err` and `client_data` and overwrites the rest.
            unsafe { sys::jpeg_create_decompress(&mut *decoder.info) };
            Ok(())
        })?;
        decoder.info.common.progress = decoder.progress;
        Ok(decoder)
    }

    /// Decodes every row. Runs inside [`caught`].
    fn rows(
        &mut self,
        bytes: &'a [u8],
        stored: Stored,
        limits: &Limits,
        room: &dyn Room,
    ) -> Result<Samples, ImageProblem> {
        let info = &mut *self.info;
        // SAFETY: `info` was created by libjpeg; `bytes` outlives it (`'a`).
        unsafe { sys::jpeg_mem_src(info, bytes.as_ptr(), bytes.len() as c_ulong) };
        // SAFETY: `info` has a source; TRUE makes a file of tables alone an error.
        unsafe { sys::jpeg_read_header(info, 1) };

        let (width, height) = (info.image_width, info.image_height);
        let components = info.num_components as usize;
        info.out_color_space = match components {
            1 => sys::J_COLOR_SPACE::JCS_GRAYSCALE,
            3 => sys::J_COLOR_SPACE::JCS_RGB,
            4 => sys::J_COLOR_SPACE::JCS_CMYK,
            _ => return Err(ImageProblem::Unsupported(format!("a JPEG of {components} components"))),
        };
        let (known, count) = match stored {
            Stored::Marked => (info.jpeg_color_space, components),
            Stored::Grey => (sys::J_COLOR_SPACE::JCS_GRAYSCALE, 1),
            Stored::Rgb => (sys::J_COLOR_SPACE::JCS_RGB, 3),
            Stored::YCbCr => (sys::J_COLOR_SPACE::JCS_YCbCr, 3),
            Stored::Cmyk => (sys::J_COLOR_SPACE::JCS_CMYK, 4),
        };
        if count != components {
            return Err(ImageProblem::Broken(format!(
                "the JPEG within has {components} components, not {count}"
            )));
        }
        info.jpeg_color_space = known;
        // SAFETY: the header has been read.
        let several_scans = unsafe { sys::jpeg_has_multiple_scans(info) } != 0;
        // several scans: libjpeg keeps a 16-bit coefficient for each sample until the last scan
        let coefficients = if several_scans { 2 * components } else { 0 };
        let converted = if components == 3 { 0 } else { 3 };
        limits.check(width, height, (components + converted + coefficients) as u64)?;

        // Pillow's settings, which are libjpeg's defaults; written down because mozjpeg is free to have others
        info.dct_method = sys::J_DCT_METHOD::JDCT_ISLOW;
        info.do_fancy_upsampling = 1;
        info.do_block_smoothing = 1;
        // SAFETY: the header has been read and the colour space is one that this number of components has.
        unsafe { sys::jpeg_start_decompress(info) };
        if (info.output_width, info.output_height) != (width, height)
            || info.output_components as usize != components
        {
            return Err(ImageProblem::Broken("its headers contradict each other".into()));
        }
        if !info.coef_bits.is_null() {
            // SAFETY: in progressive mode `coef_bits` leads to at least `components` rows of 64 ints, which live
            // until the decompressor is finished.
            let bits =
                unsafe { std::slice::from_raw_parts(info.coef_bits.cast::<[c_int; 64]>(), components) };
            self.refinement = Some(Refinement {
                absent: bits.iter().filter(|component| component[0] < 0).count(),
                unfinished: bits.as_flattened().iter().filter(|&&bits| bits != 0).count(),
            });
        }

        let row_bytes = width as usize * components;
        let mut data = Samples::memory(width, height, components, room); // [height, width, components]
        let mut left = &mut data[..];
        while !left.is_empty() {
            const AT_ONCE: usize = 4; // libjpeg has one to four rows ready at a time
            let mut rows = [std::ptr::null_mut::<u8>(); AT_ONCE];
            let count = AT_ONCE.min(left.len() / row_bytes);
            for (slot, row) in rows.iter_mut().zip(left.chunks_exact_mut(row_bytes)) {
                *slot = row.as_mut_ptr();
            }
            // SAFETY: the first `count` pointers lead to `output_width * output_components` bytes each, disjoint.
            let read = unsafe { sys::jpeg_read_scanlines(info, rows.as_mut_ptr(), count as u32) } as usize;
            if read == 0 || read > count {
                return Err(early());
            }
            left = &mut std::mem::take(&mut left)[read * row_bytes..];
        }
        self.end_of_file_within_rows = self.warnings.borrow().end_of_file;
        Ok(Samples { width, height, components, data, faults: Vec::new() })
    }

    /// Reads on to the end marker. Runs inside [`caught`].
    fn finish(&mut self) -> Result<(), ImageProblem> {
        // SAFETY: every row has been read.
        unsafe { sys::jpeg_finish_decompress(&mut self.info) };
        Ok(())
    }

    /// Says whether the data reached the last row, which libjpeg does not care for, and what else was wrong.
    fn verdict(&self, bytes: &[u8], headers: &Headers) -> Result<Vec<String>, ImageProblem> {
        let components = self.info.num_components as usize;
        let mut warnings = self.warnings.borrow_mut();
        let Some(frame) = &headers.frame else {
            return Err(ImageProblem::Broken("its headers contradict each other".into()));
        };
        let one_scan = !frame.progressive && headers.first_scan == components;
        if warnings.starved {
            // Between restart markers damage stays where it is, and rows follow. Anywhere else nothing follows.
            if !one_scan || warnings.end_of_file || !headers.has_every_restart(bytes) {
                return Err(early());
            }
            warnings.note("its data are damaged between two restart markers".into());
        }
        // An arithmetic decoder never starves, it reads zeros; so its file has to be whole.
        if frame.arithmetic && self.end_of_file_within_rows {
            return Err(early());
        }
        match self.refinement {
            Some(Refinement { absent, unfinished }) => {
                if absent > 0 || (unfinished > 0 && warnings.end_of_file) {
                    return Err(ImageProblem::Broken("its data end before its last scan".into()));
                }
                if unfinished > 0 {
                    warnings.note(format!("its scans leave {unfinished} coefficients unfinished"));
                }
            }
            None if !one_scan && headers.scanned_components(bytes) < components => {
                return Err(ImageProblem::Broken("its data end before its last scan".into()));
            }
            None => {}
        }
        Ok(warnings.faults())
    }
}

fn early() -> ImageProblem {
    ImageProblem::Broken("its data end before its last row".into())
}

/// libjpeg's `error_exit`: does not return.
unsafe extern "C-unwind" fn on_error(info: &mut sys::jpeg_common_struct) {
    // SAFETY: libjpeg calls this with the error manager that `Decoder::new` installed.
    let message = unsafe { message(&*info.err) };
    // SAFETY: as above.
    let code = unsafe { (*info.err).msg_code };
    let problem = match code {
        sys::JERR_ARITH_NOTIMPL
        | sys::JERR_BAD_PRECISION
        | sys::JERR_CONVERSION_NOTIMPL
        | sys::JERR_SOF_UNSUPPORTED => ImageProblem::Unsupported(message),
        _ => ImageProblem::Broken(message),
    };
    resume_unwind(Box::new(Abort(problem)));
}

/// libjpeg's `emit_message`: warnings have level -1, traces 0 and above.
unsafe extern "C-unwind" fn on_message(info: &mut sys::jpeg_common_struct, level: c_int) {
    if level >= 0 {
        return;
    }
    // SAFETY: `client_data` is the `RefCell` that `Decoder` keeps alive for as long as `info` lives; it is never
    // borrowed while libjpeg runs.
    let mut warnings = unsafe { &*info.client_data.cast::<RefCell<Warnings>>() }.borrow_mut();
    // SAFETY: libjpeg calls this with the error manager that `Decoder::new` installed.
    let errors = unsafe { &*info.err };
    match errors.msg_code {
        sys::JWRN_HIT_MARKER => warnings.starved = true,
        sys::JWRN_JPEG_EOF => warnings.end_of_file = true,
        // curiosities of the headers that change no pixel
        sys::JWRN_ADOBE_XFORM | sys::JWRN_JFIF_MAJOR | sys::JWRN_BOGUS_ICC => {}
        _ if warnings.other.is_some() => warnings.others += 1,
        // SAFETY: as above.
        _ => warnings.note(unsafe { message(errors) }),
    }
}

/// libjpeg's `progress_monitor`: called between rows and scans.
unsafe extern "C-unwind" fn on_progress(info: &mut sys::jpeg_common_struct) {
    // SAFETY: only decompressors are given this monitor, and a decompressor starts with the common struct.
    let scan = unsafe { (*(&raw const *info).cast::<sys::jpeg_decompress_struct>()).input_scan_number };
    if scan > MAX_SCANS {
        let problem = format!("it has more than {MAX_SCANS} scans");
        resume_unwind(Box::new(Abort(ImageProblem::TooLarge(problem))));
    }
}

/// Renders libjpeg's current message.
///
/// # Safety
/// `errors` must have been set up by `jpeg_std_error`, and hold the message that libjpeg is reporting.
unsafe fn message(errors: &sys::jpeg_error_mgr) -> String {
    if !(1..=errors.last_jpeg_message).contains(&errors.msg_code) {
        return format!("libjpeg reports {}", errors.msg_code);
    }
    // SAFETY: the table has `last_jpeg_message + 1` entries, each a C string that lives for ever.
    let template =
        unsafe { CStr::from_ptr((*errors.jpeg_message_table.add(errors.msg_code as usize)).cast()) };
    fill_in(&template.to_string_lossy(), &errors.msg_parm._bindgen_data_)
}

/// Replaces `%d`, `%02x`, … by the numbers, in order; `%s` stands for text, which is left out.
fn fill_in(template: &str, numbers: &[u32]) -> String {
    let mut numbers = numbers.iter();
    let mut parts = template.split('%');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let kind = part.find(|c: char| c.is_ascii_alphabetic() && c != 'l');
        let (kind, rest) = match kind {
            Some(at) => (&part[at..=at], &part[at + 1..]),
            None => ("", part),
        };
        match (kind, numbers.next()) {
            ("d", Some(&number)) => text += &(number as i32).to_string(),
            ("u", Some(&number)) => text += &number.to_string(),
            ("x" | "X", Some(&number)) => text += &format!("{number:02x}"),
            _ => text.push('…'),
        }
        text += rest;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::fill_in;

    #[test]
    fn messages_get_their_numbers() {
        let template = "Corrupt JPEG data: %u extraneous bytes before marker 0x%02x";
        assert_eq!(fill_in(template, &[7, 0xd9]), "Corrupt JPEG data: 7 extraneous bytes before marker 0xd9");
        assert_eq!(fill_in("no number", &[1]), "no number");
        assert_eq!(fill_in("%d and %ld", &[u32::MAX, 5]), "-1 and 5");
        assert_eq!(fill_in("%s, %", &[]), "…, …");
    }
}
