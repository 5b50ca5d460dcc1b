"""Averages."""

ELSEWHERE = {
    # tensors, numbers or checkpoints in, the same out: no model whose class, keys or flags could suffer
    "weightsmith.average.merge_checkpoints",
    "weightsmith.average.find_checkpoints",
    "weightsmith.average.checkpoint_losses",
    "weightsmith.average.metric_weights",
    "weightsmith.average.decay_weights",
    "weightsmith.average.average_state_dicts",
    "weightsmith.average.greedy_soup",
    "weightsmith.average.ema",
    "weightsmith.average.swa",
    "weightsmith.average.LAWA",
}
