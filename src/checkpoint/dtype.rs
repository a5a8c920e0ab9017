//! The element types that checkpoint files know, by the names the files use.

use serde::Serialize;

/// An element type that becomes fp16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// bfloat16: 8 bits of exponent, 7 of fraction.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl DType {
    /// Returns the size of an element, in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Returns the short name: `bf16`, `f16` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }
}

/// The two ways in which the Hub holds weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// `*.safetensors`
    Safetensors,
    /// `*.bin`: the zip archives of `torch.save`.
    Bin,
}

/// One line of [`TYPES`].
#[derive(Debug)]
struct TypeInfo {
    /// In a safetensors header; empty if there is no such name.
    safetensors: &'static str,
    /// `torch.<dtype>`
    torch: &'static str,
    /// `torch.<class>` of its storages; empty where torch stores it untyped.
    storage: &'static str,
    /// Per element.
    bits: usize,
    float: Option<DType>,
}

/// Any element type that a file may hold; most are refused where their tensor is needed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredType(&'static TypeInfo);

impl PartialEq for StoredType {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for StoredType {}

#[rustfmt::skip]
static TYPES: [TypeInfo; 29] = [
    row("BF16",        "bfloat16",         "BFloat16Storage",      16, Some(DType::Bf16)),
    row("F16",         "float16",          "HalfStorage",          16, Some(DType::F16)),
    row("F32",         "float32",          "FloatStorage",         32, Some(DType::F32)),
    row("F64",         "float64",          "DoubleStorage",        64, None),
    row("I64",         "int64",            "LongStorage",          64, None),
    row("I32",         "int32",            "IntStorage",           32, None),
    row("I16",         "int16",            "ShortStorage",         16, None),
    row("I8",          "int8",             "CharStorage",           8, None),
    row("U8",          "uint8",            "ByteStorage",           8, None),
    row("BOOL",        "bool",             "BoolStorage",           8, None),
    row("U16",         "uint16",           "",                     16, None),
    row("U32",         "uint32",           "",                     32, None),
    row("U64",         "uint64",           "",                     64, None),
    row("C64",         "complex64",        "ComplexFloatStorage",  64, None),
    row("",            "complex128",       "ComplexDoubleStorage", 128, None),
    row("",            "complex32",        "",                     32, None),
    row("F8_E5M2",     "float8_e5m2",      "",                      8, None),
    row("F8_E4M3",     "float8_e4m3fn",    "",                      8, None),
    row("F8_E8M0",     "float8_e8m0fnu",   "",                      8, None),
    row("F8_E4M3FNUZ", "float8_e4m3fnuz",  "",                      8, None),
    row("F8_E5M2FNUZ", "float8_e5m2fnuz",  "",                      8, None),
    row("",            "float4_e2m1fn_x2", "",                      8, None),
    row("F4",          "float4",           "",                      4, None),
    row("F6_E2M3",     "float6_e2m3",      "",                      6, None),
    row("F6_E3M2",     "float6_e3m2",      "",                      6, None),
    row("",            "uint4",            "",                      8, None),
    row("",            "int4",             "",                      8, None),
    row("",            "uint2",            "",                      8, None),
    row("",            "untyped",          "",                      8, None),
];

/// The last line of [`TYPES`]: a storage of bytes, whose tensors name their dtype themselves.
const UNTYPED: usize = TYPES.len() - 1;

const fn row(
    safetensors: &'static str,
    torch: &'static str,
    storage: &'static str,
    bits: usize,
    float: Option<DType>,
) -> TypeInfo {
    TypeInfo { safetensors, torch, storage, bits, float }
}

impl StoredType {
    /// The type that a safetensors header calls `name`.
    pub fn from_safetensors(name: &str) -> Option<Self> {
        TYPES.iter().find(|info| !name.is_empty() && info.safetensors == name).map(Self)
    }

    /// The type that a pickle's global stands for: a storage class or a dtype.
    pub fn from_torch_global(module: &str, name: &str) -> Option<Self> {
        match module {
            "torch" => TYPES[..UNTYPED]
                .iter()
                .find(|info| info.torch == name || (!name.is_empty() && info.storage == name))
                .map(Self),
            "torch.storage" if name == "UntypedStorage" => Some(Self(&TYPES[UNTYPED])),
            _ => None,
        }
    }

    /// Whether a pickle's global belongs to PyTorch's own quantisation: `QInt8Storage`, `per_tensor_affine`.
    pub fn is_quantised_global(module: &str, name: &str) -> bool {
        module == "torch"
            && (name.starts_with("QInt")
                || name.starts_with("QUInt")
                || name.starts_with("qint")
                || name.starts_with("quint")
                || name.starts_with("per_tensor_")
                || name.starts_with("per_channel_"))
    }

    /// The same as a type that becomes fp16; `None` for every other.
    pub fn float(self) -> Option<DType> {
        self.0.float
    }

    /// Size of an element, in bytes; `None` where several elements share one.
    pub fn size(self) -> Option<usize> {
        self.0.bits.is_multiple_of(8).then_some(self.0.bits / 8)
    }

    /// Size of an element, in bits.
    pub fn bits(self) -> usize {
        self.0.bits
    }

    /// The name that files of a format use: `F8_E4M3`, `torch.float8_e4m3fn`.
    pub fn name(self, format: Format) -> String {
        match format {
            Format::Safetensors => self.0.safetensors.to_owned(),
            Format::Bin => format!("torch.{}", self.0.torch),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_the_types_they_say() {
        let bf16 = StoredType::from_safetensors("BF16").unwrap();
        assert_eq!(bf16.float(), Some(DType::Bf16));
        assert_eq!(StoredType::from_torch_global("torch", "BFloat16Storage"), Some(bf16));
        assert_eq!(StoredType::from_torch_global("torch", "bfloat16"), Some(bf16));
        let fp8 = StoredType::from_torch_global("torch", "float8_e4m3fn").unwrap();
        assert_eq!(StoredType::from_safetensors("F8_E4M3"), Some(fp8));
        assert_eq!((fp8.float(), fp8.size()), (None, Some(1)));
        assert_eq!(fp8.name(Format::Bin), "torch.float8_e4m3fn");
        assert_eq!(StoredType::from_torch_global("torch.storage", "UntypedStorage").unwrap().size(), Some(1));
    }

    #[test]
    fn an_empty_or_foreign_name_leads_nowhere() {
        assert_eq!(StoredType::from_safetensors(""), None);
        assert_eq!(StoredType::from_torch_global("torch", ""), None);
        assert_eq!(StoredType::from_torch_global("torch", "load"), None);
        assert_eq!(StoredType::from_torch_global("torch", "untyped"), None);
        assert_eq!(StoredType::from_torch_global("torch.cuda", "FloatStorage"), None);
    }

    #[test]
    fn float_sizes_agree_with_the_table() {
        for info in &TYPES {
            if let Some(dtype) = info.float {
                assert_eq!(dtype.size() * 8, info.bits);
            }
        }
    }
}
