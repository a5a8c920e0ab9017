//! The machine: opcodes, stack, memo, arenas.

use std::collections::HashMap;

use super::{MAX_PICKLE, Outcome, PickleError, PickledTensor, Problem, StateDict};
use crate::checkpoint::dtype::StoredType;
use crate::checkpoint::printable;

/// The opcodes that tensors need, by the names of `pickletools`.
mod op {
    // Protocol, framing, end.
    pub const PROTO: u8 = 0x80;
    pub const FRAME: u8 = 0x95;
    pub const STOP: u8 = b'.';
    // Plain values.
    pub const NONE: u8 = b'N';
    pub const NEWTRUE: u8 = 0x88;
    pub const NEWFALSE: u8 = 0x89;
    pub const BININT: u8 = b'J';
    pub const BININT1: u8 = b'K';
    pub const BININT2: u8 = b'M';
    pub const LONG1: u8 = 0x8a;
    pub const BINFLOAT: u8 = b'G';
    pub const BINUNICODE: u8 = b'X';
    pub const SHORT_BINUNICODE: u8 = 0x8c;
    pub const BINUNICODE8: u8 = 0x8d;
    // Containers.
    pub const EMPTY_TUPLE: u8 = b')';
    pub const TUPLE: u8 = b't';
    pub const TUPLE1: u8 = 0x85;
    pub const TUPLE2: u8 = 0x86;
    pub const TUPLE3: u8 = 0x87;
    pub const EMPTY_LIST: u8 = b']';
    pub const APPEND: u8 = b'a';
    pub const APPENDS: u8 = b'e';
    pub const EMPTY_DICT: u8 = b'}';
    pub const SETITEM: u8 = b's';
    pub const SETITEMS: u8 = b'u';
    // Stack and memo.
    pub const MARK: u8 = b'(';
    pub const POP: u8 = b'0';
    pub const POP_MARK: u8 = b'1';
    pub const BINPUT: u8 = b'q';
    pub const LONG_BINPUT: u8 = b'r';
    pub const MEMOIZE: u8 = 0x94;
    pub const BINGET: u8 = b'h';
    pub const LONG_BINGET: u8 = b'j';
    // Globals, and what is done with them.
    pub const GLOBAL: u8 = b'c';
    pub const STACK_GLOBAL: u8 = 0x93;
    pub const BINPERSID: u8 = b'Q';
    pub const REDUCE: u8 = b'R';
    pub const BUILD: u8 = b'b';
}

/// Most values on the stack and in the memo; a model has thousands.
const MAX_VALUES: usize = 1 << 20;
/// Most values in all tuples and dictionaries together.
const MAX_ITEMS: usize = 1 << 22;
/// Most tuples, dictionaries, storages and tensors, of each.
const MAX_OBJECTS: usize = 1 << 17;
/// Deepest nesting of open marks.
const MAX_MARKS: usize = 1 << 12;

/// What a known global stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    OrderedDict,
    /// `(storage, offset, size, stride, requires_grad, hooks[, metadata])`
    RebuildTensorV2,
    /// The same with a dtype after the hooks: how torch stores what has no storage class of its own.
    RebuildTensorV3,
    /// `(tensor, requires_grad, hooks[, state])`
    RebuildParameter,
    /// A storage class or a dtype.
    Type(StoredType),
}

/// The globals that are no storage and no dtype (those are in [`StoredType`]'s tables).
const GLOBALS: [(&str, &str, Global); 5] = [
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2", Global::RebuildTensorV2),
    ("torch._utils", "_rebuild_tensor_v3", Global::RebuildTensorV3),
    ("torch._utils", "_rebuild_parameter", Global::RebuildParameter),
    ("torch._utils", "_rebuild_parameter_with_state", Global::RebuildParameter),
];

