"""Logs that are larger than memory are read in a stream."""

import json
import tracemalloc

from weightsmith.average.checkpoints import RunCheckpoint, checkpoint_losses


def test_a_log_is_read_in_the_memory_of_a_piece(tmp_path):
    folder = tmp_path / "checkpoint-1000"
    folder.mkdir()
    with (folder / "trainer_state.json").open("w") as file:
        file.write('{"log_history": [')
        for step in range(1, 1_001):
            entry = {"step": step, "loss": 1.0 / step, "notes": ["x" * 10_000]}
            file.write(json.dumps(entry) + ", ")
        file.write('{"step": 1000, "eval_loss": 0.5}]}')
    size = (folder / "trainer_state.json").stat().st_size
    newest = RunCheckpoint(folder, 1_000, "model")
    for source, expected in (("last", 1 / 1_000), ("eval", 0.5)):
        tracemalloc.start()
        assert checkpoint_losses([newest], source) == [expected]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size / 4
