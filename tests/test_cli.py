"""Progress in a log file."""

from nanochat_jax import cli


def test_progress_is_lines_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setattr(cli, "SECONDS_BETWEEN_LINES", 0)
    with cli.progress_bar("CORE") as bar:
        bar(1, 8)
        bar(8, 8)
    assert capsys.readouterr().out == "CORE: 12 %\nCORE: 100 %\n"


def test_short_work_prints_no_progress_in_a_log_file(capsys):
    with cli.progress_bar("CORE") as bar:
        for done in range(1, 9):
            bar(done, 8)
    assert capsys.readouterr() == ("", "")
