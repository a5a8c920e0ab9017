//! What an encoder is opened with.

use crate::backend::Device;
use crate::checkpoint::RangePolicy;
use crate::features::FeatureCache;
use crate::image::{DecodeOptions, Resample};

/// How to open and run an [`Encoder`](super::Encoder); the defaults suit most.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct EncoderOptions {
    /// Where to run: the CPU, a GPU, or several that share the images of a call ([`Device::CudaSeveral`],
    /// [`Device::CudaAll`]).
    pub device: Device,
    /// Threads of the CPU; `None` takes rayon's global pool, one per core.
    pub threads: Option<usize>,
    /// What to do with a weight that fp16 cannot hold.
    pub range_policy: RangePolicy,
    /// How files become RGB8.
    pub decode: DecodeOptions,
    /// Which Pillow the resize equals.
    pub resample: Resample,
    /// Where features are looked for before the tower runs, and kept after; `None`: nowhere.
    pub feature_cache: Option<FeatureCache>,
}

impl EncoderOptions {
    /// Makes the default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets where to run, say `"cuda:0,1".parse()?` for two GPUs.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Sets the number of CPU threads, in a pool of this encoder's own.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Sets what to do with a weight that fp16 cannot hold.
    pub fn range_policy(mut self, policy: RangePolicy) -> Self {
        self.range_policy = policy;
        self
    }

    /// Sets how files become RGB8.
    pub fn decode(mut self, decode: DecodeOptions) -> Self {
        self.decode = decode;
        self
    }

    /// Sets which Pillow the resize equals.
    pub fn resample(mut self, resample: Resample) -> Self {
        self.resample = resample;
        self
    }

    /// Sets where features are looked for before the tower runs, and kept after. Images are then decoded and resized on
    /// the host, and features go through its memory.
    pub fn feature_cache(mut self, cache: FeatureCache) -> Self {
        self.feature_cache = Some(cache);
        self
    }
}
