//! What a launch asks for beside its sizes.

use std::ffi::c_void;

use cudarc::driver::sys::{
    CUfunction, CUlaunchAttribute_st, CUlaunchAttributeID_enum, CUlaunchAttributeValue_union,
    CUlaunchConfig_st, CUresult, CUstream,
};

use super::library::calls::cuLaunchKernelEx;

/// Attributes of a launch.
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct Attributes {
    /// May begin before the launch before it is over.
    pub(in crate::cuda) programmatic: bool,
    /// Blocks of a cluster, along x; 1: there are none.
    pub(in crate::cuda) cluster: u32,
}

impl Attributes {
    /// False for a launch as any other.
    pub(in crate::cuda) fn any(self) -> bool {
        self.programmatic || self.cluster > 1
    }

    /// Enqueues a kernel with them.
    ///
    /// # Safety
    /// `parameters` must point to one address for each of the kernel's parameters, and each of those to a value of its
    /// type; what the kernel does with them must be well.
    pub(in crate::cuda) unsafe fn launch(
        self,
        function: CUfunction,
        [x, y, z]: [u32; 3],
        threads: u32,
        shared: u32,
        stream: CUstream,
        parameters: *mut *mut c_void,
    ) -> CUresult {
        use CUlaunchAttributeID_enum::*;
        let attribute = |id| CUlaunchAttribute_st {
            id,
            pad: [0; 4],
            value: CUlaunchAttributeValue_union { pad: [0; 64] },
        };
        let mut attributes = Vec::with_capacity(2);
        if self.programmatic {
            let mut programmatic = attribute(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
            programmatic.value.programmaticStreamSerializationAllowed = 1;
            attributes.push(programmatic);
        }
        if self.cluster > 1 {
            let mut cluster = attribute(CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
            cluster.value.clusterDim.x = self.cluster;
            cluster.value.clusterDim.y = 1;
            cluster.value.clusterDim.z = 1;
            attributes.push(cluster);
        }
        let config = CUlaunchConfig_st {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the configuration and its attributes live to the end of the call; the rest is the caller's promise.
        unsafe { cuLaunchKernelEx(&config, function, parameters, std::ptr::null_mut()) }
    }
}
