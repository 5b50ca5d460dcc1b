"""The fifteen techniques, a card each: what the command line, the README and the docs say of them comes from here.

A card is plain data and imports nothing, so that listing the techniques is instant. A technique is *available* when its
card names an experiment; until then it is announced, and says so wherever it appears.
"""

from dataclasses import dataclass
from typing import Literal

from weightsmith.core.errors import unknown

Stage = Literal[
    "start",
    "write",
    "move",
    "weigh",
    "keep few",
    "keep small",
    "adapt",
    "merge",
    "keep learning",
    "guarantee",
    "search",
]


@dataclass(frozen=True, slots=True)
class Technique:
    """What a technique is, where it comes from and where it lives here.

    Attributes:
        slug: Name on the command line.
        title: Name in headings.
        stage: What is done to the weights, in the order of their life.
        purpose: What it is for, in at most 50 characters: the list of all has a line for each.
        claim: The paper's claim in one sentence, without its figures.
        paper: Title of the paper.
        venue: Where it appeared.
        year: When.
        arxiv: arXiv identifier.
        code: The authors' own code, or ``""`` when none was published.
        names: Public names, qualified; empty until the technique is available.
        experiment: Module that holds its ``EXPERIMENT``; ``None`` until the technique is available.
    """

    slug: str
    title: str
    stage: Stage
    purpose: str
    claim: str
    paper: str
    venue: str
    year: int
    arxiv: str
    code: str = ""
    names: tuple[str, ...] = ()
    experiment: str | None = None

    @property
    def available(self) -> bool:
        """Whether it can be used and run in this version."""
        return self.experiment is not None


