//! As much of the protobuf wire format as a SentencePiece model needs, over hostile bytes.
//!
//! Reading borrows and never recurses, allocates or looks past its slice; writing appends.

/// A field's value, borrowed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'b> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'b [u8]),
    Fixed32(u32),
}

impl<'b> Value<'b> {
    /// Returns the bytes of a string, bytes or message field.
    pub(super) fn bytes(self) -> Result<&'b [u8], String> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            other => Err(format!("a field holds {other:?} where bytes belong")),
        }
    }

    /// Returns an enum or bool.
    pub(super) fn varint(self) -> Result<u64, String> {
        match self {
            Self::Varint(value) => Ok(value),
            other => Err(format!("a field holds {other:?} where a varint belongs")),
        }
    }

    /// Returns a float.
    pub(super) fn float(self) -> Result<f32, String> {
        match self {
            Self::Fixed32(bits) => Ok(f32::from_bits(bits)),
            other => Err(format!("a field holds {other:?} where a float belongs")),
        }
    }
}

/// The fields of one message, in the order of the file.
#[derive(Clone, Debug)]
pub(super) struct Fields<'b> {
    rest: &'b [u8],
}

impl<'b> Fields<'b> {
    pub(super) fn new(message: &'b [u8]) -> Self {
        Self { rest: message }
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or("it ends inside a number")?;
            self.rest = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number has more than ten bytes".into())
    }

    fn take(&mut self, len: u64) -> Result<&'b [u8], String> {
        let len = usize::try_from(len).ok().filter(|&len| len <= self.rest.len());
        let len = len.ok_or("it ends inside a field")?;
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u64, Value<'b>), String> {
        let key = self.varint()?;
        let little =
            |bytes: &[u8]| bytes.iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(little(self.take(8)?)),
            2 => {
                let len = self.varint()?;
                Value::Bytes(self.take(len)?)
            }
            5 => Value::Fixed32(little(self.take(4)?) as u32),
            wire => return Err(format!("a field has wire type {wire}")),
        };
        match key >> 3 {
            0 => Err("a field has number 0".into()),
            number => Ok((number, value)),
        }
    }
}

impl<'b> Iterator for Fields<'b> {
    type Item = Result<(u64, Value<'b>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[]; // what follows a broken field means nothing
        }
        Some(field)
    }
}

/// Appends a varint.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends an enum, bool or integer field.
pub(super) fn put_number(out: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(out, field << 3);
    put_varint(out, value);
}

/// Appends a string, bytes or message field.
pub(super) fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(out, field << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Appends a float field.
pub(super) fn put_float(out: &mut Vec<u8>, field: u64, value: f32) {
    put_varint(out, field << 3 | 5);
    out.extend_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(number in any::<u64>(), bytes in any::<Vec<u8>>(), float in any::<u32>()) {
            let mut out = Vec::new();
            put_number(&mut out, 1, number);
            put_bytes(&mut out, 35, &bytes);
            put_float(&mut out, 2, f32::from_bits(float));
            let fields: Vec<_> = Fields::new(&out).collect();
            let want =
                [(1, Value::Varint(number)), (35, Value::Bytes(&bytes)), (2, Value::Fixed32(float))].map(Ok);
            prop_assert_eq!(fields, want);
        }

        #[test]
        fn any_bytes_end_in_fields_or_one_error(bytes in any::<Vec<u8>>()) {
            let fields: Vec<_> = Fields::new(&bytes).collect();
            prop_assert!(fields.iter().rev().skip(1).all(Result::is_ok));
        }
    }

    #[test]
    fn broken_fields_are_refused() {
        let cases: [&[u8]; 7] = [
            b"\x0a\x05abc",                                      // 5 bytes promised, 3 there
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",     // 2^64 - 1 bytes promised
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", // eleven bytes of varint
            b"\x08",                                             // no value
            b"\x0d\0\0\0",                                       // three bytes of a float
            b"\x0b",                                             // a group
            b"\x02\x00",                                         // field number 0
        ];
        for bytes in cases {
            assert!(Fields::new(bytes).last().is_some_and(|field| field.is_err()), "{bytes:x?}");
        }
    }
}
