import pytest
from runs import adapter_run, factors, log_of, write_adapter, write_state

from weightsmith.average import checkpoint_losses, find_checkpoints, weigh_checkpoints
from weightsmith.core.errors import UsageError, WeightsmithWarning


def run_with(folder, steps, log=()):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    write_state(folder / f"checkpoint-{max(steps)}", list(log))
    return folder


def steps_of(found):
    return [checkpoint.step for checkpoint in found]


def test_checkpoints_are_sorted_by_number_not_by_name(tmp_path):
    run = run_with(tmp_path, [1000, 900, 50, 200])
    assert steps_of(find_checkpoints(run)) == [50, 200, 900, 1000]


def test_only_checkpoint_folders_count(tmp_path):
    run = run_with(tmp_path, [1, 2])
    for name in ("checkpoint-best", "checkpoint-3-old", "merged"):
        (run / name).mkdir()
    (run / "checkpoint-9").write_text("a file")
    assert steps_of(find_checkpoints(run, last=None)) == [1, 2]


def test_checkpoints_behind_symbolic_links_are_found(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run = run_with(tmp_path / "run", [10])
    (run / "checkpoint-20").symlink_to(tmp_path / "elsewhere")
    assert steps_of(find_checkpoints(run, last=2)) == [10, 20]


def test_last_every_and_steps_choose(tmp_path):
    run = run_with(tmp_path, range(1, 11))
    assert steps_of(find_checkpoints(run, last=3)) == [8, 9, 10]
    assert steps_of(find_checkpoints(run, last=3, every=2)) == [6, 8, 10]
    assert steps_of(find_checkpoints(run, last=None, every=4)) == [2, 6, 10]
    assert steps_of(find_checkpoints(run, steps=[9, 2])) == [2, 9]


def test_kinds_are_told_by_the_adapter_configuration(tmp_path):
    write_adapter(tmp_path / "checkpoint-1", {})
    (tmp_path / "checkpoint-2").mkdir()
    assert [checkpoint.kind for checkpoint in find_checkpoints(tmp_path, last=2)] == ["adapter", "model"]


def test_fewer_than_asked_for_is_a_warning(tmp_path):
    run = run_with(tmp_path, [1, 2])
    with pytest.warns(WeightsmithWarning, match="has 2 such checkpoints, fewer than the last 4"):
        assert steps_of(find_checkpoints(run)) == [1, 2]


def test_what_cannot_be_found_says_so(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        find_checkpoints(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no checkpoint-<step> folder"):
        find_checkpoints(tmp_path)
    run = run_with(tmp_path, [1, 2])
    with pytest.raises(UsageError, match="no checkpoint of step 7; there are 1, 2"):
        find_checkpoints(run, steps=[1, 7])
    for wrong in ({"last": 0}, {"every": 0}):
        with pytest.raises(UsageError, match="must be at least 1, got 0"):
            find_checkpoints(run, **wrong)
    with pytest.raises(UsageError, match="is not a folder"):
        weigh_checkpoints([tmp_path / "nowhere"])


def test_a_checkpoints_loss_is_the_mean_since_the_folder_before_it(tmp_path):
    log = log_of([10, 8, 6, 4, 2], every=2)  # steps 2, 4, 6, 8, 10
    found = find_checkpoints(run_with(tmp_path, [4, 10], log), last=2)
    assert checkpoint_losses(found) == [9, 4]


def test_a_deleted_folder_leaves_its_steps_to_the_next(tmp_path):
    log = log_of([10, 8, 6, 4], every=1)
    found = find_checkpoints(run_with(tmp_path, [1, 2, 4], log), steps=[4])
    assert checkpoint_losses(found) == [5]  # since step 2, which exists although it is not taken


def test_log_entries_weigh_by_the_steps_that_they_cover(tmp_path):
    log = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 6.0}, {"step": 5, "loss": 2.0}]
    found = find_checkpoints(run_with(tmp_path, [1, 5], log), steps=[5])
    assert checkpoint_losses(found) == [(6 + 3 * 2) / 4]


def test_a_checkpoint_between_two_log_entries_takes_the_last_one(tmp_path):
    found = find_checkpoints(run_with(tmp_path, [10, 11, 20], log_of([3.0, 1.0], every=10)), last=3)
    assert checkpoint_losses(found) == [3.0, 3.0, 1.0]


def test_evaluation_metrics_are_read_at_the_very_step(tmp_path):
    log = [{"step": s, "eval_loss": 1 / s, "eval_accuracy": s / 10} for s in (1, 2)]
    found = find_checkpoints(run_with(tmp_path, [1, 2], log), last=2)
    assert checkpoint_losses(found, "eval") == [1, 0.5]
    assert checkpoint_losses(found, "eval:accuracy") == checkpoint_losses(found, "eval:eval_accuracy") == [0.1, 0.2]
    with pytest.raises(UsageError, match="did you mean 'eval_accuracy'"):
        checkpoint_losses(found, "eval:acuracy")


def test_a_missing_evaluation_names_the_checkpoint(tmp_path):
    found = find_checkpoints(run_with(tmp_path, [1, 2], [{"step": 2, "eval_loss": 1.0}]), last=2)
    with pytest.raises(UsageError, match=r"no eval_loss at step 1 \(checkpoint-1\); evaluate as often as you save"):
        checkpoint_losses(found, "eval")


def test_a_log_in_the_run_folder_serves_too(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    write_state(tmp_path, log_of([0.5]))
    assert checkpoint_losses(find_checkpoints(tmp_path, last=1)) == [0.5]


def test_a_log_that_is_missing_damaged_or_empty_says_so(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    found = find_checkpoints(tmp_path, last=1)
    with pytest.raises(UsageError, match=r"has no trainer_state\.json: give the values by hand"):
        checkpoint_losses(found)
    (tmp_path / "checkpoint-1/trainer_state.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        checkpoint_losses(found)
    write_state(tmp_path / "checkpoint-1", [])
    with pytest.raises(UsageError, match="no training loss up to step 1"):
        checkpoint_losses(found)
    with pytest.raises(UsageError, match="did you mean 'last'"):
        checkpoint_losses(found, "lst")


def test_a_bare_nan_in_the_log_names_its_checkpoint_and_can_be_left_out(tmp_path):
    run = run_with(tmp_path, [1, 2, 3], log_of([1.0, float("nan"), 2.0]))
    found = find_checkpoints(run, last=3)
    with pytest.raises(UsageError, match=r"loss of .*checkpoint-2 is nan; skip_bad=True"):
        weigh_checkpoints(found)
    assert steps_of(share.checkpoint for share in weigh_checkpoints(found, skip_bad=True)) == [1, 3]


def test_top_takes_the_best_by_metric_in_step_order(tmp_path):
    found = find_checkpoints(run_with(tmp_path, [1, 2, 3, 4], log_of([4.0, 1.0, 3.0, 2.0])))
    assert steps_of(share.checkpoint for share in weigh_checkpoints(found, top=2)) == [2, 4]
    by_score = weigh_checkpoints(found, values=[4, 1, 3, 2], metric="score", top=2)
    assert steps_of(share.checkpoint for share in by_score) == [1, 3]
    with pytest.raises(UsageError, match="top must be at least 1"):
        weigh_checkpoints(found, top=0)


def test_values_and_weights_by_hand(tmp_path):
    found = find_checkpoints(run_with(tmp_path, [1, 2]), last=2)
    assert [s.weight for s in weigh_checkpoints(found, values=[1.0, 3.0])] == pytest.approx([0.75, 0.25])
    assert [s.weight for s in weigh_checkpoints(found, weights=[3, 1])] == [0.75, 0.25]
    with pytest.raises(UsageError, match="values must be 2 numbers"):
        weigh_checkpoints(found, values=[1.0])
    with pytest.raises(UsageError, match="weights must be 2 numbers"):
        weigh_checkpoints(found, weights=[1.0])
    for wrong in ([-1, 2], [0, 0], [float("nan"), 1]):
        with pytest.raises(UsageError, match="weights must be at least 0"):
            weigh_checkpoints(found, weights=wrong)


def test_uniform_and_exponential_weights_need_no_log(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    found = find_checkpoints(tmp_path, last=2)
    assert [s.weight for s in weigh_checkpoints(found, scheme="uniform")] == [0.5, 0.5]
    assert [s.weight for s in weigh_checkpoints(found, scheme="ema", penalty=0.5)] == pytest.approx([1 / 3, 2 / 3])


def test_a_log_of_a_resumed_run_counts_each_step_once_in_order(tmp_path):
    log = [{"step": 10, "loss": 4.0}, {"step": 20, "loss": 9.0}, {"step": 11, "loss": 3.0}, {"step": 20, "loss": 2.0}]
    found = find_checkpoints(run_with(tmp_path, [10, 20], log), last=2)
    assert checkpoint_losses(found) == pytest.approx([4.0, (1 * 3.0 + 9 * 2.0) / 10])
    assert checkpoint_losses(found, "last") == [4.0, 2.0]
    joined = [{"step": 10, "loss": 4.0}, {"step": 20, "loss": 6.0}, {"step": 11, "loss": 3.0}]
    write_state(tmp_path / "checkpoint-20", joined)
    assert min(checkpoint_losses(found)) > 0


def test_the_newest_evaluation_of_a_step_counts(tmp_path):
    log = [{"step": 2, "eval_loss": 5.0}, {"step": 1, "eval_loss": 4.0}, {"step": 2, "eval_loss": 3.0}]
    assert checkpoint_losses(find_checkpoints(run_with(tmp_path, [1, 2], log), last=2), "eval") == [4.0, 3.0]


@pytest.mark.parametrize("options", [{}, {"scheme": "uniform"}, {"weights": [1, 1, 1]}, {"decay": "linear"}])
def test_a_checkpoint_that_was_not_saved_to_its_end_is_named_with_what_to_do(tmp_path, options):
    run = run_with(tmp_path, [1, 2, 3])
    write_state(run / "checkpoint-2", log_of([1.0, 0.5]))
    (run / "checkpoint-3/trainer_state.json").unlink()
    message = r"checkpoint-3 is incomplete: it has no trainer_state\.json.*steps=\[1, 2\] \(--steps 1 2\)"
    with pytest.raises(UsageError, match=message):
        weigh_checkpoints(find_checkpoints(run, last=3), **options)
    assert steps_of(s.checkpoint for s in weigh_checkpoints(find_checkpoints(run, steps=[1, 2]))) == [1, 2]


def test_numbers_by_hand_need_checkpoints_oldest_first(tmp_path):
    run = adapter_run(tmp_path, count=2)
    folders = [run / "checkpoint-20", run / "checkpoint-10"]
    for argument in ("values", "weights"):
        with pytest.raises(UsageError, match=f"{argument} go with checkpoints that are given oldest first"):
            weigh_checkpoints(folders, **{argument: [0.9, 0.1]})
    assert [share.weight for share in weigh_checkpoints(folders[::-1], weights=[0.9, 0.1])] == [0.9, 0.1]


def test_names_with_and_without_a_step_do_not_mix(tmp_path):
    run = adapter_run(tmp_path, count=1)
    final = write_adapter(run / "final", factors(9))
    with pytest.raises(UsageError, match="all be named checkpoint-<step>, or none of them"):
        weigh_checkpoints([run / "checkpoint-10", final], weights=[0.5, 0.5])


@pytest.mark.parametrize("source", ["since_previous", "last", "eval", "eval:loss"])
def test_a_loss_is_no_score(tmp_path, source):
    with pytest.raises(UsageError, match="metric 'score' takes values, or source='eval:<key>'"):
        weigh_checkpoints(adapter_run(tmp_path), metric="score", source=source)


def test_checkpoints_of_several_runs_are_read_from_their_own_logs(tmp_path):
    folders = []
    for index, run in enumerate(("a", "b")):
        folder = write_adapter(tmp_path / run / "checkpoint-10", factors(index))
        write_state(folder, log_of([2.0 + index], every=10))
        folders.append(folder)
    assert [share.value for share in weigh_checkpoints(folders)] == [2.0, 3.0]
