"""bench/ is not part of the installed package: make it importable from the source tree, here and in `module:callable`."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
