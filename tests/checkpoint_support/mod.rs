//! Checkpoint directories made by hand: a tensor list, and writers of both formats that share no code with
//! the readers under test. What real PyTorch writes is tested with the goldens.

#![allow(dead_code, reason = "each test file uses a part")]

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use half::{bf16, f16};

/// A dtype as the two formats name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dt {
    Bf16,
    F16,
    F32,
    F64,
    I64,
    Fp8,
}

impl Dt {
    pub fn size(self) -> usize {
        match self {
            Self::Fp8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    fn safetensors(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::Fp8 => "F8_E4M3",
        }
    }

    /// The storage class, or the dtype of an untyped storage.
    fn torch(self) -> Result<&'static str, &'static str> {
        match self {
            Self::Bf16 => Ok("BFloat16Storage"),
            Self::F16 => Ok("HalfStorage"),
            Self::F32 => Ok("FloatStorage"),
            Self::F64 => Ok("DoubleStorage"),
            Self::I64 => Ok("LongStorage"),
            Self::Fp8 => Err("float8_e4m3fn"),
        }
    }

    pub fn encode(self, value: f32) -> Vec<u8> {
        match self {
            Self::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
            Self::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            Self::F32 => value.to_le_bytes().to_vec(),
            Self::F64 => f64::from(value).to_le_bytes().to_vec(),
            Self::I64 => (value as i64).to_le_bytes().to_vec(),
            Self::Fp8 => vec![value.to_bits() as u8],
        }
    }

    /// The fp16 value that a stored value has to become.
    pub fn rounded(self, value: f32) -> f16 {
        match self {
            Self::Bf16 => f16::from_f32(bf16::from_f32(value).to_f32()),
            _ => f16::from_f32(value),
        }
    }
}

/// A dense tensor.
#[derive(Clone, Debug)]
pub struct Named {
    pub name: String,
    pub dtype: Dt,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Named {
    pub fn new(name: &str, dtype: Dt, shape: &[usize], values: Vec<f32>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        Self { name: name.into(), dtype, shape: shape.into(), values }
    }

    pub fn zeros(name: &str, dtype: Dt, shape: &[usize]) -> Self {
        Self::new(name, dtype, shape, vec![0.0; shape.iter().product()])
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|&value| self.dtype.encode(value)).collect()
    }

    pub fn rounded(&self) -> Vec<f16> {
        self.values.iter().map(|&value| self.dtype.rounded(value)).collect()
    }
}

/// The sizes of a small model, no two alike, so that a mix-up shows.
#[derive(Clone, Copy, Debug)]
pub struct Small {
    pub grid: usize,
    pub patch: usize,
    pub width: usize,
    pub layers: usize,
    pub mlp: usize,
    pub projector: usize,
    pub hidden: usize,
    pub vocab: usize,
}

pub const SMALL: Small =
    Small { grid: 3, patch: 2, width: 64, layers: 2, mlp: 96, projector: 80, hidden: 48, vocab: 40 };

pub const TOWER: &str = "vit.vision_tower.vision_model.";

/// Every needed tensor, with reproducible values between -1 and 1.
pub fn small_model(sizes: Small, dtype: Dt) -> Vec<Named> {
    let Small { grid, patch, width: c, layers, mlp: f, projector: p, hidden: h, vocab: v } = sizes;
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        (format!("{TOWER}embeddings.class_embedding"), vec![c]),
        (format!("{TOWER}embeddings.patch_embedding.weight"), vec![c, 3, patch, patch]),
        (format!("{TOWER}embeddings.position_embedding.weight"), vec![grid * grid + 1, c]),
        (format!("{TOWER}pre_layrnorm.weight"), vec![c]),
        (format!("{TOWER}pre_layrnorm.bias"), vec![c]),
    ];
    for i in 0..layers {
        let name = |part: &str| format!("{TOWER}encoder.layers.{i}.{part}");
        for norm in ["layer_norm1", "layer_norm2"] {
            shapes.push((name(&format!("{norm}.weight")), vec![c]));
            shapes.push((name(&format!("{norm}.bias")), vec![c]));
        }
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            shapes.push((name(&format!("self_attn.{projection}.weight")), vec![c, c]));
            shapes.push((name(&format!("self_attn.{projection}.bias")), vec![c]));
        }
        shapes.push((name("mlp.fc1.weight"), vec![f, c]));
        shapes.push((name("mlp.fc1.bias"), vec![f]));
        shapes.push((name("mlp.fc2.weight"), vec![c, f]));
        shapes.push((name("mlp.fc2.bias"), vec![c]));
    }
    shapes.push(("vision_proj.0.weight".into(), vec![p, c]));
    shapes.push(("vision_proj.0.bias".into(), vec![p]));
    shapes.push(("vision_proj.2.weight".into(), vec![h, p]));
    shapes.push(("vision_proj.2.bias".into(), vec![h]));
    shapes.push(("model.tok_embeddings.weight".into(), vec![v, h]));

    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).map(|_| next()).collect();
            Named { name, dtype, shape, values }
        })
        .collect()
}

