"""Reward functions of every kind, and pools that run them; `FUNCTIONS` has to lie in `f.py` of the working folder."""

from __future__ import annotations

from pathlib import Path

from strop.config import RewardsConfig
from strop.rewards.pool import RewardPool
from strop.types import Message, Problem, Rollout, Segment

FUNCTIONS = """
import asyncio, os, re, signal, subprocess, sys, time
from pathlib import Path

def length(completions, **kwargs):
    return [float(len(c)) for c in completions]

def chat_length(prompts, completions, **kwargs):
    assert prompts[0][0]["role"] == "user"
    return [float(len(c[0]["content"])) for c in completions]

async def slow_length(completions, **kwargs):
    await asyncio.sleep(0.001)
    return [float(len(c)) for c in completions]

class Prefix:
    def __init__(self, prefix):
        self.prefix = prefix
        self.__name__ = "prefix"
    def __call__(self, completions, answer, **kwargs):
        return [1.0 if c.startswith(self.prefix + a) else 0.0 for c, a in zip(completions, answer)]
prefix = Prefix("=")

class AsyncScorer:
    async def __call__(self, completions):
        await asyncio.sleep(0)
        return [3.0]
async_scorer = AsyncScorer()

def everything(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("seen", ["%s|%s|%s" % (prompts[0], kwargs["answer"][0], kwargs["when"][0].isoformat())])
    log_metric("ids", len(completion_ids[0]))
    return [trainer_state.global_step + 0.5 * (kwargs["prefill"] == ["<think>"])]

def no_row(completions):
    return [1.0 for _ in completions]

def even_only(completions, answer, **kwargs):
    return [1.0 if int(a) % 2 == 0 else None for a in answer]

def fussy(completions, **kwargs):
    text = completions[0]
    if text == "raise":
        raise ValueError("not this one")
    if text == "exit":
        sys.exit(3)
    if text == "nan":
        return [float("nan")]
    if text == "recurse":
        return fussy(completions) + fussy(completions)
    return [1.0]

def two_values(completions, **kwargs):
    return [1.0, 2.0]

def a_string(completions, **kwargs):
    return ["good"]

def dangerous(completions, **kwargs):
    text = completions[0]
    with open("calls.txt", "a") as file:
        file.write(text + "\\n")
    if text == "sleep":
        time.sleep(1000)
    if text == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "power":
        9**9**9
    if text == "child":
        Path("child.pid").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        time.sleep(1000)
    if text == "exit":
        os._exit(7)
    if text == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "fork":
        os.fork()
    return [1.0]

def noisy(completions, **kwargs):
    print("x" * 100000)
    sys.stdout.write("\\x00\\x00\\x00\\x05hello")
    os.write(1, b"raw bytes to one")
    print("to stderr", file=sys.stderr)
    try:
        input()
    except EOFError:
        return [float(len(sys.stdin.read()))]
    return [-1.0]

def mutates(completions, answer, **kwargs):
    answer[0].append("changed")
    completions.clear()
    return [1.0]

def after_mutation(completions, answer, **kwargs):
    return [float(len(answer[0]))]

def modules(completions, log_extra, **kwargs):
    log_extra("modules", [sorted(m for m in sys.modules if m in ("torch", "transformers", "vllm", "pydantic"))])
    log_extra("main", [sys.modules["__main__"].__spec__.name])
    log_extra("pid", [os.getpid()])
    return [1.0]

def draws(completions, **kwargs):
    import random
    return [random.random() + hash(completions[0]) % 1000]

def boom(completions, log_extra, **kwargs):
    log_extra("x", [1, 2])
    return [1.0]
"""


def pool_of(
    *names: str, weights: tuple[float, ...] = (), timeout_s: float = 20.0, workers: int = 1, log: Path | None = None
) -> RewardPool:
    funcs = tuple(name if name in ("numeric", "math", "think_format") else f"f.py:{name}" for name in names)
    config = RewardsConfig(funcs=funcs, weights=weights, timeout_s=timeout_s, workers=workers)
    return RewardPool(config, default_funcs=("numeric",), verdict_log=log, output=Path("out.log"))


def rollout(
    text: str = "abc",
    *,
    seed: int = 0,
    prompt: str | tuple[Message, ...] = "question",
    prefill: str = "",
    **row: object,
) -> Rollout:
    problem = Problem("t/0", prompt, (1, 2), {"answer": "3"} | row, prefill)
    segments = (Segment("prompt", (1, 2), (False,) * 2), Segment("sampled", (3, 4, 5), (True,) * 3, (-1.0,) * 3))
    return Rollout(problem, 0, segments, text, "stop", policy_version=4, seed=seed)


def rewards_of(pool: RewardPool, *texts: str) -> list[float | None]:
    return [scored.reward for scored in pool.score(rollout(text, seed=i) for i, text in enumerate(texts))]
