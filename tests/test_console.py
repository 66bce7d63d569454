"""What a user sees of a long step: a line now and then where there is no terminal, and no flood of them."""

from ibft import console as module
from ibft.console import Console


def test_progress_without_a_terminal_is_a_line_every_half_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Console().progress("generating", 1280) as advance:
        for done in range(1, 71):
            now[0] += 1
            advance(done)
    assert capsys.readouterr().out == "generating: 30 of 1,280\ngenerating: 60 of 1,280\n"


def test_none_where_other_lines_tell(monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_SECONDS", 0)
    with Console().progress("training", 2, elsewhere=False) as advance:
        advance(1)
    assert capsys.readouterr().out == ""