pub fn find<'a>(model: &'a [Named], name: &str) -> &'a Named {
    model.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no {name}"))
}

pub fn find_mut<'a>(model: &'a mut [Named], name: &str) -> &'a mut Named {
    model.iter_mut().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no {name}"))
}

/// A `config.json` that agrees with the sizes, with the LLM's numbers set to trap whoever takes them.
pub fn config_json(sizes: Small) -> serde_json::Value {
    serde_json::json!({
        "model_type": "internlmxcomposer2",
        "img_size": sizes.grid * sizes.patch,
        "hidden_size": sizes.hidden,
        "vocab_size": sizes.vocab,
        "max_length": 4096,
        "max_position_embeddings": 32768,
        "num_attention_heads": 7,
        "num_hidden_layers": 31,
        "intermediate_size": 11,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-3,
    })
}

pub fn write_config(dir: &Path, config: &serde_json::Value) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// A directory with a model in one file.
pub fn model_dir(model: &[Named], format: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &config_json(SMALL));
    match format {
        "safetensors" => {
            std::fs::write(dir.path().join("model.safetensors"), safetensors_bytes(model)).unwrap()
        }
        "bin" => std::fs::write(dir.path().join("pytorch_model.bin"), torch_bytes(model)).unwrap(),
        other => panic!("format {other}"),
    }
    dir
}

/// An index of shards: tensor to file.
pub fn write_index<'a>(path: &Path, files: impl Iterator<Item = (&'a str, &'a str)>) {
    let map: serde_json::Map<String, serde_json::Value> =
        files.map(|(name, file)| (name.to_owned(), file.into())).collect();
    let index = serde_json::json!({ "metadata": { "total_size": 0 }, "weight_map": map });
    std::fs::write(path, index.to_string()).unwrap();
}

