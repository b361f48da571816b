"""bench_infer as a person starts it, on the smallest model; and what its speed rests on."""

import json

from random_model import random_model

from nanochat_jax.engine.engine import make_engine
from nanochat_jax.planner import hlo


def test_the_last_line_holds_what_was_measured(tiny_base, monkeypatch, call):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tiny_base))
    flags = ("--depth=2", "--vocab-size=300", "--max-seq-len=64", "--prompt-tokens=20")
    output = call("bench_infer.py", *flags, "--new-tokens=8", "--batch-sizes=1,3", "--repeats=2")
    result = json.loads(output.splitlines()[-1])
    wanted = ("loop_tokens_per_s", "step_tokens_per_s", "loop_over_step", "ttft_ms", "peak_gib")
    assert all(result[key] > 0 for key in wanted)
    assert result["loop_tokens_per_s"] == result["rows"][0]["tokens_per_s"]
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    assert {"bandwidth_share", "device", "depth"} <= result.keys()


def test_the_decode_loop_copies_no_ring():
    """Each token writes one position of a ring in place; a copy would cost more than the model."""
    model, params = random_model(sequence_len=192)
    for slots in (1, 4):
        compiled = make_engine(model, n_slots=slots, chunk=4).lowered(params)["decode"].compile()
        module = hlo.parse(compiled.as_text())
        loop = max(module.computations.values(), key=lambda c: len(c.instructions))
        assert len(loop.instructions) > 100
        rings = (f"[{slots},2,129,8]", f"[{slots},2,192,8]")
        copied = [
            i.name
            for i in loop.instructions.values()
            if i.opcode == "copy" and any(ring in i.shape for ring in rings)
        ]
        assert copied == []
