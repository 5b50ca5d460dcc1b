"""What an arm makes of a test image of each degradation, for the report's gallery."""

from torch import nn

from weightsmith.lab.gallery import Picture, keep_gallery
from weightsmith.lab.job import Job
from weightsmith.lab.task import Task
from weightsmith.lab.tasks.restoration import examples, psnr


def keep_pictures(job: Job, task: Task, model: nn.Module, caption: str, *, order: int, clean: bool = False) -> None:
    """Keep a picture per degradation, captioned with its PSNR.

    Args:
        job: Keeps them.
        task: Restores images.
        model: Degraded images to restored ones.
        caption: What is seen.
        order: Where it stands among those of other arms.
        clean: Keep the clean images too, at the end.
    """
    pictures = []
    for kind, (_, after, target) in examples(task, model).items():
        ratio = psnr(after[None], target[None]).item()
        pictures.append(Picture.of(after[None], kind.capitalize(), f"{caption}, {ratio:.1f} dB", order))
        if clean:
            pictures.append(Picture.of(target[None], kind.capitalize(), "clean", 9))
    keep_gallery(job.keep, pictures)