/// Splits a model into a shard with the LLM, and two with the needed tensors.
pub fn write_shards(dir: &Path, model: &[Named], format: &str, with_llm: bool) {
    let (extension, index) = match format {
        "safetensors" => ("safetensors", "model.safetensors.index.json"),
        _ => ("bin", "pytorch_model.bin.index.json"),
    };
    let llm = [
        Named::zeros("model.layers.0.attention.wqkv.weight", Dt::Bf16, &[4, 4]),
        Named::zeros("model.layers.0.attention.wqkv.Plora_A.weight", Dt::Bf16, &[2, 4]),
    ];
    let names: Vec<String> = (1..=3).map(|i| format!("shard-{i}-of-3.{extension}")).collect();
    let (first, second) = model.split_at(model.len() / 2);
    for (name, part) in names.iter().zip([first, &llm[..], second]) {
        if part[0].name.starts_with("model.layers") && !with_llm {
            continue;
        }
        let bytes = if format == "safetensors" { safetensors_bytes(part) } else { torch_bytes(part) };
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    let lines = [first, &llm[..], second]
        .into_iter()
        .zip(&names)
        .flat_map(|(part, name)| part.iter().map(move |tensor| (tensor.name.as_str(), name.as_str())));
    write_index(&dir.join(index), lines);
    write_config(dir, &config_json(SMALL));
}

// ---- safetensors -------------------------------------------------------------------------------------

/// A header line: name, dtype, shape, begin, end.
pub fn safetensors_header(lines: &[(String, &str, Vec<usize>, u64, u64)]) -> Vec<u8> {
    let lines: Vec<String> = lines
        .iter()
        .map(|(name, dtype, shape, begin, end)| {
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#)
        })
        .collect();
    let mut header = format!(r#"{{"__metadata__":{{"format":"pt"}},{}}}"#, lines.join(",")).into_bytes();
    while header.len() % 8 != 0 {
        header.push(b' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes
}

pub fn safetensors_bytes(model: &[Named]) -> Vec<u8> {
    let (mut lines, mut data) = (Vec::new(), Vec::new());
    for tensor in model {
        let begin = data.len() as u64;
        data.extend(tensor.bytes());
        let line =
            (tensor.name.clone(), tensor.dtype.safetensors(), tensor.shape.clone(), begin, data.len() as u64);
        lines.push(line);
    }
    let mut bytes = safetensors_header(&lines);
    bytes.extend(data);
    bytes
}

// ---- pickle ------------------------------------------------------------------------------------------

/// A tensor as a pickle describes it.
#[derive(Clone, Debug)]
pub struct View {
    pub name: String,
    pub dtype: Dt,
    pub storage: String,
    /// Elements of the storage.
    pub storage_len: usize,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
    pub parameter: bool,
}

impl View {
    /// A dense tensor in a storage of its own.
    pub fn dense(tensor: &Named, storage: usize) -> Self {
        let mut strides = vec![1; tensor.shape.len()];
        for i in (1..strides.len()).rev() {
            strides[i - 1] = strides[i] * tensor.shape[i];
        }
        Self {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            storage: storage.to_string(),
            storage_len: tensor.values.len(),
            offset: 0,
            shape: tensor.shape.clone(),
            strides,
            parameter: false,
        }
    }
}

/// Opcodes, written one after the other.
#[derive(Default)]
pub struct Pickle(pub Vec<u8>);

impl Pickle {
    pub fn op(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    pub fn global(&mut self, module: &str, name: &str) -> &mut Self {
        self.op(format!("c{module}\n{name}\n").as_bytes())
    }

    pub fn text(&mut self, text: &str) -> &mut Self {
        self.op(b"X").op(&(text.len() as u32).to_le_bytes()).op(text.as_bytes())
    }

    pub fn int(&mut self, n: usize) -> &mut Self {
        match n {
            0..=0xff => self.op(&[b'K', n as u8]),
            0x100..=0xffff => self.op(b"M").op(&(n as u16).to_le_bytes()),
            0x1_0000..=0x7fff_ffff => self.op(b"J").op(&(n as i32).to_le_bytes()),
            _ => self.op(&[0x8a, 8]).op(&(n as u64).to_le_bytes()),
        }
    }

    pub fn ints(&mut self, sizes: &[usize]) -> &mut Self {
        self.op(b"(");
        for &size in sizes {
            self.int(size);
        }
        self.op(b"t")
    }

    /// `OrderedDict()`
    pub fn ordered_dict(&mut self) -> &mut Self {
        self.global("collections", "OrderedDict").op(b")R")
    }

    pub fn tensor(&mut self, view: &View) -> &mut Self {
        if view.parameter {
            self.global("torch._utils", "_rebuild_parameter");
        }
        let class = view.dtype.torch();
        let rebuild = if class.is_ok() { "_rebuild_tensor_v2" } else { "_rebuild_tensor_v3" };
        self.global("torch._utils", rebuild).op(b"((").text("storage");
        match class {
            Ok(class) => self.global("torch", class),
            Err(_) => self.global("torch.storage", "UntypedStorage"),
        };
        let len = if class.is_ok() { view.storage_len } else { view.storage_len * view.dtype.size() };
        self.text(&view.storage).text("cpu").int(len).op(b"tQ");
        self.int(view.offset).ints(&view.shape).ints(&view.strides).op(b"\x89").ordered_dict();
        if let Err(dtype) = class {
            self.global("torch", dtype);
        }
        self.op(b"tR");
        if view.parameter {
            self.op(b"\x88").ordered_dict().op(b"\x87R");
        }
        self
    }

    /// `OrderedDict` of tensors, with its `_metadata`, as `torch.save(model.state_dict())` writes it.
    pub fn state_dict(views: &[View]) -> Vec<u8> {
        let mut pickle = Self::default();
        pickle.op(b"\x80\x02").ordered_dict().op(b"q\x00(");
        for view in views {
            pickle.text(&view.name).tensor(view);
        }
        pickle.op(b"u}").text("_metadata").ordered_dict().text("").op(b"}").text("version").int(1);
        pickle.op(b"sssb.");
        pickle.0
    }
}

// ---- zip ---------------------------------------------------------------------------------------------

/// Content of a zip entry.
pub enum Content {
    Bytes(Vec<u8>),
    /// As many zero bytes, left as a hole in the file.
    Hole(u64),
}

/// Writes stored entries as `torch.save` does: data on multiples of 64 bytes, sizes above 4 GiB and offsets
/// beyond them as zip64, and a zip64 end record always.
pub fn write_zip(out: &mut (impl Write + Seek), entries: &[(String, Content)]) -> std::io::Result<()> {
    let mut directory = Vec::new();
    for (name, content) in entries {
        let len = match content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Hole(len) => *len,
        };
        let header = out.stream_position()?;
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let mut extra = Vec::new();
        if len >= u64::from(u32::MAX) {
            extra.extend([1, 0, 16, 0]);
            extra.extend(len.to_le_bytes());
            extra.extend(len.to_le_bytes());
        }
        let unpadded = header + 30 + (name.len() + extra.len()) as u64 + 4;
        let padding = (64 - unpadded % 64) as usize % 64;
        extra.extend(b"FB");
        extra.extend((padding as u16).to_le_bytes());
        extra.extend(vec![b'Z'; padding]);

        out.write_all(b"PK\x03\x04\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00")?;
        out.write_all(&[0; 4])?; // checksum: a wrong one, which nobody looks at
        out.write_all(&narrow(len).to_le_bytes())?;
        out.write_all(&narrow(len).to_le_bytes())?;
        out.write_all(&(name.len() as u16).to_le_bytes())?;
        out.write_all(&(extra.len() as u16).to_le_bytes())?;
        out.write_all(name.as_bytes())?;
        out.write_all(&extra)?;
        match content {
            Content::Bytes(bytes) => out.write_all(bytes)?,
            Content::Hole(len) => {
                out.seek(SeekFrom::Current(*len as i64))?;
            }
        }

        let mut wide = Vec::new();
        if len >= u64::from(u32::MAX) {
            wide.extend(len.to_le_bytes());
            wide.extend(len.to_le_bytes());
        }
        if header >= u64::from(u32::MAX) {
            wide.extend(header.to_le_bytes());
        }
        let mut extra = Vec::new();
        if !wide.is_empty() {
            extra.extend([1, 0]);
            extra.extend((wide.len() as u16).to_le_bytes());
            extra.extend(wide);
        }
        directory.extend(b"PK\x01\x02\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00");
        directory.extend([0; 4]);
        directory.extend(narrow(len).to_le_bytes());
        directory.extend(narrow(len).to_le_bytes());
        directory.extend((name.len() as u16).to_le_bytes());
        directory.extend((extra.len() as u16).to_le_bytes());
        directory.extend([0; 10]); // no comment, disk 0, attributes
        directory.extend(narrow(header).to_le_bytes());
        directory.extend(name.as_bytes());
        directory.extend(extra);
    }

    let start = out.stream_position()?;
    let end = start + directory.len() as u64;
    out.write_all(&directory)?;
    out.write_all(b"PK\x06\x06")?;
    out.write_all(&44u64.to_le_bytes())?;
    out.write_all(&[0x1e, 3, 0x2d, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
    out.write_all(&(entries.len() as u64).to_le_bytes())?;
    out.write_all(&(entries.len() as u64).to_le_bytes())?;
    out.write_all(&(directory.len() as u64).to_le_bytes())?;
    out.write_all(&start.to_le_bytes())?;
    out.write_all(b"PK\x06\x07\x00\x00\x00\x00")?;
    out.write_all(&end.to_le_bytes())?;
    out.write_all(&1u32.to_le_bytes())?;
    out.write_all(b"PK\x05\x06\x00\x00\x00\x00")?;
    let count = entries.len().min(0xffff) as u16;
    out.write_all(&count.to_le_bytes())?;
    out.write_all(&count.to_le_bytes())?;
    out.write_all(&(directory.len() as u32).to_le_bytes())?;
    out.write_all(&u32::try_from(start).unwrap_or(u32::MAX).to_le_bytes())?;
    out.write_all(&[0; 2])
}

/// The entries of an archive: pickle, byte order, storages, version.
pub fn archive_entries(pickle: Vec<u8>, storages: Vec<(String, Content)>) -> Vec<(String, Content)> {
    let mut entries = vec![
        ("archive/data.pkl".to_owned(), Content::Bytes(pickle)),
        ("archive/byteorder".to_owned(), Content::Bytes(b"little".to_vec())),
    ];
    entries.extend(storages.into_iter().map(|(key, content)| (format!("archive/data/{key}"), content)));
    entries.push(("archive/version".to_owned(), Content::Bytes(b"3\n".to_vec())));
    entries
}

pub fn archive_bytes(pickle: Vec<u8>, storages: Vec<(String, Vec<u8>)>) -> Vec<u8> {
    let storages = storages.into_iter().map(|(key, bytes)| (key, Content::Bytes(bytes))).collect();
    let mut out = std::io::Cursor::new(Vec::new());
    write_zip(&mut out, &archive_entries(pickle, storages)).unwrap();
    out.into_inner()
}

pub fn torch_bytes(model: &[Named]) -> Vec<u8> {
    let views: Vec<View> = model.iter().enumerate().map(|(i, tensor)| View::dense(tensor, i)).collect();
    let storages = model.iter().enumerate().map(|(i, tensor)| (i.to_string(), tensor.bytes())).collect();
    archive_bytes(Pickle::state_dict(&views), storages)
}

/// Writes an archive to a file, holes as holes.
pub fn write_archive(path: &Path, pickle: Vec<u8>, storages: Vec<(String, Content)>) {
    write_zip(&mut File::create(path).unwrap(), &archive_entries(pickle, storages)).unwrap();
}
