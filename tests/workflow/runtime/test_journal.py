"""The bar tells speed and time left truly and costs nothing; tables survive odd files."""

import functools
import io

import pytest
import torch

from vitslim.workflow.runtime import journal as journal_module
from vitslim.workflow.runtime.journal import COLUMNS, Bar, Journal, read_summary, write_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    time = [0.0]
    monkeypatch.setattr(journal_module, "Bar", functools.partial(Bar, file=Terminal()))
    monkeypatch.setattr("tqdm.std.time", lambda: time[0])
    return time


@pytest.fixture
def journal():
    return Journal("search", None)


def test_speed_is_that_of_all_processes_and_time_left_that_of_the_stage(journal, clock):
    with journal.bar(100, 400) as bar:
        clock[0] = 10.0
        journal.show(bar, loss=1.5, penalty=0.25, images=512)
        bar.update(20)
        drawn = str(bar)
    assert "120/400 [00:10<02:20, 1024 images/s, loss 1.5000, penalty 0.2500]" in drawn


def test_an_evaluation_counts_for_the_time_left_and_not_for_the_speed(journal, clock):
    with journal.bar(0, 40) as bar:
        journal.show(bar, loss=1.5, images=100)
        clock[0] = 10.0
        bar.update(10)
        clock[0] = 100.0
        journal.say("evaluated")
        clock[0] = 110.0
        bar.update(10)
        drawn = str(bar)
    assert "20/40 [01:50<01:50, 100 images/s, loss 1.5000]" in drawn


def test_a_loss_is_not_read_before_the_bar_is_drawn(journal, clock):
    class Loss:
        read = 0

        def __float__(self) -> float:
            self.read += 1
            return 1.5

    loss = Loss()
    with journal.bar(0, 1000) as bar:
        for _ in range(100):
            bar.update()
            journal.show(bar, loss=loss, penalty=loss, images=8)
        assert loss.read == 0
        clock[0] = 1.0
        bar.update()
        assert loss.read == 2


def test_a_tensor_will_do_and_a_penalty_of_zero_is_left_out(journal, clock):
    with journal.bar(0, 10) as bar:
        journal.show(bar, loss=torch.tensor(0.5), penalty=0.0, images=8)
        assert "loss 0.5000]" in str(bar)


def test_a_quiet_journal_draws_and_says_nothing(clock, capsys):
    journal = Journal("search", None, quiet=True)
    with journal.bar(0, 10) as bar:
        clock[0] = 10.0
        journal.show(bar, loss=0.5, images=8)
        bar.update(5)
        journal.say("hello")
    assert capsys.readouterr().out == ""


def test_rows_of_other_stages_stay_whatever_is_in_them(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text("stage,epoch,loss,mood\ndense,1,0.5,good,more\nsearch,1,0.9,bad\nsea\n\n")
    Journal("search", path).record([{"stage": "search", "epoch": 1, "loss": 0.25, "extra": 1}])
    rows = read_summary(path)
    assert tuple(rows[0]) == COLUMNS
    told = [(row["stage"], row["loss"]) for row in rows if row["epoch"]]
    assert told == [("dense", "0.5"), ("search", "0.25")]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, ("a",), [{"a": 1}])
    before = path.read_text()

    def rows():
        yield {"a": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_table(path, ("a",), rows())
    assert path.read_text() == before == "a\n1\n"
