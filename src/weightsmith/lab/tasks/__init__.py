"""Ready-made tasks, chosen by name, and the settings that every experiment shares.

| task | what it trains |
|---|---|
| ``images`` | classify images |
| ``sentences`` | classify texts |
| ``language`` | predict the next token of running text |
| ``questions`` | answer questions, trained on the answers alone |
| ``restoration`` | take noise, haze and rain off photographs |
| ``module:function`` | a task of your own: a function that returns a `weightsmith.lab.task.Task` |
"""

from weightsmith.lab.tasks.config import TaskConfig, TrainConfig, make_task, shared_task
from weightsmith.lab.tasks.own import from_datasets

__all__ = ["TaskConfig", "TrainConfig", "from_datasets", "make_task", "shared_task"]
