"""Disks that read streamed layers ahead of need, one request at a time, for devices that may share one. Pure."""

from __future__ import annotations

from homeinfer.cluster.planning.route import Stream

LONG_AGO = -1e15


class _Reader:
    """One device's prefetcher: which items it has read, when each was there, when each was released."""

    __slots__ = ("back", "begins", "ends", "first_release", "n", "read", "released")

    def __init__(self, stream: Stream) -> None:
        self.read, self.back, self.n = stream.read, stream.back, len(stream.read)
        self.begins: list[float] = []
        self.ends: list[float] = []
        self.released: list[float] = []

    def asks_at(self) -> float | None:
        """When the next item can be asked for, None while its room is not released yet."""
        index = len(self.ends)
        freed = index - self.back[index % self.n]
        if freed >= len(self.released):
            return None
        own = self.ends[-1] if index else LONG_AGO
        return max(own, self.released[freed]) if freed >= 0 else own


class Disks:
    """Devices that share a disk are served in the order in which they ask."""

    def __init__(self, streams: dict[str, Stream], groups: dict[str, str]) -> None:
        self.readers = {name: _Reader(stream) for name, stream in streams.items()}
        self._groups: dict[str, list[_Reader]] = {}
        self._free: dict[str, float] = {}
        self._group_of: dict[str, str] = {}
        for name, reader in self.readers.items():
            group = f"group {groups[name]}" if groups[name] else f"device {name}"
            self._group_of[name] = group
            self._groups.setdefault(group, []).append(reader)
            self._free[group] = LONG_AGO

    @property
    def busy_ms(self) -> float:
        """For how long the busiest disk reads for each step."""
        return max((sum(sum(reader.read) for reader in some) for some in self._groups.values()), default=0.0)

    def ready(self, name: str) -> float:
        """When the device's next item to compute is in memory."""
        reader, group = self.readers[name], self._group_of[name]
        wanted = len(reader.released)
        while len(reader.ends) <= wanted:
            self._serve(group)
        return reader.ends[wanted]

    def _serve(self, group: str) -> None:
        best, when = None, 0.0
        for reader in self._groups[group]:
            asks = reader.asks_at()
            if asks is not None and (best is None or asks < when):
                best, when = reader, asks
        assert best is not None, "the reader that is waited for has room"
        begin = max(when, self._free[group])
        best.begins.append(begin)
        best.ends.append(begin + best.read[len(best.ends) % best.n])
        self._free[group] = best.ends[-1]

    def release(self, name: str, now: float) -> None:
        """The device's item computed last has left memory."""
        self.readers[name].released.append(now)
