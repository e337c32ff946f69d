"""A target whose forward passes wait for a test."""

import threading

from server_calls import WAIT


class GatedTarget:
    """Waits in its forward until told, so that requests queue up; may raise instead of answering."""

    def __init__(self, target):
        self._target = target
        self.started, self.opened = threading.Event(), threading.Event()
        self.raises = None
        self.forwards = []  # the first token id of each, in order
        self.probes = []  # the thread of each

    def generate_batch(self, input_ids, *args, **packing):
        self.forwards.append(int(input_ids[0, 0]))
        self.started.set()
        assert self.opened.wait(WAIT)
        if self.raises is not None:
            raise self.raises
        return self._target.generate_batch(input_ids, *args, **packing)

    def probe_head(self, selected_token_ids):
        self.probes.append(threading.current_thread().name)
        self._target.probe_head(selected_token_ids)

    def __getattr__(self, name):
        return getattr(self._target, name)
