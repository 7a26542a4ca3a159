"""`soup-jax serve`: a soup as a service, with a page to try it.

    soup-jax serve --run=runs/quickstart/soup

answers on http://127.0.0.1:8000: POST /v1/specialists makes a specialist of documents, and
/v1/completions speaks the OpenAI protocol with its name as the model. For other machines than this
one, give `--host=0.0.0.0` and a token in a file, which every request must bear.
"""

import ipaddress
import pathlib
from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError
from soup_jax.inputs import read_text

# In the Host header; of an IPv6 address starlette compares what stands before its first colon.
_HERE = ["127.0.0.1", "localhost", "["]


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    string("run", "", "the run, or the soup folder", flag_values=values)
    string("corpus", "", "the prepared corpus, if it was moved", flag_values=values)
    integer("step", None, "checkpoint; default the newest", flag_values=values)
    string("host", "127.0.0.1", "address to listen on", flag_values=values)
    integer("port", 8000, "port to listen on", lower_bound=0, upper_bound=65535, flag_values=values)
    string(
        "token_file",
        "",
        "a file with the token that requests must bear; needed for another host than this one",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "allowed_host",
        [],
        "a name by which the server may be called, in the Host header; default: any with a token, "
        "else those of this machine",
        flag_values=values,
    )
    flags.DEFINE_float(
        "memory_gib",
        4.0,
        "of merged specialists and their caches, beside the bank",
        lower_bound=0.0,
        upper_bound=1e6,
        flag_values=values,
    )
    integer("max_requests", 256, "texts under way or waiting", lower_bound=1, flag_values=values)
    integer(
        "rows",
        16,
        "texts of one specialist, or of all with low-rank experts, that are decoded together",
        lower_bound=1,
        upper_bound=1024,
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Serve until interrupted; returns the exit status."""
    if not values.run:
        raise UserError("--run=RUN is required: a run or a soup folder")
    token = _token(values.token_file)
    local = _is_local(values.host)
    if not local and not token:
        raise UserError(
            f"--host={values.host} opens the server to other machines: give --token_file=FILE, or "
            "listen on 127.0.0.1"
        )
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise UserError("serving needs starlette and uvicorn: pip install 'soup_jax[serve]'") from e
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.specialists.open import load
    from soup_jax.specialists.serve.app import make_app
    from soup_jax.specialists.serve.engine import Engine, Limits

    limits = Limits(
        memory_bytes=int(values.memory_gib * (1 << 30)),
        requests=values.max_requests,
        rows=values.rows,
    )
    engine = Engine(load(values.run, step=values.step, corpus_dir=values.corpus), limits)
    hosts = values.allowed_host or (["*"] if token else _HERE)
    app = make_app(engine, token=token, hosts=hosts)
    soup = engine.soup
    print(f"step {soup.step} of {soup.place}: {soup.num_experts} experts", flush=True)
    config = uvicorn.Config(
        app,
        host=values.host,
        port=values.port,
        log_level="warning",
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = uvicorn.Server(config)
    try:
        sockets = [config.bind_socket()]
        sockets[0].listen()  # whoever reads the line below may connect at once
    except (SystemExit, OSError) as e:
        raise UserError(f"--host={values.host} --port={values.port}: the port is taken") from e
    port = sockets[0].getsockname()[1]
    name = f"[{values.host}]" if ":" in values.host else values.host
    print(f"serving on http://{name}:{port} (Ctrl-C ends it)", flush=True)
    server.run(sockets=sockets)
    return 0


def _token(path: str) -> str:
    if not path:
        return ""
    token = read_text(pathlib.Path(path), limit=4096).strip()
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{path} must hold one token of at least 16 printable ASCII characters")
    return token


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
