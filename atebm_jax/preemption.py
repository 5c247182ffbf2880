"""An orderly end on SIGTERM or Ctrl-C."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The job was asked to stop.

    Attributes:
      signal_number: the signal that asked.
      kept: what the job has saved, for the message.
    """

    def __init__(self, signal_number: int, kept: str = "everything is saved"):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number, self.kept = signal_number, kept


class StopSignal:
    """Remembers a SIGTERM or SIGINT until the job reaches a safe point.

    Several processes must all end after the same step. JAX's own synchronisation
    chooses it, after a SIGTERM to any one of them.
    """

    def __init__(self) -> None:
        self._number = 0
        self._asked = 0
        self._several = jax.process_count() > 1
        signals = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        self._previous = {
            number: signal.signal(number, self._note) for number in signals
        }

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._number = number
        # A second signal ends the process at once.
        self.restore()

    def restore(self) -> None:
        """Puts the previous signal handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> int:
        """The signal to obey after this step, 0 for none; the same in all processes.

        Every process must call it equally often.
        """
        if self._several:
            # JAX needs a number that only grows; steps restart with every stage.
            self._asked += 1
            reached = multihost_utils.reached_preemption_sync_point(self._asked)
            return signal.SIGTERM if reached else 0
        return self._number

    def check(self) -> None:
        """Raises `Interrupted` if a signal came; for work that can be repeated."""
        if self._number and not self._several:
            raise Interrupted(self._number)
