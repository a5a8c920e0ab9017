//! The commands and their options, as `--help` shows them.

use std::path::PathBuf;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use imagehere::backend::Device;
use imagehere::convert::Layout;
use imagehere::image::{Alpha, Exif, Resample};
use imagehere::picture::Map;
use imagehere::prompt::Bos;
use imagehere::synth::{DType, Format, Preset};

use super::bulk::FeatureSink;
use super::sink::Sink;

const EXAMPLES: &str = "\
Examples:
  imagehere demo
      sets up a small random model, draws two pictures and encodes them

  imagehere encode --model DIR --image a.jpg b.jpg --out sequence.safetensors \\
      --prompt 'First: <ImageHere>, second: <ImageHere>. What changed?'
      runs the main job: one marker per image, in order

  imagehere encode --model DIR --request several.json --out-dir sequences
      encodes several sequences that share images, each image once

  imagehere features --model DIR --image a.jpg b.jpg --out features.safetensors
      keeps what the tower makes of images, for `encode --features`

  imagehere plan --model DIR --image a.jpg b.jpg --prompt '...'
      shows where each image will go, without running the model

Exit status: 0 done; 2 something to mend (arguments, input, checkpoint, target, device); 1 a fault of ours.";

/// Put many images into one multimodal LLM sequence.
///
/// A prompt with <ImageHere> markers and as many images become the whole input of InternLM-XComposer2-VL, in
/// fp16: text rows, and each image's features in the rows that its marker stands for.
#[derive(Debug, Parser)]
#[command(name = "imagehere", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Say on stderr what is done (-v) and every detail of it (-vv)
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Encode a prompt and its images into one sequence, and write it as safetensors or npy
    ///
    /// The file holds `inputs_embeds` F16 [1,L,H], `im_mask` BOOL [1,L], `input_ids` I64 [1,L] with -1 in
    /// image rows, and `slots` I64 [N,2]: begin and end of each image. It appears whole or not at all.
    ///
    /// With --format npy it is a folder, which appears whole or not at all: a file for each of these (<f2, |b1, <i8),
    /// each image's rows [P,H] once more in image_000.npy, ..., and metadata.json. Other formats are those of engines; see
    /// --format.
    ///
    /// With --request, a JSON file names images and the sequences that share them:
    /// {"images": {"a": "a.jpg", ...}, "sequences": [{"name": "first", "prompt": "<ImageHere>?", "images": ["a"]},
    /// ...]}. A sequence may also have "meta_instruction" (null: none), "history", "raw" and "bos", as the options
    /// of these names. Paths are relative to the file; all other options hold for every sequence.
    ///
    /// With --features, the images are those of files that `imagehere features` wrote: nothing is decoded and no tower is
    /// run. With --feature-cache, the tower is run for images that are not in a directory of features yet. The sequence is
    /// the same, byte for byte.
    ///
    /// With --picture, a PNG shows each image beside a map of its features, over the layout; with --features the maps alone.
    Encode(Box<EncodeArgs>),
    /// Encode images once and keep their features, for `encode --features`
    ///
    /// The file holds `features` F16 [N,P,H]; in its metadata the checkpoint's fingerprint, how files became pixels, and
    /// each image's name, SHA-256 of the pixels that the tower saw, and warnings. It appears whole or not at all.
    ///
    /// With --format parquet it is a table of any number of images: name, pixels (their SHA-256), checkpoint, rows, hidden,
    /// and features, a list of P*H float16. Images are encoded and written 32 at a time.
    ///
    /// With --format vllm-encoder-cache it is the shared_storage_path of a vLLM server: UUID/encoder_cache.safetensors of
    /// each image, which a request uses that has the image and this uuid. The uuid is the SHA-256 of the features. Entries
    /// appear one by one, each whole.
    Features(FeaturesArgs),
    /// Show the layout of the sequence without running the model
    ///
    /// Reads the tokenizer and the sizes of the model, no weights and no pixels.
    Plan(PlanArgs),
    /// Write what the model sees of each image, as PNG: 000.png, 001.png, ...
    Preprocess(PreprocessArgs),
    /// Say what a checkpoint directory holds: sizes, dtypes, shards, ranges of values
    Inspect(InspectArgs),
    /// Write what encoding needs of a checkpoint as fp16 safetensors
    ///
    /// Tower, projector and token embedding of any checkpoint that can be read, with config.json and the
    /// tokenizer: a directory that every command takes as a checkpoint, and that encodes to the same bits. It
    /// appears whole or not at all.
    ///
    /// --layout upstream keeps the published model's names. --layout clip-vision is for transformers and torch:
    /// `CLIPVisionModel.from_pretrained(DIR)` loads the tower, and projector.safetensors and
    /// token_embedding.safetensors are state dicts of a Sequential(Linear, GELU, Linear) and an Embedding.
    Convert(ConvertArgs),
    /// Measure every step of an encode, on your checkpoint and your images
    ///
    /// Decode, resize and, on the CPU, each kind of step of tower and projector: median and best of several runs, beside
    /// what the machine's units of multiply-adds reach at most. Every run's sequence is checked.
    Bench(BenchArgs),
    /// Make a random checkpoint in the upstream layout, for tests and measurements
    ///
    /// Names, shapes and formats are those of the published model; the values are noise, the same for the
    /// same seed.
    Synth(SynthArgs),
    /// Run the whole job on a small random model and two pictures drawn on the spot
    Demo(DemoArgs),
    /// Print what a shell needs to complete commands and options
    ///
    /// For bash: imagehere completions bash > ~/.local/share/bash-completion/completions/imagehere
    Completions(CompletionsArgs),
    /// Print the manual page, or that of a command, for man
    ///
    /// To read one at once: imagehere man encode | man -l -
    Man(ManArgs),
}

