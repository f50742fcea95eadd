"""`verl-prefix report`: sampling, redaction and differences, and a page that hostile text cannot abuse."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html.parser
import http.server
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from hypothesis import given
from hypothesis import strategies as st
from report_runs import rollout, write_rollouts, write_run
from typer.testing import CliRunner

from verl_prefix import comparison, redaction
from verl_prefix.cli import app
from verl_prefix.report import curves, differences, page, rollouts

BUDGET = 20_000_000


def runs(*folders):
    return comparison.find_runs(list(folders))


class Page(html.parser.HTMLParser):
    """What a browser's parser finds: tags in order, the scripts and the style sheet."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.raw, self.inside = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            tag, attrs, text = self.raw[-1]
            self.raw[-1] = (tag, attrs, text + data)

    def content(self):
        return json.loads(next(text for _, attrs, text in self.raw if attrs.get("id") == "data"))


# ---- curves


def test_curves_of_a_run_with_and_one_without_prefixes(tmp_path):
    found = curves.data(
        runs(
            write_run(tmp_path / "prefix_rft_seed1", logged=0),
            write_run(tmp_path / "stock_seed1", logged=0, prefixes=False, best=0.2),
        )
    )
    panels = {panel["title"]: panel for panel in found["panels"]}
    positions, values = panels["Held-out accuracy: hard"]["lines"][0]["runs"][1]
    assert [found["axes"][1]["step"][p] for p in positions] == [0, 5, 10, 15, 20]
    assert values == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    on_policy = {line["label"]: line["runs"] for line in panels["Training reward"]["lines"]}
    assert on_policy["prefixed"][1] is None
    assert len(on_policy["on-policy"][1][0]) == 20
    assert panels["Prefix length / demonstration length, as drawn"]["lines"][1]["label"] == "lower bound"
    assert found["axes"][0]["tokens"][-1] == round(20 * 128 * 25 * 0.9)


def test_long_runs_are_thinned_and_keep_every_validation(tmp_path):
    found = curves.data(runs(write_run(tmp_path / "a", steps=999, every=7, logged=0)), max_points=100)
    steps = found["axes"][0]["step"]
    assert set(range(0, 999, 7)) <= set(steps)
    assert steps[-1] == 999
    assert len(steps) < 100 + 999 / 7 + 2


