"""`--batch-size auto`: batches grow only while a clip gets cheaper, and what was found out is kept."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from emt_cli.batch.batch_sizes import BatchSizes
from emt_cli.batch.phases import Pace

GIB = 1 << 30
JOB, OTHER = (SimpleNamespace(shape=(16, side, side)) for side in (512, 128))


@dataclass
class Gpu:
    """A GPU with so much memory, of which two GiB are the model's."""

    memory_gib: int = 80
    is_gpu: bool = True

    def memory(self):
        return 2 * GIB, 2 * GIB, self.memory_gib * GIB


def run(sizes: BatchSizes, pace, batches: int, device=None, job=JOB, gib_a_clip: int = 2, key: str = "") -> list[int]:
    """Sizes of the batches of a long list, of which a clip takes `pace(size)` seconds a step."""
    made = []
    for _ in range(batches):
        clips = sizes.limit(job, None, key)
        made.append(clips)
        sizes.learn(job, clips, gib_a_clip * clips * GIB, 2 * GIB, device or Gpu(), pace(clips), key)
    return made


def test_where_one_clip_fills_the_gpu_batches_stay_small():
    assert run(BatchSizes(None), lambda n: 0.090, 5) == [1, 2, 1, 1, 1]
    assert run(BatchSizes(None), lambda n: 0.090 * (0.98 if n > 1 else 1), 5) == [1, 2, 1, 1, 1], "2% is no gain"


def test_they_grow_as_long_as_clips_get_cheaper():
    assert run(BatchSizes(None), lambda n: 0.02 + 0.1 / n, 6) == [1, 2, 4, 8, 8, 8]
    assert run(BatchSizes(None), lambda n: max(0.05, 0.1 / n), 6) == [1, 2, 4, 2, 2, 2], "four are no cheaper than two"


def test_they_stay_within_the_memory():
    assert run(BatchSizes(None), lambda n: 1 / n, 5, Gpu(memory_gib=10)) == [1, 2, 3, 3, 3]
    sizes = BatchSizes(None)
    sizes.shrink(JOB, 1)
    assert run(sizes, lambda n: 1 / n, 3) == [1, 1, 1], "what did not fit is not tried again"


def test_the_rest_of_a_list_teaches_nothing():
    sizes = BatchSizes(None)
    assert run(sizes, lambda n: 1 / n, 2) == [1, 2]
    sizes.learn(JOB, 1, 2 * GIB, 2 * GIB, Gpu(), 9.0)
    assert run(sizes, lambda n: 1 / n, 2) == [4, 8]


@pytest.mark.parametrize("steps", [2, 4, 25])
def test_a_pace_is_that_of_steps_and_not_of_what_is_prepared_among_them(steps):
    """Libraries choose kernels in the first step; a graph is captured in the third."""
    clock = 0.0
    pace = Pace(lambda: clock)
    for done in range(1, steps + 1):
        clock += 0.1 if done > 1 else 7.0
        if done == 3:
            with pace.preparing():
                clock += 2.0
        if pace.is_due(done, steps):
            pace.step(done, steps)
    assert pace.seconds == pytest.approx(0.1)


def test_a_single_step_has_no_pace_and_memory_decides():
    assert run(BatchSizes(None), lambda n: None, 3) == [1, 8, 8]


def test_elsewhere_and_on_request_nothing_is_measured():
    assert run(BatchSizes(None), lambda n: 1 / n, 3, Gpu(is_gpu=False)) == [1, 1, 1]
    assert run(BatchSizes(3), lambda n: 1 / n, 3) == [3, 3, 3]
    assert BatchSizes(3).limit(JOB, 2) == 2, "an engine can so many"


def test_what_was_found_out_is_kept_by_model_device_and_shape(tmp_path):
    folder = tmp_path / "cache"
    assert run(BatchSizes(None, folder), lambda n: 0.1, 3, key="a")[-1] == 1
    assert run(BatchSizes(None, folder), lambda n: 1 / n, 4, key="b")[-1] == 8
    again = BatchSizes(None, folder)
    assert run(again, lambda n: 1 / n, 2, key="a") == [1, 1]
    assert run(again, lambda n: 1 / n, 2, key="b", job=OTHER) == [8, 8]
    assert run(BatchSizes(None, folder), lambda n: 1 / n, 2, key="another GPU") == [1, 2]


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"a": "many", "b": 99, "c": true}', b"[" * 10_000])
def test_a_damaged_file_is_measured_again(tmp_path, content):
    (tmp_path / "batches.json").write_bytes(content)
    assert run(BatchSizes(None, tmp_path), lambda n: 0.1, 3, key="a") == [1, 2, 1]
    assert run(BatchSizes(None, tmp_path), lambda n: 0.1, 1, key="a") == [1]


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert run(BatchSizes(None, tmp_path / "cache"), lambda n: 0.1, 3, key="a") == [1, 2, 1]