/// `imagehere encode`
#[derive(Debug, clap::Args)]
#[command(mut_arg("prompt", |prompt| prompt.required_unless_present("request")))]
pub struct EncodeArgs {
    /// The prompt and its layout.
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// The images.
    #[command(flatten)]
    pub images: ImageArgs,

    /// Encode several sequences, as this file says, each image once
    #[arg(long, value_name = "F.json", requires = "out_dir", help_heading = "Several sequences")]
    #[arg(conflicts_with_all = ["prompt", "prompt_file", "image", "out"])]
    #[arg(conflicts_with_all = ["meta_instruction", "no_meta", "history", "raw", "bos"])]
    pub request: Option<PathBuf>,

    /// Where to write them: NAME.safetensors, without a name 000.safetensors, 001.safetensors, ... by place; with
    /// --format npy folders NAME, 000, 001, ..., with others .json or .pt; made if it does not exist
    #[arg(long, value_name = "DIR", requires = "request", help_heading = "Several sequences")]
    #[arg(conflicts_with_all = ["prompt", "prompt_file", "image", "out"])]
    pub out_dir: Option<PathBuf>,

    /// Where to write the sequence: a file, or with --format npy a folder that is empty or does not exist yet
    #[arg(long, value_name = "F.safetensors", required_unless_present = "request")]
    pub out: Option<PathBuf>,

    /// How to write it: for this program, for NumPy, or for an engine
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub format: Sink,

    /// The id that image rows have among the ids: for --format sglang the served model's image token, for lmdeploy any
    /// [default there: 0]
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u32).range(..=i64::from(i32::MAX)))]
    pub image_token: Option<u32>,

    /// Take the images from files that `imagehere features` wrote, in this order; the options of images must be those they
    /// were made with. No tower is run, so that device and threads make no difference
    #[arg(long, value_name = "F.safetensors", num_args = 1.., action = ArgAction::Append)]
    #[arg(help_heading = "Features", conflicts_with_all = ["image", "request", "feature_cache"])]
    pub features: Vec<PathBuf>,

    /// Draw the sequence to this PNG as well: each image beside a map of its features, over the layout
    #[arg(long, value_name = "F.png", help_heading = "Picture", conflicts_with = "request")]
    pub picture: Option<PathBuf>,

    /// What the maps show: an image's first three principal components as red, green and blue (pca), or the norm of each
    /// row (norm) [default: pca]
    #[arg(long, value_name = "MAP", value_parser = map, requires = "picture", help_heading = "Picture")]
    pub picture_map: Option<Map>,

    /// Where and how to run.
    #[command(flatten)]
    pub running: RunningArgs,

    /// Print one JSON object: layout, timings in seconds, peak memory in bytes, warnings
    #[arg(long)]
    pub json: bool,
}

