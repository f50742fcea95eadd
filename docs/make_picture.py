"""Draws docs/prefix_rft.png: prefix -> continuation -> group. Run it from the repository root."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

DEMO, POLICY, GREY, GOOD, BAD = "#e0a458", "#6fa3d0", "#d9d9d9", "#3f8f6b", "#b0483f"

figure, axis = plt.subplots(figsize=(11, 4.1), layout="constrained")
axis.set(xlim=(0, 110), ylim=(1, 43))
axis.axis("off")


def box(x, y, width, colour, text="", height=4.2, **style):
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.1,rounding_size=0.7", fc=colour, ec="none", **style)
    )
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


axis.text(2, 38.3, "demonstration y*", fontsize=10, color="#7a5a2a")
box(20, 37, 44, DEMO, "worked solution, from the training file")
axis.annotate("", (30, 31.6), (30, 36.6), arrowprops={"arrowstyle": "->", "color": "#7a5a2a"})
axis.text(31.5, 34, "cut at a drawn ratio, long at first, then any length", va="center", fontsize=9)

for row, (colour, reward, advantage) in enumerate(
    [(GOOD, "R = 1", "+0.75"), (BAD, "R = 0", "-0.25"), (BAD, "R = 0", "-0.25"), (BAD, "R = 0", "-0.25")]
):
    y = 27 - 6 * row
    box(2, y, 14, GREY, "prompt")
    if row == 0:
        box(17.5, y, 27, DEMO, "prefix")
        box(45.5, y, 24, POLICY, "continuation")
    else:
        box(17.5, y, 52, POLICY, "the policy's own rollout")
    axis.text(74, y + 2.1, reward, color=colour, va="center", fontsize=10, weight="bold")
    axis.text(84, y + 2.1, advantage, color=colour, va="center", fontsize=10, weight="bold")
axis.text(74, 34, "reward", fontsize=9, color="grey", va="center")
axis.text(84, 34, "A = R - mean(R)", fontsize=9, color="grey", va="center")
axis.text(
    2,
    3.2,
    "One RL objective trains on prefix and continuation. Of the prefix, only the 20 % of tokens on which the policy is "
    "least sure keep their advantage.",
    fontsize=9,
)
figure.savefig("docs/prefix_rft.png", dpi=110)
