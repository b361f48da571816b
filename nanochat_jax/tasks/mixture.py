"""Tasks made of other tasks: a part of one, several shuffled together, several in a row."""

import random
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from nanochat_jax.tasks.task import Conversation, Conversations, Task, check_index

MIXTURE_SEED = 42


class Slice(Task):
    """Every `step`-th example from `start` to before `stop` of a task, with the task's judge."""

    def __init__(self, task: Task, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(
                f"a slice of {task.name} from {start} to {stop} in steps of {step} makes no sense"
            )
        self.name, self.kind = task.name, task.kind
        self.skipped, self.notes = task.skipped, task.notes
        self._task, self._picked = task, range(len(task))[start:stop:step]

    def __len__(self) -> int:
        return len(self._picked)

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        return self._task[self._picked[i]]

    def where(self, i: int) -> str:
        return self._task.where(self._picked[i])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self._task.evaluate(conversation, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        return self._task.reward(conversation, completion)


class TaskSequence(Conversations):
    """Several tasks one after the other: a curriculum."""

    def __init__(self, tasks: Sequence[Conversations]) -> None:
        if not tasks:
            raise ValueError("name at least one task to train on")
        self.tasks = list(tasks)
        self.name = ",".join(task.name for task in tasks)
        different = {id(task): task for task in tasks}.values()
        self.skipped = [row for task in different for row in task.skipped]
        self.notes = [note for task in different for note in task.notes]
        self._ends = list(accumulate(len(task) for task in tasks))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        number, example = self.locate(i)
        return self.tasks[number][example]

    def where(self, i: int) -> str:
        number, example = self.locate(i)
        return self.tasks[number].where(example)

    def locate(self, i: int) -> tuple[int, int]:
        """The task that conversation i comes from, and its number there."""
        number = bisect_right(self._ends, i)
        return number, i - (self._ends[number - 1] if number else 0)


class Mixture(TaskSequence):
    """Several tasks shuffled together once; list a task twice to see it twice as often."""

    def __init__(self, tasks: Sequence[Conversations]) -> None:
        super().__init__(tasks)
        order = list(range(len(self)))
        random.Random(MIXTURE_SEED).shuffle(order)
        self._order = array("q", order)

    def locate(self, i: int) -> tuple[int, int]:
        return super().locate(self._order[i])