def test_values_that_are_not_finite_are_left_out(tmp_path):
    folder = write_run(tmp_path / "a", steps=2, logged=0)
    lines = [
        {"step": s, "data": {"prefix/rollout_share": 0, "on_policy/reward": float(v)}} for s, v in ((1, "nan"), (2, 1))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curves.data(runs(folder))
    assert found["panels"][0]["lines"][0]["runs"] == [[[1], [1.0]]]
    page.build(runs(folder), BUDGET)


# ---- rollouts


def test_everything_is_kept_if_it_fits(tmp_path):
    found = rollouts.sample(write_run(tmp_path / "a", steps=5, groups=3, size=4) / "rollouts", BUDGET)
    assert (found.rollouts_kept, found.rollouts_read, found.steps, found.log_steps) == (60, 60, 5, 5)
    group = next(g for g in found.groups if g["row"] == "1")
    assert (group["prompt"], group["truth"]) == ("1agbhci=", "48A800")
    assert group["rollouts"][0][:8] == [0, "prefixed", 0.0, 8, 20, 0.4, 0, 1]
    assert group["rollouts"][0][8:] == [["a4g", 0, "8bAh8", 0.75], ["c0i0\\boxed{48A800}", 0.75]]
    assert group["rollouts"][1][8:] == [[], ["a4g8bAh8c0i0\\boxed{48A801}", -0.25]]


@pytest.mark.parametrize("budget", [0, 3_000, 30_000, 300_000])
def test_a_sample_fits_its_budget_and_keeps_groups_whole(tmp_path, budget):
    folder = write_run(tmp_path / "a", steps=120, groups=16, size=8) / "rollouts"
    found = rollouts.sample(folder, budget)
    assert sum(len(rollouts.dump(group)) for group in found.groups) <= budget
    assert all(len(group["rollouts"]) == 8 for group in found.groups)
    assert found == rollouts.sample(folder, budget)
    if budget >= 30_000:
        steps = [group["step"] for group in found.groups]
        assert min(steps) < 20
        assert max(steps) > 100
    if budget == 30_000:  # the same prompts at all steps, so that they can be followed
        assert len({group["prompt"] for group in found.groups}) < 4


def test_steps_are_taken_evenly():
    assert rollouts.evenly(list(range(5)), 100) == [0, 1, 2, 3, 4]
    found = rollouts.evenly(list(range(1, 1001)), 100)
    assert (found[0], found[-1], len(set(found))) == (1, 1000, 100)
    assert max(b - a for a, b in zip(found, found[1:], strict=False)) <= 11


def test_prefix_characters_are_code_points_and_controls_are_spelled_out(tmp_path):
    text = "𝟜𝟜\u202e𝟜x\ud800\x1b[31m"
    write_rollouts(
        tmp_path,
        1,
        [rollout(1, 0, s, text, prefix_chars=4, advantages=a) for s, a in enumerate(([], [[2, 0.5], [11, 1]]))],
    )
    (group,) = rollouts.sample(tmp_path, BUDGET).groups
    assert group["rollouts"][0][8:] == ["𝟜𝟜\\u202e𝟜", "x\\ud800\\x1b[31m"]
    assert group["rollouts"][1][8:] == [["𝟜𝟜", 0.5, "\\u202e𝟜", 1], ["x\\ud800\\x1b[31m", 1]]


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([-1.0, 0.0, 0.5])), max_size=6).flatmap(
        lambda spans: st.tuples(st.just(spans), st.integers(0, sum(n for n, _ in spans)))
    )
)
def test_shaded_parts_are_the_text_with_its_advantages(case):
    spans, boundary = case
    length = sum(n for n, _ in spans)
    text = "".join(chr(0x4E00 + i % 20000) for i in range(length))
    ends = [sum(n for n, _ in spans[: k + 1]) for k in range(len(spans))]
    values = [value for n, value in spans for _ in range(n)]
    found = rollouts._parts(
        text, boundary, rollouts._spans(list(zip(ends, (v for _, v in spans), strict=True)), length)
    )
    at = 0
    for part, whole in zip(found, (text[:boundary], text[boundary:]), strict=True):
        if isinstance(part, str):
            assert not spans
            continue
        kept = [(t, v) for t, v in zip(part[::2], part[1::2], strict=True) if v is not None]
        if len(whole) <= rollouts.HEAD + rollouts.TAIL:
            assert "".join(t for t, _ in kept) == whole
        else:
            assert "".join(t for t, _ in kept) == whole[: rollouts.HEAD] + whole[-rollouts.TAIL :]
            assert sum(v is None for v in part[1::2]) == 1
        for piece, value in kept:
            begin = at + whole.index(piece)
            assert set(values[begin : begin + len(piece)]) == {value}
        at += len(whole)


@pytest.mark.parametrize("bad", [None, 3, "x", [[1]], [["a", 1]], [[2, 1], [1, 1]], [[-1, 0], [4, 0]], [[9, 1]],
                                 [[4, float("nan")]], [[float("inf"), 1]], {"4": 1}])  # fmt: skip
def test_advantages_that_are_not_those_of_the_text_are_left_out(bad):
    assert rollouts._spans(bad, 4) == []


def test_broken_lines_and_values_are_survived(tmp_path):
    good = json.dumps(rollout(1, 0, 1))
    odd = json.dumps({"output": None, "score": float("nan"), "prefix_chars": "many", "session": [], "role": 7})
    (tmp_path / "1.jsonl").write_bytes(f"{good}\n{odd}\n[]\n\xff\n".encode("latin-1") + good[:50].encode())
    (tmp_path / "notes.jsonl").write_text("not a step\n")
    found = rollouts.sample(tmp_path, BUDGET)
    assert (found.rollouts_kept, found.unreadable, found.log_steps) == (2, 3, 1)
    json.loads(rollouts.dump(found.groups))


