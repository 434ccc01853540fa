"""From the command to the first finished step: what takes how long.

python bench/startup.py                     # a 0.5B model with random weights, built first
python bench/startup.py recipes/x.yaml      # a recipe of your own; its first step
python bench/startup.py --imports           # where the time of `import vllm` goes, by package

The first of the two runs compiles every Triton kernel (its cache is a new folder), as on a machine that has never run
Strop; the second finds them. On a card whose machine was just switched on the first also reads libraries from disk.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

WATCHED = ("torch", "transformers", "vllm", "datasets", "pyarrow", "sympy", "math_verify", "peft", "bitsandbytes",
           "triton", "tensorboard", "xgrammar")  # fmt: skip
FUNCTIONS = {
    "strop.trainer.opening": ("prepare", "build", "open_run_folder"),
    "strop.trainer.parts": ("build_task", "detect_machine", "make_plan", "_model_and_engine"),
    "strop.policy.load": ("open_model", "build_on_meta"),
    "strop.policy.policy": ("check_packed_forward",),
    "strop.policy.lora": ("inject",),
    "strop.weights": ("alias_parameters", "SharedWeights.publish"),
    "strop.rewards.pool": ("RewardPool.wait_ready", "RewardPool.__enter__"),
    "strop.trainer.loop": ("train_step", "_generate_and_submit", "update"),
    "strop.engine.vllm_engine": ("VllmEngine.__init__",),
    "vllm.engine.arg_utils": ("EngineArgs.create_engine_config",),
    "vllm.v1.engine.llm_engine": ("renderer_from_config", "InputProcessor.__init__"),
    "vllm.v1.engine.core": ("EngineCore.__init__", "EngineCore._initialize_kv_caches"),
    "vllm.v1.worker.gpu_worker": (
        "Worker.init_device", "Worker.load_model", "Worker.determine_available_memory", "Worker.initialize_from_config",
        "Worker.compile_or_warm_up_model", "kernel_warmup", "warmup_kernels", "init_worker_distributed_environment",
    ),
    "vllm.v1.worker.gpu.model_runner": ("GPUModelRunner.capture_model", "GPUModelRunner.profile_run"),
    "vllm.v1.worker.gpu_model_runner": ("GPUModelRunner.capture_model", "GPUModelRunner.profile_run"),
}  # fmt: skip

STARTED = time.time()
_lines: list[tuple[float, float, int, str]] = []
_depth = 0


def _timed(label: str, function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _depth
        begin, depth = time.time(), _depth
        _depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            _depth = depth
            _lines.append((begin, time.time(), depth, label))

    return call


def _wrap_what_is_there(done: set[str]) -> None:
    for module, names in FUNCTIONS.items():
        if module in done or module not in sys.modules:
            continue
        loaded = sys.modules[module]
        if getattr(getattr(loaded, "__spec__", None), "_initializing", False):
            continue
        done.add(module)
        for name in names:
            owner: Any = loaded
            *path, leaf = name.split(".")
            for part in path:
                owner = getattr(owner, part, None)
            if owner is not None and hasattr(owner, leaf):
                setattr(owner, leaf, _timed(name, getattr(owner, leaf)))


def watch_imports() -> None:
    """Record the first import of each of WATCHED, and time FUNCTIONS once their modules are loaded."""
    original, seen, wrapped = builtins.__import__, set[str](), set[str]()

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        global _depth
        top = name.split(".")[0]
        if name in sys.modules and not (top in ("vllm", "strop") and len(wrapped) < len(FUNCTIONS)):
            return original(name, *args, **kwargs)
        first = top in WATCHED and top not in seen
        if not first:
            module = original(name, *args, **kwargs)
            _wrap_what_is_there(wrapped)
            return module
        seen.add(top)
        begin, depth = time.time(), _depth
        _depth += 1
        try:
            return original(name, *args, **kwargs)
        finally:
            _depth = depth
            _lines.append((begin, time.time(), depth, f"import {name}"))

    builtins.__import__ = load


def watch_compiler() -> list[tuple[float, float, str]]:
    """Return a list that takes (end, seconds, kernel) of each Triton kernel that is compiled."""
    compiled: list[tuple[float, float, str]] = []
    try:
        from triton import knobs
    except ImportError:
        return compiled

    def listen(*, src: Any, times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            compiled.append((time.time(), times.total / 1e6, src.name))

    knobs.compilation.listener = listen
    return compiled


def child(config: str, out: str) -> None:
    import psutil

    born = psutil.Process().create_time()
    watch_imports()
    compiled = watch_compiler()
    from strop.config_load import load_config
    from strop.trainer.loop import train

    checked = load_config(config, ["run.max_steps=2", "run.eval_num_problems=0", "run.save_steps=1000"])
    train(checked, out=out)
    end = time.time()
    print(f"start of Python {STARTED - born:.2f} s, end of run {end - born:.2f} s after the command")
    steps = sorted(stop for _, stop, _, label in _lines if label == "train_step")
    print(f"first step finished {steps[0] - born:.2f} s after the command, second took {steps[1] - steps[0]:.2f} s")
    print("   at s   took s")
    for begin, stop, depth, label in sorted(_lines):
        if stop - begin >= 0.05:
            print(f"{begin - born:7.2f}  {stop - begin:7.2f}  {'  ' * depth}{label}")
    print(f"{len(compiled)} Triton kernels compiled in {sum(seconds for _, seconds, _ in compiled):.2f} s")
    for end, seconds, name in compiled:
        print(f"{end - seconds - born:7.2f}  {seconds:7.2f}    {name}")


def make_model(folder: Path) -> None:
    """Write a Llama of the size of Qwen2.5-0.5B with random weights and the demo model's tokenizer."""
    import torch
    from shapes import CONFIGS
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

    from strop.demo.tokenizer import build_tokenizer

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "tie_word_embeddings")  # fmt: skip
    tokenizer = build_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        **{k: CONFIGS["qwen2.5-0.5b"][k] for k in keys}, bos_token_id=None, max_position_embeddings=4096, **ids
    )
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)


