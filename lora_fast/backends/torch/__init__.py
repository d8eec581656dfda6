"""The portable backend: PyTorch's own operators, on any device and in any dtype."""

from lora_fast.backends.registry import Backend

BACKEND = Backend(__name__)
