"""Work in pieces whose kernels overlap where a CUDA graph is captured: branches of the graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

Piece = Callable[[int, int], None]
"""Does its part of a piece: the number of the piece, and of the room that it uses."""


def in_turn(pieces: int, rooms: int, device: torch.device, fill: Piece, empty: Piece) -> None:
    """``fill`` and then ``empty`` each piece, in room ``piece % rooms``; pieces are emptied in their order.

    While a CUDA graph is captured, a piece is filled beside others, as soon as its room is empty: the blocks of one
    kernel take the place of the last of another, and what is bound by memory runs beside what is not. Otherwise one
    after the other: streams beside the current one are taken from torch's pool, and another thread that captured on one
    of them would find this work in its graph.

    Args:
        pieces: how many.
        rooms: how many pieces are in work at a time; they share nothing.
        device: where.
        fill, empty: launch kernels on the current stream, and allocate nothing that outlives them.
    """
    if pieces == 1 or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        for piece in range(pieces):
            fill(piece, piece % rooms)
            empty(piece, piece % rooms)
        return
    current = torch.cuda.current_stream(device)
    filling = [torch.cuda.Stream(device) for _ in range(min(rooms, pieces))]
    # Its blocks go before those of pieces to come, or these would keep it from running beside them.
    emptying = torch.cuda.Stream(device, priority=-1)
    for stream in (*filling, emptying):
        stream.wait_stream(current)
    emptied: dict[int, torch.cuda.Event] = {}
    for piece in range(pieces):
        room = piece % rooms
        with torch.cuda.stream(filling[room]):
            if room in emptied:
                filling[room].wait_event(emptied[room])
            fill(piece, room)
        with torch.cuda.stream(emptying):
            emptying.wait_event(filling[room].record_event())
            empty(piece, room)
            emptied[room] = emptying.record_event()
    current.wait_stream(emptying)