/// A value on the stack: plain, or an index into the arena of its kind.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Value<'p> {
    None,
    /// A bool: never looked at.
    Bool,
    Int(i64),
    /// A float: never looked at.
    Float,
    Str(&'p str),
    Tuple(usize),
    List,
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

impl Value<'_> {
    fn kind(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a bool",
            Self::Int(_) => "an int",
            Self::Float => "a float",
            Self::Str(_) => "a string",
            Self::Tuple(_) => "a tuple",
            Self::List => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a global",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

/// A storage as `BINPERSID` announces it.
#[derive(Clone, Copy, Debug)]
struct Storage<'p> {
    key: &'p str,
    dtype: StoredType,
    /// In bytes.
    len: u64,
}

/// The machine: stack, memo and arenas.
pub(super) struct Machine<'p> {
    bytes: &'p [u8],
    at: usize,
    /// Where the running opcode begins: what an error points to.
    opcode_at: usize,
    stack: Vec<Value<'p>>,
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'p>>,
    tuples: Vec<Box<[Value<'p>]>>,
    dicts: Vec<Vec<(Value<'p>, Value<'p>)>>,
    /// Values in all of `tuples` and `dicts`.
    items: usize,
    storages: Vec<Storage<'p>>,
    tensors: Vec<PickledTensor<'p>>,
}

impl<'p> Machine<'p> {
    pub fn new(bytes: &'p [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            opcode_at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            tuples: Vec::new(),
            dicts: Vec::new(),
            items: 0,
            storages: Vec::new(),
            tensors: Vec::new(),
        }
    }

    fn fail(&self, problem: Problem) -> PickleError {
        PickleError { at: self.opcode_at, problem }
    }

    fn malformed(&self, problem: impl Into<String>) -> PickleError {
        self.fail(Problem::Malformed(problem.into()))
    }

    // ---- bytes ---------------------------------------------------------------------------------------

    fn take(&mut self, n: u64) -> Outcome<&'p [u8]> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(n).ok().and_then(|n| rest.get(..n)) {
            Some(taken) => {
                self.at += taken.len();
                Ok(taken)
            }
            None => Err(self.malformed(format!("it ends where {n} more bytes are announced"))),
        }
    }

    /// An unsigned little-endian number of `N` bytes, at most 8.
    fn number<const N: usize>(&mut self) -> Outcome<u64> {
        Ok(self.take(N as u64)?.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    /// Pushes a string of `n` bytes.
    fn text(&mut self, n: u64) -> Outcome<()> {
        match std::str::from_utf8(self.take(n)?) {
            Ok(text) => self.push(Value::Str(text)),
            Err(_) => Err(self.malformed("a string is not UTF-8")),
        }
    }

    /// A line of a `GLOBAL`, without its newline.
    fn line(&mut self) -> Outcome<&'p str> {
        let rest = &self.bytes[self.at..];
        let Some(end) = rest.iter().position(|&byte| byte == b'\n') else {
            return Err(self.malformed("the name of a global does not end"));
        };
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| self.malformed("the name of a global is not UTF-8"))
    }

    // ---- stack, marks, memo, arenas ------------------------------------------------------------------

    fn push(&mut self, value: Value<'p>) -> Outcome<()> {
        if self.stack.len() >= MAX_VALUES {
            return Err(self.malformed(format!("more than {MAX_VALUES} values on the stack")));
        }
        self.stack.push(value);
        Ok(())
    }

    /// Pops a value that lies above the last mark.
    fn pop(&mut self) -> Outcome<Value<'p>> {
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(self.malformed("it takes a value from an empty stack"));
        }
        Ok(self.stack.pop().expect("the stack was just measured"))
    }

    fn top(&self) -> Outcome<Value<'p>> {
        self.stack.last().copied().ok_or_else(|| self.malformed("it looks at an empty stack"))
    }

    fn mark(&mut self) -> Outcome<()> {
        if self.marks.len() >= MAX_MARKS {
            return Err(self.malformed(format!("more than {MAX_MARKS} open marks")));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    /// Pops everything above the last mark, and the mark.
    fn pop_to_mark(&mut self) -> Outcome<Vec<Value<'p>>> {
        let mark = self.marks.pop().ok_or_else(|| self.malformed("it closes a mark that was never set"))?;
        Ok(self.stack.split_off(mark))
    }

    fn memoise(&mut self, slot: u64) -> Outcome<()> {
        let value = self.top()?;
        if self.memo.len() >= MAX_VALUES {
            return Err(self.malformed(format!("more than {MAX_VALUES} values in the memo")));
        }
        self.memo.insert(slot, value);
        Ok(())
    }

    fn recall(&mut self, slot: u64) -> Outcome<()> {
        let value = self.memo.get(&slot).copied();
        let value = value.ok_or_else(|| self.malformed(format!("memo {slot} is empty")))?;
        self.push(value)
    }

    fn tuple(&mut self, items: Vec<Value<'p>>) -> Outcome<()> {
        self.room(self.tuples.len(), "tuples")?;
        self.count_items(items.len())?;
        self.tuples.push(items.into_boxed_slice());
        self.push(Value::Tuple(self.tuples.len() - 1))
    }

    /// Makes a tuple of the top `n` values.
    fn tuple_of(&mut self, n: usize) -> Outcome<()> {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.tuple(items)
    }

    fn dict(&mut self) -> Outcome<()> {
        self.room(self.dicts.len(), "dictionaries")?;
        self.dicts.push(Vec::new());
        self.push(Value::Dict(self.dicts.len() - 1))
    }

    /// Fails when an arena is full.
    fn room(&self, used: usize, what: &str) -> Outcome<()> {
        if used < MAX_OBJECTS {
            Ok(())
        } else {
            Err(self.malformed(format!("more than {MAX_OBJECTS} {what}")))
        }
    }

    fn count_items(&mut self, n: usize) -> Outcome<()> {
        self.items += n;
        if self.items <= MAX_ITEMS {
            Ok(())
        } else {
            Err(self.malformed(format!("more than {MAX_ITEMS} items")))
        }
    }

    // ---- the program ---------------------------------------------------------------------------------

    /// Runs opcode after opcode up to `STOP`, and returns what is then on top of the stack.
    fn run(&mut self) -> Outcome<Value<'p>> {
        loop {
            self.opcode_at = self.at;
            match self.number::<1>()? as u8 {
                op::PROTO => match self.number::<1>()? {
                    0..=5 => {}
                    n => return Err(self.malformed(format!("protocol {n}, and 5 is the last known"))),
                },
                op::FRAME => self.take(8).map(drop)?, // a hint to Python's reader
                op::STOP => return self.pop(),

                op::NONE => self.push(Value::None)?,
                op::NEWTRUE => self.push(Value::Bool)?,
                op::NEWFALSE => self.push(Value::Bool)?,
                op::BININT => self.integer(4)?,
                op::BININT1 => self.number::<1>().and_then(|n| self.push(Value::Int(n as i64)))?,
                op::BININT2 => self.number::<2>().and_then(|n| self.push(Value::Int(n as i64)))?,
                op::LONG1 => self.number::<1>().and_then(|n| self.integer(n))?,
                op::BINFLOAT => self.take(8).and_then(|_| self.push(Value::Float))?,
                op::SHORT_BINUNICODE => self.number::<1>().and_then(|n| self.text(n))?,
                op::BINUNICODE => self.number::<4>().and_then(|n| self.text(n))?,
                op::BINUNICODE8 => self.number::<8>().and_then(|n| self.text(n))?,

                op::EMPTY_TUPLE => self.tuple(Vec::new())?,
                op::TUPLE => self.pop_to_mark().and_then(|items| self.tuple(items))?,
                op::TUPLE1 => self.tuple_of(1)?,
                op::TUPLE2 => self.tuple_of(2)?,
                op::TUPLE3 => self.tuple_of(3)?,
                op::EMPTY_LIST => self.push(Value::List)?,
                op::APPEND => self.pop().and_then(|_| self.expect_list())?,
                op::APPENDS => self.pop_to_mark().and_then(|_| self.expect_list())?,
                op::EMPTY_DICT => self.dict()?,
                op::SETITEM => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(&[key, value])?;
                }
                op::SETITEMS => self.pop_to_mark().and_then(|items| self.set(&items))?,

                op::MARK => self.mark()?,
                op::POP => self.pop().map(drop)?,
                op::POP_MARK => self.pop_to_mark().map(drop)?,
                op::BINPUT => self.number::<1>().and_then(|slot| self.memoise(slot))?,
                op::LONG_BINPUT => self.number::<4>().and_then(|slot| self.memoise(slot))?,
                op::MEMOIZE => self.memoise(self.memo.len() as u64)?,
                op::BINGET => self.number::<1>().and_then(|slot| self.recall(slot))?,
                op::LONG_BINGET => self.number::<4>().and_then(|slot| self.recall(slot))?,

                op::GLOBAL => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(module, name)?;
                }
                op::STACK_GLOBAL => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Str(module), Value::Str(name)) = (module, name) else {
                        return Err(self.malformed("the name of a global is no string"));
                    };
                    self.global(module, name)?;
                }
                op::BINPERSID => self.persistent_id()?,
                op::REDUCE => self.reduce()?,
                op::BUILD => self.build()?,

                other => {
                    return Err(self.malformed(format!("opcode 0x{other:02x}, which tensors do not need")));
                }
            }
        }
    }

    /// Pushes a little-endian two's complement integer of `n` bytes. `LONG1` could have 255; sizes fit in 8.
    fn integer(&mut self, n: u64) -> Outcome<()> {
        if n > 8 {
            return Err(self.malformed(format!("an integer of {n} bytes")));
        }
        let digits = self.take(n)?;
        let sign = if digits.last().is_some_and(|&byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [sign; 8];
        wide[..digits.len()].copy_from_slice(digits);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    // ---- what the opcodes do -------------------------------------------------------------------------

    fn expect_list(&mut self) -> Outcome<()> {
        match self.top()? {
            Value::List => Ok(()),
            other => Err(self.malformed(format!("it appends to {}", other.kind()))),
        }
    }

    fn set(&mut self, items: &[Value<'p>]) -> Outcome<()> {
        let Value::Dict(dict) = self.top()? else {
            return Err(self.malformed(format!("it sets an item of {}", self.top()?.kind())));
        };
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err(self.malformed("a key without a value"));
        };
        self.count_items(items.len())?;
        self.dicts[dict].extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Outcome<()> {
        let known = GLOBALS.iter().find(|known| (known.0, known.1) == (module, name)).map(|known| known.2);
        let known = known.or_else(|| StoredType::from_torch_global(module, name).map(Global::Type));
        match known {
            Some(global) => self.push(Value::Global(global)),
            None => {
                let full = printable(&format!("{module}.{name}"));
                Err(self.fail(
                    if name == "_rebuild_qtensor" || StoredType::is_quantised_global(module, name) {
                        Problem::Quantised(full)
                    } else {
                        Problem::Global(full)
                    },
                ))
            }
        }
    }

    /// `("storage", class, key, location, elements)`: how torch points into the archive.
    fn persistent_id(&mut self) -> Outcome<()> {
        let id = self.pop()?;
        let items = match id {
            Value::Tuple(tuple) => &*self.tuples[tuple],
            _ => &[],
        };
        let &[
            Value::Str("storage"),
            Value::Global(Global::Type(dtype)),
            Value::Str(key),
            Value::Str(_),
            Value::Int(elements),
        ] = items
        else {
            return Err(self.malformed("a persistent id that is no storage"));
        };
        let len = u64::try_from(elements).ok().and_then(|n| n.checked_mul(dtype.size()? as u64));
        let Some(len) = len else {
            return Err(self.malformed(format!("a storage of {elements} elements")));
        };
        self.room(self.storages.len(), "storages")?;
        self.storages.push(Storage { key, dtype, len });
        self.push(Value::Storage(self.storages.len() - 1))
    }

    fn reduce(&mut self) -> Outcome<()> {
        let (args, callee) = (self.pop()?, self.pop()?);
        let (Value::Global(callee), Value::Tuple(args)) = (callee, args) else {
            let problem = format!("it calls {} with {}", callee.kind(), args.kind());
            return Err(self.malformed(problem));
        };
        match callee {
            Global::OrderedDict if self.tuples[args].is_empty() => self.dict(),
            Global::RebuildTensorV2 | Global::RebuildTensorV3 => {
                let tensor = self.rebuild_tensor(args, callee)?;
                self.room(self.tensors.len(), "tensors")?;
                self.tensors.push(tensor);
                self.push(Value::Tensor(self.tensors.len() - 1))
            }
            Global::RebuildParameter => match self.tuples[args].first() {
                Some(&Value::Tensor(tensor)) => self.push(Value::Tensor(tensor)),
                _ => Err(self.malformed("a parameter that is no tensor")),
            },
            Global::OrderedDict | Global::Type(_) => {
                Err(self.malformed(format!("it calls {callee:?} with {} arguments", self.tuples[args].len())))
            }
        }
    }

    fn rebuild_tensor(&self, args: usize, callee: Global) -> Outcome<PickledTensor<'p>> {
        let args = &*self.tuples[args];
        let &[Value::Storage(storage), Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides), ..] =
            args
        else {
            return Err(self.malformed("a tensor without storage, offset, size and stride"));
        };
        let dtype = match (callee, args.get(6)) {
            (Global::RebuildTensorV3, Some(&Value::Global(Global::Type(dtype)))) => dtype,
            (Global::RebuildTensorV3, _) => return Err(self.malformed("a tensor without dtype")),
            _ => self.storages[storage].dtype,
        };
        let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(self.malformed(format!("a tensor of size {shape:?} with strides {strides:?}")));
        }
        let offset = usize::try_from(offset).map_err(|_| self.malformed(format!("offset {offset}")))?;
        let Storage { key, len, .. } = self.storages[storage];
        Ok(PickledTensor { storage: key, storage_len: len, dtype, offset, shape, strides })
    }

    /// A tuple of sizes or strides. Torch's own limit is 64 dimensions; so a tensor costs no more than that.
    fn sizes(&self, tuple: usize) -> Outcome<Vec<usize>> {
        let items = &*self.tuples[tuple];
        if items.len() > 64 {
            return Err(self.malformed(format!("a tensor of {} dimensions", items.len())));
        }
        let size = |&value: &Value<'p>| match value {
            Value::Int(n) => usize::try_from(n).map_err(|_| self.malformed(format!("a size of {n}"))),
            other => Err(self.malformed(format!("a size that is {}", other.kind()))),
        };
        items.iter().map(size).collect()
    }

    /// `BUILD` hangs `_metadata` on an `OrderedDict`; that is all it may do, and nobody looks at it.
    fn build(&mut self) -> Outcome<()> {
        let state = self.pop()?;
        match (self.top()?, state) {
            (Value::Dict(_), Value::Dict(_)) => Ok(()),
            (object, state) => {
                let problem = format!("it sets the state of {} to {}", object.kind(), state.kind());
                Err(self.malformed(problem))
            }
        }
    }

    /// Runs the program, and takes out what the dictionary holds that it leaves behind.
    pub fn state_dict(mut self) -> Outcome<StateDict<'p>> {
        if self.bytes.len() as u64 > MAX_PICKLE {
            return Err(self.malformed(format!("{} bytes, more than {MAX_PICKLE}", self.bytes.len())));
        }
        let Value::Dict(top) = self.run()? else {
            return Err(self.malformed("it holds no dictionary of tensors"));
        };
        let items = std::mem::take(&mut self.dicts[top]);
        let mut found = StateDict::default();
        let mut position = HashMap::new(); // name → index in `found.tensors`
        for (key, value) in items {
            match (key, value) {
                (Value::Str(name), Value::Tensor(tensor)) => {
                    let tensor = self.tensors[tensor].clone();
                    match position.get(name) {
                        Some(&i) => found.tensors[i] = (name, tensor),
                        None => {
                            self.room(found.tensors.len(), "tensors")?;
                            position.insert(name, found.tensors.len());
                            found.tensors.push((name, tensor));
                        }
                    }
                }
                (Value::Str(name), Value::Dict(_)) => found.nested.push(name),
                _ => {}
            }
        }
        Ok(found)
    }
}
