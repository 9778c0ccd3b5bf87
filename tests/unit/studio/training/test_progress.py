"""What the page shows of a run comes from its folder alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from restune_diffusion.run_queue import QueuedRun
from restune_diffusion.studio.training.data_panel import edited_rows, with_names, with_prefix
from restune_diffusion.studio.training.desk import last_lines
from restune_diffusion.studio.training.loss_plot import loss_plot
from restune_diffusion.studio.training.markup import duration, memory_html, run_html, run_label, samples_html
from restune_diffusion.studio.training.progress import read_progress
from restune_diffusion.studio.training.runs_panel import allowed_actions, chosen_run
from restune_diffusion.training.advice.memory_estimate import MemoryEstimate
from restune_diffusion.utils.errors import UsageError

CONFIG = "base: b\ndata: d\noutput: o\nsteps: 100\nname: ink\nvalidation: {prompts: ['<b>fox</b>'], seed: 5}\n"


@pytest.fixture
def make_run(tmp_path):
    def make(state="running", **changes):
        values = {
            "id": "1", "name": "ink <i>", "state": state, "config": tmp_path / "c", "output": tmp_path / "out",
            "log": tmp_path / "log", "added": datetime.now(UTC), "started": None, "ended": None, "pid": None,
            "message": None, "command": [],
        }  # fmt: skip
        return QueuedRun(**{**values, **changes})

    return make


def write_log(output, steps, more=()):
    output.mkdir(exist_ok=True)
    (output / "config.yaml").write_text(CONFIG)
    lines = [
        {"step": step, "loss": 1 / step, "seconds": 0.5, "images_per_second": 8.0, "peak_memory_mib": 700.0}
        for step in range(1, steps + 1)
    ]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]) + '{"step": 9')


def test_progress_speed_and_time_left_are_read_from_the_folder(make_run):
    run = make_run()
    assert read_progress(run).steps is None
    assert "being loaded" in run_html(run, read_progress(run), "")
    write_log(run.output, 40, [{"step": 40, "validation_loss": 0.25}])
    progress = read_progress(run)
    assert (progress.steps, progress.step, progress.seconds_left, progress.memory_mib) == (100, 40, 30.0, 700.0)
    assert progress.validation_loss == 0.25
    assert progress.loss == pytest.approx(sum(1 / step for step in range(1, 41)) / 40)
    html = run_html(run, progress, "")
    assert 'aria-valuenow="40"' in html
    assert "about 30 s" in html
    assert "8.0 images/s" in html
    assert "validation loss 0.250 at the start" in html
    assert run_label(run, progress) == "ink <i> · running, step 40 of 100"
    write_log(run.output, 41)
    assert read_progress(run).step == 41


def test_text_of_a_run_is_never_markup(make_run):
    run = make_run("failed", message="it <script>failed</script>")
    write_log(run.output, 3)
    folder = run.output / "samples" / "step-000000"
    folder.mkdir(parents=True)
    (folder / "00.png").write_bytes(b"")
    html = run_html(run, read_progress(run), "log <img src=x>") + samples_html(read_progress(run))
    for text in ("<script>", "<img src=x>", "<b>fox", "ink <i>"):
        assert text not in html
    assert "it &lt;script&gt;failed" in html
    assert f'src="/gradio_api/file={folder}/00.png"' in html
    assert "&lt;b&gt;fox&lt;/b&gt;, step 0" in html


def test_the_plot_has_a_line_for_each_loss_and_points_inside_its_frame():
    training = [(step, 1 / step) for step in range(1, 2001)]
    plot = loss_plot(training, [(0, 0.9), (1000, 0.1)], 4000)
    assert plot.count("<polyline") == 3
    assert plot.count("<circle") == 2
    points = [
        tuple(map(float, pair.split(","))) for pair in plot.split('class="mean" points="')[1].split('"')[0].split()
    ]
    assert len(points) == 400
    assert all(56 <= x <= 640 and 0 <= y <= 260 for x, y in points)
    # The run is half done, and a lower loss is further down.
    assert points[-1][0] == pytest.approx(56 + (640 - 56 - 12) / 2, abs=1)
    assert points[-1][1] > points[0][1] + 100
    assert loss_plot(training[:1], [], 10) == ""


def test_actions_follow_the_state(make_run):
    run = make_run()
    write_log(run.output, 3)
    progress = read_progress(run)

    def allowed(run, place=0):
        return {name for name, yes in allowed_actions(run, progress, place).items() if yes}

    assert allowed(run) == {"stop", "sample"}
    assert allowed(make_run(stopping=True)) == set()
    assert allowed(make_run("waiting"), 1) == {"stop", "earlier", "remove"}
    assert allowed(make_run("stopped")) == allowed(make_run("failed")) == {"resume", "remove"}
    (run.output / "ink.safetensors").write_bytes(b"x")
    progress = read_progress(run)
    assert allowed(make_run("finished")) == {"library", "remove"}
    assert allowed(None) == set()


def test_the_running_or_newest_run_is_shown_until_one_is_chosen(make_run):
    old = make_run("finished", id="1", added=datetime(2020, 1, 1, tzinfo=UTC))
    running, new = make_run(id="2"), make_run("waiting", id="3")
    assert chosen_run([old, running, new], None) is running
    assert chosen_run([old, running, new], "1") is old
    assert chosen_run([old, new], "gone") is new
    assert chosen_run([], None) is None


def test_memory_beyond_what_is_free_is_a_warning():
    estimate = MemoryEstimate(2**30, 2**20, 2**29)
    assert "Needs about 2.2 GiB" in memory_html(estimate, 2**33, "this machine")
    assert 'role="alert"' not in memory_html(estimate, 2**33, "this machine")
    assert "Only 1.0 GiB are free; choose the purpose with the least memory" in memory_html(estimate, 2**30, "it")
    assert "once the base is on this machine" in memory_html(None, 2**33, "it")


def test_rows_of_captions_are_edited():
    rows = [["a_red-cat.png", ""], ["b.png", " old "]]
    assert with_names(rows) == [["a_red-cat.png", "a red cat"], ["b.png", "old"]]
    assert with_prefix(rows, "ink style, ") == [["a_red-cat.png", "ink style"], ["b.png", "ink style, old"]]
    assert with_prefix(with_prefix(rows, "ink style"), "ink style") == with_prefix(rows, "ink style")
    assert edited_rows(rows, str.upper)[1] == ["b.png", "OLD"]
    with pytest.raises(UsageError, match="no words"):
        with_prefix(rows, " ")


def test_the_log_ends_with_the_last_state_of_its_progress_bar(tmp_path):
    assert last_lines(tmp_path / "none") == ""
    (tmp_path / "log").write_text(
        "start\n" + "\r".join(f"step {number}" for number in range(9)) + "\nrestune: failed\n"
    )
    assert last_lines(tmp_path / "log") == "start\nstep 8\nrestune: failed"


def test_times_are_in_words():
    assert [duration(seconds) for seconds in (8.4, 65, 7260)] == ["8 s", "1 min 5 s", "2 h 1 min"]
