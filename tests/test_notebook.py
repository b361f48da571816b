"""The notebook, executed as a person would, on a base model and on a chat model."""

import asyncio
import json
import re
from functools import partial
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from script_runs import ROOT

from nanochat_jax.checkpoint import LoadedModel, load_model
from nanochat_jax.evals.chat import chat_json, chat_table, evaluate_categorical, evaluate_generative
from nanochat_jax.evals.core import comparison, core_json, evaluate_core
from nanochat_jax.evals.core_tasks import read_bundle
from nanochat_jax.evals.generation import make_sampler
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.runs import read_metrics
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.tasks.registry import make_task

NOTEBOOK = ROOT / "notebooks" / "evaluate_checkpoint.ipynb"
TEXT = "the of and to in a is that it was for on are with as his they. " * 20
SMALL = {"TEXT": TEXT, "NEW_TOKENS": 4, "CORE_QUESTIONS": 5}
SMALL |= {"CHAT_TASKS": ["choice", "arithmetic"], "CHAT_QUESTIONS": 5}


@pytest.fixture
def execute(tiny_base, monkeypatch, tmp_path_factory):
    """execute(RUN=…): what each cell printed, by its id; a warning is a failure."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tiny_base))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.delenv("NANOCHAT_TASK_DATA", raising=False)

    def run(**parameters) -> dict[str, str]:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        at = 1 + [cell.id for cell in notebook.cells].index("parameters")
        lines = [f"{name} = {value!r}" for name, value in (SMALL | parameters).items()]
        notebook.cells.insert(at, nbformat.v4.new_code_cell("\n".join(lines), id="injected"))
        asyncio.run(NotebookClient(notebook, timeout=200).async_execute())
        return {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}

    return run


def printed(cell) -> str:
    for output in cell.outputs:
        assert output.get("name") != "stderr", output.text
    texts = (o.text if o.output_type == "stream" else " ".join(o.data) for o in cell.outputs)
    return "".join(texts)


def numbers(text: str, pattern: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(pattern, text)]


def bits_per_byte(loaded: LoadedModel, text: str) -> float:
    """By the model's own losses, each row of the trained length for itself."""
    model, params, tokenizer, _ = loaded
    tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text)])
    losses = jax.jit(partial(model.apply, method="losses"))
    nats = 0.0
    for first in range(0, len(tokens) - 1, model.config.sequence_len):
        row = tokens[None, first : first + model.config.sequence_len + 1]
        nats += float(losses({"params": params}, row[:, :-1], row[:, 1:]).sum())
    return nats / np.log(2) / len(text.encode())


def test_it_is_stored_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}


def test_a_base_model_beside_its_oldest_checkpoint(tiny_base, execute):
    found = execute(RUN="base")
    loaded = load_model(tiny_base / "runs" / "base")
    params = loaded.meta["plan"]["params"]["total"]
    assert found["card"].startswith(f"base: pretrain, step 6, {params:,} parameters\n")
    assert "image/png" in found["curves"]
    val = [r["bpb"] for r in read_metrics(tiny_base / "runs" / "base") if r["kind"] == "val"]
    assert numbers(found["scores"], r"Validation bpb +([\d.]+)") == [
        pytest.approx(val[-1], abs=1e-4)
    ]
    assert "Once upon a time" in found["samples"]
    bits = bits_per_byte(loaded, TEXT)
    assert numbers(found["bytes"], r"model: ([\d.]+) bits") == [pytest.approx(bits, abs=1e-4)]
    assert "CORE is left out" in found["core"]
    assert "has not learned to answer yet" in found["chat"]
    older = bits_per_byte(load_model(tiny_base / "runs" / "base", 3), TEXT)
    sides = numbers(found["two"], r"base, step [36] +([\d.]+) bits")
    assert sides == pytest.approx([bits, older], abs=1e-4)
    assert found["two-samples"].count("[base, step 3]") == found["samples"].count("---")
    assert len(found["two-tokens"].splitlines()) == 10


