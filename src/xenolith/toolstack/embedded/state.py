"""The state of a domain in files and copies: saved, restored, kept as checkpoints, rolled back to, cloned."""

from __future__ import annotations

import contextlib
from pathlib import Path

from xenolith.toolstack.checkpoints import CheckpointedDomain, Schedule, check_complete, checkpoints_in, put_disks_back
from xenolith.toolstack.client import (
    AfterSave,
    Checkpoint,
    InvalidRequest,
    NewDomid,
    OnProgress,
    Progress,
    ToolstackError,
    no_progress,
)
from xenolith.toolstack.config.domain import DomainConfig
from xenolith.toolstack.embedded.part import Part
from xenolith.toolstack.saving import Arriving, open_saved, save_domain


class State(Part):
    """What a domain is at a moment."""

    def save(
        self,
        domid: int,
        path: Path,
        after: AfterSave = AfterSave.DESTROY,
        compress: bool = False,
        progress: OnProgress = no_progress,
    ) -> None:
        if not path.is_absolute():
            raise InvalidRequest(f"The path of a saved domain must be absolute: {path}.")
        with self._table.hold(domid) as record:
            save_domain(self.dom0, record.domain, self.config(domid), path, compress, progress)
        if after is AfterSave.DESTROY:
            self._table.clone_disks.keep(record.config)
            self.destroy(domid, again=True)
        elif after is AfterSave.RUN:
            self._control.unpause(domid)

    def restore(self, path: Path, config: DomainConfig | None = None, progress: OnProgress = no_progress) -> NewDomid:
        if not path.is_absolute():
            raise InvalidRequest(f"The path of a saved domain must be absolute: {path}.")
        with open_saved(path) as source:
            progress(Progress("restoring the domain", 0, 1))
            arriving = Arriving(self.dom0, source, lambda name: open_saved(path.with_name(name)))
            if arriving.series is not None and arriving.series.disks:
                raise ToolstackError("This is a checkpoint with disks: `xenolith rollback` brings these back too.")
            domid = self._builder.restored(config or arriving.config, arriving.receive)
        progress(Progress("restoring the domain", 1, 1))
        return NewDomid(domid)

    def checkpoint(self, domid: int, directory: Path, keep: int) -> Checkpoint:
        if not directory.is_absolute() or keep < 1:
            raise InvalidRequest("Checkpoints need a directory with an absolute path, and at least one is kept.")
        with self._table.hold(domid) as record:
            if record.checkpointed is None or record.checkpointed.directory != directory:
                if record.checkpointed is not None:
                    record.checkpointed.close()
                record.checkpointed = CheckpointedDomain(self.dom0, record.domain, directory)
            return record.checkpointed.take(self.config(domid), keep)

    def checkpoint_every(self, domid: int, directory: Path, seconds: float, keep: int) -> None:
        def take() -> None:
            self.checkpoint(domid, directory, keep)

        def give_up(why: str) -> None:
            self.dom0.domain.log(f"d{domid}: no more checkpoints: {why}")

        with self._table.hold(domid) as record:
            record.end_checkpoints()
        if seconds > 0:
            self.checkpoint(domid, directory, keep)  # whether that is possible
            record.schedule = Schedule(seconds, take, give_up)

    def checkpoints(self, directory: Path) -> list[Checkpoint]:
        return checkpoints_in(directory)

    def rollback(self, path: Path) -> NewDomid:
        if not path.is_absolute():
            raise InvalidRequest(f"The path of a checkpoint must be absolute: {path}.")
        with open_saved(path) as source:
            arriving = Arriving(self.dom0, source, lambda name: open_saved(path.with_name(name)))
            config = arriving.config
            series = check_complete(path, config)
            with self._table.lock:
                found = [domid for domid, record in self._table.records.items() if record.config.name == config.name]
            for domid in found:
                self.destroy(domid, again=True)
            put_disks_back(path, series, config)
            return NewDomid(self._builder.restored(config, arriving.receive))

    def clone(self, domid: int, names: list[str], progress: OnProgress = no_progress) -> list[int]:
        parent = self._builder.frozen(domid)
        made: list[int] = []
        try:
            for number, name in enumerate(names, 1):
                made.append(self._builder.cloned(parent, name, number))
                progress(Progress("cloning the domain", number, len(names)))
        except BaseException:
            for each in made:
                with contextlib.suppress(ToolstackError):
                    self.destroy(each)
            raise
        finally:
            parent.close()
        return made
