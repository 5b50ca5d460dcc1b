"""Measures."""

ELSEWHERE = {
    # tensors in, numbers out: tests/diagnose
    "weightsmith.diagnose.kernel_alignment",
    "weightsmith.diagnose.representation_alignment",
    "weightsmith.diagnose.weight_change",
    "weightsmith.diagnose.sign_similarity",
    "weightsmith.diagnose.kernel_target_alignment",
    "weightsmith.diagnose.effective_rank",
    # a model in, measures of it out; that nothing of the model changes: tests/diagnose/test_probe.py
    "weightsmith.diagnose.LazinessProbe",
    "weightsmith.diagnose.tangent_kernel",
    "weightsmith.diagnose.plan_kernel",
    "weightsmith.diagnose.KernelOptions",
}
