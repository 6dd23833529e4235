"""The one exception family for files and conversion; bad arguments stay ``ValueError`` and ``TypeError``."""


class SlimtrainError(Exception):
    """Base of all errors about a file or a conversion."""


class ParameterFileError(SlimtrainError):
    """A compression parameter file cannot be read or would not be valid."""


class ConversionError(SlimtrainError):
    """The converter or the runtime did not do what was asked."""


class CoverageError(ConversionError):
    """A converted file compresses less than its parameters ask for."""
