//! The façade for Python.

use std::path::PathBuf;
use std::time::Instant;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use imagehere::backend::Device;
use imagehere::checkpoint::RangePolicy;
use imagehere::encoder::{EncodeReport, EncoderOptions};
use imagehere::features::FeatureCache;
use imagehere::image::{DecodeOptions, ImageSource};
use imagehere::output::parquet::TableFile;
use imagehere::sequence::Place;
use imagehere::synth::{self, Preset, SynthOptions};

use crate::call::run;
use crate::errors::{argument, raise};
use crate::features::Features;
use crate::images::{Picture, pictures};
use crate::options::{self, MetaArg, PromptOptions};
use crate::plan::Plan;
use crate::rows::Rows;
use crate::sequence::Sequence;
use crate::target::Target;

/// Images that are encoded before they are written: 320 MB of the published model's features.
const TOGETHER: usize = 32;

/// A loaded model. Calls from several threads run side by side and share the weights; the GIL is free meanwhile.
///
/// Opens a checkpoint directory as the Hub holds it.
///
/// ``device``: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``cuda:0,1`` or ``cuda:all``. ``threads``: of the CPU, in a
/// pool of its own; None shares one of a thread per core. ``saturate``: weights beyond fp16 become ±65504 instead of
/// an error. ``exif``: files are turned as their orientation says, or (upstream) not. ``alpha``: dropped (upstream),
/// or over a colour. ``resample``: the Pillow whose resize is matched, byte by byte. ``feature_cache``: a folder where
/// features are looked for first and kept after, of ``feature_cache_size`` bytes at most.
///
/// Raises CheckpointError, DTypeError, ValueOutOfRangeError or DeviceError.
#[pyclass(frozen, module = "imagehere")]
pub struct Encoder {
    pub inner: imagehere::encoder::Encoder,
    path: PathBuf,
}

