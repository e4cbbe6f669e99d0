"""The errors users see. Each names the cause and the one-line fix, and is raised with the model untouched."""


class PruneError(Exception):
    """Base class of every error this library raises on purpose."""


class UnknownMethodError(PruneError, LookupError):
    """No registered method has this name; the message lists the names and the closest ones."""


class BudgetError(PruneError, ValueError):
    """The budget is missing, given twice, out of range, or out of reach for the method."""


class ConfigError(PruneError, ValueError):
    """An option, a registration or a saved configuration is wrong."""


class UnsupportedModelError(PruneError, TypeError):
    """The object is no model we can attach to; the message lists what was looked for and the supported families."""


class UnsupportedMethodError(PruneError, ValueError):
    """The model lacks a signal the method needs; the message lists methods that would work."""


class InputError(PruneError, ValueError):
    """The inputs of one forward call do not fit the method (no question after the image, an image without tokens)."""


class AlreadyAttachedError(PruneError, RuntimeError):
    """The model already carries a pruner."""


class CacheMismatchError(PruneError, RuntimeError):
    """The KV cache was filled by another pruner, for another batch size, or by an interrupted forward."""
