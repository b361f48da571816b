"""tok_train, tok_eval and bench_tokenizer as a person starts them."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.evals import compression
from nanochat_jax.tokenizer import Tokenizer

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# The names under which tiktoken keeps the files of the two GPT tokenizers.
TIKTOKEN_CACHE = {
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "gpt2_vocab.bpe",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "gpt2_encoder.json",
    "9b5ad71b2ce5302211f9c61530b329a4922fc6a4": "cl100k_base.tiktoken",
}


@pytest.fixture
def run(tmp_path):
    """Starts a script with its own base directory, without any network."""
    environment = {
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken"),
        "HTTPS_PROXY": "http://127.0.0.1:9",  # refuses at once
        "COLUMNS": "200",
    }

    def start(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPTS / script, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            check=False,
        )

    return start


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Two training shards, and a validation shard with a word of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    texts = [
        [f"The {colour} fox number {i} jumps over {i * 7} dogs.\n" * 3 for i in range(300)]
        for colour in ("brown", "red")
    ]
    for index, rows in enumerate([*texts, ["zyzzyva zyzzyva " * 50] * 40]):
        pq.write_table(pa.table({"text": rows}), folder / f"shard_{index:05d}.parquet")
    return folder


def train(run, dataset, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("tok_train.py", f"--dataset={dataset}", "--vocab-size=350", *arguments)


def test_train_writes_a_tokenizer_of_the_training_shards(run, dataset, tmp_path):
    done = train(run, dataset, "--name=mine")
    assert done.returncode == 0, done.stderr
    tok = Tokenizer.load(tmp_path / "base" / "tokenizer" / "mine")
    assert tok.vocab_size == 350
    assert tok.provenance["documents"] == 600
    assert tok.provenance["files"] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert len(tok.encode(" jumps")) < len(" jumps")
    assert len(tok.encode("zyzzyva")) == len("zyzzyva"), "the validation shard was trained on"
    assert "350 tokens" in done.stdout
    assert "characters per token" in done.stdout


def test_train_obeys_its_limits(run, dataset, tmp_path):
    done = train(run, dataset, "--max-chars=1000", "--doc-cap=60", "--vocab-size=300")
    assert done.returncode == 0, done.stderr
    provenance = Tokenizer.load(tmp_path / "base" / "tokenizer" / "default").provenance
    assert provenance["chars"] == 60 * 17
    assert provenance["documents"] == 17


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=nowhere/at/all"], "there is no data set at nowhere/at/all"),
        (["--vocab-size=100"], "vocab_size=100 is too small"),
        (["--vocab-size=60000"], "use a smaller --vocab-size or more text"),
    ],
)
def test_train_says_what_is_wrong_in_one_line(run, dataset, tmp_path, arguments, message):
    done = train(run, dataset, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "base" / "tokenizer" / "default").exists()


def test_train_names_a_damaged_shard(run, dataset):
    (dataset / "shard_00001.parquet").write_bytes(b"PAR1 cut off")
    done = train(run, dataset)
    assert done.returncode == 1
    assert f"{dataset / 'shard_00001.parquet'} cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_without_the_gpt_tokenizers(run, dataset, tmp_path):
    assert train(run, dataset).returncode == 0
    done = run("tok_eval.py", f"--dataset={dataset}")
    assert done.returncode == 0, done.stderr
    assert "not available: GPT-2, GPT-4" in done.stdout
    report = (tmp_path / "base" / "tokenizer" / "default" / "tok_eval.md").read_text()
    lines = [line for line in report.splitlines() if line.startswith("| ")]
    kinds = [*compression.SAMPLES, "training text", "validation text"]
    assert [line.split(" | ")[0].strip("|- ") for line in lines] == ["text", "", *kinds]
    assert all(line.count("not available") == 2 for line in lines[2:])
    assert "350 tokens" in report


def test_eval_with_the_gpt_tokenizers(run, dataset, tmp_path, real_data):
    (tmp_path / "tiktoken").mkdir()
    for cached, name in TIKTOKEN_CACHE.items():
        shutil.copy(real_data / "tokenizers" / name, tmp_path / "tiktoken" / cached)
    assert train(run, dataset).returncode == 0
    done = run("tok_eval.py", f"--dataset={dataset}")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "base" / "tokenizer" / "default" / "tok_eval.md").read_text()
    assert "not available" not in done.stdout + report
    rows = {
        cells[0].strip("| "): cells[1:]
        for cells in (line.split(" | ") for line in report.splitlines())
    }
    assert len(rows["Korean"]) == 7
    gpt2, gpt4 = (float(rows["Korean"][column]) for column in (3, 5))
    assert gpt4 > 1.5 * gpt2, "GPT-4 knows Korean far better than GPT-2"
    n_bytes, ours = (int(cell.replace(",", "")) for cell in rows["news"][:2])
    expected = ours / (n_bytes / float(rows["news"][3])) - 1
    assert float(rows["news"][4].rstrip("%")) / 100 == pytest.approx(expected, rel=0.02)


def test_eval_without_a_tokenizer(run, dataset):
    done = run("tok_eval.py", f"--dataset={dataset}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no tokenizer at")


def test_comparing_counts_bytes_and_tokens():
    rows = compression.compare(
        {"a": "né", "none": ""}, lambda text: [0] * 4, {"x": lambda text: [0] * 2, "y": None}
    )
    assert [row.name for row in rows] == ["a"]
    assert (rows[0].n_bytes, rows[0].bytes_per_token(), rows[0].bytes_per_token("x")) == (
        3,
        3 / 4,
        1.5,
    )
    assert rows[0].difference("x") == 1.0
    assert rows[0].others == {"x": 2}


def test_the_sample_texts_are_of_their_kinds():
    texts = compression.sample_texts()
    assert all(150 <= len(text.split()) <= 500 for text in texts.values())
    korean = [character for character in texts["Korean"] if "가" <= character <= "힣"]
    assert len(korean) > 400
    assert texts["LaTeX maths"].count("\\") > 80


def test_bench_compares_merges_and_prints_json(run, dataset):
    contestants = ["ours", "ours_iter", "rustbpe"]
    done = run(
        "bench_tokenizer.py",
        f"--dataset={dataset}",
        "--vocab-size=320",
        "--threads=2",
        "--contestants",
        *contestants,
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    if not installed("rustbpe"):
        assert line[f"{contestants.pop()}_s"] is None
    for name in contestants:
        assert line[f"{name}_s"] > 0
        assert line[f"{name}_peak_mib"] > 5
    assert line["identical_merges"] is True
    assert line["encode_mb_s"] > 0
    assert line["vocab_size"] == 320


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