def imports() -> None:
    """Print self time of imports by package, and the largest modules, for what an engine imports."""
    code = (
        "import os; os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] = '0'\n"
        "import transformers.models.auto\n"
        "from vllm.engine.arg_utils import EngineArgs\nfrom vllm.v1.engine.llm_engine import LLMEngine\n"
    )
    for run in ("first", "second"):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
        print(
            f"{run} import of torch, transformers and vLLM: {time.perf_counter() - begin:.1f} s, rc {done.returncode}"
        )
    packages: dict[str, float] = defaultdict(float)
    modules: list[tuple[float, str]] = []
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            packages[parts[2].strip().split(".")[0]] += int(parts[0]) / 1e6
            modules.append((int(parts[1]) / 1e6, parts[2].rstrip()))
    print("self time by package:", ", ".join(
        f"{name} {seconds:.2f}" for name, seconds in sorted(packages.items(), key=lambda x: -x[1])[:30]
    ))  # fmt: skip
    print("cumulative:", ", ".join(f"{name.strip()} {s:.2f}" for s, name in sorted(modules, reverse=True)[:60]))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["--imports"]:
        imports()
        return
    work = Path(tempfile.mkdtemp(prefix="strop-startup-"))
    config = Path(sys.argv[1]) if len(sys.argv) > 1 else work / "config.yaml"
    if len(sys.argv) == 1:
        begin = time.perf_counter()
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"from pathlib import Path; from startup import make_model; make_model(Path({str(work / 'm')!r}))"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        print(f"model made in {time.perf_counter() - begin:.1f} s")
        config.write_text(json.dumps({
            "model": {"path": str(work / "m")},
            "task": {"name": "arithmetic", "max_prompt_length": 128},
            "rollout": {"num_prompts": 16, "num_generations": 8, "max_completion_length": 128},
            "run": {"report_to": "none"},
        }))  # fmt: skip
    kernels = os.environ | {"TRITON_CACHE_DIR": str(work / "triton")}
    for number in (1, 2):
        print(f"## run {number}", flush=True)
        subprocess.run([sys.executable, __file__, "--child", str(config), str(work / f"run{number}")], timeout=240,
                       check=False, env=kernels)  # fmt: skip


if __name__ == "__main__":
    assert importlib.util.find_spec("strop"), "strop is not installed; set PYTHONPATH to src"
    main()
