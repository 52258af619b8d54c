"""One piece of work on a GPU, done again and again at the same addresses: a CUDA graph launches it in one call.

A decoding step of a small batch is hundreds of kernels of a few microseconds each, and launching them one by one takes
the host longer than the GPU needs to run them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_one_at_a_time = threading.Lock()


class Replayed:
    """Runs one function over and over: as it is the first time, captured the second, and replayed from then on.

    The function must read and write tensors that stay where they are, and neither wait for the device nor copy from
    the host. The first run finds out whether it does, makes what libraries make at their first call, and counts as a
    run. It is handed over at every call and not kept, so that nothing holds itself.

    Attributes:
        refused: why it is called and not replayed, where that is so.
    """

    def __init__(self) -> None:
        cuda: Any = torch.cuda
        self._stream = cuda.Stream()
        self._graph: Any = None
        self._warm = False
        self.refused = ""

    def __call__(self, function: Callable[[], None]) -> None:
        """Run it once."""
        if self._warm and self._graph is None and not self.refused:
            self._capture(function)
        if self._graph is not None:
            self._graph.replay()
        elif self._warm:
            function()
        else:
            self._warm_up(function)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream that captures, behind what was launched before, and before what is launched afterwards."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _warm_up(self, function: Callable[[], None]) -> None:
        with self._beside(), waits() as found:
            function()
        self._warm = True
        if found:
            self.refused = "it waits for the device"

    def _capture(self, function: Callable[[], None]) -> None:
        graph: Any = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # what runs still may free memory, which cannot be while a graph is made
        try:
            with _one_at_a_time, self._beside():
                # Other threads of this process may go on using the device.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.refused = f"it cannot be captured: {str(error).partition(chr(10))[0]}"
            torch.cuda.synchronize()
            return
        self._graph = graph


@contextmanager
def waits() -> Iterator[list[str]]:
    """What this thread waits for the device in, as torch's own debug mode tells."""
    found: list[str] = []
    mine = threading.get_ident()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() == mine and "synchronizing CUDA operation" in str(message):
            found.append(str(message))

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
