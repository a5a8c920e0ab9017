//! Where to run: a choice that is parsed, displayed and copied.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Where to run.
///
/// Parsed from and displayed as `auto`, `cpu`, `cuda:1`, `cuda:0,1` or `cuda:all`; `cuda` is `cuda:0`.
///
/// Several GPUs share the images of a call. The first has the sequence: text rows, what
/// [`Encoder::device_sequence`](crate::Encoder::device_sequence) makes and
/// [`Encoder::wrap_device`](crate::Encoder::wrap_device) takes lie there, and the others write their images'
/// rows into it. The bits are those of one GPU.
///
/// # Examples
/// ```
/// use imagehere::backend::Device;
///
/// let device: Device = "cuda:1,0".parse()?;
/// assert!(matches!(device, Device::CudaSeveral(gpus) if gpus.iter().eq([1, 0])));
/// assert_eq!(device.to_string(), "cuda:1,0");
/// # Ok::<(), imagehere::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The first GPU if there is a usable one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU with this ordinal.
    Cuda(usize),
    /// The NVIDIA GPUs with these ordinals.
    CudaSeveral(Ordinals),
    /// Every NVIDIA GPU that can be used, in the order of their ordinals.
    CudaAll,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::CudaSeveral(ordinals) => write!(f, "cuda:{ordinals}"),
            Self::CudaAll => f.write_str("cuda:all"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || {
            Error::argument(
                format!("`{text}` is no device"),
                "Use auto, cpu, cuda, cuda:N as in cuda:1, several as in cuda:0,1, or cuda:all",
            )
        };
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => return Ok(Self::Cuda(0)),
            "cuda:all" => return Ok(Self::CudaAll),
            _ => {}
        }
        let list = text.strip_prefix("cuda:").ok_or_else(unknown)?;
        let ordinals: Vec<usize> =
            list.split(',').map(|n| n.parse().map_err(|_| unknown())).collect::<Result<_>>()?;
        match ordinals[..] {
            [ordinal] => Ok(Self::Cuda(ordinal)),
            _ => Ordinals::new(ordinals).map(Self::CudaSeveral),
        }
    }
}

/// Ordinals of GPUs, each once, in the order given: the first has the sequence.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ordinals {
    ordinals: [u16; Self::MOST],
    len: usize, // the rest is 0
}

impl Ordinals {
    /// The most GPUs of one encoder.
    pub const MOST: usize = 16;

    /// Takes ordinals in the order of their use.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none, more than [`Ordinals::MOST`], one twice, or one that no driver
    /// counts to.
    pub fn new(ordinals: impl IntoIterator<Item = usize>) -> Result<Self> {
        const REMEDY: &str = "Name each device once, as in cuda:0,1, or take cuda:all";
        let refuse = |problem: String| Err(Error::argument(problem, REMEDY));
        let mut set = Self { ordinals: [0; Self::MOST], len: 0 };
        for ordinal in ordinals {
            let Ok(small) = u16::try_from(ordinal) else {
                return refuse(format!("there is no device cuda:{ordinal}"));
            };
            if set.iter().any(|other| other == ordinal) {
                return refuse(format!("device cuda:{ordinal} is named twice"));
            }
            let Some(place) = set.ordinals.get_mut(set.len) else {
                return refuse(format!("more than {} devices are named", Self::MOST));
            };
            *place = small;
            set.len += 1;
        }
        if set.len == 0 {
            return refuse("no device is named".into());
        }
        Ok(set)
    }

    /// Lists them.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.ordinals[..self.len].iter().map(|&ordinal| ordinal.into())
    }
}

impl fmt::Display for Ordinals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, ordinal) in self.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{ordinal}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Ordinals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_displayed_is_parsed() {
        for text in ["auto", "cpu", "cuda:0", "cuda:7", "cuda:70000", "cuda:0,1", "cuda:3,1,2", "cuda:all"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse::<Device>().unwrap(), Device::Cuda(0));
        let several: Device = "cuda:2,0".parse().unwrap();
        assert_eq!(several, Device::CudaSeveral(Ordinals::new([2, 0]).unwrap()));
        assert_ne!(
            several,
            Device::CudaSeveral(Ordinals::new([0, 2]).unwrap()),
            "the first has the sequence"
        );
        assert_eq!(format!("{several:?}"), "CudaSeveral([2, 0])");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let all: Vec<String> = (0..17).map(|i| i.to_string()).collect();
        for (text, problem) in [
            ("", "`` is no device"),
            ("gpu", "`gpu` is no device"),
            ("cuda:", "`cuda:` is no device"),
            ("cuda:0,", "`cuda:0,` is no device"),
            ("cuda:0,-1", "`cuda:0,-1` is no device"),
            ("cuda:0,all", "`cuda:0,all` is no device"),
            ("cuda:1,0,1", "device cuda:1 is named twice"),
            ("cuda:0,70000", "there is no device cuda:70000"),
            (&format!("cuda:{}", all.join(",")), "more than 16 devices are named"),
        ] {
            let error = text.parse::<Device>().unwrap_err();
            assert_eq!(error.category(), crate::Category::Input);
            let said = error.to_string();
            assert!(said.contains(problem) && said.contains("cuda:0,1"), "{said}");
        }
        assert!(Ordinals::new([]).unwrap_err().to_string().contains("no device is named"));
    }
}
