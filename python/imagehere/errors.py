"""What can go wrong. Each text names the file, tensor or image, both sides of a disagreement, and what to do next.

Classes also derive from the built-in exception that fits, so that ``except ValueError`` and ``except OSError`` work.
"""


class Error(Exception):
    """The base of all."""


class ArgumentError(Error, ValueError):
    """An argument or a request that cannot be carried out."""


class ReadError(Error, OSError):
    """An input file that cannot be read."""


class MarkerCountError(Error, ValueError):
    """The number of markers in the prompt is not the number of images. Says where each marker is."""


class SequenceTooLongError(Error, ValueError):
    """The sequence would be longer than its limit. Nothing is cut unless asked for."""


class ImageError(Error, ValueError):
    """An image that cannot be used. Nothing was written."""


class FeaturesError(Error, ValueError):
    """A file of features that cannot be used."""


class CheckpointError(Error, ValueError):
    """A checkpoint directory, or one of its files, that cannot be used."""


class DTypeError(Error, TypeError):
    """A tensor of the checkpoint whose dtype is not bf16, f16 or f32."""


class ValueOutOfRangeError(Error, OverflowError):
    """A weight that fp16 cannot hold; ``saturate=True`` takes the nearest it can."""


class DeviceError(Error, RuntimeError):
    """A device that is absent or unusable."""


class WriteError(Error, OSError):
    """An output that cannot be written. Nothing was left behind."""


class IncompleteError(Error, RuntimeError):
    """A sequence that failed its completeness check: a row not written, a value that is NaN or infinite."""


class InternalError(Error, RuntimeError):
    """A broken promise inside the library. Please report it."""
