//! Kernel images loaded into a context, and their functions.

use std::ffi::CString;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::{CUfunction, CUfunction_attribute, CUmodule, CUresult};

use super::context::Context;
use super::library::calls::*;
use crate::error::{Error, Result};

/// A kernel image, loaded.
pub(crate) struct Module {
    context: Arc<Context>,
    raw: CUmodule,
    name: String,
}

// SAFETY: a module is read only once it is loaded; the handle is a plain address.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads the fat binary `image`, called `name` in messages.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver finds nothing for this device in it.
    pub(crate) fn load(context: &Arc<Context>, name: &str, image: &'static [u8]) -> Result<Arc<Self>> {
        context.bind()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for one module; the image is a fat binary of nvcc's, which has its own length.
        let result = unsafe { cuModuleLoadData(&mut raw, image.as_ptr().cast()) };
        context.check(|| format!("cuModuleLoadData of {name} on {context:?}"), result)?;
        Ok(Arc::new(Self { context: context.clone(), raw, name: name.into() }))
    }

    /// Finds a kernel by name.
    ///
    /// # Errors
    /// [`Error::Internal`] if the image has none of that name.
    pub(crate) fn function(self: &Arc<Self>, name: &'static str) -> Result<Function> {
        self.context.bind()?;
        let symbol = CString::new(name).map_err(|_| Error::Internal(format!("a kernel called {name:?}")))?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: a place for one function, a loaded module, and a name that ends in zero.
        match unsafe { cuModuleGetFunction(&mut raw, self.raw, symbol.as_ptr()) } {
            CUresult::CUDA_ERROR_NOT_FOUND => {
                Err(Error::Internal(format!("{} has no kernel `{name}`", self.name)))
            }
            result => {
                self.context.check(|| format!("cuModuleGetFunction of {name}"), result)?;
                Ok(Function { module: self.clone(), raw, name })
            }
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: loaded by `load`, unloaded once; functions keep it alive.
            let _ = unsafe { cuModuleUnload(self.raw) };
        }
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "module {} on {:?}", self.name, self.context)
    }
}

/// A kernel of a loaded image.
#[derive(Clone)]
pub(crate) struct Function {
    module: Arc<Module>,
    raw: CUfunction,
    name: &'static str,
}

// SAFETY: a handle to something read only.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// The context it was loaded into.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.module.context
    }

    /// The driver's handle.
    pub(in crate::cuda) fn raw(&self) -> CUfunction {
        self.raw
    }

    /// Offset and size of parameter `index`, in bytes; `None` past the last.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn parameter(&self, index: usize) -> Result<Option<(usize, usize)>> {
        self.context().bind()?;
        let (mut offset, mut size) = (0, 0);
        // SAFETY: places for two sizes.
        match unsafe { cuFuncGetParamInfo(self.raw, index, &mut offset, &mut size) } {
            CUresult::CUDA_ERROR_INVALID_VALUE => Ok(None),
            result => {
                self.context().check(|| format!("cuFuncGetParamInfo of {}", self.name), result)?;
                Ok(Some((offset, size)))
            }
        }
    }

    /// Threads a block may have, given the registers it takes.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub(crate) fn threads_per_block(&self) -> Result<usize> {
        let which = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        self.context().bind()?;
        let mut value = 0;
        // SAFETY: a place for one int.
        let result = unsafe { cuFuncGetAttribute(&mut value, which, self.raw) };
        self.context().check(|| format!("cuFuncGetAttribute of {}", self.name), result)?;
        Ok(value as usize)
    }

    /// Allows launches with as much as `bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// [`Error::Device`] if the device has less.
    pub(crate) fn allow_shared(&self, bytes: usize) -> Result<()> {
        let which = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        self.context().bind()?;
        // SAFETY: the function is loaded.
        let result = unsafe { cuFuncSetAttribute(self.raw, which, bytes as i32) };
        self.context().check(
            || format!("cuFuncSetAttribute of {} to {bytes} bytes of shared memory", self.name),
            result,
        )
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {:?}", self.name, self.context())
    }
}
