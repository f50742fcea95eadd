"""Samples from a vLLM server's completions endpoint, graded and stored as they come."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from verl_prefix.evaluation.grading import correct
from verl_prefix.evaluation.problems import Problem
from verl_prefix.evaluation.server import Server
from verl_prefix.evaluation.store import Store
from verl_prefix.exceptions import EvaluationError

Grade = Callable[[Problem, str], dict[str, Any]]
#: the openai client's own back-off: 0.5 s doubling to 8 s, on lost connections, timeouts, 408, 409, 429 and 5xx
RETRIES = 6


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; sent with every request, so that a server's own defaults have no say."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int

    def request(self, problem: Problem, sample: int) -> dict[str, Any]:
        plain = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return {
            "prompt": problem.prompt_ids,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": sample_seed(self.seed, problem.key, sample),
            "extra_body": plain,
        }


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """A seed per sample, independent of order and of how often the evaluation was resumed; below 2^31."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {problem} {sample}".encode(), digest_size=4).digest(), "big") >> 1


def run(
    server: Server,
    todo: Iterable[tuple[Problem, int]],
    store: Store,
    grade: Grade,
    sampling: Sampling,
    *,
    concurrency: int,
    timeout: float,
    done: Callable[[dict[str, Any]], None] = lambda record: None,
) -> None:
    """Draw, grade and store the samples of `todo`, `concurrency` at a time; `done` sees every record.

    A request that fails for good, or a grader that raises, leaves a record with `error` instead of a grade.

    Raises:
        EvaluationError: the server is gone or refuses everybody (the rest would fail too), or a grade is not 0 or 1.
    """
    asyncio.run(_run(server, iter(todo), store, grade, sampling, concurrency, timeout, done))


async def _run(server, todo, store, grade, sampling, concurrency, timeout, done) -> None:
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise EvaluationError("the package openai is missing (vLLM brings it along): pip install openai") from error

    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=server.key, timeout=timeout, max_retries=RETRIES
    ) as client:

        async def work() -> None:
            for problem, sample in todo:  # one iterator for all workers
                record = await _sample(client, server, problem, sample, grade, sampling)
                store.add(record)
                done(record)

        workers = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _sample(client, server: Server, problem: Problem, sample: int, grade: Grade, sampling: Sampling) -> dict:
    import openai

    request = sampling.request(problem, sample)
    record = {
        "problem": problem.key,
        "sample": sample,
        "data_source": problem.data_source,
        "ability": problem.ability,
        "seed": request["seed"],
    }
    try:
        completion = await client.completions.create(model=server.name, **request)
    except openai.APITimeoutError:
        return {**record, "error": f"no response within {client.timeout:g} s, {RETRIES + 1} times"}
    except (
        openai.APIConnectionError,
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    ) as error:
        raise EvaluationError(
            f"{server.url}: {_reason(error)}. Finished samples are kept; mend the server and repeat the command."
        ) from error
    except openai.APIError as error:
        return {**record, "error": _reason(error)}
    choice = completion.choices[0] if completion.choices else None
    if choice is None or choice.finish_reason not in ("stop", "length"):
        return {**record, "error": f"the server ended the response: {getattr(choice, 'finish_reason', 'no choice')}"}
    record |= {
        "ground_truth": problem.ground_truth,
        "response": choice.text,
        "finish_reason": choice.finish_reason,
        "response_tokens": completion.usage.completion_tokens if completion.usage else None,
    }
    try:
        result = await asyncio.to_thread(grade, problem, choice.text)
    except Exception as error:
        return {**record, "error": f"the grader raised {_reason(error)}"}
    return {**record, "grade": result, "correct": correct(result, f"grade of {problem.key}")}


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
