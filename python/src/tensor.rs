//! Memory that Python looks at without a copy: by DLPack, and, on the host, by the buffer protocol.

use std::any::Any;
use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

use half::f16;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyTuple, PyType};

use crate::buffer;
use crate::dlpack;

/// What the elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Float16,
    Int64,
    Bool,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Float16 => "float16",
            Self::Int64 => "int64",
            Self::Bool => "bool",
        }
    }

    /// In the words of the module `struct`.
    fn format(self) -> &'static CStr {
        match self {
            Self::Float16 => c"e",
            Self::Int64 => c"q",
            Self::Bool => c"?",
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::Float16 => 2,
            Self::Int64 => 8,
            Self::Bool => 1,
        }
    }

    pub fn dlpack(self) -> dlpack::DataType {
        let (code, bits) = match self {
            Self::Float16 => (2, 16),
            Self::Int64 => (0, 64),
            Self::Bool => (6, 8),
        };
        dlpack::DataType { code, bits, lanes: 1 }
    }
}

/// Where a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Host,
    Cuda(usize),
}

impl Place {
    pub fn dlpack(self) -> dlpack::Device {
        match self {
            Self::Host => dlpack::Device { kind: dlpack::CPU, id: 0 },
            Self::Cuda(ordinal) => dlpack::Device { kind: dlpack::CUDA, id: ordinal as i32 },
        }
    }
}

/// Memory, whoever's, and how to read it.
#[derive(Clone)]
pub struct Memory {
    owner: Arc<dyn Any + Send + Sync>, // keeps the memory where it is
    first: *mut c_void,
    kind: Kind,
    place: Place,
    shape: Vec<i64>,
    strides: Vec<i64>, // elements
    read_only: bool,
}

// SAFETY: the pointer is handed to readers and writers in Python, who answer for races as with any shared array; what it
// points to lives as long as the owner, which is Send and Sync.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Describes memory: rows without gaps.
    ///
    /// # Safety
    /// Elements of `shape` are readable at `first`, and writable unless `read_only`, for as long as `owner` lives.
    pub unsafe fn new(
        owner: Arc<dyn Any + Send + Sync>,
        first: *mut c_void,
        kind: Kind,
        place: Place,
        shape: Vec<i64>,
        read_only: bool,
    ) -> Self {
        let strides = dlpack::contiguous(&shape);
        Self { owner, first, kind, place, shape, strides, read_only }
    }

    /// The same with these strides, in elements.
    ///
    /// # Safety
    /// As for [`Memory::new`], of the elements that these strides lead to.
    pub unsafe fn with_strides(mut self, strides: Vec<i64>) -> Self {
        self.strides = strides;
        self
    }

    /// Makes the Python object.
    pub fn into_tensor(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let passed = PyCapsule::new_with_value(py, Passed(self), PASSED)?;
        Ok(class(py)?.call1((passed,))?.unbind())
    }

    fn elements(&self) -> usize {
        self.shape.iter().map(|&n| n as usize).product()
    }

    fn is_contiguous(&self) -> bool {
        let expected = dlpack::contiguous(&self.shape);
        let axes = self.shape.iter().zip(self.strides.iter().zip(&expected));
        self.elements() == 0 || axes.into_iter().all(|(&n, (is, expected))| n == 1 || is == expected)
    }

    /// Takes rows `[R, hidden]` of one's own.
    pub fn own(rows: Vec<f16>, hidden: usize) -> Self {
        let shape = vec![(rows.len() / hidden) as i64, hidden as i64];
        let owner = Arc::new(rows.into_boxed_slice());
        let first = owner.as_ptr().cast_mut().cast();
        // SAFETY: the box has as many elements, and does not move.
        unsafe { Self::new(owner, first, Kind::Float16, Place::Host, shape, false) }
    }

    /// Rows `offset .. offset + len` of a sequence `[1, L, H]`, as `[len, H]`, not copied.
    pub fn part(&self, offset: usize, len: usize) -> Self {
        let (&[1, rows, hidden], &[_, down, across]) = (&self.shape[..], &self.strides[..]) else {
            panic!("a sequence, not {:?}", self.shape)
        };
        assert!(offset + len <= rows as usize, "rows of the sequence");
        let first =
            self.first.wrapping_byte_offset(offset as isize * down as isize * self.kind.bytes() as isize);
        let (shape, strides) = (vec![len as i64, hidden], vec![down, across]);
        Self { owner: self.owner.clone(), first, shape, strides, ..*self }
    }

    /// The same in host memory without gaps, copied if it does not lie so; `None` on a device.
    pub fn contiguous(&self) -> Option<Self> {
        match self.place {
            Place::Host if self.is_contiguous() => Some(self.clone()),
            Place::Host => Some(self.copy()),
            Place::Cuda(_) => None,
        }
    }

    /// All elements of fp16 rows in host memory without gaps, and how many a row has.
    pub fn rows(&self) -> (&[f16], usize) {
        let hidden = self.shape.last().map_or(0, |&hidden| hidden as usize);
        assert!(
            self.kind == Kind::Float16 && self.place == Place::Host && self.is_contiguous(),
            "rows of the host"
        );
        match self.elements() {
            0 => (&[], hidden),
            // SAFETY: the owner has them; who writes them meanwhile, through what Python was given, answers for that.
            elements => (unsafe { std::slice::from_raw_parts(self.first.cast(), elements) }, hidden),
        }
    }

    /// Copies the elements, in host memory.
    fn copy(&self) -> Self {
        let (bytes, elements) = (self.kind.bytes(), self.elements());
        let mut data = vec![0u64; (elements * bytes).div_ceil(8)].into_boxed_slice();
        let first: *mut u8 = data.as_mut_ptr().cast();
        for i in 0..elements {
            let mut rest = i as i64;
            let mut at = 0;
            for (&n, &stride) in self.shape.iter().zip(&self.strides).rev() {
                at += rest % n * stride;
                rest /= n;
            }
            // SAFETY: element `at` is one of ours, element `i` one of the copy's, which has as many.
            unsafe {
                let from = self.first.cast::<u8>().offset(at as isize * bytes as isize);
                std::ptr::copy_nonoverlapping(from, first.add(i * bytes), bytes);
            }
        }
        // SAFETY: the box owns as many elements, and does not move.
        unsafe {
            let owner = Arc::new(data);
            let first = owner.as_ptr().cast_mut().cast();
            Self::new(owner, first, self.kind, Place::Host, self.shape.clone(), false)
        }
    }
}

