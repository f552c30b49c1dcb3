"""Sessions: what makes clips in a process, from options that other processes can be given."""

from __future__ import annotations

import pickle
import subprocess
import sys

import program

from emt.train.teacher import Filter, Guidance
from emt_cli.batch.jobs import numerics
from emt_cli.batch.options import Kernels, Memory, Precision, TransferOptions
from emt_cli.batch.session import RunOptions, SessionOptions, open_session

OPENED = """
import pickle, sys
from emt_cli.batch.session import open_session
options = pickle.loads(bytes.fromhex(sys.argv[1]))
session = open_session(options, "cpu")
assert options.teacher or "torch" not in sys.modules, "a session that makes nothing loads nothing"
print(session.generator.model_sha256, session.generator.device.torch_device, type(session.generator).__name__)
"""


def test_a_session_is_opened_from_the_same_options_in_any_process(tmp_path):
    for teacher, kind in ((None, "Generator"), (Guidance(), "TeachingGenerator")):
        options = TransferOptions(model=str(program.model()), cache_dir=tmp_path, precision=Precision.BF16)
        given = SessionOptions.of(options, teacher)
        sent = pickle.dumps(given)
        assert pickle.loads(sent) == given
        ended = subprocess.run([sys.executable, "-c", OPENED, sent.hex()], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        here = open_session(given, "cpu")
        assert ended.stdout.split() == [here.generator.model_sha256, "cpu", kind]
        assert type(here.generator).__name__ == kind
        assert here.generator.device.precision == "bf16"


def test_options_of_a_run_can_be_sent_too():
    options = TransferOptions(batch_size="3", memory=Memory.AUTO, overwrite=True, kernels=Kernels.REFERENCE)
    given = RunOptions.of(options, numerics(options))
    assert given == RunOptions("auto kernels reference", batch_size=3, overwrite=True)
    filtered = RunOptions(filter=Filter(0.5, None))
    assert pickle.loads(pickle.dumps(filtered)) == filtered
    assert RunOptions.of(TransferOptions(memory=Memory.LOW), "auto").batch_size == 1, "what low memory has room for"
