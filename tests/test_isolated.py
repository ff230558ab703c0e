"""Jobs in processes of their own: a crash or a hang costs one job and no more."""

import signal
import time

import pytest

from fused_peft.tools import isolated
from fused_peft.tools.isolated import Failure


def answers(function, jobs, seconds=60.0, **options):
    return dict(isolated.run(function, jobs, seconds, **options))


def test_results_come_back_by_number():
    assert answers("operator:add", [(1, 2), (3, 4), ("a", "b")], workers=2) == {0: 3, 1: 7, 2: "ab"}


def test_what_a_job_raises_is_its_answer_and_the_process_goes_on():
    found = answers("operator:truediv", [(1, 0), (1, 2)])
    assert found == {0: Failure("ZeroDivisionError: division by zero"), 1: 0.5}


def test_what_a_job_prints_is_no_answer(capfd):
    assert answers("builtins:print", [("one",), ("two",)]) == {0: None, 1: None}


def test_a_crash_costs_one_job():
    """A signal, as after a bad access, and an exit, as by a library that gives up."""
    found = answers("signal:raise_signal", [(int(signal.SIGUSR1),), (int(signal.SIGCHLD),)])
    assert found[0].fatal
    assert found[0].why.startswith(f"its process was ended by signal {int(signal.SIGUSR1)}")
    assert found[1] is None
    (gone,) = answers("os:_exit", [(3,)]).values()
    assert gone == Failure("its process ended with exit status 3", fatal=True)


def test_a_hang_costs_one_job():
    begin = time.time()
    found = answers("time:sleep", [(600,), (0,)], seconds=2.0)
    assert found == {0: Failure("its process took too long", fatal=True), 1: None}
    assert time.time() - begin < 120


def test_the_deadline_is_no_fault_of_a_jobs():
    """A job that it cuts short is told apart from one that hangs, and those behind it do not begin."""
    found = answers("time:sleep", [(0,), (600,), (0,)], seconds=60.0, deadline=time.time() + 20)
    assert found == {0: None, 1: Failure("out of time")}
    assert answers("time:sleep", [(0,)], deadline=0.0) == {}


def test_what_cannot_be_begun_is_said(monkeypatch):
    (answer,) = answers("no_such_module:f", [()]).values()
    assert answer == Failure("ModuleNotFoundError: No module named 'no_such_module'")
    monkeypatch.setattr(isolated.sys, "executable", "/bin/false")
    (answer,) = answers("operator:add", [(1, 2)]).values()
    assert answer == Failure("RuntimeError: a process could not be begun: it ended with exit status 1")


def test_processes_are_kept_from_one_run_to_the_next():
    with isolated.Pool(2) as pool:
        first, second = ({pid for _, pid in pool.run("os:getpid", [()] * 6, 60)} for _ in range(2))
        assert second <= first
        (process, *_) = pool.idle
    assert process.running.poll() is not None


def test_a_cuda_error_ends_the_process_since_its_context_is_gone(monkeypatch, tmp_path):
    (tmp_path / "faulty.py").write_text(
        "def f(n):\n    if n:\n        raise RuntimeError('CUDA error: an illegal memory access')\n    import os\n"
        "    return os.getpid()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    first, failed, second = (v for _, v in sorted(answers("faulty:f", [(0,), (1,), (0,)]).items()))
    assert failed == Failure("RuntimeError: CUDA error: an illegal memory access", fatal=True)
    assert first != second


def test_nothing_to_do():
    assert answers("operator:add", []) == {}


@pytest.mark.parametrize("workers", [1, 3])
def test_each_job_is_answered_once(workers):
    assert answers("operator:neg", [(i,) for i in range(9)], workers=workers) == {i: -i for i in range(9)}
