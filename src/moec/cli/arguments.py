"""Options that several commands declare alike."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.cli.command import LAYOUT, PROCESS

Ranks = Annotated[int | None, typer.Option(help="Devices.", show_default="the target's", rich_help_panel=LAYOUT)]
Tp = Annotated[int, typer.Option(help="Devices of an attention replica.", rich_help_panel=LAYOUT)]
Dp = Annotated[
    int | None, typer.Option(help="Attention replicas.", show_default="ranks / TP / PP", rich_help_panel=LAYOUT)
]
Ep = Annotated[
    int | None,
    typer.Option(help="Devices that share the routed experts.", show_default="all of a stage", rich_help_panel=LAYOUT),
]
Redundant = Annotated[
    int | None,
    typer.Option(
        help="Expert slots beyond one for each expert.", show_default="the fewest that divide", rich_help_panel=LAYOUT
    ),
]
Pp = Annotated[int, typer.Option(help="Pipeline stages.", rich_help_panel=LAYOUT)]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of the kernels.", show_default="all usable CPUs", rich_help_panel=PROCESS),
]
CheckWeights = Annotated[
    bool, typer.Option("--check", help="Compare the hashes of weights, too.", rich_help_panel=PROCESS)
]
