"""The errors `align` raises for input it cannot use.

Each also inherits the standard error a caller would expect, so `except ValueError` keeps working. A message names the
row (or file), the value and the remedy.
"""


class AlignError(Exception):
    """Base class: everything that is wrong with the caller's input or settings, never a bug of ours."""


class RecordError(AlignError, ValueError):
    """A row of a record file or dataset cannot be used as it is."""


class MissingColumnError(AlignError, KeyError):
    """A column that a stage or trainer reads is not there."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes, newlines escaped


class ConfigError(AlignError, ValueError):
    """Settings that contradict each other or lie outside their range."""


class ModelMismatchError(AlignError, ValueError):
    """A model, adapter or tokenizer that does not belong to the others."""


class RecordFileError(AlignError, OSError):
    """A file that cannot be read or written."""


class ModelLoadError(AlignError, OSError):
    """No model or tokenizer can be loaded from a path."""


class NonFiniteError(AlignError, ArithmeticError):
    """A loss or gradient of a training is infinite or no number."""


class DeviceMemoryError(AlignError, MemoryError):
    """A batch that a training will meet does not fit into memory."""


class EngineError(AlignError, RuntimeError):
    """An engine or server that draws completions cannot be used, or gives what is no completion of its prompt."""


class ElsewhereError(AlignError):
    """Another process of this launch stopped, and says itself why."""
