"""Pages that say what the code says: links, keys, metrics, quoted messages, commands, generated tables."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from tests_support import compose_in_process

from verl_prefix import metrics, presets, reward, startup
from verl_prefix.config import PrefixConfig
from verl_prefix.cpu import settings

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "docs/README.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

#: where the messages of others that troubleshooting.md quotes are written
UPSTREAM = {
    "verl": [
        "trainer/ppo/v1/replay_buffer.py",
        "trainer/ppo/v1/agent_loop_tq.py",
        "trainer/ppo/v1/trainer_base.py",
        "trainer/ppo/core_algos.py",
        "experimental/agent_loop/agent_loop.py",
        "utils/reward_score/__init__.py",
        "utils/config.py",
        "workers/config/actor.py",
    ],
    "hydra": ["_internal/defaults_list.py", "_internal/config_loader_impl.py"],
    "transformers": ["utils/hub.py"],
    "vllm": ["v1/worker/utils.py", "v1/core/kv_cache_utils.py"],
    "ray": ["core/src/ray/raylet/raylet"],
}
#: stands for what a message fills in
HOLE = "\0"


# --- generated pages


def generator(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_methods_is_read_off_the_presets():
    make_methods = generator("make_methods")
    page = (ROOT / "docs/methods.md").read_text()
    assert make_methods.BEGIN + make_methods.table() + make_methods.END in page, "run python docs/make_methods.py"


def test_the_reference_of_the_configuration_is_read_off_the_dataclasses():
    make_config = generator("make_config")
    assert make_config.FILE.read_text() == make_config.page(), "run python docs/make_config.py"


# --- links


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor or '') of each relative link in a page, code left out."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, hyphens for blanks, punctuation dropped."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


@every_page
def test_links_lead_somewhere(page):
    for file, anchor in links(page):
        assert file.exists(), file
        if anchor:
            assert anchor in anchors(file), f"{file.name}#{anchor}"


def test_every_page_is_in_the_index_and_the_index_in_the_readme():
    linked = {file for file, _ in links(INDEX)}
    assert set(PAGES) - {ROOT / "README.md", INDEX} == linked
    assert INDEX in {file for file, _ in links(ROOT / "README.md")}


# --- names


def test_the_readme_names_every_preset():
    named = set(re.findall(r"`(?:\+prefix=)?(\w+)`", (ROOT / "README.md").read_text()))
    assert set(presets.names()) <= named


@cache
def schema() -> DictConfig:
    return OmegaConf.create({"prefix": OmegaConf.to_container(OmegaConf.structured(PrefixConfig))})


@cache
def verl_config() -> DictConfig:
    return compose_in_process("+prefix=prefix_rft")


def has(config: DictConfig, key: str) -> bool:
    parent, _, leaf = key.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    return isinstance(section, DictConfig) and leaf in list(section)  # `in section` denies a key without a value


@every_page
def test_keys_named_in_the_pages_exist(page):
    """`prefix.a.b` in a page is a key or a section of the configuration."""
    for key in re.findall(r"(?<![\w./-])prefix(?:\.[a-z_]+)+", page.read_text()):
        assert has(schema(), key), key


@pytest.mark.parametrize("name", ["quickstart", "limits", "troubleshooting", "metrics", "algorithm"])
def test_keys_of_verl_named_in_the_pages_exist(name):
    """As above for verl's own sections, but for keys that a `+` or the CPU platform adds."""
    text = (ROOT / f"docs/{name}.md").read_text()
    sections = "actor_rollout_ref|algorithm|data|ray_kwargs|reward|trainer"
    keys = re.findall(rf"(?<![\w./+-])(?:{sections})(?:\.[a-z_]\w*)+", text)
    # file names, and what is reached from a module rather than from the configuration
    keys = [key for key in keys if not key.endswith((".md", ".py", ".parquet"))]
    assert keys or name == "metrics"
    for key in keys:
        assert has(verl_config(), key) or key in settings.MIXED_PRECISION, key


@every_page
def test_metrics_named_in_the_pages_exist(page):
    known = set(metrics.DESCRIPTIONS) | {f"reward/{name}" for name in reward.compute_score("", "", "1")}
    for name in re.findall(
        r"`((?:prefix|gate|sft|prefixed|on_policy)/\w+(?:/\w+)*|reward/grader_\w+)`", page.read_text()
    ):
        assert name in known, name


# --- commands