def test_rollouts_of_stock_verl(tmp_path):
    stock = ("input", "output", "gts", "score", "step", "uid")
    lines = [{key: rollout(1, g, s)[key] for key in stock} for g in range(2) for s in range(3)]
    write_rollouts(tmp_path, 1, lines)
    found = rollouts.sample(tmp_path, BUDGET)
    assert [len(group["rollouts"]) for group in found.groups] == [3, 3]
    assert {entry[1] for group in found.groups for entry in group["rollouts"]} == {"on_policy"}


def test_no_rollout_log(tmp_path):
    text, kept = page.build(runs(write_run(tmp_path / "a", steps=5, logged=0)), BUDGET)
    assert "No rollout log" in kept
    assert Page(text).content()["groups"] == []


@given(st.text())
def test_dump_is_json_that_no_parser_takes_for_markup(text):
    dumped = rollouts.dump({text: [text]})
    assert json.loads(dumped) == {text: [text]}
    assert dumped.isascii()
    assert not set(dumped) & set("<>&")


# ---- configuration differences


def test_only_what_differs():
    a = {"prefix": {"preset": "luffy", "n": 8}, "same": [1, 2], "list": [1, {"x": 2}]}
    b = {"prefix": {"preset": "hint", "n": 8}, "same": [1, 2], "list": [1, {"x": 3}], "new": None}
    assert differences.differences([a, None, b], ["a", "x", "b"]) == [
        {"key": "list.1.x", "values": ["2", None, "3"]},
        {"key": "new", "values": ["[absent]", None, "None"]},
        {"key": "prefix.preset", "values": ["luffy", None, "hint"]},
    ]


def test_paths_in_the_runs_own_folder_are_the_same():
    configs = [
        {"dir": f"/tmp/{name}/checkpoints", "model": f"/models/{name}x"} for name in ("luffy_seed1", "luffy_seed2")
    ]
    (found,) = differences.differences(configs, ["luffy_seed1", "luffy_seed2"])
    assert found["key"] == "model"


def test_a_value_that_is_no_path_stays_though_the_folder_has_its_name():
    configs = [{"adv": "grpo", "dir": "out/grpo", "rel": "grpo/x"}, {"adv": "other", "dir": "out/b", "rel": "b/x"}]
    (found,) = differences.differences(configs, ["grpo", "b"])
    assert found == {"key": "adv", "values": ["grpo", "other"]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("env.HF_TOKEN", "S3CRET"),
        ("tracking.api_key", "S3CRET"),
        ("db.Password", 53123),
        ("client_secret", ["S3CRET"]),
        ("tokens.wandb", "S3CRET"),
        ("address", "https://user:S3CRET@host/x"),
        ("overrides", "trainer.wandb_api_key=S3CRET x=1"),
        ("overrides", ["a=1", "+env.HF_TOKEN: S3CRET"]),
    ],
)
def test_secrets_are_redacted(key, value):
    (found,) = [
        text
        for entry in differences.differences([{key: value}, {}], ["a", "b"])
        for text in entry["values"]
        if text != differences.ABSENT and "a=1" not in text
    ]
    assert "S3CRET" not in found
    assert "53123" not in found
    assert redaction.REDACTED in found


def test_limits_in_tokens_are_no_secrets():
    assert redaction.shown("actor.ppo_max_token_len_per_gpu", 16384) == "16384"
    assert redaction.shown("trainer.skip_tokenizer", False) == "False"
    assert redaction.shown("prefix.sft.token_weight", "confidence") == "confidence"


# ---- the page

