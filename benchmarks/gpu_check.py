"""Numbers and time of estimator, entropy clip and loss on a GPU, against float64 and the memory's bandwidth.

    python benchmarks/gpu_check.py            # CUDA: 64 x 8192 tokens, 151936 words
    python benchmarks/gpu_check.py --cpu      # the same at a small size, no GPU

Pure PyTorch and this package's pure functions: needs torch, NumPy and OmegaConf, neither verl nor vLLM
(`PYTHONPATH=. python ...` in a clone is enough). Exit code 1 if a number is off. Columns of the result:

- `error`: largest difference from a float64 reference that is written out here on its own, over its tolerance;
- `floor`: bytes that have to be moved / (time x bandwidth); 1 is as fast as the memory allows. The bytes are those of
  the inputs, read once, and of the results, written once (logits: read forward, read again and written as gradient
  backward). The bandwidth is that of a copy between two buffers on the same device in the same run.

Tensor names: B rows, T response positions, N tokens of a chunk, V words.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from verl_prefix import advantage, credit
from verl_prefix.config import PrefixConfig
from verl_prefix.objective import token_policy_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28, "clip_c": 3.0}
GROUP = 8
#: tokens whose log-probability and gradient are compared, of each type
SAMPLE = 16


@dataclass(frozen=True)
class Result:
    """One line of the table. `error` is in units of its tolerance: at most 1 is right."""

    what: str
    error: float | None = None
    milliseconds: float | None = None
    floor: float | None = None

    def __str__(self) -> str:
        cells = ("-" if x is None else f"{x:.3g}" for x in (self.error, self.milliseconds, self.floor))
        return f"{self.what:44}" + "".join(cell.rjust(12) for cell in cells)


# --- timing -----------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Fastest of `repeats` runs, after one that does not count."""
    best = math.inf
    for attempt in range(repeats + 1):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            took = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
        if attempt:
            best = min(best, took)
    return best


def bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes a second, reading and writing counted, of a copy of `size` bytes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), device, repeats)


# --- float64 references, one value after the other --------------------------------------------------------------------


def reference_clip(entropy: list[list[float]], prefix: list[list[bool]], share: float) -> list[list[bool]]:
    """Tokens that keep their advantage: of n prefix tokens the ceil(share n) of highest entropy, earlier ones first."""
    tokens = [(-entropy[b][t], b, t) for b, row in enumerate(prefix) for t, is_prefix in enumerate(row) if is_prefix]
    kept = {(b, t) for _, b, t in sorted(tokens)[: math.ceil(Fraction(str(share)) * len(tokens))]}
    return [[(not is_prefix) or (b, t) in kept for t, is_prefix in enumerate(row)] for b, row in enumerate(prefix)]


def reference_advantage(reward: list[float], group: list[int]) -> list[float]:
    """R - mean(R) of the prompt."""
    means = {g: math.fsum(r for r, h in zip(reward, group, strict=True) if h == g) / group.count(g) for g in set(group)}
    return [r - means[g] for r, g in zip(reward, group, strict=True)]


