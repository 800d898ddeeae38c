"""Makes `bench` importable for the tests that use it; last on the path, so that the installed qexport is what is tested."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
