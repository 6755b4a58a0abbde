"""One rank of a GPU artifact: the stand-in in place of the driver, Triton's interpreter in place of the GPU, gloo."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import interp_fixes
import numpy as np
import torch
from standin import StandIn

from moec.runtime.artifact import open_artifact
from moec.runtime.distributed.model import DistributedModel
from moec.runtime.distributed.monitor import Monitor
from moec.runtime.distributed.world import join
from moec.runtime.model import Model


def opened(path: Path) -> tuple[Any, StandIn]:
    """The model of an artifact: this rank's part of it, or all of it in a single process."""
    driver = StandIn(path / "kernels")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        from moec.runtime.cuda.engine import GpuEngine

        artifact = open_artifact(path)
        return Model(artifact, engine=GpuEngine(artifact, library=driver)), driver
    world, store = join(60.0)
    monitor = Monitor(world.rank, world.size, store, 60.0, world.progress)
    artifact = open_artifact(path, rank=world.rank, ranks=world.size)
    return DistributedModel(artifact, world, monitor, None, driver), driver


def main(request: dict[str, Any]) -> None:
    """Leaves logits, tokens and what the driver saw in the request's `out`."""
    torch.set_num_threads(1)
    interp_fixes.apply()
    model, driver = opened(Path(request["artifact"]))
    ids = np.asarray(request["ids"])
    found = {f"logits_{chunk}": model.logits(ids, chunk=chunk) for chunk in request["chunks"]}
    found["tokens"] = np.array(json.dumps(model.generate(request["prompts"], request["new"], stop=())))
    found["replays"], found["events"] = np.array(driver.replays), np.array(len(driver.order))
    idle = {r["name"] for r in driver.records.values()} - set(driver.launches)
    found["idle"] = np.array(json.dumps(sorted(idle)))
    np.savez(Path(request["out"]) / f"rank{os.environ.get('RANK', '0')}.npz", **found)
    if isinstance(model, DistributedModel):
        model.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