def reference_loss(log_p: float, old: float, advantage: float) -> tuple[float, float]:
    """PPO's loss with dual clip on one token, and its derivative by log p."""
    ratio = math.exp(log_p - old)
    plain, slope = -ratio * advantage, -ratio * advantage
    bounded = -min(max(ratio, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"]) * advantage
    loss, slope = (bounded, 0.0) if bounded > plain else (plain, slope)
    cap = -CLIP["clip_c"] * advantage
    return (cap, 0.0) if advantage < 0 and loss > cap else (loss, slope)


def reference_softmax(logits_V: Tensor, word: int) -> tuple[float, float, Tensor]:
    """log p of `word`, the entropy, and d log p / d logits, in float64."""
    exact_V = logits_V.double().cpu()
    shifted_V = exact_V - exact_V.max()
    p_V = shifted_V.exp() / shifted_V.exp().sum()
    log_p = float(shifted_V[word] - shifted_V.exp().sum().log())
    entropy = -float((p_V * p_V.clamp(min=1e-300).log()).sum())
    gradient_V = -p_V
    gradient_V[word] += 1
    return log_p, entropy, gradient_V


# --- the checked functions --------------------------------------------------------------------------------------------


def log_prob_and_entropy(logits_NV: Tensor, word_N: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each token's word with gradient, and the entropy without, in float32 whatever the logits are."""
    logits_NV = logits_NV.float()
    normaliser_N = logits_NV.logsumexp(dim=-1)
    log_prob_N = logits_NV.gather(-1, word_N[:, None]).squeeze(-1) - normaliser_N
    with torch.no_grad():
        p_NV = (logits_NV - normaliser_N[:, None]).exp_()
        entropy_N = normaliser_N - (p_NV.mul_(logits_NV)).sum(-1)
    return log_prob_N, entropy_N


class Batch:
    """A training batch: groups of `GROUP` rows, the first of each with a prefix of half its response."""

    def __init__(self, rows: int, tokens: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        self.shape, self.device = (rows, tokens), device
        length_B = (tokens // 2 + uniform(rows) * (tokens // 2)).long()
        self.mask_BT = (torch.arange(tokens) < length_B[:, None]).to(device)
        self.group = [row // GROUP for row in range(rows)]
        self.prefix_len_B = torch.where(torch.arange(rows) % GROUP == 0, length_B // 2, 0).to(device)
        self.rewards_BT = torch.zeros(rows, tokens)
        self.rewards_BT[torch.arange(rows), length_B - 1] = (uniform(rows) < 0.4).float()
        self.rewards_BT = self.rewards_BT.to(device)
        # many equal values: bfloat16 has few, and the choice among equals has to be right too
        self.entropy_BT = (uniform(rows, tokens) * 3).bfloat16().float().to(device)
        self.old_BT = (-2 * uniform(rows, tokens)).to(device)
        self.log_prob_BT = self.old_BT + (0.3 * torch.randn(rows, tokens, generator=generator)).to(device)
        self.rows = {
            "prefix_len": self.prefix_len_B,
            "demo_len": 2 * self.prefix_len_B,
            "low": torch.full((rows,), 0.5, device=device),
            "high": torch.full((rows,), 0.95, device=device),
            "hit_limit": torch.zeros(rows, dtype=torch.bool, device=device),
        }

    def credit(self) -> credit.Credit:
        return credit.assign(
            advantage.prefix_rft,
            config=PrefixConfig(),
            token_level_rewards=self.rewards_BT,
            response_mask=self.mask_BT,
            index=self.group,
            entropy=self.entropy_BT,
            rows=self.rows,
            global_step=1,
        )


def check_credit(batch: Batch, speed: float, repeats: int) -> list[Result]:
    """Estimator with entropy clip, and the clip alone."""
    prefix_BT = advantage.prefix_mask(batch.prefix_len_B, batch.mask_BT)
    clip = PrefixConfig().entropy_clip
    kept = reference_clip(batch.entropy_BT.tolist(), prefix_BT.tolist(), clip.share)
    mask, found = batch.mask_BT.tolist(), batch.credit().advantages.double().tolist()
    expected = reference_advantage(batch.rewards_BT.double().sum(-1).tolist(), batch.group)
    error = max(
        abs(found[b][t] - (expected[b] if mask[b][t] and kept[b][t] else 0.0))
        for b in range(len(mask))
        for t in range(len(mask[b]))
    )
    wrong = float(advantage.entropy_clip_mask(batch.entropy_BT, prefix_BT, clip).tolist() != kept)
    tokens = prefix_BT.numel()
    assign = seconds(batch.credit, batch.device, repeats)
    alone = seconds(lambda: advantage.entropy_clip_mask(batch.entropy_BT, prefix_BT, clip), batch.device, repeats)
    prefixed = int((batch.prefix_len_B > 0).sum()) * batch.shape[1]
    return [
        # rewards, mask, entropy of prefixed rows; advantages
        Result("estimator, entropy clip", error / 1e-6, assign * 1e3, (9 * tokens + 4 * prefixed) / speed / assign),
        # prefix mask, entropy of prefixed rows; mask
        Result("entropy clip alone", 2 * wrong, alone * 1e3, (2 * tokens + 4 * prefixed) / speed / alone),
    ]


def check_loss(batch: Batch, dtype: torch.dtype, speed: float, repeats: int) -> list[Result]:
    """The token loss with its gradient, on log-probabilities of `dtype`."""
    prefix_BT = advantage.prefix_mask(batch.prefix_len_B, batch.mask_BT)
    given = [x.to(dtype) for x in (batch.log_prob_BT, batch.old_BT, batch.credit().advantages)]
    log_prob_BT = given[0].clone().requires_grad_()

    def step() -> Tensor:
        log_prob_BT.grad = None
        loss_BT = token_policy_loss(
            log_prob_BT, given[1], given[2], prefix_BT, config=PrefixConfig().loss, **CLIP
        ).loss_BT
        loss_BT.masked_fill(~batch.mask_BT, 0.0).sum().backward()
        return loss_BT.detach()

    loss = step()[batch.mask_BT].double().tolist()
    slope = log_prob_BT.grad[batch.mask_BT].double().tolist()
    exact = [reference_loss(*x) for x in zip(*(x[batch.mask_BT].double().tolist() for x in given), strict=True)]
    # At a bound of the clip, rounding decides which side a token is on: its slope is then one or the other.
    near = [_near_a_bound(*x) for x in zip(*(x[batch.mask_BT].double().tolist() for x in given), strict=True)]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    error = max(abs(a - b[0]) / (1 + abs(b[0])) for a, b in zip(loss, exact, strict=True))
    error_slope = max(
        (abs(a - b[1]) / (1 + abs(b[1])) for a, b, skip in zip(slope, exact, near, strict=True) if not skip), default=0
    )
    took = seconds(step, batch.device, repeats)
    moved = batch.mask_BT.numel() * (4 * log_prob_BT.element_size() + 2)  # three inputs, two masks; gradient
    name = str(dtype).removeprefix("torch.")
    return [
        Result(f"token loss, {name}", error / tolerance, took * 1e3, moved / speed / took),
        Result(f"  its gradient, {name}", error_slope / tolerance),
    ]


def _near_a_bound(log_p: float, old: float, adv: float) -> bool:
    ratio, bounds = math.exp(log_p - old), (1 - CLIP["clip_low"], 1 + CLIP["clip_high"], CLIP["clip_c"])
    return any(abs(ratio / bound - 1) < 0.02 for bound in bounds)


def check_vocabulary(
    batch: Batch, words: int, chunk: int, dtype: torch.dtype, speed: float, repeats: int
) -> list[Result]:
    """From logits to the loss and back to their gradient, `chunk` tokens at a time over the whole batch."""
    rows, tokens = batch.shape
    device = batch.device
    generator = torch.Generator(device).manual_seed(0)
    logits_NV = (3 * torch.randn(chunk, words, generator=generator, device=device)).to(dtype).requires_grad_()
    word_N = torch.randint(words, (chunk,), generator=generator, device=device)
    with torch.no_grad():  # an old policy near the new one, as in training, so that the ratios are near 1
        old_N = log_prob_and_entropy(logits_NV, word_N)[0] + 0.3 * torch.randn(
            chunk, generator=generator, device=device
        )
    prefix_BT = advantage.prefix_mask(batch.prefix_len_B, batch.mask_BT)
    flat = [x.reshape(-1) for x in (batch.credit().advantages, prefix_BT)]

    def block(chosen: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_NV.grad = None
        log_prob_N, entropy_N = log_prob_and_entropy(logits_NV, word_N)
        adv_N, prefix_N = (x[chosen] for x in flat)
        lines = [x[None] for x in (log_prob_N, old_N, adv_N, prefix_N)]
        loss_N = token_policy_loss(*lines, config=PrefixConfig().loss, **CLIP).loss_BT[0]
        loss_N.sum().backward()
        return log_prob_N.detach(), entropy_N, loss_N.detach()

    # Compared on tokens that have an advantage, from all over the batch: most prefix tokens have none.
    some_N = flat[0].nonzero().squeeze(1)
    some_N = some_N[torch.linspace(0, len(some_N) - 1, chunk, device=device).long()]
    log_prob_N, entropy_N, loss_N = block(some_N)
    errors = {"log p": 0.0, "entropy": 0.0, "loss": 0.0, "gradient of the logits": 0.0}
    for n in range(0, chunk, max(chunk // SAMPLE, 1)):
        log_p, entropy, gradient_V = reference_softmax(logits_NV.detach()[n], int(word_N[n]))
        x = log_p, float(old_N[n]), float(flat[0][some_N[n]])
        errors["log p"] = max(errors["log p"], abs(float(log_prob_N[n]) - log_p) / 1e-4)
        errors["entropy"] = max(errors["entropy"], abs(float(entropy_N[n]) - entropy) / 1e-3)
        loss, slope = reference_loss(*x)
        errors["loss"] = max(errors["loss"], abs(float(loss_N[n]) - loss) / (1e-3 * (1 + abs(loss))))
        if not _near_a_bound(*x):
            exact_V = slope * gradient_V
            tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-4
            off = float((logits_NV.grad[n].double().cpu() - exact_V).abs().max())
            errors["gradient of the logits"] = max(errors["gradient of the logits"], off / tolerance)

    starts = range(0, rows * tokens - chunk + 1, chunk)
    took = seconds(lambda: [block(slice(at, at + chunk)) for at in starts], device, repeats)
    moved = 3 * len(starts) * logits_NV.numel() * logits_NV.element_size()
    name = str(dtype).removeprefix("torch.")
    whole = f"logits to loss and back, {name}"
    return [
        Result(whole, None, took * 1e3, moved / speed / took),
        *(Result(f"  {what}, {name}", error) for what, error in errors.items()),
    ]


def check(rows: int, tokens: int, words: int, chunk: int, device: torch.device, repeats: int) -> list[Result]:
    """Every check at one size; `error` above 1 anywhere is a failure."""
    speed = bandwidth(device, 1 << 30 if device.type == "cuda" else 1 << 26, 10)
    batch = Batch(rows, tokens, device)
    results = [Result(f"copy: {speed / 1e9:.0f} GB/s"), *check_credit(batch, speed, repeats)]
    for dtype in (torch.float32, torch.bfloat16):
        results += check_loss(batch, dtype, speed, repeats)
    for dtype in (torch.float32, torch.bfloat16):
        results += check_vocabulary(batch, words, chunk, dtype, speed, max(repeats // 5, 1))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="the same checks at a small size, on the CPU")
    parser.add_argument("--rows", type=int, help="B (64; with --cpu 16)")
    parser.add_argument("--tokens", type=int, help="T (8192; with --cpu 256)")
    parser.add_argument("--words", type=int, help="V (151936; with --cpu 2048)")
    parser.add_argument("--chunk", type=int, help="tokens whose logits exist at a time (2048; with --cpu 512)")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs; the fastest counts")
    parser.add_argument("--json", action="store_true", help="a JSON list on stdout")
    given = parser.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --cpu runs the same checks at a small size")
    default = (16, 256, 2048, 512) if given.cpu else (64, 8192, 151936, 2048)
    size = [x or y for x, y in zip((given.rows, given.tokens, given.words, given.chunk), default, strict=True)]
    device = torch.device("cpu" if given.cpu else "cuda")
    results = check(*size, device, given.repeats)
    if given.json:
        print(json.dumps([vars(result) for result in results], indent=2))
    else:
        name = platform.processor() or platform.machine() if given.cpu else torch.cuda.get_device_name()
        print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}: B, T, V, chunk = {size}")
        print(f"{'':44}" + "".join(name.rjust(12) for name in ("error", "ms", "floor")))
        print("\n".join(map(str, results)))
    sys.exit(any(result.error is not None and not result.error <= 1 for result in results))


if __name__ == "__main__":
    main()