MARKER = "http://127.0.0.1:{port}/hostile"
HOSTILE = (
    "</script><script>document.documentElement.dataset.hostile=1</script>",
    "<img src={url}1 onerror=document.documentElement.dataset.hostile=1>",
    "<!--<script>document.documentElement.dataset.hostile=1</script>",
    '"><svg onload=document.documentElement.dataset.hostile=1><iframe src="{url}2"></iframe>',
    "<a href='javascript:document.documentElement.dataset.hostile=1'>x</a><base href={url}>",
    "<link rel=stylesheet href={url}3><style>@import '{url}4';body{{background:url({url}5)}}</style>",
    "<meta http-equiv=refresh content='0;url={url}6'><form action={url}7><object data={url}8>",
    "\u202egnp.exe\u2066\u2028\u2029\x00\x1b[2J\x9b\ufeff\ud800 ]]> &lt;script&gt; \\u003cscript\\u003e ${{x}} `",
)


def hostile_run(folder, port=9):
    """A run in which everything that a model, a data file or a configuration may write is hostile."""
    bad = "".join(HOSTILE).format(url=MARKER.format(port=port))
    run = write_run(
        folder / "a_seed1", steps=3, every=1, logged=0, config={"note": bad, bad: 1, "x": {"HF_TOKEN": bad}}
    )
    texts = {"input": bad, "gts": bad, "role": bad, "group": bad, "row_index": bad}
    write_rollouts(
        run / "rollouts",
        1,
        [
            rollout(1, 0, s, bad, prefix_chars=40, **more, **texts)
            for s, more in enumerate(
                ({"advantages": [[bad, bad]]}, {"advantages": [[40, 0.0], [50, 0.5], [len(bad), -0.5]]}, {})
            )
        ],
    )
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics[-1]["data"] |= {f"val-core/{bad}/acc/mean@1": 0.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return [run, write_run(folder / "<b onclick=1>_seed2", steps=3, every=1)]


def test_hostile_text_is_inert_data(tmp_path):
    text, _ = page.build(runs(*hostile_run(tmp_path)), BUDGET)
    plain, _ = page.build(runs(write_run(tmp_path / "plain", steps=3)), BUDGET)
    found = Page(text)
    assert found.tags == [(tag, attrs) for tag, attrs in Page(plain).tags]
    assert [tag for tag, _ in found.tags].count("script") == 2
    (group,) = [g for g in found.content()["groups"] if g[0] == 0]
    shown = group[5][0][9]
    assert "<img src=http" in shown
    assert "<img src=http" in "".join(map(str, group[5][1][9]))
    assert "\\u202egnp.exe\\u2066\\u2028\\u2029\\x00\\x1b[2J" in shown
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    json_block = next(raw for _, attrs, raw in found.raw if attrs.get("id") == "data")
    assert not set(json_block) & set("<>&")


def test_the_policy_admits_the_one_script_and_no_request(tmp_path):
    text, _ = page.build(runs(write_run(tmp_path / "a", steps=3)), BUDGET)
    found = Page(text)
    metas = [attrs for tag, attrs in found.tags if tag == "meta"]
    assert metas[1]["http-equiv"] == "Content-Security-Policy"  # after the encoding, before anything that loads
    policy = dict(part.strip().split(" ", 1) for part in metas[1]["content"].split(";"))
    code = {tag: raw for tag, attrs, raw in found.raw if attrs.get("id") != "data"}
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(code[tag].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert {"img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}.items() <= policy.items()
    for tag, attrs in found.tags:
        assert not [name for name in attrs if name.startswith("on") or name in ("src", "action", "style")]
        assert "href" not in attrs or (tag, attrs["href"]) == ("link", "data:,")


def test_the_script_never_makes_markup_out_of_text():
    script, style = page._asset("page.js"), page._asset("page.css")
    for name in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "DOMParser",
                 "href", "src:", "srcdoc", "fetch", "XMLHttp", "import(", "</script", "<!--"):  # fmt: skip
        assert name not in script, name
    assert not re.search(r"url\(|@import|</style", style)


def test_an_absent_secret_in_the_whole_page(tmp_path):
    folders = [
        write_run(tmp_path / f"a_seed{s}", steps=3, config={"env": {"HF_TOKEN": f"hf_S3CRET{s}"}, "s": s})
        for s in (1, 2)
    ]
    text, _ = page.build(runs(*folders), BUDGET)
    assert "S3CRET" not in text
    assert [entry["key"] for entry in Page(text).content()["differences"]] == ["env.HF_TOKEN", "s"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """1,000 steps with 1,024 rollouts of 3 kB each, and the page made of them."""
    folder = tmp_path_factory.mktemp("large")
    text = "Let x be 3; then <b> & \\frac{a}{b} = 7.\n" * 75
    run = write_run(folder / "large_seed1", steps=1000, groups=128, size=8, output=text)
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(folder / "report.html")])
    assert done.exit_code == 0, done.output
    return folder / "report.html", done.stdout


def test_size_is_bounded_at_1000_steps_of_1024_rollouts(large):
    file, output = large
    assert BUDGET / 2 < file.stat().st_size <= BUDGET
    content = Page(file.read_text()).content()
    steps = [group[1] for group in content["groups"]]
    assert min(steps) <= 20
    assert max(steps) >= 980
    assert " ".join(content["sample"].split()) in " ".join(output.split())  # what is left out is said in both places
    assert re.search(r"of the [\d,]+ in the step files read, of \d+ of 1,000 step files", content["sample"])


# ---- in a browser

#: of the first element of a selector: its text's colour, or the one behind it, as [red, green, blue] of 0 to 255
COLOURS = """(() => {
  const read = (text) => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  let node = document.querySelector('%s');
  const style = getComputedStyle(node);
  if ('%s' === 'ink') return read(node.namespaceURI.includes('svg') ? style.fill : style.color).slice(0, 3);
  while (node && read(getComputedStyle(node).backgroundColor)[3] < 255) node = node.parentElement;
  return node ? read(getComputedStyle(node).backgroundColor).slice(0, 3) : [255, 255, 255];
})()"""


def contrast(one, other):
    """WCAG 2.1's ratio of two colours: 4.5 is asked of text."""

    def luminance(colour):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def browse(file, tmp_path, wait=4.0, settle=1.0):
    """The document as Chromium has it `settle` seconds after it was drawn, or after `wait` seconds."""
    with Browser(tmp_path / "profile") as tab:
        tab.open(file, wait=wait)
        time.sleep(settle)  # what text would load or run, it loads or runs in this time
        return tab.js("document.documentElement.outerHTML")


@contextlib.contextmanager
def listening():
    """(port, paths asked for): a server on this machine that hostile text points at."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium); .ci/run installs it")
class TestInABrowser:
    def test_hostile_text_runs_nothing_and_loads_nothing(self, tmp_path):
        with listening() as (port, asked):
            file = tmp_path / "report.html"
            file.write_text(page.build(runs(*hostile_run(tmp_path, port)), BUDGET)[0])
            dom = browse(file, tmp_path)
            assert asked == []
        root = re.search(r"<html[^>]*>", dom)[0]
        assert "data-ready" in root
        assert "data-hostile" not in root
        assert not re.search(r"<(img|iframe|a|object|form|base|b)[ >]", dom)
        assert "&lt;img src=http" in dom
        assert "\\u202egnp.exe" in dom
        assert (
            '<mark title="prefix, from the demonstration">&lt;/script&gt;&lt;script&gt;document.documentElemen</mark>'
            in dom
        )
        assert dom.count('<span class="up s4" title="advantage +0.5">') == 1

    def test_the_trap_works(self, tmp_path):
        """The same text in a page without the defences does run and does load: the test above can fail."""
        with listening() as (port, asked):
            bad = "".join(HOSTILE[:2]).format(url=MARKER.format(port=port))
            (tmp_path / "open.html").write_text(f"<!doctype html><html><body><script>0{bad}</body></html>")
            dom = browse(tmp_path / "open.html", tmp_path, wait=0.5)
            assert asked == ["/hostile1"]
        assert "data-hostile" in re.search(r"<html[^>]*>", dom)[0]

    def test_the_policy_alone_stops_a_script(self, tmp_path):
        text, _ = page.build(runs(write_run(tmp_path / "a", steps=3)), BUDGET)
        with listening() as (port, asked):
            bad = "".join(HOSTILE).format(url=MARKER.format(port=port)).replace("\ud800", "")
            bad = re.sub("<meta[^>]*>", "", bad)  # a policy does not hold navigation back; the escaping does
            (tmp_path / "r.html").write_text(text.replace("<main", f"<script>0{bad}</script><main"))
            dom = browse(tmp_path / "r.html", tmp_path)
            assert asked == []
        assert "data-hostile" not in re.search(r"<html[^>]*>", dom)[0]

    def test_filters_and_pages(self, tmp_path):
        """What the controls say is what is shown."""
        names = [write_run(tmp_path / f"a_seed{seed}", steps=4, groups=6, size=4, seed=seed) for seed in (1, 2)]
        (tmp_path / "report.html").write_text(page.build(runs(*names), BUDGET)[0])
        count = "document.querySelector('[role=status].soft').textContent"
        titles = "[...document.querySelectorAll('.group h3')].map((h) => h.textContent)"
        control = "[...document.querySelectorAll('label')].find((l) => l.firstChild.textContent === '{}').children[0]"

        def choose(tab, label, value, event="change"):
            found = control.format(label)
            tab.js(f"{found}.value = {value!r}; {found}.dispatchEvent(new Event('{event}'))")

        def press(tab, words):
            tab.js(f"[...document.querySelectorAll('button')].find((b) => b.textContent.includes('{words}')).click()")

        with Browser(tmp_path / "profile") as tab:
            tab.open(tmp_path / "report.html")
            assert tab.js(count) == "48 groups, page 1 of 10"
            first = tab.js(titles)
            press(tab, "Next")
            assert tab.js(count) == "48 groups, page 2 of 10"
            assert len(first) == len(tab.js(titles)) == 5
            assert first != tab.js(titles)
            choose(tab, "run", "1")
            assert tab.js(count) == "24 groups, page 1 of 5"
            choose(tab, "step", "3")
            assert tab.js(count) == "6 groups, page 1 of 2"
            assert all("a_seed2 · step 3" in title for title in tab.js(titles))
            choose(tab, "prompt", "4", "input")
            assert tab.js(count) == "1 group, page 1 of 1"
            press(tab, "This prompt at all steps")
            assert tab.js(count) == "4 groups, page 1 of 1"
            assert tab.js("document.querySelectorAll('.rollout').length") == 16
            choose(tab, "role", "prefixed")
            assert tab.js("document.querySelectorAll('.rollout.other').length") == 12
            choose(tab, "score", "2", "input")  # at least 2: none has it
            assert tab.js(count) == "0 groups, page 1 of 1"

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    @pytest.mark.parametrize("width", [360, 1600])
    def test_it_fits_the_window_and_is_legible(self, tmp_path, width, dark):
        names = [write_run(tmp_path / f"a_rather_long_name_of_a_method_seed{s}", steps=8, seed=s) for s in (1, 2)]
        names.append(write_run(tmp_path / "grpo_seed1", steps=8, prefixes=False, config={"data": {"seed": 7}}))
        (tmp_path / "report.html").write_text(page.build(runs(*names), BUDGET)[0])
        with Browser(tmp_path / "profile") as tab:
            tab.open(tmp_path / "report.html", width=width, dark=dark)
            assert tab.js("document.documentElement.scrollWidth") <= width
            for selector in ("body", "p.soft", ".tag", "mark", ".up", ".down", "td", "svg text", "button"):
                ink, ground = (tab.js(COLOURS % (selector, what)) for what in ("ink", "ground"))
                assert contrast(ink, ground) >= 4.5, (selector, ink, ground)
            if folder := os.environ.get("REPORT_PICTURES"):  # for a look at them
                tab.picture(Path(folder) / f"{width}_{'dark' if dark else 'light'}.png")

    def test_the_large_report_opens_in_under_3_seconds(self, large, tmp_path):
        root = re.search(r"<html[^>]*>", browse(large[0], tmp_path, wait=20))[0]
        assert int(re.search(r'data-ready="(\d+)"', root)[1]) < 3000
