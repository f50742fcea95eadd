r"""The registry: one declarative entry per source of demonstrations and per evaluation set.

An entry says where in a row the question, the answer and the demonstrations are. Everything else (reading, checks,
grading, deduplication, output) is the same for all of them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

from data_prep.rules import (
    After,
    Answer,
    Before,
    Chat,
    Demonstration,
    Demos,
    FirstOf,
    LastBox,
    Options,
    Question,
    ShuffledOptions,
    Steps,
    ThinkThenAttempt,
)

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Please reason step by step, and put the letter of the right option within \\boxed{}."

#: instructions that the files of others wrap around a question: a phrase that tells, and what to take off
_WRAPPINGS = (
    (
        "Solve the following math problem step by step.",
        re.compile(r"\A\s*Solve the following math problem step by step\. The last line of your.*?\n\n", re.DOTALL),
    ),
    (
        "Remember to put your answer",
        re.compile(r"\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*\Z"),
    ),
    (
        "Let's think step by step",
        re.compile(r"\s*Let's think step by step and output the final answer (?:with)?in \\+boxed\{\}\.?\s*\Z"),
    ),
    (
        "Please reason step by step",
        re.compile(r"\s*Please reason step by step,? and put your final answer (?:with)?in \\+boxed\{\}\.?\s*\Z"),
    ),
    ("Return your final response", re.compile(r"\A\s*Return your final response within \\+boxed\{\}\.?\s*")),
)


def unwrap(question: str) -> str:
    """A question without the instructions that known files put before or behind it."""
    for phrase, wrapping in _WRAPPINGS:
        if phrase in question:
            question = wrapping.sub("", question)
    return question.strip()


def as_is(text: str) -> str:
    return text


def open_think(text: str) -> str:
    """Put back a `<think>` that was part of the generator's prompt: a `</think>` without one tells."""
    if text.startswith("<think>") or "</think>" not in text or text.lstrip().startswith("<think>"):
        return text
    return f"<think>\n{text.lstrip()}"


def from_thought_markers(text: str) -> str:
    """OpenThoughts' `<|begin_of_thought|>` markers as think format."""
    text = re.sub(r"\s*<\|begin_of_thought\|>\s*", "<think>\n", text)
    text = re.sub(r"\s*<\|end_of_thought\|>\s*", "\n</think>\n\n", text)
    return open_think(re.sub(r"<\|begin_of_solution\|>\s*|\s*<\|end_of_solution\|>\s*", "", text))


