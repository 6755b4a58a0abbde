"""The device mesh of a sharded module: every rank runs the same program and differs by its place on the axes alone."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.module import Module

AXES = ("pp", "dp", "tp", "ep")


@dataclass(frozen=True)
class Mesh:
    """`pp` pipeline stages of `dp` attention replicas of `tp` ranks each; experts over groups of `ep` ranks of a stage.

    Rank `(stage · dp + replica) · tp + part`. The ranks of an expert group are consecutive, so `ep` divides `dp · tp`;
    where it is smaller, groups hold the same experts.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.pp * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.tp

    def size(self, axis: str) -> int:
        """Ranks of one group along `axis`."""
        return int(getattr(self, axis))

    def index(self, rank: int, axis: str) -> int:
        """Where `rank` stands on `axis`."""
        stage, within = divmod(rank, self.stage_ranks)
        match axis:
            case "pp":
                return stage
            case "dp":
                return within // self.tp
            case "tp":
                return within % self.tp
            case "ep":
                return within % self.ep
        raise ValueError(f"no mesh axis {axis!r} (axes: {', '.join(AXES)})")

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axis` only, in order, `rank` among them."""
        step = {"pp": self.stage_ranks, "dp": self.tp, "tp": 1, "ep": 1}[axis]
        first = rank - self.index(rank, axis) * step
        return tuple(first + i * step for i in range(self.size(axis)))


def mesh_of(module: Module) -> Mesh:
    """The mesh that a module is sharded over, `Mesh()` when it is not."""
    given = module.attrs.get("mesh", ())
    if not isinstance(given, tuple) or not given:
        return Mesh()
    pp, dp, tp, ep = (v if isinstance(v, int) else 1 for v in given)
    return Mesh(pp, dp, tp, ep)


def set_mesh(module: Module, mesh: Mesh) -> None:
    """Note the mesh on the module, as `mesh = [pp, dp, tp, ep]`."""
    module.attrs["mesh"] = (mesh.pp, mesh.dp, mesh.tp, mesh.ep)


def part(total: int, parts: int, index: int) -> tuple[int, int]:
    """First row and stop of part `index` when `total` rows are cut into parts of `ceil(total / parts)`."""
    step = -(-total // parts)
    return min(index * step, total), min((index + 1) * step, total)
