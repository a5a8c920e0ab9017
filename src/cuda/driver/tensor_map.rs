//! Maps of tensors, by which Hopper's bulk copies find their boxes.

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};
use half::f16;

use super::context::Context;
use super::library::calls::cuTensorMapEncodeTiled;
use super::memory::DevicePtr;
use crate::error::Result;

/// Elements of fp16 in a row of a box: the 128 bytes that the swizzle turns about.
pub(crate) const BOX_COLUMNS: u32 = 64;

/// `CUtensorMap`: 128 bytes that only the driver can read. A kernel's parameter of type `TensorMap` (ptx_sm90.cuh).
///
/// The kernels align it to 64 bytes, which is what copies ask for; CUDA 13's header says 128, which would put it
/// elsewhere among a kernel's parameters.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TensorMap {
    opaque: [u64; 16],
}

const _: () = assert!(size_of::<TensorMap>() == size_of::<CUtensorMap>(), "all of it travels");

impl TensorMap {
    /// Maps an fp16 tensor in boxes of 64 columns and `rows` rows, in the 128-byte swizzle; what lies outside of the
    /// tensor arrives as zeros.
    ///
    /// `sizes`: elements of each dimension, columns first. `pitches`: elements from one to the next in each dimension
    /// but the first. Nothing of the tensor is looked at, and the map is no longer than the memory.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the driver refuses: an address or pitch that is no multiple of 16 bytes, an empty
    /// dimension, more than 256 rows.
    pub(crate) fn new<const RANK: usize, const OUTER: usize>(
        context: &Context,
        first: DevicePtr<f16>,
        sizes: [usize; RANK],
        pitches: [usize; OUTER],
        rows: usize,
    ) -> Result<Self> {
        const { assert!(RANK >= 2 && RANK <= 5 && OUTER == RANK - 1, "a pitch for each dimension but one") };
        context.bind()?;
        let mut map = Self { opaque: [0; 16] };
        let strides = pitches.map(|pitch| (pitch * size_of::<f16>()) as u64);
        let elements = sizes.map(|size| size as u64);
        let mut boxes = [1; RANK];
        (boxes[0], boxes[1]) = (BOX_COLUMNS, rows as u32);
        // SAFETY: a place for one map at a multiple of 64; arrays of as many numbers as the rank says. The address is
        // kept, not followed.
        let result = unsafe {
            cuTensorMapEncodeTiled(
                std::ptr::from_mut(&mut map).cast(),
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                RANK as u32,
                std::ptr::with_exposed_provenance_mut(first.address() as usize),
                elements.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                [1; RANK].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        context.check(
            || format!("cuTensorMapEncodeTiled of {sizes:?}, {pitches:?} apart, in boxes of {rows} rows"),
            result,
        )?;
        Ok(map)
    }
}
