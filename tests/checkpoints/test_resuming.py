"""What an interrupted writer completed stays, whatever befalls those that go on."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxmerge.checkpoints import LeafInfo, journal, open_writer, output
from jaxmerge.checkpoints.journal import Journal, completed
from jaxmerge.hosts import OtherHostError

LEAVES = {"a": LeafInfo((3,), np.dtype("float64")), "b": LeafInfo((), np.dtype("int8"))}


def opened(tmp_path, **options):
    return open_writer(tmp_path / "out", LEAVES, identity="it", **options)


def fails_after_a(tmp_path, error):
    """The first of two leaves is complete when an error ends a writer."""

    def use():
        with opened(tmp_path) as writer:
            writer.write("a", np.arange(3.0))
            writer.complete("a", None)
            raise error

    with pytest.raises(error):
        use()


def assert_kept(tmp_path):
    with opened(tmp_path) as writer:
        assert writer.done == {"a": None}
        writer.write("b", np.int8(1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, OSError, OtherHostError])
def test_an_error_removes_nothing_of_an_earlier_run(tmp_path, error):
    fails_after_a(tmp_path, KeyboardInterrupt)
    with pytest.raises(error), opened(tmp_path):
        raise error("something else")
    assert_kept(tmp_path)


@pytest.mark.parametrize("calls", range(3))
def test_an_error_elsewhere_while_opening_removes_nothing(tmp_path, calls):
    """In whatever step another process fails, while this one is the first."""
    fails_after_a(tmp_path, KeyboardInterrupt)
    left = [calls]

    def agree(error):
        left[0] -= 1
        if left[0] < 0:
            raise OtherHostError("process 1 failed")

    with pytest.raises(OtherHostError), opened(tmp_path, agree=agree):
        pass
    assert_kept(tmp_path)


def test_a_journal_that_cannot_be_opened_removes_nothing(tmp_path, monkeypatch):
    fails_after_a(tmp_path, KeyboardInterrupt)

    def refuse(*arguments):
        raise OSError("Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(journal.fcntl, "flock", refuse)
        with pytest.raises(OSError, match="Stale"), opened(tmp_path):
            pass
    assert_kept(tmp_path)


def test_an_error_in_a_first_run_leaves_nothing(tmp_path):
    fails_after_a(tmp_path, OSError)
    assert not list(tmp_path.iterdir())


def test_all_processes_go_on_from_the_same_leaves(tmp_path, monkeypatch):
    """Threads stand for them: the second reads the journals late."""
    barrier = threading.Barrier(2, timeout=60)
    first_is_done = threading.Event()

    def agree(error):
        barrier.wait()
        if error is not None:
            raise error

    def read_late(path):
        if threading.current_thread().name.endswith("_1"):
            # Without an agreement after it, the first one would not wait.
            first_is_done.wait(timeout=0.1)
        return completed(path)

    monkeypatch.setattr(output, "completed", read_late)
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_SYNCS", 0)

    def process(number, names):
        def use():
            with opened(tmp_path, process=number, agree=agree) as writer:
                done.append(set(writer.done))
                for name in names - set(writer.done):
                    writer.complete(name, None)
                first_is_done.set()
                barrier.wait()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            use()

    for names in (({"b"}, {"a", "b"}), ({"a"}, {"a"})):
        done = []
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(process, i, names[i]) for i in range(2)]
            for future in futures:
                future.result()
        first_is_done.clear()
    assert done == [{"b"}, {"b"}]


def test_a_journal_is_flushed_by_one_thread_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_SYNCS", 0)
    syncing, go_on, syncs = threading.Event(), threading.Event(), []

    def sync():
        syncs.append(None)
        syncing.set()
        go_on.wait(timeout=60)

    notes = Journal(tmp_path / "journal", "it", sync)
    with ThreadPoolExecutor(2) as pool:
        adding = pool.submit(notes.add, "a", 1)
        assert syncing.wait(timeout=60)
        flushing = pool.submit(notes.flush)
        with pytest.raises(TimeoutError):
            flushing.result(timeout=0.2)
        assert len(syncs) == 1
        go_on.set()
        adding.result()
        flushing.result()
    notes.close()
    assert (tmp_path / "journal").read_text() == '"it"\n["a", 1]\n'


def test_a_journal_that_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    path.write_text('"it"\n["ä", 1]\n["b", ', encoding="utf-8")
    notes = Journal(path, "it", lambda: None)
    assert (notes.done, notes.is_new) == ({"ä": 1}, False)
    notes.add("c", 2)
    notes.flush()
    notes.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[1:] == ['["ä", 1]', '["c", 2]']
