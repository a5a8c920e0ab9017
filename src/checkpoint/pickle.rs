//! The restricted pickle interpreter: as much of the pickle machine as a `state_dict` of tensors needs.
//!
//! A pickle is a program, and Python's reader runs it: `c os\nsystem` followed by `R` is a shell. This
//! reader executes nothing. It keeps a stack of plain values, knows the handful of globals in [`GLOBALS`],
//! whose "calls" do no more than note an offset, a shape and strides, and refuses everything else by name,
//! at the moment it is named.
//!
//! ```text
//! OrderedDict ── "vision_proj.0.weight" ─▶ _rebuild_tensor_v2( storage "7", offset, (4096, 1024), (1024, 1) )
//!             ── "vision_proj.0.bias"   ─▶ _rebuild_tensor_v2( storage "8", offset, (4096,), (1,) )
//! ```
//!
//! It is bounded against programs that are small and make much of it. Values live in an arena and refer to
//! each other by index, so a tuple that holds itself a billion times over costs one entry per opcode, no
//! value is ever copied, expanded or walked recursively, and time and memory are linear in the pickle's
//! bytes, with the caps below on top. Nothing is allocated by a size that the pickle declares.
//!
//! # Source
//! The opcodes: CPython's `pickletools.py`. The shape of a `state_dict`: `torch/serialization.py` and
//! `torch/_utils.py`.

use std::collections::HashMap;
use std::fmt;

use super::dtype::StoredType;

/// Longest pickle read, in bytes; that of the 7B checkpoint's larger shard has about 100 kB.
pub(crate) const MAX_PICKLE: u64 = 32 << 20;
/// Most values on the stack and in the memo; a model has thousands.
const MAX_VALUES: usize = 1 << 20;
/// Most values in all tuples and dictionaries together.
const MAX_ITEMS: usize = 1 << 22;
/// Most tuples, dictionaries, storages and tensors, of each.
const MAX_OBJECTS: usize = 1 << 17;
/// Deepest nesting of open marks.
const MAX_MARKS: usize = 1 << 12;

/// A tensor as the pickle describes it; nothing about it is checked against the archive yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PickledTensor<'p> {
    /// Name of the storage's entry in the archive, below `data/`.
    pub storage: &'p str,
    /// Length that the pickle declares for the storage, in bytes.
    pub storage_len: u64,
    pub dtype: StoredType,
    /// Of the first element in the storage, in elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements, one per dimension.
    pub strides: Vec<usize>,
}

/// What a `state_dict` holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct StateDict<'p> {
    /// In the order of the pickle; a name set twice has its last tensor, as in Python.
    pub tensors: Vec<(&'p str, PickledTensor<'p>)>,
    /// Keys whose values are dictionaries: where a training checkpoint hides its tensors.
    pub nested: Vec<&'p str>,
}

/// Why a pickle was refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PickleError {
    /// Offset in the pickle, in bytes.
    pub at: usize,
    pub problem: Problem,
}

/// The kinds of refusal, as far as the advice differs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// A global that tensors do not need.
    Global(String),
    /// A tensor of PyTorch's own quantisation.
    Quantised(String),
    /// Anything else: damage, or an opcode that tensors do not need.
    Malformed(String),
}

impl fmt::Display for PickleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            Problem::Global(name) => write!(f, "the pickle asks for `{name}` (at byte {})", self.at),
            Problem::Quantised(name) => {
                write!(f, "the pickle holds quantised tensors (`{name}` at byte {})", self.at)
            }
            Problem::Malformed(problem) => write!(f, "broken pickle: {problem} (at byte {})", self.at),
        }
    }
}

type Outcome<T> = std::result::Result<T, PickleError>;

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
    Bool(bool),
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
            Self::Bool(_) => "a bool",
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
struct Machine<'p> {
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

/// Reads the `state_dict` that a pickle describes, executing nothing.
///
/// # Errors
/// [`PickleError`] where the pickle ends early, asks for something that tensors do not need, or describes
/// no dictionary.
pub(crate) fn read_state_dict(bytes: &[u8]) -> Outcome<StateDict<'_>> {
    let mut machine = Machine {
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
    };
    if bytes.len() as u64 > MAX_PICKLE {
        return Err(machine.malformed(format!("{} bytes, more than {MAX_PICKLE}", bytes.len())));
    }
    let top = machine.run()?;
    machine.state_dict(top)
}

impl<'p> Machine<'p> {
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

    fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        Ok(self.take(N as u64)?.try_into().expect("take returns what it was asked for"))
    }

    fn text(&mut self, n: u64) -> Outcome<Value<'p>> {
        let bytes = self.take(n)?;
        std::str::from_utf8(bytes).map(Value::Str).map_err(|_| self.malformed("a string is not UTF-8"))
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

    /// Runs opcode after opcode up to `STOP`, and returns what is left on the stack.
    fn run(&mut self) -> Outcome<Value<'p>> {
        loop {
            self.opcode_at = self.at;
            let [opcode] = self.array::<1>()?;
            match opcode {
                // Protocol and framing.
                0x80 => {
                    let [protocol] = self.array::<1>()?; // PROTO
                    if protocol > 5 {
                        return Err(self.malformed(format!("protocol {protocol}, and 5 is the last known")));
                    }
                }
                0x95 => self.array::<8>().map(drop)?, // FRAME: a hint to Python's reader
                b'.' => return self.pop(),            // STOP

                // Plain values.
                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'K' => {
                    let [value] = self.array()?; // BININT1
                    self.push(Value::Int(i64::from(u8::from_le_bytes([value]))))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?); // BININT2
                    self.push(Value::Int(i64::from(value)))?;
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?); // BININT
                    self.push(Value::Int(i64::from(value)))?;
                }
                0x8a => self.long1()?, // LONG1
                b'G' => {
                    self.array::<8>()?; // BINFLOAT
                    self.push(Value::Float)?;
                }
                0x8c => {
                    let [n] = self.array()?; // SHORT_BINUNICODE
                    let text = self.text(u64::from(u8::from_le_bytes([n])))?;
                    self.push(text)?;
                }
                b'X' => {
                    let n = u32::from_le_bytes(self.array()?); // BINUNICODE
                    let text = self.text(u64::from(n))?;
                    self.push(text)?;
                }
                0x8d => {
                    let n = u64::from_le_bytes(self.array()?); // BINUNICODE8
                    let text = self.text(n)?;
                    self.push(text)?;
                }

                // Containers.
                b')' => self.tuple(Vec::new())?, // EMPTY_TUPLE
                0x85 => self.tuple_of(1)?,
                0x86 => self.tuple_of(2)?,
                0x87 => self.tuple_of(3)?,
                b't' => {
                    let items = self.pop_to_mark()?; // TUPLE
                    self.tuple(items)?;
                }
                b'}' => self.dict()?,            // EMPTY_DICT
                b']' => self.push(Value::List)?, // EMPTY_LIST
                b's' => self.set_item()?,        // SETITEM
                b'u' => self.set_items()?,       // SETITEMS
                b'a' => {
                    self.pop()?; // APPEND: what a list holds is never needed
                    self.expect_list()?;
                }
                b'e' => {
                    self.pop_to_mark()?; // APPENDS
                    self.expect_list()?;
                }

                // Stack and memo.
                b'(' => {
                    if self.marks.len() >= MAX_MARKS {
                        return Err(self.malformed(format!("more than {MAX_MARKS} open marks")));
                    }
                    self.marks.push(self.stack.len()); // MARK
                }
                b'0' => self.pop().map(drop)?,         // POP
                b'1' => self.pop_to_mark().map(drop)?, // POP_MARK
                b'q' => {
                    let [slot] = self.array()?; // BINPUT
                    self.memoise(u64::from(u8::from_le_bytes([slot])))?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.array()?); // LONG_BINPUT
                    self.memoise(u64::from(slot))?;
                }
                0x94 => self.memoise(self.memo.len() as u64)?, // MEMOIZE
                b'h' => {
                    let [slot] = self.array()?; // BINGET
                    self.recall(u64::from(u8::from_le_bytes([slot])))?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.array()?); // LONG_BINGET
                    self.recall(u64::from(slot))?;
                }

                // Globals, and the calls that only note what a tensor is.
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?); // GLOBAL
                    self.global(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?); // STACK_GLOBAL
                    let (Value::Str(module), Value::Str(name)) = (module, name) else {
                        return Err(self.malformed("the name of a global is no string"));
                    };
                    self.global(module, name)?;
                }
                b'Q' => self.persistent_id()?, // BINPERSID
                b'R' => self.reduce()?,        // REDUCE
                b'b' => self.build()?,         // BUILD

                _ => {
                    return Err(self.malformed(format!("opcode 0x{opcode:02x}, which tensors do not need")));
                }
            }
        }
    }

    /// `LONG1`: a little-endian two's complement integer of up to 255 bytes; sizes fit in 8.
    fn long1(&mut self) -> Outcome<()> {
        let [n] = self.array::<1>()?;
        let digits = self.take(u64::from(n))?;
        if digits.len() > 8 {
            return Err(self.malformed(format!("an integer of {n} bytes")));
        }
        let sign = if digits.last().is_some_and(|&byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [sign; 8];
        wide[..digits.len()].copy_from_slice(digits);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn expect_list(&mut self) -> Outcome<()> {
        match self.top()? {
            Value::List => Ok(()),
            other => Err(self.malformed(format!("it appends to {}", other.kind()))),
        }
    }

    fn set_item(&mut self) -> Outcome<()> {
        let (value, key) = (self.pop()?, self.pop()?);
        self.set(&[key, value])
    }

    fn set_items(&mut self) -> Outcome<()> {
        let items = self.pop_to_mark()?;
        self.set(&items)
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

    fn state_dict(mut self, top: Value<'p>) -> Outcome<StateDict<'p>> {
        let Value::Dict(top) = top else {
            return Err(self.malformed(format!("it holds {}, not a dictionary of tensors", top.kind())));
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

/// A name from a file as a message may show it: short, and with control characters escaped.
pub(crate) fn printable(name: &str) -> String {
    const LIMIT: usize = 120;
    let mut shown: String = name.chars().take(LIMIT).flat_map(char::escape_debug).collect();
    if name.chars().nth(LIMIT).is_some() {
        shown.push('…');
    }
    shown
}