def test_the_newest_run_a_chat_model_beside_what_it_was_made_from(tiny_base, execute, tmp_path):
    write_bundle(tmp_path)
    found = execute(BUNDLE=str(tmp_path), SENTENCE="the of and")
    loaded = load_model(tiny_base / "runs" / "chat")
    assert found["card"].startswith("chat: sft, step 6, ")
    assert '"run": "base"' in found["card"]
    assert "Who are you?" in found["samples"]
    check_tokens(found["tokens"], loaded, "the of and")
    core, chat = measure(loaded, tmp_path)
    assert found["core"].strip() == core
    assert found["chat"].strip() == chat
    assert found["transcripts"].count("--- arithmetic") == 1
    wanted = [
        bits_per_byte(load_model(tiny_base / "runs" / name), TEXT) for name in ("chat", "base")
    ]
    sides = numbers(found["two"], r"(?:chat|base), step 6 +([\d.]+) bits")
    assert sides == pytest.approx(wanted, abs=1e-4)
    assert "Once upon a time" in found["two-samples"]


def check_tokens(table: str, loaded: LoadedModel, text: str) -> None:
    """One line for each token: its probability, and the three most likely tokens."""
    model, params, tokenizer, _ = loaded
    tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
    logits = jax.jit(model.apply)({"params": params}, np.array([tokens[:-1]]))
    p = jax.nn.softmax(logits[0])
    lines = table.splitlines()
    assert len(lines) == len(tokens) - 1
    for line, token, of_place in zip(lines, tokens[1:], np.asarray(p), strict=True):
        assert line.startswith(repr(tokenizer.decode([token])))
        shown = numbers(line, r" ([\d.]+)%")
        wanted = 100 * np.array([of_place[token], *np.sort(of_place)[:-4:-1]])
        assert shown == pytest.approx(wanted, abs=0.051)


def measure(loaded: LoadedModel, bundle_path: Path) -> tuple[str, str]:
    """The tables of CORE and of the chat tasks, as the package makes them."""
    mesh, tokenizer = make_mesh(1), loaded.tokenizer
    scorer = Scorer(loaded.model, mesh, from_logical(loaded.params, mesh))
    bundle = read_bundle(bundle_path)
    core = core_json(evaluate_core(scorer, tokenizer, bundle, max_per_task=5))
    choice, sums = (make_task(name, "test", limit=5) for name in SMALL["CHAT_TASKS"])
    sampler = make_sampler(loaded.model, loaded.params, loaded.tokenizer, max_new_tokens=8)
    results = [
        evaluate_categorical(scorer, tokenizer, choice),
        evaluate_generative(sampler, sums),
    ]
    return comparison(core, bundle.published), chat_table(chat_json(results))


def write_bundle(folder: Path) -> None:
    """Two small tasks in the format of CORE's bundle, and scores that somebody published."""
    (folder / "eval_data").mkdir()
    options = [
        {"query": f"{i} and", "choices": ["the", "of", "to"], "gold": i % 3} for i in range(8)
    ]
    continues = [{"context": f"{i} they are at", "continuation": "be this"} for i in range(8)]
    for name, questions in (("options", options), ("continues", continues)):
        lines = "\n".join(map(json.dumps, questions))
        (folder / "eval_data" / f"{name}.jsonl").write_text(lines)
    tasks = [
        {"label": name, "icl_task_type": kind, "dataset_uri": f"{name}.jsonl", "num_fewshot": [1]}
        for name, kind in (("options", "multiple_choice"), ("continues", "language_modeling"))
    ]
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))
    baselines = "Eval Task,Random baseline\noptions,33\ncontinues,0\n"
    (folder / "eval_meta_data.csv").write_text(baselines)
    (folder / "gpt2.csv").write_text("Task,Accuracy,Centered\noptions,0.5,0.25\nCORE,,0.25\n")


def test_the_example_of_the_readme_opens_a_run(tiny_base, monkeypatch):
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    example = next(block for block in blocks if "load_model" in block).split("```")[0]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tiny_base))
    names: dict = {}
    exec(example.replace('run_folder("cpu")', 'run_folder("base")'), names)
    assert names["logits"].shape == (*names["tokens"].shape, 300)
