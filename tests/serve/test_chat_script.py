"""The terminal chat: answers as they come, commands, a long talk, Ctrl-C; the script as a whole."""

import importlib
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import scripted
from running import script_environment

from nanochat_jax.serve.terminal import Settings, Terminal, talk

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chat.py"
SHOWN = "Hi 😀⟨1+2⟩ = 3 ."  # what the scripted model says, on a terminal
GREEDY = Settings(temperature=0, max_tokens=100)


@pytest.fixture
def say_all(spare_scheduler, loaded, monkeypatch, capsys):
    """Types these lines and returns what was printed, and the terminal as it was left."""

    def start(*lines: str, stage: str = "sft", settings: Settings = GREEDY):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        model = loaded._replace(meta=loaded.meta | {"stage": stage})
        with Terminal(spare_scheduler, model, "scripted", settings) as terminal:
            talk(terminal)
        return capsys.readouterr().out, terminal

    return start


def test_a_conversation(say_all):
    out, terminal = say_all("hello", "", "and?")
    assert "scripted, step 7. Ask something" in out
    assert out.count(SHOWN) == 2
    answer = {"role": "assistant", "content": scripted.ANSWER_PARTS}
    questions = [{"role": "user", "content": text} for text in ("hello", "and?")]
    assert terminal.messages == [questions[0], answer, questions[1], answer]


def test_commands(say_all):
    out, terminal = say_all(
        *("/temperature 0.5", "/topk 7", "/tokens 2", "/tokens", "/temperature", "hello"),
    )
    assert "max_tokens is 2\n" in out
    assert out.count("temperature is 0.5\n") == 2
    assert terminal.settings == Settings(temperature=0.5, top_k=7, max_tokens=2)
    assert "Hi\n" in out


def test_mistakes_change_nothing(say_all):
    out, terminal = say_all("/temperature hot", "/topk -1", "/tokens 0", "/sing", "/help")
    assert "hot is not a number" in out
    assert "top_k must be from 0" in out
    assert "max_tokens must be at least 1" in out
    assert "there is no command /sing" in out
    assert "/clear" in out
    assert terminal.settings == GREEDY


def test_clear_forgets_and_quit_leaves(say_all):
    out, terminal = say_all("hello", "/clear", "/quit", "never said")
    assert out.count(SHOWN) == 1
    assert terminal.messages == []


def test_what_no_longer_fits_is_forgotten_and_reported(say_all):
    settings = Settings(temperature=0, max_tokens=20)
    question = "q" * 2000
    out, terminal = say_all(question, question, question, "x" * 5000, "short", settings=settings)
    assert out.count("The oldest 2 messages no longer fit and are forgotten.") == 1
    assert "the last message is too long" in out
    assert len(terminal.messages) == 6


def test_a_base_model_continues_the_text(say_all):
    out, terminal = say_all("it goes x", stage="pretrain", settings=Settings(0, max_tokens=7))
    assert "has only been pretrained" in out
    assert "yzxyzxy\n" in out
    assert terminal.messages[-1]["content"] == [{"type": "text", "text": "yzxyzxy"}]


def test_the_same_seed_gives_the_same_answers(say_all):
    def answer(seed):
        settings = Settings(temperature=1, max_tokens=30, seed=seed)
        return say_all("what?", stage="pretrain", settings=settings)[1].messages[-1]["content"]

    assert answer(1) == answer(1) != answer(2)


def test_one_question_from_standard_input(run_folder, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(run_folder.parent.parent))
    monkeypatch.syspath_prepend(SCRIPT.parent)
    chat = importlib.import_module("chat")
    monkeypatch.setattr(chat, "start", lambda: None)  # would change this process's JAX
    monkeypatch.setattr(sys, "argv", ["chat.py", "-p", "-", "--temperature", "0"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    chat.main()
    assert capsys.readouterr().out.strip() == SHOWN


def test_ctrl_c_stops_the_answer_and_then_leaves(run_folder, tmp_path):
    """A model that never ends: Ctrl-C in its answer, another question, Ctrl-C at the prompt."""
    folder = tmp_path / "runs" / "endless"
    scripted.write_run(folder, stage="pretrain")
    flags = ["--run", str(folder), "--temperature", "0", "--max-tokens", "4000"]
    script = subprocess.Popen(
        [sys.executable, SCRIPT, *flags],
        env=script_environment(run_folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert script.stdin is not None
    assert script.stdout is not None

    def read_until(text: str) -> None:
        seen = ""
        while text not in seen:
            character = script.stdout.read(1)
            assert character, f"{seen!r} ended before {text!r}"
            seen += character

    read_until("> ")
    for _ in range(2):
        script.stdin.write("x\n")
        script.stdin.flush()
        read_until("yzxyzx")
        script.send_signal(signal.SIGINT)
        read_until("[stopped]")
        read_until("> ")
    script.send_signal(signal.SIGINT)
    _, err = script.communicate(timeout=60)
    assert (script.returncode, err) == (0, "")
