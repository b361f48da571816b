"""A progress bar for downloads, on the terminal."""

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bar:
    """Shows the bytes of all files while it is entered: `with bar.shown: …`."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self.shown = Progress(*columns)
        self._task = self.shown.add_task("asking the hub", total=None)

    def expect(self, files: int, size: int) -> None:
        self.shown.update(self._task, total=size, description=f"{files} files")

    def advance(self, size: int) -> None:
        self.shown.advance(self._task, size)
