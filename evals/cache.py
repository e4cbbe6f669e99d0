"""Keep decoded items in memory, up to a limit: every cell of a sweep reads the same ones."""

from __future__ import annotations

from collections.abc import Sequence

LIMIT = 2**30  # bytes of pixels


class Cached(Sequence):
    """The same items, each made once as long as their pictures fit in `limit` bytes.

    Args:
        items: made when asked for.
        limit: bytes of RGB pixels to hold.
    """

    def __init__(self, items: Sequence, limit: int = LIMIT):
        self.items, self.room = items, limit
        self.held: dict[int, object] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        if index in self.held:
            return self.held[index]
        item = self.items[index]
        size = sum(3 * image.width * image.height for image in item.images)
        if size <= self.room:
            self.room -= size
            self.held[index] = item
        return item
