"""`python -m adamix`, but in the first life of a job rank 1 is killed in step 3, which was charged and not taken."""

from __future__ import annotations

import os
import signal
import sys

from adamix.__main__ import main
from adamix.deep.ranks import RankRecorder

_charge = RankRecorder.charge


def charge(self: RankRecorder) -> None:
    _charge(self)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1" and len(self.steps) == 2:
        os.kill(os.getpid(), signal.SIGKILL)


RankRecorder.charge = charge  # type: ignore[method-assign]
sys.exit(main())
