"""Named queues: at most so many at once, older runs first.

Rule 1: the order is the run's sequence number, so that it is the same after a restart.
Rule 2: a place is asked for synchronously (`enlist`), so that the order does not depend on which task is woken first.
"""

import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

import trio


@dataclass(order=True, slots=True)
class Ticket:
    """A place in a queue, asked for; `granted` when it is held."""

    seq: int
    number: int
    granted: trio.Event = field(compare=False)
    dropped: bool = field(default=False, compare=False)


class Queue:
    """A queue of `limit` places."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._waiting: list[Ticket] = []
        self._numbers = count()

    def enlist(self, seq: int) -> Ticket:
        """Ask for a place on behalf of run `seq`; hand the ticket to `drop` whatever happens."""
        ticket = Ticket(seq, next(self._numbers), trio.Event())
        heapq.heappush(self._waiting, ticket)
        self._grant()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Give the place back, or stop waiting for it."""
        if ticket.dropped:
            return
        ticket.dropped = True
        if ticket.granted.is_set():
            self.held -= 1
            self._grant()
        else:
            self._waiting.remove(ticket)
            heapq.heapify(self._waiting)

    @asynccontextmanager
    async def place(self, seq: int) -> AsyncIterator[None]:
        """Hold a place."""
        ticket = self.enlist(seq)
        try:
            await ticket.granted.wait()
            yield
        finally:
            self.drop(ticket)

    def _grant(self) -> None:
        while self._waiting and self.held < self.limit:
            self.held += 1
            heapq.heappop(self._waiting).granted.set()