/// `imagehere features`
#[derive(Debug, clap::Args)]
pub struct FeaturesArgs {
    /// The checkpoint directory, as the Hub holds it
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// The images.
    #[command(flatten)]
    pub images: ImageArgs,

    /// Where to write the features: a file, or with --format vllm-encoder-cache a directory, which is made if it does not
    /// exist, and keeps what is in it
    #[arg(long, value_name = "F.safetensors")]
    pub out: PathBuf,

    /// How to write them: for this program, for many images, or for an engine
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub format: FeatureSink,

    /// Where and how to run.
    #[command(flatten)]
    pub running: RunningArgs,

    /// Print one JSON object: the images, timings in seconds, peak memory in bytes, warnings
    #[arg(long)]
    pub json: bool,
}

/// Where and how the tower is run.
#[derive(Debug, clap::Args)]
pub struct RunningArgs {
    /// Where to run: auto, cpu, cuda, cuda:N, several GPUs as in cuda:0,1, or cuda:all
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Auto)]
    pub device: Device,

    /// Threads to use on the CPU [default: one per core]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Running")]
    pub threads: Option<usize>,

    /// Clamp weights beyond fp16's 65504 and count them, instead of refusing the checkpoint
    #[arg(long, help_heading = "Running")]
    pub saturate: bool,

    /// Look for features in this directory before the tower is run, and keep new ones there; made if it does not exist.
    /// They are found by checkpoint, device and pixels, whatever a file is called
    #[arg(long, value_name = "DIR", help_heading = "Features")]
    pub feature_cache: Option<PathBuf>,

    /// The most that it holds; what was not used for longest goes first [default: 10GiB]
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "feature_cache", help_heading = "Features")]
    pub feature_cache_size: Option<u64>,
}

/// `imagehere plan`
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// The prompt and its layout.
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// The images.
    #[command(flatten)]
    pub images: ImageArgs,

    /// Print one JSON object: length, input_ids with -1 in image rows, slots, segments, warnings
    #[arg(long)]
    pub json: bool,
}

/// What a sequence is made from, images aside.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Prompt")]
pub struct PromptArgs {
    /// The checkpoint directory, as the Hub holds it
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,

    /// The query, with one <ImageHere> marker per image, or <image> where the model is a LLaVA
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    #[arg(required_unless_present = "prompt_file", conflicts_with = "prompt_file")]
    pub prompt: Option<String>,

    /// Read the query from a file, byte for byte; - is stdin
    #[arg(long, value_name = "F")]
    pub prompt_file: Option<PathBuf>,

    /// Replace the system text [default: upstream's]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "no_meta")]
    pub meta_instruction: Option<String>,

    /// Leave the system text out
    #[arg(long)]
    pub no_meta: bool,

    /// Earlier turns, as JSON: [[query, answer], ...]; markers in them count
    #[arg(long, value_name = "F.json")]
    pub history: Option<PathBuf>,

    /// Take the prompt as it is, without chat template; control tokens in it are live
    #[arg(long, conflicts_with_all = ["meta_instruction", "history"])]
    pub raw: bool,

    /// Let control tokens typed in query and history be control tokens, not plain text
    #[arg(long)]
    pub allow_control_tokens: bool,

    /// Which text segments begin with BOS: per-segment (upstream's chat) or first (its training)
    /// [default: per-segment]
    #[arg(long, value_name = "WHERE", value_parser = bos)]
    pub bos: Option<Bos>,

    /// The longest sequence to accept, in positions [default: the model's max_position_embeddings]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub max_length: Option<usize>,

    /// Cut the sequence at the model's max_length, as upstream does silently, and say what is lost
    #[arg(long)]
    pub truncate: bool,
}

