"""What experiments on image classifiers share: which data, which model, how long."""

from dataclasses import dataclass

from torch import nn

from weightsmith.lab.data import check_data, load_images
from weightsmith.lab.images import Images
from weightsmith.lab.models import build_model, check_model
from weightsmith.lab.train import Schedule, seed_everything


@dataclass(frozen=True, slots=True)
class ImageTask:
    """A classifier and the images it is trained on; the configuration of an experiment adds its own fields."""

    data: str = "digits"
    """Data set: digits, mnist, fashion_mnist, cifar10, cifar100, imagenet, a hub id or a folder."""
    model: str = "convnet"
    """Model: mlp, convnet, resnet18, vit_tiny ..., module:function, or a Hugging Face id or folder."""
    train_examples: int | None = None
    """Use the first so many training rows, validation included; all by default."""
    test_examples: int | None = None
    """Use the first so many test rows; all by default."""
    epochs: int = 10
    """Passes over the training data."""
    batch_size: int = 64
    """Examples per step."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule, per step."""
    augment: bool = False
    """Random crops and flips."""
    mixed_precision: str | None = None
    """no, fp16 or bf16."""

    def check(self) -> None:
        """Refuse a model or data set that cannot be had, before any job starts."""
        check_model(self.model)
        check_data(self.data)

    def images(self) -> Images:
        """Load the data."""
        return load_images(
            self.data, train_examples=self.train_examples, test_examples=self.test_examples, augment=self.augment
        )

    def network(self, images: Images, seed: int) -> nn.Module:
        """Build the model; its first weights follow from the seed alone."""
        seed_everything(seed)
        return build_model(self.model, channels=images.channels, size=images.size, classes=images.classes)
