"""Serves a model: OpenAI's API and a page to chat on.

    python scripts/serve.py                                   the newest run, on this machine only
    python scripts/serve.py --run d24 --port 8080 --slots 32
    NANOCHAT_API_KEYS=secret python scripts/serve.py --host 0.0.0.0

Then open http://127.0.0.1:8000 in a browser, or send requests from any client of OpenAI's API:

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": true}'

Ctrl-C or SIGTERM lets running answers finish first.
"""

from dataclasses import replace

from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import run_script
from nanochat_jax.config import parse
from nanochat_jax.distributed import say, start
from nanochat_jax.engine.scheduler import make_scheduler
from nanochat_jax.runs import default_run, run_folder
from nanochat_jax.serve.app import create_app
from nanochat_jax.serve.middleware import read_keys
from nanochat_jax.serve.server import bind, serve, url_of
from nanochat_jax.serve.settings import ServeConfig
from nanochat_jax.serve.text import prompt_format
from nanochat_jax.sharding import make_mesh


def main() -> None:
    config = parse(ServeConfig, "serve", description=__doc__)
    config = replace(config, run=config.run or default_run())
    bound = bind(config)  # before the model is loaded, so that mistakes show early
    if not config.is_local and not read_keys(config.api_keys_file):
        say(
            f"WARNING: anyone who can reach {config.host} port {config.port} can use this server; "
            "protect it with --api-keys-file or NANOCHAT_API_KEYS"
        )
    start()
    loaded = load_model(run_folder(config.run), config.step)
    scheduler = make_scheduler(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        n_slots=config.slots,
        chunk=config.chunk,
        max_queue=config.max_queue,
        mesh=make_mesh(config.n_devices),
    )
    app = create_app(scheduler, loaded.tokenizer, loaded.meta, config, progress=say)
    say(f"{config.run}, step {loaded.meta['step']}: {NOTES[prompt_format(loaded.meta)]}")
    say(f"listening on {url_of(bound)}")
    serve(app, bound, say)


NOTES = {
    "base": "a base model, which continues texts and has not learned to chat",
    "chat": "a chat model",
}

if __name__ == "__main__":
    run_script(main)