/// The images of a call and how they become pixels.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Images")]
pub struct ImageArgs {
    /// The images in the order of their markers: JPEG, PNG, WebP, GIF, BMP or TIFF; - is stdin
    #[arg(long = "image", value_name = "F", num_args = 1.., action = ArgAction::Append)]
    pub image: Vec<PathBuf>,

    /// Turn images as their EXIF orientation says (apply) or not (ignore) [default: apply]
    #[arg(long, value_name = "RULE", value_parser = exif)]
    pub exif: Option<Exif>,

    /// Drop alpha as upstream does (drop), or compose over a colour (white, black) [default: drop]
    #[arg(long, value_name = "RULE", value_parser = alpha)]
    pub alpha: Option<Alpha>,

    /// Which Pillow the resize equals: every one up to 12 (pillow), or 13 (pillow13) [default: pillow]
    #[arg(long, value_name = "RULE", value_parser = resample)]
    pub resample: Option<Resample>,

    /// Do all as upstream's chat does: EXIF ignored, alpha dropped, BOS per segment, control tokens live,
    /// cut at the model's max_length
    #[arg(long, value_name = "WHOM")]
    pub compat: Option<Compat>,
}

/// Whose behaviour to match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compat {
    /// The published model's own code.
    Upstream,
}

/// `imagehere preprocess`
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("side").required(true))]
pub struct PreprocessArgs {
    /// The images.
    #[command(flatten)]
    pub images: ImageArgs,

    /// Resize to the image size of this checkpoint
    #[arg(long, value_name = "DIR", group = "side")]
    pub model: Option<PathBuf>,

    /// Resize to N×N pixels
    #[arg(long, value_name = "N", group = "side", value_parser = clap::value_parser!(u32).range(1..=16384))]
    pub size: Option<u32>,

    /// The directory to write to; made if it does not exist
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Print one JSON object: the images, their files, warnings
    #[arg(long)]
    pub json: bool,
}

/// `imagehere inspect`
#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// The checkpoint directory, as the Hub holds it
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// Read all tensors, the language model's too, not only those that encoding needs
    #[arg(long)]
    pub all: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `imagehere convert`
#[derive(Debug, clap::Args)]
pub struct ConvertArgs {
    /// The checkpoint directory, as the Hub holds it
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// The directory to write to, which is empty or does not exist yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Whose names the tensors get: upstream, as every command reads them, or clip-vision, for transformers
    #[arg(long, value_name = "LAYOUT", default_value = "upstream", value_parser = layout)]
    pub layout: Layout,

    /// Clamp weights beyond fp16's 65504 and count them, instead of refusing the checkpoint
    #[arg(long)]
    pub saturate: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `imagehere bench`
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// The checkpoint directory, as the Hub holds it
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,

    /// The images of each run, all in one sequence; - is stdin [default: one that is drawn]
    #[arg(long = "image", value_name = "F", num_args = 1.., action = ArgAction::Append)]
    pub image: Vec<PathBuf>,

    /// Where to run: auto, cpu, cuda, cuda:N, several GPUs as in cuda:0,1, or cuda:all
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Auto)]
    pub device: Device,

    /// Threads to use on the CPU [default: one per core]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,

    /// Runs to measure, after one that is not
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = positive)]
    pub repeat: usize,

    /// Clamp weights beyond fp16's 65504 and count them, instead of refusing the checkpoint
    #[arg(long)]
    pub saturate: bool,

    /// Print one JSON object: each step with the seconds of every run, operations, shares of the peak
    #[arg(long)]
    pub json: bool,
}

/// `imagehere synth`
#[derive(Debug, clap::Args)]
pub struct SynthArgs {
    /// tiny: encodes in milliseconds; vl-7b-vision: the real tower, projector and vocabulary, 1.4 GB; llava-tiny: tiny as
    /// a LLaVA-1.5
    #[arg(value_name = "PRESET", value_parser = preset)]
    pub preset: Preset,

