"""What scripts say while something long runs."""

from nanochat_jax import cli


def test_a_log_file_is_told_of_progress_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(cli, "SECONDS_BETWEEN_LINES", 0)
    with cli.progress_bar("CORE") as bar:
        bar(1, 8)
        bar(8, 8)
    assert capsys.readouterr().out == "CORE: 12 %\nCORE: 100 %\n"


def test_what_is_soon_done_fills_no_log_file(capsys):
    with cli.progress_bar("CORE") as bar:
        for done in range(1, 9):
            bar(done, 8)
    assert capsys.readouterr() == ("", "")
