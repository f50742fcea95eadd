r"""What the grader has to say, written by hand from the shapes of real answers and not from its output.

`EQUALITY`: one case a line, `truth == answer` (right) or `truth != answer` (wrong); the answer goes into a box.
`RESPONSES`: whole responses with the truth, whether a think format is asked for, and the expected reason.
"""

from __future__ import annotations

EQUALITY: dict[str, str] = {
    "several choices are no answer": r"""
        A != (A)(B)(C)(D)
        A != A. B. C. D.
        A != (A) or (B)
        A != A) or B)
        A != (A), (B)
        A != \text{(A) and (C)}
        B != (A)(B)
        A == (A)
        A == A) apples
        A == (A) (A)
    """,
    "letters that name, and letters that multiply": r"""
        ABC != BAC
        ABC != CBA
        on != no
        no != on
        is != si
        MOO != OMO
        xy == yx
        abc == cab
    """,
    "units with powers, and behind pi": r"""
        12 == 12 cm^2
        12 == 12cm^2
        12 == 12 m^3
        12\text{ cm}^2 == 12 cm^2
        12\,\mathrm{cm}^2 == 12 cm^2
        12 cm^2 != 12 cm^3
        5 == 5 cm^3
        1.5 == 1.5 m/s^2
        16\pi == 16\pi\text{ cm}^2
        16\pi\text{ square inches} == 16\pi
        5m^2 != 5
    """,
    "large constants, and their neighbours": r"""
        2^{2013} != 2^{2013}-1
        2^{2016}-1 != 2^{2016}+1
        2^{2013}-1 == 2\cdot 2^{2012}-1
        2^{2013} == 2\cdot 2^{2012}
        2^{1000} == 4^{500}
        2^{1000} == (1+i)^{2000}
        1-\frac{1}{2^{2013}} != 1
        1-\frac{1}{2^{2013}} == \frac{2^{2013}-1}{2^{2013}}
        \frac12+\frac{1}{2^{2011}} != \frac12
        2013! != 2013!-1
        \binom{2000}{1000} != \binom{2000}{1000}-1
        10^{100} != 10^{100}+1
        5050 == \sum_{k=1}^{100} k
        \frac12 == \int_0^1 x dx
        \frac{\pi^2}{6} == \sum_{k=1}^{\infty} \frac{1}{k^2}
    """,
    "a text behind a number that names another": r"""
        5 != 5\text{ (or 6)}
        5 != 5\text{ or maybe 6}
        2520 == 2520\text{ (in dollars)}
    """,
    "the list of data.md": r"""
        0.5 == \frac12
        0.5 == 1/2
        1/2 == 0.5
        \frac12 == 0.5
        1/2 == \frac12
        \frac12 == 2/4
        1,000 == 1{,}000
        1000 == 1,000
        1{,}000 == 1000
        \frac32 == 1½
        1½ == 1.5
        50\% == 50
        50 == 50\%
        12 == 12\,\mathrm{cm}^2
        12\,\mathrm{cm}^2 == 12
        C == \text{(C)}
        \text{(C)} == C
        \{1,2,3\} == \{3,1,2\}
        1, 2, 3 == 3, 2, 1
        (0,1) == 0<x<1
        0<x<1 == (0,1)
        1024 == 2^{10}
        2^{10} == 1024
        -3 == −3
        \pi != 3.14
        3.14 != \pi
        \frac{1}{2^{98}} != \frac{1}{2^{99}}
        1/2^{99} != 1/2^{98}
        1/2^{98} == 2^{-98}
        42 != 4 2
        42 != 4\,2
        \frac{\sqrt{3}}{2} == \frac{\sqrt{3}}{2}
    """,
    "whole numbers": r"""
        204 == 204
        204 == 0204
        204 != 205
        204 != 2040
        204 != 20
        073 == 73
        0 == 0
        0 == -0
        7 == +7
        7 != -7
        -7 == - 7
        -12 == –12
        1234567 == 1,234,567
        1234567 == 1\,234\,567
        1234567 == 1 234 567
        1234567 != 1234567.5
        5 == 5.0
        5 == 5.
        5 == $5$
        5 == \(5\)
        5 == \mathbf{5}
        5 == **5**
        5 == {5}
        5 == (5)
        25 == ２５
        \boxed{204} == 204
        #### 18 == 18
        Natalia sold 48/2 = 24 clips.\n#### 72 == 72
        So the sum is $\boxed{\frac{3}{4}}$. == 0.75
        120 == 5!
        10 == \binom{5}{2}
        81 == 3^4
        1000000 == 10^6
        1000000 == 1e6
        45 != 4 5
        6 != 4 2
    """,
    "decimals and fractions": r"""
        0.75 == .75
        0.75 == \dfrac{3}{4}
        3/4 == \tfrac34
        -\frac{3}{4} == \frac{-3}{4}
        -\frac{3}{4} == -3/4
        -\frac34 != \frac34
        \frac34 != \frac43
        \frac{7}{3} == 2\frac{1}{3}
        \frac{7}{3} == 2 1/3
        \frac{7}{3} != 2.33
        \frac{1}{3} == 0.333333
        \frac{1}{3} == 0.3333333333
        \frac{1}{3} != 0.33
        \frac{1}{3} != 0.3333
        \frac{2}{3} == 0.666667
        \frac{1}{3} == 0.\overline{3}
        0.\overline{3} == \frac{1}{3}
        0.\overline{3} != 0.3
        0.1\overline{6} == 1/6
        0.\overline{142857} == \frac17
        0.0000001 != 0.0000002
        0.1 != 0.1000001
        3.5 == 3.50
        2.5 != 2.05
        0.001 == 10^{-3}
        1.2\times 10^3 == 1200
        1200 == 1.2 \cdot 10^{3}
        4.5e33 == 4.5\times10^{33}
        4.5e33 != 4.5\times10^{32}
        6.02\times10^{23} == 6.02 × 10^23
        \pi == 3.141592653589793
        \pi != 22/7
        \sqrt{2} == 1.41421356
        \sqrt{2} != 1.41
        10^{-30} != 10^{-31}
        10^{1000} != 10^{1001}
        \frac{100}{7} != 14.29
        \frac{1}{1024} == 2^{-10}
    """,
    "percent, money, units, bases": r"""
        50\% == 0.5
        0.5 == 50\%
        50\% == 50 percent
        50\% != 5
        50\% != 0.05
        12.5\% == 12.5
        12.5\% == \frac{1}{8}
        36 == \$36
        \$36 == 36
        \$36 == 36\text{ dollars}
        \$36 != 36\text{ cents}
        36 != \$63
        1250 == \$1,250.00
        12\text{ cm} == 12
        12\text{ cm} == 12\ \mathrm{cm}
        12\text{ cm} == 12 centimeters
        12\text{ cm} != 12\text{ m}
        12\text{ cm}^2 == 12 \text{ square centimeters}
        12\text{ cm}^2 != 12\text{ cm}
        5 == 5\text{ hours}
        5\text{ hours} == 5\text{ hour}
        5\text{ hours} != 5\text{ minutes}
        18 == 18 \text{ apples}
        18 == 18 apples
        60 == 60^\circ
        60^{\circ} == 60°
        60^\circ == 60 \text{ degrees}
        60^\circ != 30^\circ
        25_8 == 25_{8}
        25_8 == 25
        25_8 != 25_7
        1011_2 == 1011_{\text{two}}
        3t != 3
        3 != 3t
        2x != 2
        5m + 2 != 5
    """,
    "choices and words": r"""
        C == (C)
        C == \text{C}
        C == \textbf{(C)}
        C == \textbf{(C)}\ 42
        C == C. \text{ the mitochondria}
        C == \mathrm{(C)}
        (C) == C
        A != B
        A != (B)
        D != \text{(A)}
        B != AB
        C != 3
        E == E
        E != D
        J == (J)
        \text{Evelyn} == Evelyn
        Evelyn == \text{evelyn}
        \text{Evelyn} != \text{Carla}
        \text{even} == even
        \text{even} != \text{odd}
        listen != silent
        \text{6:30 pm} == 6:30 pm
        \text{6:30 pm} != 6:30 am
        2:1 != 1:2
        \text{Yes} == Yes
        Yes != No
        \text{no solution} == No solution
        \text{Tuesday} != \text{Thursday}
        \text{ellipse} == \text{Ellipse}.
    """,
    "roots, powers, constants": r"""
        2\sqrt{2} == \sqrt{8}
        2\sqrt{2} == 2√2
        \sqrt{50} == 5\sqrt2
        \sqrt{50} != 2\sqrt5
        \frac{\sqrt{3}}{3} == \frac{1}{\sqrt{3}}
        \frac{3\sqrt{3}}{2} == \frac{3}{2}\sqrt{3}
        \sqrt{3+2\sqrt2} == 1+\sqrt{2}
        1+\sqrt{2} != 1-\sqrt{2}
        \frac{1+\sqrt{5}}{2} == \frac{2}{\sqrt{5}-1}
        \sqrt[3]{8} == 2
        \sqrt[3]{2} == 2^{1/3}
        \sqrt[3]{2} != \sqrt{2}
        \frac{\pi}{2} == \pi/2
        2\pi == 2π
        2\pi != 2
        6 - \frac{3\pi}{2} == \frac{12-3\pi}{2}
        e^{2} == e^2
        \ln 2 == \frac{1}{2}\ln 4
        \log_2 8 == 3
        \sin\frac{\pi}{6} == \frac12
        2^{10}-1 == 1023
        3^{2^2} == 81
        2^{100} != 2^{101}
        2^{100} == 4^{50}
        9^{2} != 9^{99999999}
        7 != 100000000!
        \infty == ∞
        \infty != -\infty
        5 != \infty
        1+2i == 2i+1
        1+2i != 1-2i
        \sqrt{-4} == 2i
        -1 == i^2
        i != -i
        3 \mathrm{e}^{2} == 3e^2
        3 + 4\mathrm{i} == 3+4i
        2^{1009} == 2^{1008}\cdot 2
        10^{10^{10}} != 10^{10^{9}}
        11\sqrt2 == 15.556349
        \cos 2x == 2\cos^2 x - 1
        \arctan 2 == \tan^{-1} 2
        \frac{\pi}{3} != 60^\circ
    """,
    "expressions": r"""
        x^2+2x+1 == (x+1)^2
        (x+1)^2 == x^2 + 2x + 1
        (x+1)^2 != x^2+1
        \frac{n(n+1)}{2} == \frac{n^2+n}{2}
        \frac{n(n+1)}{2} != \frac{n(n-1)}{2}
        a+b == b+a
        a-b != b-a
        x^2 != y^2
        (x-2)(x+3) == (x+3)(x-2)
        (x-2)(x+3) == x^2+x-6
        \frac{1}{x}+\frac{1}{y} == \frac{x+y}{xy}
        \sqrt{ab} == \sqrt{a}\sqrt{b}
        |x| != x
        \frac{x}{2^{98}} != \frac{x}{2^{99}}
        x != (x+1)^{20000}
        2^n != 2^{n+1}
        2\cdot 2^n == 2^{n+1}
        \sin^2 x + \cos^2 x == 1
        -x^2 != (-x)^2
        3x+2 != 3x-2
    """,
    "equations": r"""
        5 == x=5
        x=5 == 5
        x=5 == x = 5
        x=5 != x=6
        x=5 != y=5
        5 != x=6
        y=2x+1 == 2x+1
        y=2x+1 == y = 1 + 2x
        y=2x+1 != y=2x-1
        x^2+y^2=4 == y^2+x^2=4
        x^2+y^2=4 != x^2+y^2=2
        f(x)=x^2 == x^2
        f(x)=2x != g(x)=2x
        y = \frac{1}{2}x + 3 == y=0.5x+3
    """,
    "lists, tuples, sets": r"""
        1,2 == 2,1
        1,2 == 1, 2
        1,2 == \{1,2\}
        1,2 == 1 \text{ and } 2
        1,2 == 1 and 2
        1,2 == x=1 \text{ or } x=2
        1,2 != 1
        1,2 != 1,3
        1,2 != 1,2,3
        1 != 1,2
        \pm 2 == 2,-2
        -2, 2 == \pm 2
        \pm 2 != 2
        (1,2) == (1, 2)
        (1,2) == \left(1,2\right)
        (1,2) != (2,1)
        (1,2) == x=1, y=2
        \{1,2\} == x\in\{1,2\}
        \left( \frac{3}{2}, -13 \right) == (1.5,-13)
        (1,2) != (1,3)
        (1,2,3) != (1,2)
        (1,2) != \{1,2\}
        \{1,2\} != (1,2)
        (3,\frac{\pi}{2}) == (3,\pi/2)
        (3,\frac{\pi}{2}) != (3,\pi)
        (\frac12,-1) == (0.5,-1)
        (1,\frac{1}{2^{98}}) != (1,\frac{1}{2^{99}})
        \{\frac12, \sqrt2\} == \{\sqrt2, \frac12\}
        \emptyset == \varnothing
        \emptyset == \{\}
        \emptyset != \{0\}
        -1,\frac12 == \frac{1}{2},-1
        1+\sqrt2, 1-\sqrt2 == 1-\sqrt{2}, 1+\sqrt{2}
    """,
    "intervals, inequalities, matrices": r"""
        [0,1] == [0, 1]
        [0,1] != (0,1)
        [0,1) != (0,1]
        [0,1) == 0\le x<1
        (2,\infty) == x>2
        x>2 == (2,\infty)
        x>2 != x\ge 2
        x>2 != x<2
        x>2 == 2<x
        (-\infty,2] == x\leq 2
        (-\infty,2] == x\in(-\infty,2]
        [1,2]\cup[3,4] == [3,4]\cup[1,2]
        [1,2]\cup[3,4] != [1,2]\cup[3,5]
        (-\infty,-1)\cup(1,\infty) == (-∞,-1)∪(1,∞)
        \begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{bmatrix}1&2\\3&4\end{bmatrix}
        \begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} == \begin{pmatrix}1.0\\\frac{4}{2}\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}2\\1\end{pmatrix}
    """,
    "spelling": r"""
        \frac{1}{2} == \left(\frac{1}{2}\right)
        \frac{a}{b} == \dfrac{a}{b}
        \frac{1}{2} == \displaystyle\frac{1}{2}
        \frac{1}{2} == \frac 1 2
        \frac{1}{2} == \frac1{2}
        x \leq 3 == x ≤ 3
        3\cdot 4 == 12
        3 \times 4 == 12
        12 == 3·4
        8 \div 2 == 4
        5 == 5\!
        5 == \;5\,
        5 == \text{5}
        x^2 == x²
        5 == =5
    """,
}

