"""Metrics, stored rollouts, progress, trackers and the summary."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from strop.errors import ConfigError, RunError
from strop.monitor.metrics import MetricsLog, deterministic_part, read_metrics
from strop.monitor.progress import Progress
from strop.monitor.rollouts import RolloutStore
from strop.monitor.summary import EvalSummary, build_summary
from strop.monitor.trackers import Trackers
from strop.types import Problem, Rollout, ScoredRollout, Segment

SRC = Path(__file__).parents[1] / "src"


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_rows_are_one_json_object_each_in_the_given_order(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=None) as log:
        log.write(1, {"reward": 0.1 + 0.2, "loss": float("nan"), "grad_norm": float("inf"), "step": 99, "n": 3})
        log.write(2, {"reward": -0.0})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 1, "reward": 0.30000000000000004, "loss": null, "grad_norm": null, "n": 3}\n'
        '{"step": 2, "reward": -0.0}\n'
    )
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize(
    "torn", ['{"step": 4, "rew', '{"step": 4, "reward": 0.5}', "{", "", '{"step": 4}\n\x00\x00\x00\n']
)
def test_resume_removes_rows_beyond_the_checkpoint_and_a_torn_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = '{"step": 0, "eval": 1}\n{"step": 1, "reward": 0.25}\n{"step": 2, "reward": 0.5}\n'
    path.write_text(kept + '{"step": 3, "reward": 0.75}\n' + torn)
    with MetricsLog(path, resume_step=2) as log:
        assert path.read_text() == kept
        assert log.removed >= 1
        log.write(3, {"reward": 1.0})
    assert path.read_text() == kept + '{"step": 3, "reward": 1.0}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_whole_last_row_without_its_line_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    MetricsLog(path, resume_step=2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_start_without_a_checkpoint_begins_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    log = MetricsLog(path, resume_step=None)
    assert (path.read_text(), log.removed) == ("", 2)
    log.close()


def test_reading_leaves_out_a_torn_line_and_names_any_other_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2, "re')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n[1]\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 is not a row"):
        read_metrics(path)


def test_a_full_disk_is_named_and_the_rows_before_it_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resume_step=None)
    log.write(1, {"reward": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(RunError, match="File too large") as caught:
            log.write(2, {"reward": 2.0})
        with pytest.raises(RunError, match="File too large"):
            log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "--resume" in caught.value.hint
    assert read_metrics(path) == [{"step": 1, "reward": 1.0}]
    with MetricsLog(path, resume_step=1) as log:
        log.write(2, {"reward": 2.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with pytest.raises(RunError, match="cannot be written"):
        MetricsLog(tmp_path / "absent" / "metrics.jsonl", resume_step=None)


def test_timed_values_are_no_part_of_what_two_runs_share() -> None:
    row = {
        "step": 3, "reward": 0.5, "completions/mean_length": 20.0, "num_tokens": 99.0, "times_seen": 1.0,
        "time/generate_s": 1.0, "tokens/rollout_per_s": 9.0, "memory/peak_gib": 2.0, "step_time": 3.0,
        "eval/time/all_s": 1.0,
    }  # fmt: skip
    assert list(deterministic_part(row)) == ["step", "reward", "completions/mean_length", "num_tokens", "times_seen"]


# --- rollouts --------------------------------------------------------------------------------------------------------


def scored(index: int, *, reward: float | None = 1.0, prompt: object = "2+2?", text: str = "4") -> ScoredRollout:
    problem = Problem(f"sums/{index}", prompt, (1, 2))  # pyright: ignore[reportArgumentType]
    segments = (
        Segment("prompt", (1, 2), (False, False)),
        Segment("sampled", (5, 6), (True, True), (-0.5, -0.25)),
        Segment("environment", (7,), (False,)),
    )
    rollout = Rollout(problem, index, segments, text, "length" if index else "stop", 3, 2**63 - 1)
    failures = {} if reward is not None else {"slow": "ran past 10 s", "b": "NaN"}
    return ScoredRollout(rollout, reward, {"accuracy": reward, "reward": None}, failures)


def test_a_rollout_file_has_one_row_per_completion(tmp_path: Path) -> None:
    chat = (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Ω?"},
        {"role": "assistant", "content": "<t>"},
    )
    samples = [scored(0), scored(1, reward=None, prompt=chat, text="half \ud800 pair"), scored(2, prompt=chat[:1])]
    path = RolloutStore(tmp_path / "rollouts").write(10, samples, [0.5, None, -0.5])
    assert path == tmp_path / "rollouts" / "step_00010.parquet"
    rows = pq.read_table(path).to_pylist()
    assert rows[0] == {
        "step": 10, "problem_id": "sums/0", "sample_index": 0, "prompt": "2+2?", "completion": "4", "reward": 1.0,
        "rewards/accuracy": 1.0, "rewards/reward": None, "advantage": 0.5, "num_tokens": 3, "finish_reason": "stop",
        "truncated": False, "mean_logprob": -0.375, "policy_version": 3, "seed": 2**63 - 1, "failures": "{}",
    }  # fmt: skip
    assert [row["prompt"] for row in rows] == ["2+2?", "Ω?", "S"]
    assert (rows[1]["reward"], rows[1]["advantage"], rows[1]["truncated"]) == (None, None, True)
    assert rows[1]["completion"] == "half ? pair"
    assert json.loads(rows[1]["failures"]) == {"b": "NaN", "slow": "ran past 10 s"}


def test_equal_rollouts_give_equal_bytes_and_none_at_all_a_readable_file(tmp_path: Path) -> None:
    first, second = RolloutStore(tmp_path / "a"), RolloutStore(tmp_path / "b")
    for store in (first, second):
        store.write(1, [scored(i) for i in range(4)], [0.0] * 4)
        time.sleep(0.01)
    assert (tmp_path / "a/step_00001.parquet").read_bytes() == (tmp_path / "b/step_00001.parquet").read_bytes()
    table = pq.read_table(first.write(2, [], []))
    assert table.num_rows == 0
    assert "completion" in table.column_names


def test_rollout_files_beyond_the_checkpoint_are_removed(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "rollouts")
    assert (store.steps(), store.truncate_after(5)) == ([], [])
    for step in (9, 10, 100_000, 20):
        store.write(step, [scored(0)], [None])
    (store.folder / ".step_00030.parquet.partial-1").write_bytes(b"x")
    (store.folder / "notes.txt").touch()
    assert store.truncate_after(10) == [20, 100_000]
    assert store.steps() == [9, 10]
    assert sorted(os.listdir(store.folder)) == ["notes.txt", "step_00009.parquet", "step_00010.parquet"]
    assert store.truncate_after(None) == [9, 10]


def test_a_rollout_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("")
    with pytest.raises(RunError, match=r"rollouts cannot be written.*step_00001") as caught:
        RolloutStore(tmp_path / "rollouts").write(1, [], [])
    assert "run.rollout_steps" in caught.value.hint


# --- trackers --------------------------------------------------------------------------------------------------------


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    before = Trackers(("tensorboard",), tmp_path, None)
    for step in range(5):
        before.log(step, {"reward": step / 4, "loss": 1.0})
    # Not closed, as after a kill; the resumed process may even start within the same second.
    after = Trackers(("tensorboard",), tmp_path, 2)
    after.log(3, {"reward": 30.0})
    assert scalars(tmp_path, "reward") == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 30.0)]
    after.close()
    anew = Trackers(("tensorboard",), tmp_path, None)
    anew.log(0, {"reward": 7.0, "loss": float("nan")})
    anew.close()
    before.close()
    assert scalars(tmp_path, "reward") == [(0, 7.0)]
    assert len(os.listdir(tmp_path)) == 3


def test_a_torn_event_file_does_not_hide_what_follows(tmp_path: Path) -> None:
    first = Trackers(("tensorboard",), tmp_path, None)
    for step in (1, 2):
        first.log(step, {"reward": float(step)})
    first.close()
    (file,) = tmp_path.iterdir()
    os.truncate(file, file.stat().st_size - 7)
    second = Trackers(("tensorboard",), tmp_path, 1)
    second.log(2, {"reward": 20.0})
    second.close()
    assert scalars(tmp_path, "reward") == [(1, 1.0), (2, 20.0)]


def test_trackers_refuse_unknown_names_and_none_writes_nothing(tmp_path: Path) -> None:
    none = Trackers(("none",), tmp_path / "tb", None)
    none.log(1, {"reward": 1.0})
    none.close()
    assert not (tmp_path / "tb").exists()
    with pytest.raises(ConfigError, match=r"run\.report_to: `wandb`"):
        Trackers(("wandb",), tmp_path, None)
    with pytest.raises(ConfigError, match="`none` stands beside tensorboard"):
        Trackers(("none", "tensorboard"), tmp_path, None)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="TensorBoard events cannot be written"):
        Trackers(("tensorboard",), tmp_path / "file", None)


def test_missing_tensorboard_is_named_with_what_to_do(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from pathlib import Path; from strop.errors import StropError; from strop.monitor.trackers import Trackers\n"
        "try: Trackers(('tensorboard',), Path(sys.argv[1]), None)\n"
        "except StropError as e: print(e)"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=env, capture_output=True, text=True, check=True)
    assert "pip install tensorboard, or set run.report_to: none" in done.stdout


# --- progress --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[Progress, Clock, io.StringIO]:
    clock, stream = Clock(), io.StringIO()
    return Progress(stall_warning_s=60.0, stream=stream, clock=clock), clock, stream


def test_a_step_is_one_line_with_rate_and_time_left() -> None:
    progress, clock, stream = plain()
    metrics = {
        "reward": 0.4567, "accuracy": 0.5, "completions/mean_length": 123.4, "completions/clipped_ratio": 0.25,
    }  # fmt: skip
    for step in (1, 2, 3):
        with progress.phase("generate", total=2):
            clock.now += 2.0
            progress.advance(tokens=300)
            with progress.phase("score"):
                clock.now += 1.0
            clock.now += 1.0
            progress.advance(tokens=300)
        progress.phase("train")
        clock.now += 2.0 if step < 3 else 30.0
        progress.step_done(step, 100, metrics)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    expected = "step   1/100  reward 0.457  accuracy 50.0%  length 123  truncated 25%  200 tok/s  6.0 s  ETA 10 min"
    assert lines[0] == expected
    # The one slow step is in the time shown, not in the median that the time left is made of.
    assert lines[2].endswith("200 tok/s  34 s  ETA 10 min")


def test_odd_metrics_do_not_stop_a_run() -> None:
    progress, _, stream = plain()
    progress.step_done(3, 3, {"reward": math.nan, "step_time": math.nan, "completions/mean_length": math.inf})
    progress.step_done(4, 3, {})
    assert stream.getvalue().splitlines() == [
        "step 3/3  reward -  length -  truncated -  -",
        "step 4/3  reward -  length -  truncated -  0.0 s",
    ]


def test_a_stall_is_named_once_and_again_after_twice_the_time() -> None:
    progress, clock, stream = plain()
    progress.tick()
    with progress.phase("generate", total=8):
        progress.advance(3)
        for _ in range(250):
            clock.now += 1.0
            progress.tick()
        progress.advance()
        for _ in range(59):
            clock.now += 1.0
            progress.tick()
    notes = [line for line in stream.getvalue().splitlines() if line.startswith("note: ")]
    assert [note.split(" in ")[0] for note in notes] == [
        "note: nothing finished for 60 s",
        "note: nothing finished for 2 min",
        "note: nothing finished for 4 min",
    ]
    assert "phase generate 3/8  60 s; last decode step 0.0 s ago" in notes[0]
    assert "generate goes on after 4 min" in stream.getvalue()
    assert ["note: " + note for note in progress.notes] == notes


def test_plain_output_names_a_phase_only_when_it_is_slow() -> None:
    progress, clock, stream = plain()
    progress.start_at(4, 9)
    for seconds in (9, 25):
        with progress.phase("evaluate", total=40):
            for _ in range(seconds):
                clock.now += 1.0
                progress.advance(tokens=10)
                progress.tick()
    assert stream.getvalue().splitlines() == [
        "  step 5: evaluate 10/40  10 tok/s  10 s",
        "  step 5: evaluate 20/40  10 tok/s  20 s",
    ]


def test_leaving_a_phase_goes_back_to_the_one_around_it_even_on_an_error() -> None:
    progress, clock, stream = plain()

    def fail() -> None:
        with progress.phase("generate"):
            progress.phase("score")
            raise KeyError

    with progress.phase("evaluate"):
        with pytest.raises(KeyError):
            fail()
        clock.now += 61
        progress.tick()
        assert "in phase evaluate" in stream.getvalue()
    clock.now += 1000
    progress.tick()
    assert len(progress.notes) == 1


def test_a_phase_that_hangs_without_a_tick_is_named_by_the_thread() -> None:
    stream = io.StringIO()
    with Progress(stall_warning_s=0.05, stream=stream) as progress:
        with progress.phase("train"):
            time.sleep(0.4)
        assert any("in phase train" in note for note in progress.notes)
    assert "nothing finished for" in stream.getvalue()
    assert not [t for t in threading.enumerate() if t.name == "strop-progress"]


def test_output_that_fails_ends_the_output_and_keeps_the_notes(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with Progress(stall_warning_s=60.0, stream=stream) as progress:
        stream.close()
        progress.step_done(1, 2, {"reward": 1.0})
        progress.note("temperature was overridden")
    assert progress.notes == ["temperature was overridden"]
    assert "note: temperature was overridden" in capfd.readouterr().err


def test_text_that_the_stream_cannot_hold_is_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    progress = Progress(stall_warning_s=60.0, stream=stream)
    progress.note("[bold]Ω[/bold] \ud800")
    assert raw.getvalue() == b"note: [bold]?[/bold] ?\n"


def test_a_signal_handler_may_print_while_a_line_is_being_printed() -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if "step 1" in text:
                progress.note("stopping after this step")
                assert "stopping" not in self.getvalue()
            return super().write(text)

    stream = Interrupted()
    progress = Progress(stall_warning_s=60.0, stream=stream)
    progress.step_done(1, 2, {"reward": 1.0})
    lines = stream.getvalue().splitlines()
    assert [line[:15] for line in lines] == ["step 1/2  rewar", "note: stopping "]


def test_a_pipe_closed_by_head_does_not_kill_the_run(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom strop.monitor.progress import Progress\n"
        "assert 'rich' not in sys.modules\n"
        "with Progress(stall_warning_s=60.0) as progress:\n"
        "    for step in range(1, 20001): progress.step_done(step, 20000, {'reward': 1.0})\n"
        "    progress.note('to the end')\n"
        "    print('printed elsewhere', flush=True)\n"
        f"Path({str(tmp_path / 'end')!r}).write_text('reached')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC), "CODE": code, "PY": sys.executable}
    script = 'set -o pipefail; "$PY" -c "$CODE" | head -n 1'
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step     1/20000")
    assert done.stderr == "note: to the end\n"
    assert (tmp_path / "end").read_text() == "reached"


def on_terminal(monkeypatch: pytest.MonkeyPatch, run: Callable[[Progress], None], **env: str) -> str:
    """What a terminal gets while `run(progress)` goes on."""
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "30", **env}.items():
        monkeypatch.setenv(name, value)
    reader, slave = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(reader, 4096)
            except OSError:
                return
            received.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    stdout = sys.stdout
    try:
        with (
            os.fdopen(slave, "w", encoding="utf-8") as stream,
            Progress(stall_warning_s=60.0, stream=stream) as progress,
        ):
            run(progress)
    finally:
        thread.join(timeout=10)
        os.close(reader)
        assert sys.stdout is stdout
    return b"".join(received).decode()


def one_step(progress: Progress) -> None:
    with progress.phase("generate", total=4):
        progress.advance(2, tokens=10)
        time.sleep(0.6)
        progress.note("[red]kept as it is[/red]")
    progress.step_done(1, 3, {"reward": 0.5})


def test_a_terminal_shows_the_phase_live_and_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    output = on_terminal(monkeypatch, one_step)
    assert "\x1b[?25l" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert "generate 2/4" in output
    assert "note: [red]kept as it is[/red]" in output
    assert "step 1/3  reward 0.500" in output


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"CI": "true"}, {"TERM": "dumb"}])
def test_no_live_view_where_it_is_unwanted(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    output = on_terminal(monkeypatch, lambda progress: progress.step_done(1, 3, {"reward": 0.5}), **env)
    assert "\x1b" not in output
    assert output.startswith("step 1/3  reward 0.500")


def test_an_exception_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []

    def crash(progress: Progress) -> None:
        seen.append(progress)
        progress.phase("train")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        on_terminal(monkeypatch, crash)
    assert not [t for t in threading.enumerate() if t.name == "strop-progress"]
    assert seen


def test_a_terminal_that_goes_away_does_not_kill_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stdout = sys.stdout
    reader, slave = pty.openpty()
    stream = os.fdopen(slave, "w", encoding="utf-8")
    with Progress(stall_warning_s=60.0, stream=stream) as progress:
        os.close(reader)
        one_step(progress)
    assert sys.stdout is stdout
    assert progress.notes == ["[red]kept as it is[/red]"]


# --- summary ---------------------------------------------------------------------------------------------------------


def test_the_summary_holds_both_evaluations() -> None:
    before, after = EvalSummary(0.25, 0.75, 4, 100), EvalSummary(0.9, 1.0, 4, 100)
    assert EvalSummary.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    assert build_summary(
        steps=40, seconds=61.23456, stopped="finished", reward=0.8, eval_before=before, eval_after=after
    ) == {
        "stopped": "finished",
        "steps": 40,
        "seconds": 61.235,
        "reward": 0.8,
        "eval_before": {"pass@1": 0.25, "pass@k": 0.75, "k": 4, "problems": 100},
        "eval_after": {"pass@1": 0.9, "pass@k": 1.0, "k": 4, "problems": 100},
        "best": None,
        "diagnoses": [],
    }
    assert build_summary(steps=3, seconds=1.0, stopped="interrupted", reward=None)["eval_after"] is None