#[pymethods]
impl Encoder {
    #[new]
    #[pyo3(signature = (path, device = "auto", *, threads = None, saturate = false, exif = "apply", alpha = None,
        resample = "pillow", feature_cache = None, feature_cache_size = None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        device: &str,
        threads: Option<usize>,
        saturate: bool,
        exif: &str,
        alpha: Option<&Bound<'_, PyAny>>,
        resample: &str,
        feature_cache: Option<PathBuf>,
        feature_cache_size: Option<u64>,
    ) -> PyResult<Self> {
        let device: Device = device.parse().map_err(|error| raise(py, &error))?;
        let mut decode = DecodeOptions::default().with_exif(options::exif(py, exif)?);
        if let Some(alpha) = alpha {
            decode = decode.with_alpha(options::alpha(alpha)?);
        }
        let mut settings =
            EncoderOptions::new().device(device).decode(decode).resample(options::resample(py, resample)?);
        if let Some(threads) = threads {
            if threads == 0 {
                return Err(argument(py, "threads=0 cannot encode anything. Give at least 1, or None"));
            }
            settings = settings.threads(threads);
        }
        if saturate {
            settings = settings.range_policy(RangePolicy::Saturate);
        }
        if let Some(dir) = feature_cache {
            let mut cache = FeatureCache::open(dir).map_err(|error| raise(py, &error))?;
            if let Some(bytes) = feature_cache_size {
                cache = cache.with_size(bytes);
            }
            settings = settings.feature_cache(cache);
        } else if feature_cache_size.is_some() {
            return Err(argument(py, "feature_cache_size without feature_cache. Give the folder, too"));
        }
        let inner = run(py, |_| imagehere::encoder::Encoder::open_with(&path, settings))?;
        Ok(Self { inner, path })
    }

    #[pyo3(signature = (prompt, images = None, *, meta_instruction = MetaArg::default(), history = None, raw = false,
        bos = "per-segment", allow_control_tokens = false, max_length = None, truncate = false))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    /// Lays out a sequence for so many images, or for these: each takes the place of an ``<ImageHere>``.
    ///
    /// ``meta_instruction``: the system text; None for none; upstream's where not given. A bool is a TypeError: upstream's
    /// code would put the text "True" into the prompt. ``history``: earlier (query, answer) pairs, with their markers.
    /// ``raw``: the prompt is the whole text, without a template. ``bos``: before each segment of text, as upstream's chat
    /// has it, or before the first alone, as in training. ``max_length``: a limit in positions; longer is an error.
    /// ``truncate``: cut where upstream does, with a warning, at the ``max_length`` of the checkpoint's config.
    ///
    /// Raises MarkerCountError or SequenceTooLongError.
    fn plan(
        &self,
        py: Python<'_>,
        prompt: &str,
        images: Option<&Bound<'_, PyAny>>,
        meta_instruction: MetaArg,
        history: Option<Vec<(String, String)>>,
        raw: bool,
        bos: &str,
        allow_control_tokens: bool,
        max_length: Option<usize>,
        truncate: bool,
    ) -> PyResult<Plan> {
        let options = PromptOptions {
            meta: meta_instruction,
            history,
            raw,
            bos: bos.to_owned(),
            allow_control_tokens,
            max_length,
            truncate,
        };
        let request = options.request(py, prompt)?;
        let request = match images {
            None => request,
            Some(images) => match images.extract::<usize>() {
                Ok(count) => request.image_count(count),
                Err(_) => request.images(names(&pictures(images)?)),
            },
        };
        self.inner.plan(&request).map(Plan::new).map_err(|error| raise(py, &error))
    }

    #[pyo3(signature = (prompt, images = None, *, meta_instruction = MetaArg::default(), history = None, raw = false,
        bos = "per-segment", allow_control_tokens = false, max_length = None, truncate = false, out = None,
        verify = true))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    /// Fills a sequence: text rows, and each image's features in its slot.
    ///
    /// Features are placed and not encoded again. ``out``: a float16 tensor or array [rows, H] or [1, rows, H], of
    /// the host or the encoder's device, with at least L rows; they are written in place, and rows after them are not
    /// touched. Nobody else may touch it during the call. ``verify``: every row was written, and no value is NaN or infinite.
    ///
    /// Ctrl-C stops the call; rows of ``out`` may have been written then.
    ///
    /// Raises as ``plan``, ImageError naming the first image that cannot be used (nothing was written then),
    /// IncompleteError.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        prompt: &Bound<'py, PyAny>,
        images: Option<&Bound<'py, PyAny>>,
        meta_instruction: MetaArg,
        history: Option<Vec<(String, String)>>,
        raw: bool,
        bos: &str,
        allow_control_tokens: bool,
        max_length: Option<usize>,
        truncate: bool,
        out: Option<&Bound<'py, PyAny>>,
        verify: bool,
    ) -> PyResult<Sequence> {
        let pictures = images.map_or_else(|| Ok(vec![]), pictures)?;
        let options = PromptOptions {
            meta: meta_instruction,
            history,
            raw,
            bos: bos.to_owned(),
            allow_control_tokens,
            max_length,
            truncate,
        };
        let plan = match prompt.cast::<Plan>() {
            Ok(_) if options != PromptOptions::default() => {
                return Err(argument(
                    py,
                    "a Plan has its options already. Give them to `plan`, or give the prompt here",
                ));
            }
            Ok(plan) => plan.clone(),
            Err(_) => {
                let text = prompt
                    .cast::<PyString>()
                    .map_err(|_| PyTypeError::new_err("prompt is a string or a Plan"))?;
                let request = options.request(py, text.to_str()?)?.images(names(&pictures));
                let plan = self.inner.plan(&request).map_err(|error| raise(py, &error))?;
                Bound::new(py, Plan::new(plan))?
            }
        };
        let layout = &*plan.get().inner;
        let mut target = Target::new(py, &self.inner, layout.len(), out)?;
        let buffer = target.buffer();
        let given: Vec<_> = pictures.iter().map(Picture::features).collect();
        let sources: Vec<ImageSource<'_>> = pictures.iter().filter_map(Picture::source).collect();
        let (report, norms) = run(py, |progress| {
            let report = if given.iter().any(Option::is_some) {
                let start = Instant::now();
                let mut encoded =
                    self.inner.feature_set(&sources, progress)?.0.features().to_vec().into_iter();
                let features: Vec<_> =
                    given.into_iter().filter_map(|given| given.or_else(|| encoded.next())).collect();
                self.inner.place_into(layout, &features, buffer)?;
                let mut report = EncodeReport::default();
                report.encode = start.elapsed();
                report.images_encoded = sources.len();
                report
            } else {
                self.inner.encode_watched(layout, &sources, buffer, progress)?
            };
            let norms = match verify && !buffer.is_empty() {
                true => Some(buffer.verify()?.slots.iter().map(|slot| slot.mean_norm).collect()),
                false => None,
            };
            Ok((report, norms))
        })?;
        let inputs_embeds = target.finish(py)?;
        Ok(Sequence { inputs_embeds, plan: plan.unbind(), report, norms })
    }

    /// Encodes images, equal ones once. Raises ImageError.
    fn features(&self, py: Python<'_>, images: &Bound<'_, PyAny>) -> PyResult<Vec<Features>> {
        let pictures = pictures(images)?;
        let sources = only_images(py, &pictures)?;
        let features =
            run(py, |progress| Ok(self.inner.feature_set(&sources, progress)?.0.features().to_vec()))?;
        features.into_iter().map(|features| Features::new(py, features)).collect()
    }

    /// Takes float16 rows [N, P, H] or [P, H] in host memory, made by this checkpoint elsewhere, as features: copied.
    ///
    /// Raises ArgumentError, TypeError.
    fn adopt_features(&self, py: Python<'_>, rows: &Bound<'_, PyAny>) -> PyResult<Vec<Features>> {
        let (patches, hidden) = (self.inner.config().patches, self.inner.config().hidden_size);
        let rows = Rows::read(rows)?;
        if rows.hidden != hidden || rows.count % patches != 0 {
            let text = format!(
                "rows have shape {:?}. Give [N, {patches}, {hidden}] or [{patches}, {hidden}]",
                rows.shape
            );
            return Err(argument(py, text));
        }
        let adopt = |image: usize| {
            let image = rows.image(image, patches);
            Features::new(py, self.inner.adopt_features(image).map_err(|error| raise(py, &error))?)
        };
        (0..rows.count / patches).map(adopt).collect()
    }

    /// Encodes images into a features file, whole or not at all, and returns its bytes. Raises ImageError, WriteError.
    fn save_features(&self, py: Python<'_>, path: PathBuf, images: &Bound<'_, PyAny>) -> PyResult<u64> {
        let pictures = pictures(images)?;
        let sources = only_images(py, &pictures)?;
        run(py, |progress| self.inner.feature_set(&sources, progress)?.0.save(&path))
    }

    /// Encodes images into a Parquet file, a row for each: name, pixels, checkpoint, rows, hidden, features. Whole or not at
    /// all; images are encoded and written some at a time. Returns its bytes. Raises ImageError, WriteError.
    fn write_parquet(&self, py: Python<'_>, path: PathBuf, images: &Bound<'_, PyAny>) -> PyResult<u64> {
        let pictures = pictures(images)?;
        let sources = only_images(py, &pictures)?;
        run(py, |progress| {
            let mut table = TableFile::create(&path)?;
            for (i, group) in sources.chunks(TOGETHER).enumerate() {
                let encoded = self.inner.feature_set(group, progress);
                let (set, _) = encoded.map_err(|error| error.after_images(i * TOGETHER))?;
                set.push_to(&mut table)?;
            }
            table.commit(&self.inner.provenance())
        })
    }

    /// Reads a features file that this checkpoint made by this encoder's rules. Raises FeaturesError.
    fn read_features(&self, py: Python<'_>, path: PathBuf) -> PyResult<Vec<Features>> {
        let features = run(py, |_| self.inner.read_features(&path))?;
        features.into_iter().map(|features| Features::new(py, features)).collect()
    }

    #[pyo3(signature = (*batch_sizes))]
    /// Makes the first call with so many images cost what the tenth does, on a GPU.
    fn warm_up(&self, py: Python<'_>, batch_sizes: Vec<usize>) -> PyResult<()> {
        run(py, |_| self.inner.warm_up(&batch_sizes))
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    #[getter]
    /// The device and the kernels chosen on it, in words.
    fn device(&self) -> String {
        self.inner.describe()
    }

    #[getter]
    /// The text in a prompt that stands for an image: ``<ImageHere>``, or ``<image>`` in LLaVA.
    fn marker(&self) -> &'static str {
        self.inner.config().profile.marker
    }

    #[getter]
    /// Where sequences lie: ``cpu`` or ``cuda:N``.
    fn place(&self) -> String {
        match self.inner.device_sequence().map(|sequence| sequence.place()) {
            Ok(Place::Cuda(ordinal)) => format!("cuda:{ordinal}"),
            _ => "cpu".into(),
        }
    }

    #[getter]
    fn fingerprint(&self) -> &str {
        self.inner.fingerprint()
    }

    #[getter]
    /// What was noticed when the checkpoint was opened.
    fn warnings(&self) -> Vec<String> {
        self.inner.warnings().iter().map(ToString::to_string).collect()
    }

    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let config = self.inner.config();
        let dict = PyDict::new(py);
        for (name, value) in [
            ("image_size", config.image_size),
            ("patch_size", config.patch_size),
            ("patches", config.patches),
            ("width", config.width),
            ("layers", config.layers),
            ("hidden_size", config.hidden_size),
            ("vocab_size", config.vocab_size),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        format!("Encoder({:?}, {})", self.path.display().to_string(), self.inner.describe())
    }
}

/// What messages call the images of a call.
fn names(pictures: &[Picture]) -> Vec<String> {
    pictures.iter().enumerate().map(|(i, picture)| picture.name(i)).collect()
}

/// The images of a call that takes no features.
fn only_images<'a>(py: Python<'_>, pictures: &'a [Picture]) -> PyResult<Vec<ImageSource<'a>>> {
    let sources: Vec<_> = pictures.iter().filter_map(Picture::source).collect();
    match sources.len() == pictures.len() {
        true => Ok(sources),
        false => Err(argument(py, "features were given where images are encoded. Give images")),
    }
}

/// Writes random weights in the upstream layout, for tests and trials.
#[pyfunction]
#[pyo3(signature = (path, *, preset = "tiny"))]
pub fn make_random_checkpoint(py: Python<'_>, path: PathBuf, preset: &str) -> PyResult<()> {
    let presets =
        [("tiny", Preset::Tiny), ("llava-tiny", Preset::LlavaTiny), ("vl-7b-vision", Preset::Vl7bVision)];
    let preset = options::pick(py, "preset", preset, &presets)?;
    run(py, |_| synth::write(preset, &SynthOptions::default(), &path).map(drop))
}
