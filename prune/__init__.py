"""Training-free visual-token pruning for unmodified vision-language models.

>>> from prune import apply_pruner
>>> handle = apply_pruner(model, "dart", ratio=0.9)  # 90 % of the visual tokens are gone after the last stage
>>> model.generate(**inputs)
>>> handle.remove()
"""

from prune._version import __version__
from prune.apply import Handle, apply_pruner, get_handle
from prune.budget import Budget, Geometry
from prune.compose import Compose
from prune.config import PrunerConfig
from prune.errors import (
    AlreadyAttachedError,
    BudgetError,
    CacheMismatchError,
    ConfigError,
    InputError,
    PruneError,
    UnknownMethodError,
    UnsupportedMethodError,
    UnsupportedModelError,
)
from prune.method import Method, Reducer, Scorer, Site, Stage
from prune.registry import MethodInfo, get_method, list_methods, method_info, register
from prune.report import BlockReport, ImageReport, Report
from prune.tokens import AttentionInputs, BlockAttention, Merge, Reduction, Tower, VisualTokens

__all__ = [
    "AlreadyAttachedError",
    "AttentionInputs",
    "BlockAttention",
    "BlockReport",
    "Budget",
    "BudgetError",
    "CacheMismatchError",
    "Compose",
    "ConfigError",
    "Geometry",
    "Handle",
    "ImageReport",
    "InputError",
    "Merge",
    "Method",
    "MethodInfo",
    "PruneError",
    "PrunerConfig",
    "Reducer",
    "Reduction",
    "Report",
    "Scorer",
    "Site",
    "Stage",
    "Tower",
    "UnknownMethodError",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VisualTokens",
    "__version__",
    "apply_pruner",
    "get_handle",
    "get_method",
    "list_methods",
    "method_info",
    "register",
]
