"""`moec serve`: a compiled artifact over HTTP, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.cli.arguments import CheckWeights, Threads
from moec.cli.command import SERVER

_EXAMPLES = """\
moec serve tiny.moec --port 8000
curl localhost:8000/v1/completions -d '{"prompt": "import os", "max_tokens": 16}'
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve", epilog=_EXAMPLES)(serve)


def serve(
    artifact: Annotated[str, typer.Argument(help="Folder that `moec compile` wrote.")],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: all.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.", rich_help_panel=SERVER)] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model.", show_default="the artifact's", rich_help_panel=SERVER),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each request.", rich_help_panel=SERVER)] = False,
    speculate: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Draft up to N tokens a step with the module of `moec compile --mtp`."),
    ] = 0,
    threads: Threads = None,
    check: CheckWeights = False,
) -> None:
    """Serve an artifact over HTTP, in the form of OpenAI's API.

    /v1/completions, /v1/chat/completions (both with stream), /v1/models and /health. Requests share the model's steps;
    at most as many run at a time as `moec compile --batch` says.
    """
    from moec.cli.options import UsageError
    from moec.cli.output import note
    from moec.runtime import load
    from moec.runtime.launch import launched
    from moec.runtime.serving.http import HttpServer
    from moec.runtime.serving.worker import Worker

    if launched():
        raise UsageError(message="moec serve is one process: compile without --ranks and leave torchrun away")
    model = load(artifact, check=check, threads=threads)
    called = name or model.artifact.manifest.model
    worker = Worker(model, speculate)
    try:
        with HttpServer(model, worker, called, host, port, log=not quiet) as server:
            address, bound = server.server_address[:2]
            limits = f"batch {model.artifact.manifest.batch}, context {model.context}"
            note(f"serving {called} at http://{address!s}:{bound} ({limits}); Ctrl-C ends it")
            server.serve_forever()
    finally:
        worker.close()
