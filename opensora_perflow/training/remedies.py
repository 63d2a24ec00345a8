"""What is done where the guard names a breach: nothing, older weights, or an end.

Nothing happens in the middle of a step: its graph would not be that of the new weights. A breach is dealt with where the next
step begins, in all processes alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from opensora_perflow.training.guard import Breach
from opensora_perflow.training.host import Host

logger = logging.getLogger("opensora_perflow")

LOWER = 0.1
"""Factor on the learning rate where no weights are kept yet."""
GENTLER = 0.5
"""Factor on the learning rate that good weights were trained with, after they were put back."""
KEEP_EVERY = 25
"""Steps between two copies of a run's state. A copy is good once as many steps after it showed no breach: what a breach shows
in began some steps before."""


class Remedies:
    """Carries a policy out.

    Args:
        policy: watch.policy.
        host: Has the optimizer's rate.
        keep_state: Copies all that a step changes. Returns what puts the copy back, as often as it is called.
    """

    def __init__(self, policy: str, host: Host, keep_state: Callable[[], Callable[[], None]]) -> None:
        self.policy, self.host, self.keep_state = policy, host, keep_state
        self._pending: Breach | None = None
        self._good: tuple[int, float | None, Callable[[], None]] | None = None
        self._newest: tuple[int, float | None, Callable[[], None]] | None = None

    def note(self, breach: Breach) -> None:
        """A breach that this process saw."""
        if self._pending is None and (breach.curable or self.policy == "stop"):
            self._pending = breach

    def act(self, step: int) -> int | None:
        """At the beginning of a step: deal with what the step before showed; not asked where the policy is "warn".

        Returns:
            The step whose weights were put back, if any were.

        Raises:
            ValueError: policy "stop".
        """
        seen, self._pending = self._pending, None
        breached = self.host.mean(0.0 if seen is None else 1.0, self.host.device()) > 0
        if breached:
            return self._carry_out(step, "another process saw it" if seen is None else seen.text)
        if self.policy == "rollback" and not breached and step % KEEP_EVERY == 0:
            self._good, self._newest = self._newest or self._good, (step, self.host.rate(), self.keep_state())
        return None

    def _carry_out(self, step: int, text: str) -> int | None:
        if self.policy == "stop":
            raise ValueError(f'stopped before training step {step} (watch.policy="stop"): {text}')
        kept = self._good or self._newest
        if kept is None:
            self.host.scale_rate(LOWER)
            logger.warning("PeRFlow lowers the learning rate to %s times what it was, from step %d on", LOWER, step)
            return None
        at, rate, put_back = kept
        now = self.host.rate()
        put_back()
        factor = GENTLER if not rate or not now else GENTLER * rate / now
        self.host.scale_rate(factor)
        # Where that is not enough, the next time halves it again.
        self._good, self._newest = (at, None if rate is None else GENTLER * rate, put_back), None
        logger.warning("PeRFlow goes back to the weights of step %d, with %.3g times the learning rate of now", at, factor)
        return at
