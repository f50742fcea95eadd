"""`verl-prefix eval` with a real small chat model, its template and text: `make chat-model`, which fetches it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.chat_model]

EXAMPLE = ("What is 2 + 3?", r"2 + 3 = 5. The answer is \boxed{5}.")
QUESTIONS = (
    ("Tom has 3 apples and buys 4 more. How many apples does he have?", "7"),
    ("A box holds 6 pens. How many pens are in 2 boxes?", "12"),
    ("Ann had 10 dollars and spent 4. How many dollars are left?", "6"),
    ("What is 5 + 8?", "13"),
    ("Sam reads 5 pages a day. How many pages does he read in 3 days?", "15"),
    ("There are 9 birds on a tree. 2 fly away. How many birds are left?", "7"),
    ("What is 10 + 20?", "30"),
    ("What is 6 + 1?", "7"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, out = Path(os.environ["SMOLLM2_GGUF"]).resolve(), tmp_path_factory.mktemp("smollm2")
    AutoModelForCausalLM.from_pretrained(where.parent, gguf_file=where.name).save_pretrained(out)
    AutoTokenizer.from_pretrained(where.parent, gguf_file=where.name).save_pretrained(out)
    return out


def test_a_chat_model_answers_through_its_own_template(model, tmp_path):
    turns = [{"role": "user", "content": EXAMPLE[0]}, {"role": "assistant", "content": EXAMPLE[1]}]
    rows = [
        {
            "data_source": "words",
            "prompt": [*turns, {"role": "user", "content": question}],
            "reward_model": {"style": "rule", "ground_truth": answer},
        }
        for question, answer in QUESTIONS
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "words.parquet")
    command = [sys.executable, "-m", "verl_prefix.cli", "eval", tmp_path / "words.parquet", "--model", model]
    command += ["--out", tmp_path / "out", "-n", "2", "--max-tokens", "64", "--serve-args", "--max-model-len 1024"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    for record in sorted(records, key=lambda record: record["problem"]):
        print(record["correct"], record["finish_reason"], repr(record["response"]))
    # with another template it does not end its turn, and does not follow the example
    assert sum(record["finish_reason"] == "stop" for record in records) >= 12
    assert sum("\\boxed{" in record["response"] for record in records) >= 6
    assert json.loads((tmp_path / "out/summary.json").read_text())["sets"]["words"]["avg"]["value"] >= 2 / 16
