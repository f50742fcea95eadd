"""What a user installs: sdist and wheel, and the wheel at work where there is no repository."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_prefix import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("verl_prefix", "data_prep")
DIST_INFO = f"verl_prefix-{__version__}.dist-info"


def run(*command: str | Path, cwd: Path, **more) -> subprocess.CompletedProcess:
    """Outside of the repository: without its PYTHONPATH and with `cwd` elsewhere."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, **more)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def tracked(*folders: str) -> list[str]:
    """Files of the repository, those not yet committed included; nothing that git ignores."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders)
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


def build(kind: str, source: Path, out: Path) -> Path:
    """The backend's own hook in this environment, so that a build downloads nothing."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-c", code, out, cwd=source)
    (made,) = out.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return build("sdist", source, source / "dist")


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """Built from the repository's files, in the folder that the sdist was built in."""
    return build("wheel", sdist.parents[1], sdist.parents[1] / "dist_wheel")


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel):
    shipped = {name: data for name, data in contents(wheel).items() if not name.startswith(DIST_INFO)}
    files = {name: (ROOT / name).read_bytes() for name in tracked(*PACKAGES)}
    assert {Path(name).suffix for name in files} >= {".py", ".yaml", ".js", ".css"}
    assert sorted(shipped) == sorted(files)
    assert shipped == files


def test_the_sdist_alone_gives_the_same_wheel(sdist, wheel, tmp_path):
    shutil.unpack_archive(sdist, tmp_path)  # tarfile's `filter` came with Python 3.11.4
    (source,) = tmp_path.iterdir()
    assert contents(build("wheel", source, tmp_path / "wheel")) == contents(wheel)


def test_the_metadata_say_what_setup_says(wheel):
    files = contents(wheel)
    metadata = message_from_bytes(files[f"{DIST_INFO}/METADATA"])
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License"] == "Apache-2.0"
    assert "verl==0.9.1" in metadata.get_all("Requires-Dist")
    entry_points = ConfigParser()
    entry_points.read_string(files[f"{DIST_INFO}/entry_points.txt"].decode())
    assert dict(entry_points["verl.plugins"]) == {"verl_prefix": "verl_prefix.plugin"}
    assert dict(entry_points["console_scripts"]) == {"verl-prefix": "verl_prefix.cli:app"}
    assert any(name.endswith("LICENSE") for name in files)


def test_the_changelog_begins_with_this_version():
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading.group(1) == __version__


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks", "docs", "recipes", "tests"])
def test_the_syntax_is_that_of_the_oldest_python(folder):
    for name in tracked(folder):
        if name.endswith(".py"):
            ast.parse((ROOT / name).read_text(), name, feature_version=(3, 10))


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment with this one's packages, but with the wheel in place of the repository.

    A path file adds this environment's packages. Path files in there, an editable install's among them, are not read
    again, so the repository is not importable; the wheel goes in first, before pip could see the installed package.
    """
    folder = tmp_path_factory.mktemp("elsewhere") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    install = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    run(sys.executable, *install, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "packages_of_the_tests.pth").write_text("\n".join(sorted(paths)) + "\n")
    return folder / "bin"


@pytest.mark.slow
def test_verl_finds_the_wheels_plugin_and_not_the_repositorys(elsewhere, tmp_path):
    code = (
        "import sys, json, verl, verl_prefix, data_prep, importlib.metadata as m; from verl_prefix import plugin\n"
        "files = [sys.modules[n].__file__ for n in ('verl_prefix', 'data_prep', 'verl_prefix.plugin')]\n"
        "print(json.dumps([files, plugin._active, str(m.distribution('verl_prefix')._path), sys.path]))"
    )
    out = run(elsewhere / "python", "-c", code, cwd=tmp_path).stdout
    files, active, distribution, path = json.loads(out.splitlines()[-1])
    for file in (*files, distribution):
        assert Path(file).is_relative_to(elsewhere.parent), file
    assert active
    assert str(ROOT) not in path

    command = (elsewhere / "python", "-m", "verl.trainer.main_ppo", "+prefix=prefix_rft", "--cfg", "job")
    config = OmegaConf.create(run(*command, cwd=tmp_path).stdout)
    assert config.prefix.preset == "prefix_rft"
    assert config.trainer.v1.trainer_mode == "prefix_sync"


@pytest.mark.slow
def test_the_wheels_commands_work_and_doctor_is_green(elsewhere, tmp_path):
    assert (elsewhere / "verl-prefix").read_text().splitlines()[0].endswith(str(elsewhere / "python"))
    found = json.loads(run(elsewhere / "verl-prefix", "doctor", "--json", cwd=tmp_path).stdout)
    levels = {finding["check"]: finding["level"] for finding in found}
    assert "error" not in levels.values()
    assert [levels[check] for check in ("verl_prefix", "entry point", "plugin", "Hydra group")] == ["ok"] * 4
    assert "prefix_rft" in run(elsewhere / "verl-prefix", "preview", "--help", cwd=tmp_path).stdout
