"""``python -m lora_fast``: the same as the command ``lora-fast``."""

import sys

from lora_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
