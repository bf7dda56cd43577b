"""paramkit writes parameters into live PyTorch models: in bulk, in place, all or nothing."""

from __future__ import annotations

from . import backend, recipes
from .backend import status
from .dropin import TorchPatch, patch_torch
from .errors import Finding, PlanError, RuleFileError, SourceError, UnknownNameError
from .fingerprint import fingerprint
from .loading import load_state_dict
from .ops import copy_, fill_, foreach_copy_, foreach_fill_
from .plan import Plan
from .planning import plan
from .report import Report
from .rulefile import load_rules, save_rules
from .rules import Rule, invert
from .sources import open_source
from .torn import Torn, TornError, torn
from .transplant import transplant
from .writes import writes

__version__ = "0.1.0"

# NOTE: `plan`, `transplant` and `writes` are functions here and also the names of the files that
# hold them. Importing a file binds its name in the package, once; the imports above do that and bind
# the functions afterwards, so they are not made lazy. Nothing that they import is slow.
__all__ = [
    "Finding",
    "Plan",
    "PlanError",
    "Report",
    "Rule",
    "RuleFileError",
    "SourceError",
    "TorchPatch",
    "Torn",
    "TornError",
    "UnknownNameError",
    "backend",
    "copy_",
    "fill_",
    "fingerprint",
    "foreach_copy_",
    "foreach_fill_",
    "invert",
    "load_rules",
    "load_state_dict",
    "open_source",
    "patch_torch",
    "plan",
    "recipes",
    "save_rules",
    "status",
    "torn",
    "transplant",
    "writes",
]
