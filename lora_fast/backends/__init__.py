"""Which backend runs a call: their list, the default, and the plans that ``lora-fast info`` prints."""

from lora_fast.backends import operators
from lora_fast.backends.default import (
    ForwardDefault,
    default_backend,
    default_backend_source,
    resolved,
    set_backend,
    use_backend,
)
from lora_fast.backends.registry import NAMES, BackendName, check_name, get, is_present, kept_by, plan_of

__all__ = [
    "NAMES",
    "BackendName",
    "ForwardDefault",
    "check_name",
    "default_backend",
    "default_backend_source",
    "get",
    "is_present",
    "kept_by",
    "operators",
    "plan_of",
    "resolved",
    "set_backend",
    "use_backend",
]