TECHNIQUES = (
    Technique(
        slug="fast-ibp",
        title="Fast certified training (IBP)",
        stage="guarantee",
        purpose="Train classifiers whose robustness can be proved",
        claim="Initializing for interval bounds, BatchNorm everywhere and two regularizers cut the epochs of certified training.",
        paper="Fast Certified Robust Training with Short Warmup",
        venue="NeurIPS",
        year=2021,
        arxiv="2103.17268",
        code="shizhouxing/Fast-Certified-Robust-Training",
        names=(
            "weightsmith.certify.bounds",
            "weightsmith.certify.margins",
            "weightsmith.certify.trace",
            "weightsmith.certify.verified_error",
            "weightsmith.certify.pgd",
            "weightsmith.certify.register_bound",
            "weightsmith.certify.CertifiedTraining",
            "weightsmith.certify.EpsilonSchedule",
            "weightsmith.certify.BoundRegularizer",
            "weightsmith.certify.add_batchnorm_",
            "weightsmith.certify.robust_cross_entropy",
            "weightsmith.init.ibp_",
        ),
        experiment="weightsmith.experiments.fast_ibp",
    ),
    Technique(
        slug="rich-lazy",
        title="Rich and lazy initialization",
        stage="start",
        purpose="Choose the rank of first weights, measure laziness",
        claim="At equal norm, low-rank initial weights lead to richer learning and high-rank ones to lazier learning.",
        paper="How connectivity structure shapes rich and lazy learning in neural circuits",
        venue="ICLR",
        year=2024,
        arxiv="2310.08513",
        code="Helena-Yuhan-Liu/BioRNN_RichLazy",
        names=(
            "weightsmith.init.low_rank_",
            "weightsmith.init.low_rank_from_",
            "weightsmith.init.soft_rank_",
            "weightsmith.init.dale_",
            "weightsmith.init.block_",
            "weightsmith.init.chain_",
            "weightsmith.init.from_matrix_",
            "weightsmith.init.apply_",
            "weightsmith.diagnose.LazinessProbe",
            "weightsmith.diagnose.tangent_kernel",
            "weightsmith.diagnose.plan_kernel",
            "weightsmith.diagnose.KernelOptions",
            "weightsmith.diagnose.kernel_alignment",
            "weightsmith.diagnose.representation_alignment",
            "weightsmith.diagnose.weight_change",
            "weightsmith.diagnose.sign_similarity",
            "weightsmith.diagnose.kernel_target_alignment",
            "weightsmith.diagnose.effective_rank",
        ),
        experiment="weightsmith.experiments.rich_lazy",
    ),
    Technique(
        slug="weight-compander",
        title="Weight Compander",
        stage="write",
        purpose="Bound weights by a curve, let small ones move more",
        claim="Training the weights of a convnet through a bounded, compressing function improves its test accuracy.",
        paper="Weight Compander: A Simple Weight Reparameterization for Regularization",
        venue="IJCNN",
        year=2023,
        arxiv="2306.16993",
        names=(
            "weightsmith.reparam.compand_",
            "weightsmith.reparam.WeightCompander",
            "weightsmith.reparam.InWeightSpace",
            "weightsmith.reparam.param_groups",
            "weightsmith.reparam.add_weight_decay_grad_",
        ),
        experiment="weightsmith.experiments.weight_compander",
    ),
    Technique(
        slug="adamp",
        title="AdamP and SGDP",
        stage="move",
        purpose="Momentum that does not inflate normalized weights",
        claim="Dropping the radial part of updates keeps the norm of scale-invariant weights from growing and improves accuracy.",
        paper="AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
        venue="ICLR",
        year=2021,
        arxiv="2006.08217",
        code="clovaai/AdamP",
        names=("weightsmith.optim.AdamP", "weightsmith.optim.SGDP", "weightsmith.optim.param_groups"),
        experiment="weightsmith.experiments.adamp",
    ),
    Technique(
        slug="meta-rescaling",
        title="Self-taught meta loss rescaling",
        stage="weigh",
        purpose="Weigh samples whose labels may be wrong",
        claim="Sample weights learned on the fly from the noisy data themselves improve classifiers without any clean data.",
        paper="Learning from Noisy Labels via Self-Taught On-the-Fly Meta Loss Rescaling",
        venue="AAAI",
        year=2025,
        arxiv="2412.12955",
        code="storm-public (the authors' GitLab)",
        names=(
            "weightsmith.reweight.MetaRescaler",
            "weightsmith.reweight.RescalingSettings",
            "weightsmith.reweight.LossRescaler",
            "weightsmith.reweight.rescaler_features",
            "weightsmith.reweight.SampleStatsMemory",
            "weightsmith.reweight.directional_derivatives",
            "weightsmith.reweight.RandomBatches",
            "weightsmith.reweight.AuditTable",
        ),
        experiment="weightsmith.experiments.meta_rescaling",
    ),
    Technique(
        slug="steer",
        title="STEER token reweighting",
        stage="weigh",
        purpose="Weigh tokens so that a policy keeps its entropy",
        claim="Down-weighting the tokens that would change the entropy most keeps exploration alive and improves accuracy.",
        paper="Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective",
        venue="ACL",
        year=2026,
        arxiv="2510.10150",
        code="zz-haooo/STEER",
    ),
    Technique(
        slug="dynamic-reward-weighting",
        title="Dynamic reward weighting",
        stage="weigh",
        purpose="Adapt the weights of several rewards on the way",
        claim="Reward weights that change during training reach Pareto-better policies than fixed ones.",
        paper="Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting",
        venue="TACL",
        year=2026,
        arxiv="2509.11452",
        code="yining610/dynamic-reward-weighting",
    ),
    Technique(
        slug="mir-l",
        title="Lottery-ticket pruning (MIR-L)",
        stage="keep few",
        purpose="Prune, rewind, train again: find a small network",
        claim="Iterative pruning with rewinding keeps a restoration network's quality at about a tenth of its weights.",
        paper="Pruning Overparameterized Multi-Task Networks for Degraded Web Image Restoration",
        venue="WI-IAT",
        year=2025,
        arxiv="2510.14463",
        code="Thomkat/MIR-L",
        names=(
            "weightsmith.prune.MagnitudePruner",
            "weightsmith.prune.PruneReport",
            "weightsmith.prune.TensorDensity",
            "weightsmith.prune.iterate",
            "weightsmith.prune.Round",
            "weightsmith.prune.save_sparse",
            "weightsmith.prune.load_sparse",
            "weightsmith.prune.shrink_",
            "weightsmith.prune.Shrunk",
        ),
        experiment="weightsmith.experiments.mir_l",
    ),
    Technique(
        slug="flexround",
        title="FlexRound",
        stage="keep small",
        purpose="Learn which integer each trained weight becomes",
        claim="Dividing each weight by its own learned factor before rounding beats choosing between floor and ceiling.",
        paper="FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization",
        venue="ICML",
        year=2023,
        arxiv="2306.00317",
        code="onliwad101/FlexRound_LRQ",
        names=(
            "weightsmith.quantize.flexround_",
            "weightsmith.quantize.adaround_",
            "weightsmith.quantize.adaquant_",
            "weightsmith.quantize.round_to_nearest_",
            "weightsmith.quantize.Grid",
            "weightsmith.quantize.quantized_weights",
            "weightsmith.quantize.save_quantized",
            "weightsmith.quantize.load_quantized",
            "weightsmith.quantize.export_onnx",
        ),
        experiment="weightsmith.experiments.flexround",
    ),
    Technique(
        slug="ofq",
        title="Oscillation-free quantization",
        stage="keep small",
        purpose="Train 2- to 4-bit transformers without oscillation",
        claim="Statistical scales, query-key reparametrization and annealing stop oscillation and improve low-bit accuracy.",
        paper="Oscillation-free Quantization for Low-bit Vision Transformers",
        venue="ICML",
        year=2023,
        arxiv="2302.02210",
        code="nbasyl/OFQ",
        names=(
            "weightsmith.quantize.prepare_ofq_",
            "weightsmith.quantize.calibrate_",
            "weightsmith.quantize.finish_ofq_",
            "weightsmith.quantize.ofq_report",
            "weightsmith.quantize.reparameterize_qk_",
            "weightsmith.quantize.ConfidenceGuidedAnnealing",
            "weightsmith.quantize.OscillationTracker",
            "weightsmith.quantize.IterativeFreezing",
            "weightsmith.quantize.Dampening",
            "weightsmith.quantize.statsq",
            "weightsmith.quantize.distillation_loss",
        ),
        experiment="weightsmith.experiments.ofq",
    ),
    Technique(
        slug="bone",
        title="Bone and MiSS adapters",
        stage="adapt",
        purpose="Fine-tune with one small shared tensor per matrix",
        claim="Block-affine adapters start faster and end better than LoRA at equal parameters.",
        paper="Bone: Block Affine Transformation",
        venue="arXiv",
        year=2024,
        arxiv="2409.15371",
        code="JL-er/Bone",
        names=(
            "weightsmith.adapt.apply_bone_",
            "weightsmith.adapt.BoneConfig",
            "weightsmith.adapt.set_adapter_",
            "weightsmith.adapt.bone_disabled",
            "weightsmith.adapt.merge_bone_",
            "weightsmith.adapt.unmerge_bone_",
            "weightsmith.adapt.unload_bone_",
            "weightsmith.adapt.save_bone",
            "weightsmith.adapt.load_bone",
            "weightsmith.adapt.bone_state_dict",
            "weightsmith.adapt.load_bone_state_dict_",
            "weightsmith.adapt.trainable_parameters",
            "weightsmith.adapt.bone_linear",
            "weightsmith.adapt.bone_delta",
            "weightsmith.adapt.accelerate_peft_",
        ),
        experiment="weightsmith.experiments.bone",
    ),
    Technique(
        slug="mwa",
        title="Metrics-weighted averaging",
        stage="merge",
        purpose="Merge a run's checkpoints, weighted by its metrics",
        claim="Weighting checkpoints by loss or step beats their uniform average and the last checkpoint.",
        paper="Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging",
        venue="arXiv",
        year=2025,
        arxiv="2504.18580",
        names=(
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
        ),
        experiment="weightsmith.experiments.mwa",
    ),
    Technique(
        slug="weight-aligning",
        title="Weight Aligning",
        stage="keep learning",
        purpose="Add classes without favoring the newest ones",
        claim="Rescaling the new classes' rows to the old ones' mean norm removes most of their advantage.",
        paper="Maintaining Discrimination and Fairness in Class Incremental Learning",
        venue="CVPR",
        year=2020,
        arxiv="1911.07053",
        code="bwbwzhao/Weight-Aligning",
        names=(
            "weightsmith.continual.WeightAligning",
            "weightsmith.continual.AligningOptions",
            "weightsmith.continual.align_weights_",
            "weightsmith.continual.align_logits",
            "weightsmith.continual.WeightAlignment",
            "weightsmith.continual.expand_head_",
            "weightsmith.continual.expand_head",
            "weightsmith.continual.clip_head_",
            "weightsmith.continual.incremental_loss",
            "weightsmith.continual.distillation_loss",
            "weightsmith.continual.ExemplarMemory",
            "weightsmith.continual.herding",
            "weightsmith.continual.ClassOrder",
            "weightsmith.continual.fit_bias_correction",
            "weightsmith.continual.correct_bias",
        ),
        experiment="weightsmith.experiments.weight_aligning",
    ),
    Technique(
        slug="lcia",
        title="Dynamic EMA and instruction routing (LCIA)",
        stage="keep learning",
        purpose="Tune task after task with an adaptive average",
        claim="An adaptive moving average with grouped instructions forgets less than fine-tuning or a fixed average.",
        paper="Large Continual Instruction Assistant",
        venue="ICML",
        year=2025,
        arxiv="2410.10868",
        code="JingyangQiao/CoIN",
    ),
    Technique(
        slug="eagan",
        title="Evolutionary architecture search (EAGAN)",
        stage="search",
        purpose="Evolve architectures over shared weights",
        claim="Evolving generator and discriminator in two stages finds better GANs than hand design, cheaply.",
        paper="EAGAN: Efficient Two-stage Evolutionary Architecture Search for GANs",
        venue="ECCV",
        year=2022,
        arxiv="2111.15097",
        code="marsggbo/EAGAN",
        names=(
            "weightsmith.search.evolve",
            "weightsmith.search.EvolveOptions",
            "weightsmith.search.Resources",
            "weightsmith.search.SearchSpace",
            "weightsmith.search.Gene",
            "weightsmith.search.SuperNet",
            "weightsmith.search.Choice",
            "weightsmith.search.Trainer",
            "weightsmith.search.Individual",
            "weightsmith.search.SearchResult",
            "weightsmith.search.cars_selector",
            "weightsmith.search.count_parameters",
            "weightsmith.search.gan.Generator",
            "weightsmith.search.gan.Discriminator",
            "weightsmith.search.gan.StageOne",
            "weightsmith.search.gan.StageTwo",
            "weightsmith.search.gan.ScoreGenerator",
            "weightsmith.search.gan.train_gan",
            "weightsmith.search.gan.score",
            "weightsmith.search.gan.discriminator_loss",
            "weightsmith.search.gan.generator_loss",
            "weightsmith.search.gan.inception_score",
            "weightsmith.search.gan.frechet_distance",
            "weightsmith.search.gan.kernel_distance",
        ),
        experiment="weightsmith.experiments.eagan",
    ),
)


def technique(slug: str) -> Technique:
    """Look up a card by its slug.

    Raises:
        UsageError: There is none; the message lists near ones.
    """
    for card in TECHNIQUES:
        if card.slug == slug:
            return card
    raise unknown("technique", slug, [card.slug for card in TECHNIQUES])
