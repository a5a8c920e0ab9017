//! Thrift's compact protocol, as far as Parquet's headers need it: integers, texts, lists, structs.
//!
//! # Source
//! `doc/specs/thrift-compact-protocol.md` of Apache Thrift.

const I32: u8 = 5;
const I64: u8 = 6;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// A struct being written. Fields are numbered, in ascending order.
#[derive(Debug, Default)]
pub struct Struct {
    bytes: Vec<u8>,
    last: i16,
}

impl Struct {
    /// Begins one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends it and returns its bytes.
    pub fn end(mut self) -> Vec<u8> {
        self.bytes.push(0);
        self.bytes
    }

    /// Adds an integer of 32 bits, or a value of an enum.
    pub fn i32(mut self, id: i16, value: i32) -> Self {
        self.field(id, I32);
        varint(&mut self.bytes, zigzag(value.into()));
        self
    }

    /// Adds an integer of 64 bits.
    pub fn i64(mut self, id: i16, value: i64) -> Self {
        self.field(id, I64);
        varint(&mut self.bytes, zigzag(value));
        self
    }

    /// Adds a text.
    pub fn text(mut self, id: i16, text: &str) -> Self {
        self.field(id, BINARY);
        binary(&mut self.bytes, text);
        self
    }

    /// Adds a struct.
    pub fn inner(mut self, id: i16, inner: Struct) -> Self {
        self.field(id, STRUCT);
        self.bytes.extend(inner.end());
        self
    }

    /// Adds a list of structs.
    pub fn structs(mut self, id: i16, items: impl ExactSizeIterator<Item = Struct>) -> Self {
        self.list(id, STRUCT, items.len());
        items.for_each(|item| self.bytes.extend(item.end()));
        self
    }

    /// Adds a list of values of an enum.
    pub fn enums(mut self, id: i16, items: &[i32]) -> Self {
        self.list(id, I32, items.len());
        items.iter().for_each(|&item| varint(&mut self.bytes, zigzag(item.into())));
        self
    }

    /// Adds a list of texts.
    pub fn texts(mut self, id: i16, items: &[&str]) -> Self {
        self.list(id, BINARY, items.len());
        items.iter().for_each(|item| binary(&mut self.bytes, item));
        self
    }

    fn field(&mut self, id: i16, kind: u8) {
        match id - self.last {
            step @ 1..16 => self.bytes.push((step as u8) << 4 | kind),
            _ => {
                self.bytes.push(kind);
                varint(&mut self.bytes, zigzag(id.into()));
            }
        }
        self.last = id;
    }

    fn list(&mut self, id: i16, kind: u8, len: usize) {
        self.field(id, LIST);
        match len {
            0..15 => self.bytes.push((len as u8) << 4 | kind),
            _ => {
                self.bytes.push(0xf0 | kind);
                varint(&mut self.bytes, len as u64);
            }
        }
    }
}

fn binary(bytes: &mut Vec<u8>, text: &str) {
    varint(bytes, text.len() as u64);
    bytes.extend(text.as_bytes());
}

fn zigzag(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

/// Adds an integer, seven bits a byte, the lowest first.
pub fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_as_the_specification_has_them() {
        let inner = Struct::new().i32(1, -1);
        let bytes =
            Struct::new().i32(1, 150).i64(3, -2).text(20, "é").inner(21, inner).enums(22, &[0, 3]).end();
        let expected =
            [0x15, 0xac, 2, 0x26, 3, 0x08, 40, 2, 0xc3, 0xa9, 0x1c, 0x15, 1, 0, 0x19, 0x25, 0, 6, 0];
        assert_eq!(bytes, expected);
        let many = Struct::new().texts(1, &["a"; 15]).end();
        assert_eq!(many[..5], [0x19, 0xf8, 15, 1, b'a']);
        let structs = Struct::new().structs(1, (0..2).map(|i| Struct::new().i32(1, i))).end();
        assert_eq!(structs, [0x19, 0x2c, 0x15, 0, 0, 0x15, 2, 0, 0]);
    }
}