/// A [`Memory`] on its way through Python.
struct Passed(Memory);

const PASSED: &CStr = c"imagehere.memory";

/// All of `Tensor` but the buffer protocol, which [`class`] adds.
#[pyclass(subclass, frozen, name = "_Tensor", module = "imagehere")]
pub struct Base {
    memory: Memory,
    shape: Box<[isize]>,
    strides: Box<[isize]>, // bytes
}

#[pymethods]
impl Base {
    #[new]
    fn new(memory: &Bound<'_, PyAny>) -> PyResult<Self> {
        let refuse = || PyTypeError::new_err("tensors are made by imagehere, not by hand");
        let capsule = memory.cast::<PyCapsule>().map_err(|_| refuse())?;
        let pointer = capsule.pointer_checked(Some(PASSED)).map_err(|_| refuse())?;
        // SAFETY: a capsule of this name holds a `Passed`, and lives as long as the borrow.
        let Passed(memory) = unsafe { pointer.cast::<Passed>().as_ref() };
        let shape = memory.shape.iter().map(|&n| n as isize).collect();
        let strides = memory.strides.iter().map(|&n| n as isize * memory.kind.bytes() as isize).collect();
        Ok(Self { memory: memory.clone(), shape, strides })
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.memory.shape.iter())
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.memory.kind.name()
    }

    #[getter]
    /// ``cpu`` or ``cuda:N``.
    fn device(&self) -> String {
        match self.memory.place {
            Place::Host => "cpu".into(),
            Place::Cuda(ordinal) => format!("cuda:{ordinal}"),
        }
    }

    #[getter]
    /// Bytes of all elements, without gaps between rows.
    fn nbytes(&self) -> usize {
        self.memory.elements() * self.memory.kind.bytes()
    }

    /// Address of the first element, in the memory of its device.
    fn data_ptr(&self) -> usize {
        self.memory.first as usize
    }

    fn __len__(&self) -> usize {
        self.memory.shape.first().map_or(0, |&n| n as usize)
    }

    fn __repr__(&self) -> String {
        let shape: Vec<String> = self.memory.shape.iter().map(i64::to_string).collect();
        format!("Tensor({} [{}] on {})", self.dtype(), shape.join(", "), self.device())
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        let device = self.memory.place.dlpack();
        (device.kind, device.id)
    }

    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'_, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let _ = stream; // all was written when the call returned: there is nothing to wait for
        let refuse = |text: &str| Err(PyBufferError::new_err(text.to_owned()));
        if dl_device.is_some_and(|device| device != self.__dlpack_device__()) {
            return refuse("the tensor stays where it is; copy it over in your framework");
        }
        let versioned = max_version.is_some_and(|(major, _)| major >= 1);
        let copied = copy == Some(true);
        let memory = match copied {
            true if self.memory.place != Place::Host => {
                return refuse("tensors in a GPU's memory are not copied here; copy it in your framework");
            }
            true => self.memory.copy(),
            false => self.memory.clone(),
        };
        if memory.read_only && !versioned {
            return refuse("the tensor is read-only, which DLPack before 1.0 cannot say; ask for a copy");
        }
        let export = dlpack::Export {
            owner: memory.owner,
            data: memory.first,
            device: memory.place.dlpack(),
            dtype: memory.kind.dlpack(),
            shape: memory.shape,
            strides: memory.strides,
            read_only: memory.read_only,
            copied,
        };
        export.capsule(py, versioned)
    }
}

