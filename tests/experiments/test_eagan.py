import dataclasses
import math

import pytest
import torch
from PIL import Image

from weightsmith.core.errors import UsageError
from weightsmith.experiments import eagan, gan_pairs
from weightsmith.experiments.gan_pairs import Outcome
from weightsmith.experiments.gan_searches import rows_of
from weightsmith.lab import report
from weightsmith.lab.gallery import png
from weightsmith.lab.job import Job
from weightsmith.lab.record import Recorder
from weightsmith.lab.run import run
from weightsmith.search import Generation, Scored, SearchResult, gan

SMOKE = dataclasses.replace(eagan.EXPERIMENT.preset("smoke"), train_examples=200, test_examples=12)


def _scored(distance, failed=False):
    return Scored(((0,),), {"distance": distance, "parameters": 5.0}, (distance,), int(failed), failed)


def test_failed_individuals_are_counted_and_in_no_mean():
    found = SearchResult(
        (
            Generation(0, (_scored(10.0), _scored(1e9, True), _scored(20.0))),
            Generation(1, (_scored(1e9, True), _scored(1e9, True))),
        ),
        ("distance",),
    )
    rounds = [row for row in rows_of(found) if row["phase"] == "rounds"]
    assert rounds[0] == {"phase": "rounds", "round": 1, "failed": 1, "mean": 15.0, "best": 10.0, "worst": 20.0}
    assert rounds[1] == {"phase": "rounds", "round": 2, "failed": 2}
    assert all(row.get("distance", 0.0) < 1e9 for row in rows_of(found))


def test_a_random_network_that_fails_is_left_out_and_the_comparison_says_so(tmp_path, monkeypatch):
    outcomes = {"random-0": math.nan, "random-1": 40.0, "random-2": 60.0}

    def trained(config, job, genotype, discriminator, *, name="final"):
        return Outcome(outcomes.get(name, 30.0), 2.0, 100)

    monkeypatch.setattr(eagan, "from_scratch", trained)
    config = dataclasses.replace(SMOKE, random_architectures=3)
    done = run(eagan.EXPERIMENT, config, seeds=1, arms=["evolved", "random"], out=tmp_path, workers=1)
    assert not done.failures
    loaded = report.load(done.folder)
    (job,) = [job for job in loaded.jobs if job.arm == "random"]
    assert job.metrics["distance"] == 50.0
    assert job.metrics["left_out"] == 1
    text = report.to_markdown(loaded)
    assert "Failed networks, left out of the means of their arms: random G (1)." in text
    page = report.to_html(loaded)
    assert page.count("Rests on means without failed networks of") == 1  # the comparison with random search has none
    assert "random G (1)" in page


def test_the_best_state_of_a_training_is_kept_and_judged_on_other_latents(tmp_path, monkeypatch):
    seeds, kept = [], gan.generate

    def generate(generator, number, latent, *, seed, device="cpu"):
        seeds.append(seed)
        return kept(generator, number, latent, seed=seed, device=device)

    monkeypatch.setattr(gan, "generate", generate)
    job = Job("published", 3, Recorder(live=tmp_path / "rows.jsonl"), tmp_path / "job", torch.device("cpu"))
    found = gan_pairs.from_scratch(SMOKE, job, gan.GENERATORS["G*"], SMOKE.discriminator)
    assert math.isfinite(found.distance)
    assert seeds[-1] == 3
    assert set(seeds[:-1]) == {3 + 2**32}
    assert len(seeds) == SMOKE.final_steps // SMOKE.judge_every + 1
    assert "look 2" in (tmp_path / "rows.jsonl").read_text()
    assert job.record.rows == []


def test_samples_are_in_the_report(tmp_path):
    done = run(eagan.EXPERIMENT, SMOKE, seeds=1, arms=["evolved", "random"], out=tmp_path, workers=1)
    assert not done.failures
    loaded = report.load(done.folder)
    shown = [picture.caption for picture in loaded.gallery["Samples"]]
    assert [caption.partition(":")[0] for caption in shown] == ["evolved", "random", "random"]
    page = report.to_html(loaded)
    assert page.count('<img src="data:image/png;base64,') == 3
    assert "Pareto front, last round" in page


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_of_images_is_a_picture(tmp_path, channels):
    images = torch.randint(0, 256, (5, channels, 3, 4), dtype=torch.uint8)
    (tmp_path / "a.png").write_bytes(png(images, columns=2))
    read = Image.open(tmp_path / "a.png")
    assert read.size == (8, 6)
    expected = images[3, :, 2, 1].tolist()
    assert list(read.getpixel((5, 5)) if channels == 3 else [read.getpixel((5, 5))]) == expected


def test_the_second_data_set_is_trained_on_and_its_absence_is_one_clear_error(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for kind in ("cat", "unlabeled"):
            folder = tmp_path / "stl10" / split / kind
            folder.mkdir(parents=True)
            for number in range(40):
                pixels = torch.randint(0, 256, (96, 96, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    config = dataclasses.replace(
        SMOKE,
        train_examples=None,
        validation_fraction=0.0,
        transfer=str(tmp_path / "stl10"),
        transfer_side=16,
        transfer_steps=2,
        judge_every=2,
    )
    done = run(
        eagan.EXPERIMENT, config, seeds=1, arms=["transfer", "transfer-published"], out=tmp_path / "runs", workers=1
    )
    assert [failure.error for failure in done.failures] == []
    jobs = report.load(done.folder).jobs
    assert len(jobs) == 2
    assert all(math.isfinite(job.metrics["transfer"]) and "distance" not in job.metrics for job in jobs)
    with pytest.raises(UsageError, match="transfer 'no-such-data' is not there: "):
        dataclasses.replace(SMOKE, transfer="no-such-data").check()


def test_the_paper_preset_searches_cifar10_and_transfers_to_stl10():
    config = eagan.EXPERIMENT.preset("paper")
    second = config.transferred()
    assert (config.data, config.side, config.channels, config.dis_channels) == ("cifar10", 32, 256, 128)
    assert (second.data, second.side, second.size, second.batch_size, second.gen_batch) == ("stl10", 48, 48, 64, 128)
    assert (second.lr_g, second.lr_d, second.clip_norm, second.final_critic) == (3e-4, 2e-4, 50.0, 5)
    sizes = config.transferred().generator_sizes(torch.zeros(1, 3, 48, 48))
    assert gan.generator_parameters(gan.GENERATORS["G*"], **sizes) == 11_550_723
    assert gan.discriminator_parameters(gan.DISCRIMINATORS["D_S"]) == 1_578_112


@pytest.mark.slow
def test_jobs_on_ray_evaluate_where_they_are_and_ray_workers_within_them_are_refused(tmp_path):
    pytest.importorskip("ray")
    options = {"seeds": 1, "arms": ["evolved"], "engine": "ray", "workers": 1}
    assert not run(eagan.EXPERIMENT, SMOKE, out=tmp_path / "auto", **options).failures
    nested = dataclasses.replace(SMOKE, search_engine="ray")
    with pytest.raises(UsageError, match="cannot be used within a task of a Ray cluster"):
        run(eagan.EXPERIMENT, nested, out=tmp_path / "nested", **options)
