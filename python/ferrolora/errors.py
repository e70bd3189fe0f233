"""The exceptions ferrolora raises. A message says what was expected, what came, and where.

The native module raises these same classes; each also derives from the built-in a caller would expect to catch.
"""


class FerroloraError(Exception):
    """Base of every error that ferrolora raises on purpose."""


class ShapeError(FerroloraError, ValueError):
    """A tensor has the wrong number of elements or dimensions for the operation."""


class QuantizationError(FerroloraError, ValueError):
    """A tensor cannot be quantized: it holds NaN or infinity."""


class UnsupportedError(FerroloraError, NotImplementedError):
    """No kernel or method exists for this combination of type, device and option."""


class FormatError(FerroloraError, ValueError):
    """A file or state dict disagrees with the format it claims."""


class CudaError(FerroloraError, RuntimeError):
    """The GPU driver reported a failure."""


class TargetError(FerroloraError, ValueError):
    """An adapter's target matched no module, or a module it cannot adapt."""
