"""The processes that share a sweep: one, or those `accelerate launch` started."""

from __future__ import annotations

import os

import torch

from prune.loading import UserError

JOIN = "WORLD_SIZE is set, but the processes cannot be joined; start with `accelerate launch`, or unset WORLD_SIZE"


class Team:
    """Rank and size of the run, and the one operation it needs.

    Attributes:
        rank, size: this process among all.
        device: of this process; the user's choice if it is the only one.

    Raises:
        UserError: the processes cannot be joined.
    """

    def __init__(self, device: str | None = None):
        self.rank, self.size, self.device = 0, int(os.environ.get("WORLD_SIZE", 1)), device
        if self.size > 1:
            from accelerate import PartialState  # whoever launched several processes has it

            state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
            if state.num_processes != self.size:
                raise UserError(
                    f"WORLD_SIZE is {self.size}, but the processes do not find each other; see accelerate env"
                )
            self.rank, self.device = state.process_index, str(state.device)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def gather(self, found: list) -> list:
        """The lists of all processes, joined, on every process."""
        if self.size == 1:
            return found
        from accelerate.utils import gather_object

        return gather_object(found)

    def share(self, value):
        """What the first process holds, on every process."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]