    /// The directory to write to; made if it does not exist
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Where the noise starts: the same seed makes the same values
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// How the weights are stored: bin, as upstream's are, or safetensors
    #[arg(long, value_name = "FORMAT", default_value = "bin", value_parser = format)]
    pub format: Format,

    /// The dtype of the weights: bf16, as upstream's are, f16 or f32
    #[arg(long, value_name = "DTYPE", default_value = "bf16", value_parser = dtype)]
    pub dtype: DType,

    /// A tokenizer.model to copy [default: a small one of its own making]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `imagehere demo`
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Where model, pictures and output go; made if it does not exist
    #[arg(long, value_name = "DIR", default_value = "imagehere-demo")]
    pub out: PathBuf,

    /// Where to run: auto, cpu, cuda, cuda:N, several GPUs as in cuda:0,1, or cuda:all
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Auto)]
    pub device: Device,
}

/// `imagehere completions`
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell: bash, elvish, fish, powershell or zsh
    #[arg(value_name = "SHELL", hide_possible_values = true)]
    pub shell: clap_complete::Shell,
}

/// `imagehere man`
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// The command [default: an overview of all]
    #[arg(value_name = "COMMAND")]
    pub command: Option<String>,
}

/// Parses a number of at least 1.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".to_owned()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}; give a whole number")),
    }
}

/// Parses a size in bytes: `10GiB`, `500MB`, `4096`.
fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
        ("TIB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let upper = text.to_ascii_uppercase();
    let unit = UNITS.iter().find_map(|(name, bytes)| Some((upper.strip_suffix(name)?, *bytes)));
    let (number, bytes) = unit.unwrap_or((&upper, 1));
    match number.trim_end().parse::<u64>().ok().and_then(|number| number.checked_mul(bytes)) {
        Some(0) => Err("it must be at least 1 byte".to_owned()),
        Some(bytes) => Ok(bytes),
        None => Err("give a whole number and a unit, as in 10GiB or 500MB".to_owned()),
    }
}

/// Picks the value of a name, or says which names there are.
fn pick<T: Clone>(text: &str, choices: &[(&str, T)]) -> Result<T, String> {
    let found = choices.iter().find(|(name, _)| *name == text);
    found.map(|(_, value)| value.clone()).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        format!("use one of: {}", names.join(", "))
    })
}

fn bos(text: &str) -> Result<Bos, String> {
    pick(text, &[("per-segment", Bos::PerSegment), ("first", Bos::First)])
}

fn exif(text: &str) -> Result<Exif, String> {
    pick(text, &[("apply", Exif::Apply), ("ignore", Exif::Ignore)])
}

fn alpha(text: &str) -> Result<Alpha, String> {
    pick(text, &[("drop", Alpha::Drop), ("white", Alpha::WHITE), ("black", Alpha::BLACK)])
}

fn resample(text: &str) -> Result<Resample, String> {
    pick(text, &[("pillow", Resample::Pillow), ("pillow13", Resample::Pillow13)])
}

fn preset(text: &str) -> Result<Preset, String> {
    pick(
        text,
        &[("tiny", Preset::Tiny), ("vl-7b-vision", Preset::Vl7bVision), ("llava-tiny", Preset::LlavaTiny)],
    )
}

fn format(text: &str) -> Result<Format, String> {
    pick(text, &[("bin", Format::Bin), ("safetensors", Format::Safetensors)])
}

fn map(text: &str) -> Result<Map, String> {
    pick(text, &[("pca", Map::Components), ("norm", Map::Norm)])
}

fn layout(text: &str) -> Result<Layout, String> {
    pick(text, &[("upstream", Layout::Upstream), ("clip-vision", Layout::ClipVision)])
}

fn dtype(text: &str) -> Result<DType, String> {
    pick(text, &[("bf16", DType::Bf16), ("f16", DType::F16), ("f32", DType::F32)])
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in
            [("1", 1), ("7B", 7), ("10GiB", 10 << 30), ("500MB", 500_000_000), ("2 kib", 2048)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "0GiB", "-1", "1.5GiB", "10G", "GiB", "99999999999TiB", "18446744073709551616"]
        {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
