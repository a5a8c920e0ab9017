//! What the device makes of a checkpoint's tensors, against the host's conversion.

use std::path::Path;

use super::*;
use crate::checkpoint::{Checkpoint, DType, Format};
use crate::cuda::testkit::Bench;
use crate::synth::{self, Preset, SynthOptions};

/// Bytes of a slot of the ring: small, so that most tensors go in several bands.
const SLOT: usize = 4096;

fn checkpoint(dir: &Path, dtype: DType, format: Format) -> Checkpoint {
    let options = SynthOptions { dtype, format, ..SynthOptions::default() };
    synth::write(Preset::Tiny, &options, dir.join("model")).unwrap();
    Checkpoint::open(dir.join("model")).unwrap()
}

/// Converts on the device.
fn convert(
    bench: &Bench,
    checkpoint: &Checkpoint,
    policy: RangePolicy,
) -> Result<(DeviceWeights, ConversionReport)> {
    let mut ring = Ring::new(&bench.gpu.context, SLOT)?;
    let (stream, convert) = (&bench.stream, &bench.gpu.kernels.convert);
    let weights = checkpoint.stored_weights()?;
    DeviceWeights::convert(stream, convert, &mut ring, checkpoint.config(), &weights, policy)
}

/// All that is in device memory, paddings included.
fn bits(bench: &Bench, weights: &DeviceWeights) -> Vec<u16> {
    let mut values = vec![0u16; weights.bytes() / 2];
    // SAFETY: the weights are kept until the copy is done.
    let span = unsafe { weights.memory.span() }.cast().unwrap();
    bench.stream.download_and_wait(span, &mut values).unwrap();
    values
}

#[test]
fn the_device_converts_as_the_host_does() {
    let bench = Bench::new();
    for (dtype, format) in
        [(DType::Bf16, Format::Bin), (DType::F16, Format::Safetensors), (DType::F32, Format::Safetensors)]
    {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(dir.path(), dtype, format);
        let (on_host, host_report) = checkpoint.vision_weights(RangePolicy::Refuse).unwrap();
        let uploaded = DeviceWeights::upload(&bench.stream, checkpoint.config(), &on_host).unwrap();
        let (converted, report) = convert(&bench, &checkpoint, RangePolicy::Refuse).unwrap();
        assert!(bits(&bench, &converted) == bits(&bench, &uploaded), "{dtype:?}");
        assert_eq!((report.saturated(), report.groups.len()), (0, host_report.groups.len()));
        for (group, host) in report.groups.iter().zip(&host_report.groups) {
            assert_eq!((&group.name, group.tensors), (&host.name, host.tensors));
            assert_eq!(group.stats.elements, host.stats.elements);
        }
        assert!(report.warnings().is_empty());
    }
}

#[test]
fn values_out_of_range_are_refused_or_cut_in_the_hosts_words() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    drop(checkpoint(dir.path(), DType::F32, Format::Safetensors));
    let file = dir.path().join("model/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 4; // the last element of vision_proj.2.bias
    bytes[last..].copy_from_slice(&(-70000.0f32).to_le_bytes());
    std::fs::write(&file, bytes).unwrap();

    let checkpoint = Checkpoint::open(dir.path().join("model")).unwrap();
    let expected = checkpoint.vision_weights(RangePolicy::Refuse).unwrap_err().to_string();
    let error = convert(&bench, &checkpoint, RangePolicy::Refuse).unwrap_err().to_string();
    assert_eq!(error, expected);
    assert!(error.contains("vision_proj.2.bias") && error.contains("-70000"), "{error}");

    let (on_host, host_report) = checkpoint.vision_weights(RangePolicy::Saturate).unwrap();
    let uploaded = DeviceWeights::upload(&bench.stream, checkpoint.config(), &on_host).unwrap();
    let (converted, report) = convert(&bench, &checkpoint, RangePolicy::Saturate).unwrap();
    assert!(bits(&bench, &converted) == bits(&bench, &uploaded));
    assert_eq!((report.saturated(), host_report.saturated()), (1, 1));
    assert_eq!(report.warnings(), host_report.warnings());
}
