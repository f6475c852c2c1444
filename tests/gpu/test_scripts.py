"""A random script of steps: beside numpy one at a time, the same bits two at a time, for no more work than recorded.

What CI runs of it is short: ``python -m tests.gpu.soak`` goes on, over models of every kind.
"""

from __future__ import annotations

from tests.gpu.effort import RECORDED, SEED, STEPS, WINDOWS, measure
from tests.gpu.remembered import remembering
from tests.gpu.scripts import Script, play, same
from tests.gpu.shadow import Shadowed
from tests.gpu.small_model import executor, model


def test_a_script_gives_what_numpy_gives_and_again_two_steps_at_a_time() -> None:
    """Chunks, decodes fed on the device, drafts, masks, scores, pooled rows, penalties, forks, a window."""
    shadowed = Shadowed(executor(seed=1, windows=WINDOWS), *model("bf16", "bf16", windows=WINDOWS))
    with remembering():
        alone = play(Script(SEED, WINDOWS), shadowed, STEPS, 1)
        effort, outputs = measure()
    same(outputs, alone)
    assert not effort.excess(RECORDED)
