"""`rollouts/step_00010.parquet`: what the model wrote at a step and what it was given for it, one row a completion."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..types import Problem, Rollout, ScoredRollout
from .files import is_leftover, reason_of, sync_folder, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

_FILE = re.compile(r"step_(\d+)\.parquet")


class RolloutStore:
    """Writes one Parquet file per stored step into `folder`; equal rollouts give equal bytes.

    Columns: step, problem_id, sample_index, prompt, completion, reward (null: unscored), one `rewards/NAME` per reward
    function (null: does not apply or failed), advantage (null: none), num_tokens, finish_reason, truncated,
    mean_logprob (of the sampled tokens; null: none), policy_version, seed, failures (JSON: function to reason), and one
    `extra/NAME` per column that reward functions gave to `log_extra`.
    """

    def __init__(self, folder: Path) -> None:
        """Store in `folder`, which is made when the first file is written."""
        self.folder = folder

    def write(
        self,
        step: int,
        samples: Sequence[ScoredRollout],
        advantages: Sequence[float | None],
        extras: Mapping[str, Sequence[Any]] | None = None,
    ) -> Path:
        """Write the file of `step` (one advantage per sample, None where it has none) and return its path.

        `extras` are the columns that reward functions gave to `log_extra`, one value per sample; they are stored as
        text in columns `extra/NAME`. Raises RunError when the folder cannot be written.
        """
        import pyarrow.parquet as pq

        assert len(samples) == len(advantages), f"{len(advantages)} advantages for {len(samples)} completions"
        buffer = io.BytesIO()
        pq.write_table(_table(step, samples, advantages, extras or {}), buffer, compression="zstd")
        path = self.folder / f"step_{step:05d}.parquet"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as e:
            raise _cannot_write(path, e) from e
        return path

    def steps(self) -> list[int]:
        """Return the stored steps, ascending."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _FILE.fullmatch(name)))

    def truncate_after(self, step: int | None) -> list[int]:
        """Remove the files of steps beyond `step` (None: of all steps) and leftovers of a killed process.

        Call it on resume with the last step that the checkpoint covers. Returns the removed steps. Raises RunError.
        """
        removed = []
        try:
            for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
                match = _FILE.fullmatch(path.name)
                if match and (step is None or int(match[1]) > step):
                    path.unlink()
                    removed.append(int(match[1]))
                elif is_leftover(path.name):
                    path.unlink()
            if removed:
                sync_folder(self.folder)
        except OSError as e:
            raise _cannot_write(self.folder, e) from e
        return sorted(removed)


def _table(
    step: int,
    samples: Sequence[ScoredRollout],
    advantages: Sequence[float | None],
    extras: Mapping[str, Sequence[Any]],
) -> pa.Table:
    import pyarrow as pa

    rollouts = [sample.rollout for sample in samples]
    functions = list(dict.fromkeys(name for sample in samples for name in sample.scores))
    columns: list[tuple[str, pa.DataType, list[Any]]] = [
        ("step", pa.int64(), [step] * len(samples)),
        ("problem_id", pa.string(), [_utf8(r.problem.id) for r in rollouts]),
        ("sample_index", pa.int64(), [r.sample_index for r in rollouts]),
        ("prompt", pa.string(), [_utf8(_prompt_text(r.problem)) for r in rollouts]),
        ("completion", pa.string(), [_utf8(r.text) for r in rollouts]),
        ("reward", pa.float64(), [sample.reward for sample in samples]),
        *((f"rewards/{name}", pa.float64(), [sample.scores.get(name) for sample in samples]) for name in functions),
        ("advantage", pa.float64(), list(advantages)),
        ("num_tokens", pa.int64(), [r.num_completion_tokens for r in rollouts]),
        ("finish_reason", pa.string(), [r.finish_reason for r in rollouts]),
        ("truncated", pa.bool_(), [r.is_truncated for r in rollouts]),
        ("mean_logprob", pa.float64(), [_mean_logprob(r) for r in rollouts]),
        ("policy_version", pa.int64(), [r.policy_version for r in rollouts]),
        ("seed", pa.int64(), [r.seed for r in rollouts]),
        ("failures", pa.string(), [json.dumps(dict(sample.failures), sort_keys=True) for sample in samples]),
        *(
            (f"extra/{_utf8(name)}", pa.string(), [None if v is None else _utf8(str(v)) for v in values])
            for name, values in extras.items()
        ),
    ]
    schema = pa.schema([(name, kind) for name, kind, _ in columns])
    return pa.Table.from_arrays([pa.array(values, kind) for _, kind, values in columns], schema=schema)


def _prompt_text(problem: Problem) -> str:
    """The prompt as text; of a conversation the last user message, which is what differs from row to row."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    users = [message["content"] for message in problem.prompt if message.get("role") == "user"]
    return users[-1] if users else problem.prompt[-1]["content"]


def _mean_logprob(rollout: Rollout) -> float | None:
    logprobs = [value for segment in rollout.segments for value in segment.logprobs or ()]
    return math.fsum(logprobs) / len(logprobs) if logprobs else None


def _utf8(text: str) -> str:
    """Half surrogate pairs, which JSON data may hold and UTF-8 cannot, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"rollouts cannot be written to {path}: {reason_of(error, path.parent)}",
        hint="free space there and go on with --resume, or set run.rollout_steps to 0",
    )
