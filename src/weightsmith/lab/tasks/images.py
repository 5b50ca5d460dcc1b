"""Classify images."""

from functools import partial

from torch import nn

from weightsmith.lab.data.image_sets import load_images
from weightsmith.lab.data.images import Images
from weightsmith.lab.models import build_model
from weightsmith.lab.task import Batches, Task
from weightsmith.lab.tasks.code import code_of
from weightsmith.lab.tasks.config import TaskConfig
from weightsmith.lab.tasks.scoring import load_weights, supervised


def images_of(config: TaskConfig) -> Images:
    """Load the images that a configuration names, with the mean and deviation that they are normalized by."""
    return load_images(
        config.data_name,
        train_examples=config.train_examples,
        test_examples=config.test_examples,
        validation_fraction=config.validation_fraction,
        augment=config.augment,
        size=config.size,
        columns=config.columns,
        subset_name=config.subset,
    )


def make(config: TaskConfig) -> Task:
    """Load the images and make the task."""
    images = images_of(config)
    splits: dict[str, Batches] = {"train": images.train, "validation": images.validation, "test": images.test}
    first = range(min(8, len(images.train)))
    color = "gray" if images.channels == 1 else "color"
    return Task(
        name=images.name,
        build=partial(_build, config, images),
        example=partial(images.train.__getitems__, list(first)),
        fingerprint=images.fingerprint + code_of(config.model, config.loss, config.metric, config.checkpoint),
        facts={
            "data": f"{images.name}, {images.size} x {images.size} {color} images of {images.classes} classes",
            "model": config.model_name,
            **images.facts,
        },
        **supervised(splits, config.loss, config.metric, classes=images.classes),
    )


def _build(config: TaskConfig, images: Images) -> nn.Module:
    model = build_model(
        config.model_name,
        channels=images.channels,
        size=images.size,
        classes=images.classes,
        pretrained=config.pretrained,
    )
    return load_weights(model, config.checkpoint)