/// The memory of a `Tensor`.
pub fn memory(tensor: &Bound<'_, PyAny>) -> PyResult<Memory> {
    Ok(tensor.cast::<Base>()?.get().memory.clone())
}

/// Answers a request for a view of the memory.
///
/// # Safety
/// Called by Python as the slot `bf_getbuffer`, with the GIL.
unsafe extern "C" fn get_buffer(object: *mut ffi::PyObject, view: *mut buffer::Raw, flags: c_int) -> c_int {
    // SAFETY: Python passes an object of the type and a view to fill; shape and strides live as long as the object, which
    // the view holds.
    unsafe {
        let py = Python::assume_attached();
        let answered = std::panic::catch_unwind(|| {
            let object = Bound::from_borrowed_ptr(py, object);
            let base = object.cast::<Base>()?.get();
            let memory = &base.memory;
            let refuse = |text: &str| Err(PyBufferError::new_err(text.to_owned()));
            if memory.place != Place::Host {
                return refuse("the tensor lies in a GPU's memory: take it by DLPack");
            }
            if flags & buffer::WRITABLE != 0 && memory.read_only {
                return refuse("the tensor is read-only: copy it");
            }
            let rows = memory.is_contiguous();
            let columns = flags & buffer::F_CONTIGUOUS == buffer::F_CONTIGUOUS && memory.shape.len() > 1;
            if columns || (!rows && flags & buffer::STRIDES != buffer::STRIDES) {
                return refuse("the rows lie apart: ask for strides");
            }
            (*view).buf = memory.first;
            (*view).len = (memory.elements() * memory.kind.bytes()) as ffi::Py_ssize_t;
            (*view).itemsize = memory.kind.bytes() as ffi::Py_ssize_t;
            (*view).readonly = c_int::from(memory.read_only);
            (*view).ndim = base.shape.len() as c_int;
            let show = |wanted: c_int| flags & wanted == wanted;
            let format = memory.kind.format().as_ptr().cast_mut();
            (*view).format = if show(buffer::FORMAT) { format } else { std::ptr::null_mut() };
            let shape = base.shape.as_ptr().cast_mut();
            (*view).shape = if show(buffer::ND) { shape } else { std::ptr::null_mut() };
            let strides = base.strides.as_ptr().cast_mut();
            (*view).strides = if show(buffer::STRIDES) { strides } else { std::ptr::null_mut() };
            (*view).suboffsets = std::ptr::null_mut();
            (*view).internal = std::ptr::null_mut();
            (*view).obj = object.into_ptr();
            Ok(())
        });
        let error = match answered {
            Ok(Ok(())) => return 0,
            Ok(Err(error)) => error,
            Err(_) => PyBufferError::new_err("internal error"),
        };
        (*view).obj = std::ptr::null_mut();
        error.restore(py);
        -1
    }
}

const DOC: &CStr = c"\
Memory of the library's, or of the caller's ``out``, shared and not copied.

By DLPack (``torch.from_dlpack``, ``jax.dlpack.from_dlpack``), on the host by the buffer protocol too
(``numpy.asarray``, ``memoryview``). It lives as long as anybody looks at it. All is written when a call returns: a
consumer's stream has nothing to wait for.";

/// The class `Tensor`: [`Base`] with the buffer protocol.
pub fn class(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let make = || {
        let get_buffer: unsafe extern "C" fn(_, _, _) -> _ = get_buffer;
        let mut slots = [
            ffi::PyType_Slot { slot: ffi::Py_tp_doc, pfunc: DOC.as_ptr().cast_mut().cast() },
            ffi::PyType_Slot { slot: buffer::SLOT_GET, pfunc: get_buffer as *mut c_void },
            ffi::PyType_Slot { slot: 0, pfunc: std::ptr::null_mut() },
        ];
        let mut spec = ffi::PyType_Spec {
            name: c"imagehere.Tensor".as_ptr(),
            basicsize: 0, // the base's
            itemsize: 0,
            flags: ffi::Py_TPFLAGS_DEFAULT as u32,
            slots: slots.as_mut_ptr(),
        };
        let bases = PyTuple::new(py, [py.get_type::<Base>()])?;
        // SAFETY: the specification is complete, its slot has the signature it must have, and is copied.
        let class = unsafe {
            Bound::from_owned_ptr_or_err(py, ffi::PyType_FromSpecWithBases(&mut spec, bases.as_ptr()))?
        };
        Ok::<_, PyErr>(class.cast_into::<PyType>()?.unbind())
    };
    Ok(CLASS.get_or_try_init(py, make)?.bind(py))
}