@dataclass(frozen=True)
class Source:
    r"""Where a source keeps what.

    Attributes:
        name: as given to --source; also `data_source` of the rows, unless they bring one.
        hub, config, split: arguments of `datasets.load_dataset`; hub is None for formats that exist as files only.
        licence: of the data, as its card states it.
        prompt: rule for the question or the messages.
        answer: rule for the answer; None for multiple choice, where it is a letter.
        demos: rule for the demonstrations; None if it has none.
        options: rule for the options of multiple choice.
        solution: column with a reference solution beside the demonstrations.
        think: think-format rule: makes a demonstration's thinking `<think>\n...\n</think>`, opener included.
        rewrite: the prompt is the question inside another instruction, which is taken off and replaced by ours.
        evaluation: an evaluation set.
        gated: the hub asks for a login and consent.
        note: one line for the table of sources.
    """

    name: str
    hub: str | None
    licence: str
    prompt: Question | Chat
    answer: Any
    demos: Any = None
    options: Any = None
    config: str | None = None
    split: str = "train"
    solution: str | None = None
    think: Any = as_is
    rewrite: bool = False
    ability: str = "math"
    instruction: str = BOXED
    evaluation: bool = False
    gated: bool = False
    note: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row cannot be converted without."""
        rules = (self.prompt, self.answer, self.demos, self.options)
        return tuple(dict.fromkeys(column for rule in rules if rule is not None for column in rule.columns))

    @property
    def wanted(self) -> tuple[str, ...]:
        """Columns to read: those and the ones that are used where they are there."""
        return (*self.columns, *((self.solution,) if self.solution else ()), "data_source", "ability")

    def demonstrations(self, row: dict[str, Any]) -> list[Demonstration]:
        if self.demos is None:
            return []
        found = self.demos(row)
        return found if self.think is as_is else [demo._replace(text=self.think(demo.text)) for demo in found]


_VERL_ANSWER = Answer("reward_model.ground_truth")

TRAINING = (
    Source(
        "openr1-46k",
        "Elliott/Openr1-Math-46k-8192",
        "see its card; derived from OpenR1-Math-220k (Apache-2.0)",
        Chat(),
        _VERL_ANSWER,
        Demos(("target",)),
        think=open_think,
        note="LUFFY's and Prefix-RFT's training set; one R1 demonstration each",
    ),
    Source(
        "openr1-220k",
        "open-r1/OpenR1-Math-220k",
        "Apache-2.0",
        Question("problem"),
        Answer("answer"),
        Demos(
            ("generations",),
            all_of=("is_reasoning_complete",),
            any_of=("correctness_math_verify", "correctness_llama"),
        ),
        config="default",
        solution="solution",
        think=open_think,
        note="1 to 8 R1 demonstrations; those complete and found right by either of its checks",
    ),
    Source(
        "deepmath-103k",
        "zwhe99/DeepMath-103K",
        "MIT",
        Question("question"),
        Answer("final_answer"),
        Demos(("r1_solution_1", "r1_solution_2", "r1_solution_3")),
        think=open_think,
        note="three R1 demonstrations each",
    ),
    Source(
        "s1k-1.1",
        "simplescaling/s1K-1.1",
        "MIT",
        Question("question"),
        LastBox("solution", or_whole=100),
        ThinkThenAttempt("deepseek_thinking_trajectory", "deepseek_attempt"),
        solution="solution",
        note="R1's thinking and attempt; rows whose solution names no answer are dropped",
    ),
    Source(
        "s1k-1.1-gemini",
        "simplescaling/s1K-1.1",
        "MIT",
        Question("question"),
        LastBox("solution", or_whole=100),
        ThinkThenAttempt("gemini_thinking_trajectory", "gemini_attempt"),
        solution="solution",
        note="the same with Gemini's thinking and attempt",
    ),
    Source(
        "openthoughts-math",
        "open-r1/OpenThoughts-114k-math",
        "Apache-2.0 (of OpenThoughts-114k)",
        Question("problem"),
        LastBox("solution"),
        Demos(("conversations|messages",), all_of=("correct",)),
        solution="solution",
        think=from_thought_markers,
        note="last turn, where the source found it correct",
    ),
    Source(
        "limo",
        "GAIR/LIMO",
        "Apache-2.0",
        Question("question"),
        Answer("answer"),
        Demos(("solution",)),
        note="817 chosen problems",
    ),
    Source(
        "gsm8k",
        "openai/gsm8k",
        "MIT",
        Question("question"),
        After("answer"),
        Before("answer"),
        config="main",
        note="text before ####, with the answer put into a box",
    ),
    Source(
        "math",
        "DigitalLearningGmbH/MATH-lighteval",
        "MIT",
        Question("problem"),
        LastBox("solution"),
        Demos(("solution",)),
        note="the reference solution is the demonstration",
    ),
    Source(
        "numinamath-cot",
        "AI-MO/NuminaMath-CoT",
        "Apache-2.0",
        Question("problem"),
        LastBox("solution"),
        Demos(("solution",)),
        note="proofs without an answer are dropped",
    ),
    Source(
        "dapo-17k",
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "Apache-2.0",
        Chat(),
        _VERL_ANSWER,
        rewrite=True,
        note="no demonstrations; its 'Answer:' instruction is replaced by the box",
    ),
    Source(
        "skywork-or1",
        "Skywork/Skywork-OR1-RL-Data",
        "see its card",
        Chat(),
        _VERL_ANSWER,
        split="math",
        note="no demonstrations; split `math`",
    ),
    Source(
        "prefix-rft",
        None,
        "that of the file",
        Chat(),
        _VERL_ANSWER,
        Demos(("demos",), correct="demos_corr"),
        think=open_think,
        note="files made for the authors' code (demos, demos_corr)",
    ),
    Source(
        "luffy",
        None,
        "that of the file",
        Chat(),
        _VERL_ANSWER,
        Demos(("target",)),
        think=open_think,
        note="files made for LUFFY (target)",
    ),
    Source(
        "uft",
        None,
        "that of the file",
        Chat(),
        _VERL_ANSWER,
        Steps("hint"),
        note="UFT's files; the steps of `hint` are kept in demos_steps",
    ),
)

EVALUATION = tuple(
    replace(source, evaluation=True)
    for source in (
        Source("aime24", "HuggingFaceH4/aime_2024", "see its card", Question("problem"), Answer("answer"), note="30"),
        Source(
            "aime25", "math-ai/aime25", "see its card", Question("problem"), Answer("answer"), split="test", note="30"
        ),
        Source(
            "amc23",
            "math-ai/amc23",
            "see its card",
            Question("question|problem"),
            Answer("answer"),
            split="test",
            note="40; LUFFY's 'amc' is another set of 83",
        ),
        Source(
            "math500",
            "HuggingFaceH4/MATH-500",
            "MIT (of MATH)",
            Question("problem"),
            Answer("answer"),
            split="test",
            note="500",
        ),
        Source(
            "minerva",
            "math-ai/minervamath",
            "see its card",
            Question("question|problem"),
            FirstOf((LastBox("solution"), Answer("answer"))),
            split="test",
            note="272; the answer is the last box of `solution`",
        ),
        Source(
            "olympiadbench",
            "Hothan/OlympiadBench",
            "Apache-2.0",
            Question("question"),
            Answer("final_answer"),
            config="OE_TO_maths_en_COMP",
            note="674; lists of answers are joined by commas",
        ),
        Source(
            "arc-challenge",
            "allenai/ai2_arc",
            "CC-BY-SA-4.0",
            Question("question"),
            None,
            options=Options("choices.text", "answerKey", labels="choices.label"),
            config="ARC-Challenge",
            split="test",
            ability="science",
            instruction=LETTER,
            note="1,172; multiple choice",
        ),
        Source(
            "gpqa-diamond",
            "Idavidrein/gpqa",
            "CC-BY-4.0",
            Question("Question"),
            None,
            options=ShuffledOptions(
                "Question", "Correct Answer", ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
            ),
            config="gpqa_diamond",
            ability="science",
            instruction=LETTER,
            gated=True,
            note="198; options shuffled with --seed; the hub asks for consent",
        ),
        Source(
            "mmlu-pro",
            "TIGER-Lab/MMLU-Pro",
            "MIT",
            Question("question"),
            None,
            options=Options("options", "answer"),
            split="test",
            ability="knowledge",
            instruction=LETTER,
            note="12,032; up to ten options",
        ),
    )
)

SOURCES = {source.name: source for source in (*TRAINING, *EVALUATION)}


def find(name: str) -> Source | None:
    """The source of that name or hub id, whatever the case of its letters; None if there is none."""
    wanted = name.lower()
    for source in SOURCES.values():
        if wanted in (source.name, (source.hub or "").lower()):
            return source
    return None


def near(name: str) -> list[str]:
    """Names of sources that look like `name`, best first."""
    known = {source.name: source.name for source in SOURCES.values()}
    for source in SOURCES.values():
        if source.hub:
            known.setdefault(source.hub.lower(), source.name)
            known.setdefault(source.hub.lower().split("/")[1], source.name)
    close = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.5)
    close += [key for key in known if len(name) > 2 and name.lower() in key]
    return list(dict.fromkeys(known[key] for key in close))[:3]
