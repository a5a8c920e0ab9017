//! The opcodes of a pickle that numbers, texts, lists, dictionaries and tensors need: protocol 2, as `torch.save` writes.
//!
//! # Source
//! `pickletools.py` of CPython for the opcodes; `torch/serialization.py` (`persistent_id`) and `torch/_tensor.py`
//! (`_reduce_ex_internal`) for what a tensor is made of.

use std::collections::HashMap;

/// A pickle being written, from protocol to stop.
pub(crate) struct Pickle {
    bytes: Vec<u8>,
    memo: HashMap<Known, usize>,
}

/// What was pushed before and can be recalled.
#[derive(PartialEq, Eq, Hash)]
enum Known {
    Text(String),
    Global(&'static str, &'static str),
}

impl Pickle {
    /// Begins one: protocol 2.
    pub fn new() -> Self {
        Self { bytes: b"\x80\x02".to_vec(), memo: HashMap::new() }
    }

    /// Ends it and returns its bytes.
    pub fn stop(mut self) -> Vec<u8> {
        self.op(b".");
        self.bytes
    }

    /// Adds opcodes as they are.
    pub fn op(&mut self, opcodes: &[u8]) {
        self.bytes.extend_from_slice(opcodes);
    }

    /// Pushes what was remembered; false, and remembers what is pushed next, if nothing was.
    fn recall(&mut self, what: &Known) -> bool {
        let Some(&index) = self.memo.get(what) else { return false };
        match u8::try_from(index) {
            Ok(index) => self.op(&[b'h', index]),
            Err(_) => {
                self.op(b"j");
                self.op(&(index as u32).to_le_bytes());
            }
        }
        true
    }

    /// Remembers what was just pushed.
    fn memoize(&mut self, what: Known) {
        let index = self.memo.len();
        self.memo.insert(what, index);
        match u8::try_from(index) {
            Ok(index) => self.op(&[b'q', index]),
            Err(_) => {
                self.op(b"r");
                self.op(&(index as u32).to_le_bytes());
            }
        }
    }

    /// Pushes a text.
    pub fn text(&mut self, text: &str) {
        let known = Known::Text(text.to_owned());
        if !self.recall(&known) {
            self.op(b"X");
            self.op(&(text.len() as u32).to_le_bytes());
            self.op(text.as_bytes());
            self.memoize(known);
        }
    }

    /// Pushes what Python calls `module.name`.
    pub fn global(&mut self, module: &'static str, name: &'static str) {
        let known = Known::Global(module, name);
        if !self.recall(&known) {
            self.op(format!("c{module}\n{name}\n").as_bytes());
            self.memoize(known);
        }
    }

    /// Pushes an integer, with the shortest opcode that holds it.
    pub fn integer(&mut self, value: i64) {
        if let Ok(value) = u8::try_from(value) {
            self.op(&[b'K', value]);
        } else if let Ok(value) = u16::try_from(value) {
            self.op(b"M");
            self.op(&value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value) {
            self.op(b"J");
            self.op(&value.to_le_bytes());
        } else {
            self.op(b"\x8a\x08"); // a long of eight bytes, in two's complement
            self.op(&value.to_le_bytes());
        }
    }

    /// Pushes a tuple of sizes.
    fn sizes(&mut self, sizes: &[usize]) {
        let many = sizes.len() > 3;
        if many {
            self.op(b"(");
        }
        sizes.iter().for_each(|&size| self.integer(size as i64));
        self.op(match sizes.len() {
            0 => b")",
            1 => b"\x85",
            2 => b"\x86",
            3 => b"\x87",
            _ => b"t",
        });
    }

    /// Pushes a contiguous tensor that is all of the storage `index`, whose class is `torch.<storage>`.
    pub fn tensor(&mut self, index: usize, storage: &'static str, shape: &[usize]) {
        self.global("torch._utils", "_rebuild_tensor_v2");
        self.op(b"(("); // its arguments; first, the name of a storage:
        self.text("storage");
        self.global("torch", storage);
        self.text(&index.to_string());
        self.text("cpu");
        self.integer(shape.iter().product::<usize>() as i64);
        self.op(b"tQ"); // a tuple, turned into what it names
        self.integer(0); // offset in the storage, in elements
        self.sizes(shape);
        self.sizes(&strides(shape));
        self.op(b"\x89"); // requires_grad: false
        self.global("collections", "OrderedDict");
        self.op(b")R"); // backward hooks: an empty one
        self.op(b"tR");
    }
}

/// Strides of a contiguous tensor, in elements.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1);
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_row_major() {
        assert_eq!(strides(&[5, 3, 2, 7]), [42, 14, 7, 1]);
        assert_eq!(strides(&[5, 0, 2]), [2, 2, 1]); // as torch has them
        assert_eq!(strides(&[5]), [1]);
    }

    #[test]
    fn integers_take_the_shortest_opcode_that_holds_them() {
        let bytes = |value| {
            let mut p = Pickle::new();
            p.integer(value);
            p.bytes[2..].to_vec()
        };
        assert_eq!(bytes(255), [b'K', 255]);
        assert_eq!(bytes(256), [b'M', 0, 1]);
        assert_eq!(bytes(65536), [b'J', 0, 0, 1, 0]);
        assert_eq!(bytes(-1), [b'J', 255, 255, 255, 255]);
        assert_eq!(bytes(1 << 31), [0x8a, 8, 0, 0, 0, 0x80, 0, 0, 0, 0]);
    }

    #[test]
    fn a_text_is_never_taken_for_a_global_of_the_same_spelling() {
        let mut p = Pickle::new();
        p.global("torch", "HalfStorage");
        p.text("torch\nHalfStorage\n");
        p.text("torch\nHalfStorage\n");
        let bytes = p.stop();
        assert_eq!(bytes.iter().filter(|&&byte| byte == b'X').count(), 1);
        assert!(bytes.ends_with(b"h\x01."));
    }
}
