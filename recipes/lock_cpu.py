"""The lock of the CPU stack: the exact version of everything that `verl_prefix[cpu,dev]` needs, directly or not.

    python recipes/lock_cpu.py            # writes recipes/lock_cpu.txt from the environment that runs it
    python recipes/lock_cpu.py --check    # lists where lock and environment differ; exit code 1 if they do

`recipes/setup_cpu.sh` installs under it. After a change of requirements: setup_cpu.sh, this, setup_cpu.sh
again. Needs nothing but the standard library and `packaging`.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

FILE = Path(__file__).with_name("lock_cpu.txt")
PACKAGE, EXTRAS = "verl_prefix", frozenset({"cpu", "dev"})
#: not pinned here: torch's build depends on where it came from (setup_cpu.sh pins its version and wants the CPU build);
#: its companions are removed again where they do not fit it
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})

HEAD = """\
# The CPU stack of the tests: exact versions, for Python {python} on {system}. Written by recipes/lock_cpu.py.
# torch is pinned by recipes/setup_cpu.sh. No hashes: its CPU build is another file on every index, and so are packages
# that pip builds on the spot; versions are what a lock can promise here.
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(package: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Normalised names of what is needed, as far as it is installed; markers and extras are followed."""
    seen: dict[str, set[str]] = {}
    todo = [(normal(package), extras)]
    while todo:
        name, wanted = todo.pop()
        if name in seen and wanted <= seen[name]:
            continue
        seen.setdefault(name, set()).update(wanted)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            del seen[name]
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *seen[name])):
                todo.append((normal(requirement.name), frozenset(requirement.extras)))
    return seen.keys() - {normal(package)}


def installed() -> dict[str, str]:
    """Name -> version of what the lock pins, as it is in this environment."""
    names = sorted(needed(PACKAGE, EXTRAS) - LEFT_OUT)
    return {name: importlib.metadata.version(name) for name in names}


def locked(file: Path = FILE) -> dict[str, str]:
    """Name -> version as the lock has it."""
    lines = (line for line in file.read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def differences(lock: dict[str, str], found: dict[str, str]) -> list[str]:
    """One line for each package whose version is not the lock's, or that only one side has."""
    names = sorted(lock.keys() | found.keys())
    return [
        f"{name}: locked {lock.get(name, 'nothing')}, installed {found.get(name, 'nothing')}"
        for name in names
        if lock.get(name) != found.get(name)
    ]


def main() -> None:
    found = installed()
    if "--check" in sys.argv:
        lines = differences(locked(), found)
        print("\n".join(lines) or f"{len(found)} packages as locked")
        sys.exit(bool(lines))
    python, system = ".".join(platform.python_version_tuple()[:2]), f"{platform.system()} {platform.machine()}"
    FILE.write_text(HEAD.format(python=python, system=system) + "".join(f"{n}=={v}\n" for n, v in found.items()))
    print(f"{FILE.name}: {len(found)} packages")


if __name__ == "__main__":
    main()