#: truth, answer, right: what the lines above cannot hold
EQUALITY_OBJECTS: list[tuple[object, str, bool]] = [
    (204, "204", True),
    (204, "205", False),
    (0.5, r"\frac12", True),
    (["1", "2"], "2", True),
    (["1", "2"], "3", False),
    ('["5"]', "5", True),
    (r'["\\frac{1}{2}"]', "0.5", True),
    ('["5", "x=5"]', "5", True),
    ('["5"]', "6", False),
    ("[0, 1]", "[0,1]", True),
    ("[0, 1]", "0", False),
    ("[5]", "5", True),
    ("300", "(" * 300 + "5" + ")" * 300, False),
    ("5", "(" * 300 + "5" + ")" * 300, True),
    ("x+1", "(" * 300 + "x+1" + ")" * 300, True),
    ((r"$-1$", r"$\frac{1}{2}$"), "-1", True),
    (b"204", "204", True),
]

_LONG = 10_000_000

#: name, response, truth, think format, reason
RESPONSES: list[tuple[str, object, object, bool, str]] = [
    ("one box", r"so \boxed{5}", "5", False, "correct"),
    ("two boxes, the last right", r"\boxed{4}, no: \boxed{5}", "5", False, "correct"),
    ("two boxes, the last wrong", r"\boxed{5}, no: \boxed{4}", "5", False, "wrong"),
    ("box in a box", r"\boxed{x=\boxed{5}}", "5", False, "correct"),
    ("fbox", r"\fbox{5}", "5", False, "correct"),
    ("box with a blank", r"\boxed {5}", "5", False, "correct"),
    ("box without braces", r"\boxed 5", "5", False, "correct"),
    ("box without braces in dollars", r"$\boxed5$", "5", False, "correct"),
    ("nested braces", r"\boxed{\frac{\sqrt{a^{2}}}{b_{1}}}", r"\frac{\sqrt{a^2}}{b_1}", False, "correct"),
    ("escaped braces", r"\boxed{\{1,2\}}", r"\{2,1\}", False, "correct"),
    ("box over lines", "\\boxed{\n\\frac{1}{2}\n}", "0.5", False, "correct"),
    ("empty box", r"\boxed{}", "5", False, "no_answer"),
    ("blank box", r"\boxed{ }", "5", False, "no_answer"),
    ("empty box after a full one", r"\boxed{5} \boxed{}", "5", False, "no_answer"),
    ("unclosed box", r"\boxed{5", "5", False, "no_answer"),
    ("unclosed box after a closed one", r"\boxed{5} \boxed{\frac{5", "5", False, "no_answer"),
    ("box command at the end", r"\boxed", "5", False, "no_answer"),
    ("another command", r"\boxedminipage{5}", "5", False, "no_answer"),
    ("another command after a box", r"\boxed{5} \boxedminipage{4}", "5", False, "correct"),
    ("no answer", "The answer is 5.", "5", False, "no_answer"),
    ("nothing", "", "5", False, "no_answer"),
    ("None", None, "5", False, "no_answer"),
    ("a number", 5, "5", False, "no_answer"),
    ("bytes", rb"\boxed{5}", "5", False, "correct"),
    ("hashes", "so 2+3=5\n#### 5", "5", False, "correct"),
    ("hashes with money", "#### $1,250", "1250", False, "correct"),
    ("hashes, more text", "#### 5\nDone.", "5", False, "correct"),
    ("hashes, the last ones", "#### 4\n#### 5", "5", False, "correct"),
    ("hashes, wrong", "#### 4", "5", False, "wrong"),
    ("box before hashes", "\\boxed{5}\n#### 4", "5", False, "correct"),
    ("thought, then boxed", r"<think>\boxed{4}</think> \boxed{5}", "5", True, "correct"),
    ("thought, then a wrong box", r"<think>\boxed{5}</think> \boxed{4}", "5", True, "wrong"),
    ("box only in the thoughts", r"<think>\boxed{5}</think> So 5.", "5", True, "no_answer"),
    ("box only in the thoughts, no format asked", r"<think>\boxed{5}</think> So 5.", "5", False, "correct"),
    ("thinking opened in the prompt", r"2+3</think>\boxed{5}", "5", True, "correct"),
    ("never stops thinking", r"<think> \boxed{5}", "5", True, "format"),
    ("does not think", r"\boxed{5}", "5", True, "format"),
    ("thinks again", r"<think></think>\boxed{5}<think>", "5", True, "format"),
    ("thinks twice", r"<think>a</think><think>b</think>\boxed{5}", "5", True, "correct"),
    ("no truth", r"\boxed{5}", "", False, "truth_unparsable"),
    ("truth None", r"\boxed{5}", None, False, "truth_unparsable"),
    ("truth an empty list", r"\boxed{5}", [], False, "truth_unparsable"),
    ("truth an empty box", r"\boxed{5}", r"\boxed{}", False, "truth_unparsable"),
    ("truth of 10 MB", r"\boxed{5}", "5" * _LONG, False, "truth_unparsable"),
    ("answer of 10 MB", r"\boxed{" + "5" * _LONG + "}", "5", False, "no_answer"),
    ("10 MB before the box", "a" * _LONG + r"\boxed{5}", "5", False, "correct"),
    ("10 MB of braces", "{" * _LONG, "5", False, "no_answer"),
    ("10 MB of braces in a box", r"\boxed{" + "{" * _LONG, "5", False, "no_answer"),
    ("10 MB of boxes", r"\boxed{" * (_LONG // 7), "5", False, "no_answer"),
    ("10 MB of boxes with answers", r"\boxed{5}" * (_LONG // 9), "5", False, "correct"),
    ("10 MB of other commands", r"\boxedx{" * (_LONG // 8), "5", False, "no_answer"),
    ("10 MB of thoughts", "<think>" * (_LONG // 7) + r"</think>\boxed{5}", "5", True, "correct"),
    ("10 MB of backslashes", r"\boxed{" + "\\" * _LONG, "5", False, "no_answer"),
    ("not mathematics", r"\boxed{\frac{}{}\end{x}}", "5", False, "unparsable"),
    ("answer too long for algebra", r"\boxed{" + "x+" * 2000 + "1}", "5", False, "unparsable"),
]


def equality_cases() -> list[tuple[str, object, str, bool]]:
    """(group, truth, answer, right)."""
    cases: list[tuple[str, object, str, bool]] = []
    for group, lines in EQUALITY.items():
        for line in filter(str.strip, lines.splitlines()):
            right = " == " in line
            truth, answer = line.strip().split(" == " if right else " != ")
            cases.append((group, truth.replace("\\n#", "\n#"), answer, right))
    return cases + [("objects", *case) for case in EQUALITY_OBJECTS]
