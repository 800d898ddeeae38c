"""Prints how large wheels are and what takes the room, and exits with 1 where one is larger than it may be.

python .ci/wheel_size.py FOLDER
"""

import sys
import zipfile
from pathlib import Path

PLUGIN = "libqexport_ops_cuda.so"
# Bytes in the wheel, compressed: the CUDA plugin, and everything else together.
LIMITS = {PLUGIN: 12 << 20, "the rest": 3 << 20}
SHOWN = 5


def too_large(wheel: Path) -> list[str]:
    """Prints one wheel; what of it is above its limit."""
    sizes = {entry.filename: entry.compress_size for entry in zipfile.ZipFile(wheel).infolist()}
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    for name in sorted(sizes, key=sizes.get, reverse=True)[:SHOWN]:
        print(f"  {sizes[name] / 1e6:6.2f} MB  {name}")
    plugin = sum(size for name, size in sizes.items() if name.endswith(PLUGIN))
    found = {PLUGIN: plugin, "the rest": sum(sizes.values()) - plugin}
    return [
        f"{wheel.name}: {part} takes {found[part] / 1e6:.2f} MB, at most {limit / 1e6:.2f} MB are allowed"
        for part, limit in LIMITS.items()
        if found[part] > limit
    ]


if __name__ == "__main__":
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    found = [line for wheel in wheels for line in too_large(wheel)] if wheels else [f"{sys.argv[1]}: no wheel"]
    sys.exit("\n".join(found) or 0)