def commands(page: Path) -> list[list[str]]:
    """Words of each complete `main_ppo` command in a page; `...` marks an abridged one."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("python -m verl.trainer.main_ppo") and "..." not in line:
                found.append(shlex.split(line, comments=True)[3:])
    return found


def test_the_first_run_on_a_gpu_composes_and_passes_the_start_up_check():
    """All of the check that needs no files. It warns of the schedule alone, as the page says."""
    (overrides,) = commands(ROOT / "docs/quickstart.md")
    config = compose_in_process(*overrides)
    prefix = PrefixConfig.of(config.prefix)
    warnings = [
        *startup._check_trainer(config, prefix),
        *startup._check_lengths(config, prefix),
        *startup._check_method(config, prefix),
    ]
    (warning,) = warnings
    assert "the schedule ends at step 500, the run at 3" in warning
    data, actor, rollout = config.data, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert data.train_batch_size % actor.ppo_mini_batch_size == 0
    assert actor.ppo_max_token_len_per_gpu >= data.max_prompt_length + data.max_response_length
    assert rollout.tensor_model_parallel_size <= config.trainer.n_gpus_per_node
    # the page names a model of this many positions
    assert data.max_prompt_length + data.max_response_length <= 4096


# --- quoted messages


def quoted(header: str, page: Path = TROUBLESHOOTING) -> list[str]:
    """Code spans in the first column of the tables whose first heading is `header`."""
    found, inside = [], False
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif inside and not set(line) <= set("|- "):
            spans = re.findall(r"(`+)(.+?)\1(?!`)", cells[0])
            assert spans or page != TROUBLESHOOTING, f"no quoted message in {line}"
            found += [text for _, text in spans]
        elif cells[0] == header:
            inside = True
    return found


def texts_of(source: str) -> Iterator[str]:
    """Every string in Python source, f-strings with `HOLE` for what they fill in, and whole `PrefixConfigError`s."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            yield _text(node)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PrefixConfigError" and len(node.args) == 3:
            yield f"{_text(node.args[0])}={HOLE}: {_text(node.args[2])}"


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else HOLE


@cache
def own_texts() -> tuple[str, ...]:
    """What this project can print: its Python sources, with names filled in where they are constants, and scripts."""
    from verl_prefix import names

    constants = {f"{{{name}}}": value for name, value in vars(names).items() if isinstance(value, str)}
    found = []
    for package in ("verl_prefix", "data_prep"):
        for file in (ROOT / package).rglob("*.py"):
            source = file.read_text()
            for name, value in constants.items():
                source = source.replace(name, value)
            found += texts_of(source)
    for file in (ROOT / "recipes").glob("*.sh"):
        found += re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", HOLE, file.read_text()).splitlines()
    return tuple(found)


def occurs(fragment: str, text: str) -> bool:
    """The pieces of `fragment` between its dots are in `text`, in their order, with something filled in between."""
    pattern = r"[^\n]*\0[^\n]*".join(re.escape(piece.strip("\n")) for piece in fragment.split("..."))
    return re.search(pattern, text) is not None


def test_every_quoted_message_is_one_that_the_code_prints():
    fragments = quoted("message")
    assert len(fragments) > 40
    for fragment in fragments:
        assert len(fragment.replace("...", "").strip()) >= 12, f"{fragment}: too short to be found"
        assert any(occurs(fragment, text) for text in own_texts()), fragment


def test_every_output_that_the_quickstart_explains_is_one_that_the_code_prints():
    fragments = quoted("output", ROOT / "docs/quickstart.md")
    assert len(fragments) > 12
    for fragment in fragments:
        assert any(occurs(fragment, text) for text in own_texts()), fragment


@pytest.mark.parametrize(
    "header", ["message of verl or Hydra", "message of verl or transformers", "message of verl, vLLM or Ray"]
)
def test_every_quoted_message_of_others_is_one_that_they_print(header):
    fragments = quoted(header)
    assert fragments
    sources = [file for package in UPSTREAM if package.lower() in header.lower() for file in upstream(package)]
    for fragment in fragments:
        assert any(fragment.encode() in source for source in sources), fragment


def upstream(package: str) -> list[bytes]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return [(Path(spec.submodule_search_locations[0]) / file).read_bytes() for file in UPSTREAM[package]]


def test_a_message_that_nobody_prints_is_found_out():
    """The search is no formality: other words, another order and another key are not taken for the message."""
    right = "prefix.sampling.rollouts=...: exceeds actor_rollout_ref.rollout.n="
    assert any(occurs(right, text) for text in own_texts())
    for wrong in (
        right.replace("exceeds", "surpasses"),
        right.replace("rollouts=", "parts="),
        "n=...: exceeds prefix.",
    ):
        assert not any(occurs(wrong, text) for text in own_texts()), wrong
