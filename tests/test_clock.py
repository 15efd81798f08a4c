"""The line that shows an activity and its seconds, on a terminal."""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers.command_line import ROOT
from tests.helpers.made_runs import open_report
from train import clock, output
from train.report import NullReport


class Terminal:
    """Stands for standard output; keeps what is written."""

    def __init__(self):
        self.text = ""
        self.encoding = "utf-8"

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def until(self, text, seconds=10):
        limit = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < limit, self.text
            time.sleep(0.01)


@contextlib.contextmanager
def a_terminal():
    """A context, since pytest sets sys.stdout after fixtures have run."""
    before, sys.stdout = sys.stdout, Terminal()
    try:
        yield sys.stdout
    finally:
        clock.end_line()
        sys.stdout = before


def screen(text):
    """The lines that a terminal shows after text, without escape codes."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_seconds_run_and_the_line_is_erased():
    with a_terminal() as terminal:
        with clock.show("reading digits"):
            terminal.until("reading digits ... (1 s)")
            assert screen(terminal.text) == ["reading digits ... (1 s)"]
        assert screen(terminal.text) == [""]


def test_an_exception_stops_it():
    with a_terminal() as terminal:
        before = threading.active_count()
        with (
            pytest.raises(ZeroDivisionError),
            clock.show("reading", done="read"),
        ):
            _ = 1 / 0
        assert threading.active_count() == before
        assert screen(terminal.text) == [""]


def test_it_fits_a_narrow_terminal(monkeypatch):
    with a_terminal() as terminal:
        monkeypatch.setenv("COLUMNS", "10")
        monkeypatch.setenv("LINES", "5")
        with clock.show("reading digits"):
            terminal.until("reading")
        assert all(len(part) < 10 for part in re.split("[\r\n]", terminal.text))


@pytest.mark.parametrize("seconds, line", [(3, ""), (12, "compiled in 12 s\n")])
def test_without_a_terminal_only_what_took_long(
    seconds, line, capsys, tmp_path, monkeypatch
):
    times = iter([0.0, seconds])
    monkeypatch.setattr(clock.time, "monotonic", lambda: next(times, seconds))
    with clock.show("compiling", done="compiled"):
        pass
    monkeypatch.undo()
    assert capsys.readouterr().out == line
    monkeypatch.setattr(clock, "LONG", -1.0)
    with clock.show("compiling"):
        pass
    assert capsys.readouterr().out == ""
    with open_report(tmp_path, epochs=2) as report:
        with report.clock("compiling", done="compiled"):
            pass
        assert capsys.readouterr().out == "compiled in 0 s\n"
    with NullReport(None, done=0).clock("compiling", done="compiled"):
        pass
    assert capsys.readouterr().out == ""


def test_a_clock_in_the_progress_bar(tmp_path):
    with a_terminal() as terminal:
        with open_report(tmp_path, epochs=2) as report:
            report.say("headline")
            with report.clock("compiling"):
                terminal.until("compiling (1 s):   0%")
                report.say("a line")
            report.advance(20)
            elapsed = report._bar.format_dict["elapsed"]
            assert elapsed < 0.9  # without the seconds of the clock
        lines = screen(terminal.text)
        assert lines[:2] == ["headline", "a line"]
        assert lines[2].startswith("100%|") and lines[3:] == [""]


def test_an_exit_ends_the_line_of_the_bar(tmp_path):
    with a_terminal() as terminal:
        with open_report(tmp_path, epochs=2):
            clock.end_line()
            assert terminal.text.endswith("\n")
        written = terminal.text
        clock.end_line()
        assert terminal.text == written


def test_a_terminal_that_is_gone():
    with a_terminal() as terminal:

        def gone(_):
            raise OSError(5, "Input/output error")

        terminal.write = gone
        with clock.show("reading"):
            time.sleep(0.1)
        sys.stdout = None
        assert not output.is_terminal()
        with clock.show("reading"):
            pass


def on_terminal(script, *, send=None, after=""):
    """Runs a script with a terminal; returns exit code and output."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        stdin=child,
        stdout=child,
        stderr=child,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(child)
    text = b""
    while True:
        try:
            text += os.read(parent, 1000)
        except OSError:  # closed
            break
        if send and after.encode() in text:
            process.send_signal(send)
            send = None
    os.close(parent)
    return process.wait(timeout=60), text.decode()


def test_ctrl_c_leaves_a_line_of_its_own():
    code, text = on_terminal(
        "import time; from train import clock, signals\n"
        "signals.listen(); clock.start('importing'); time.sleep(60)",
        send=signal.SIGINT,
        after="importing ... (1 s)",
    )
    assert code == 130
    assert screen(text.replace("^C", "")) == [
        "train: Stopped with nothing to save; rerun the same command to train.",
        "",
    ]


def test_the_first_thing_seen_is_that_it_imports():
    code, text = on_terminal(
        "import runpy, sys; sys.argv = ['train', '--config.zzz=1']\n"
        "runpy.run_module('train', run_name='__main__', alter_sys=True)"
    )
    assert code == 1 and text.startswith("\rimporting ...\r")
    first, *_ = screen(text)
    assert first.startswith("train: There is no config.zzz")
