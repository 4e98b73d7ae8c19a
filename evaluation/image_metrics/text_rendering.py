"""Text rendering: how much of the text quoted in a prompt is recognised in its image."""

from collections.abc import Sequence

from secondcast.evaluation.image_metrics.characters import characters_right, quoted_text, window_right, words_right
from secondcast.evaluation.image_metrics.metric import MetricName, Picture, Scored, batches, mean_of
from secondcast.evaluation.image_metrics.recognisers import Recogniser
from secondcast.evaluation.intervals import wilson
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import Progress, counted


class TextRendering:
    """Fractions of correct characters and words (characters.py), and of images in which every word is read."""

    name: MetricName = "text"

    def __init__(self, recogniser: Recogniser, *, batch_size: int) -> None:
        self._recogniser, self._batch_size = recogniser, batch_size
        self.needs = recogniser.needs

    def check(self, pictures: Sequence[Picture]) -> None:
        """See Metric."""
        _asked(pictures)

    def available(self) -> str | None:
        """See Metric."""
        return self._recogniser.absent()

    def score(self, pictures: Sequence[Picture], progress: Progress) -> list[Scored]:
        """See Metric. The expected text is an image's `text`, else the quoted text of its prompt."""
        asked = _asked(pictures)
        if len(asked) < len(pictures):
            progress.say(f"text: skipped {counted(len(pictures) - len(asked), 'image')}, whose prompts quote no text")
        read: dict[str, tuple[str, str]] = {}
        with progress.bar(self.name, total=len(asked), done=0, unit="images") as bar:
            for batch in batches(asked, self._batch_size):
                found = self._recogniser.read([picture for picture, _ in batch])
                for (picture, text), reading in zip(batch, found, strict=True):
                    read[picture.name] = (text, reading)
                bar.advance(len(batch))
        return self._scored(read)

    def _scored(self, read: dict[str, tuple[str, str]]) -> list[Scored]:
        model, revision = self._recogniser.model, self._recogniser.revision
        words = {file: words_right(text, reading) for file, (text, reading) in read.items()}
        exact = {file: float(right == 1) for file, right in words.items()}
        characters = {"text": window_right, "text-whole": characters_right}
        right = {
            name: {file: rule(text, reading) for file, (text, reading) in read.items()}
            for name, rule in characters.items()
        }
        rate = sum(exact.values()) / len(exact)
        low, high = wilson(rate, len(exact))
        return [
            *(mean_of(name, values, model=model, revision=revision) for name, values in right.items()),
            mean_of("text-words", words, model=model, revision=revision),
            Scored(
                name="text-exact", mean=rate, count=len(exact), low=low, high=high, interval="wilson", model=model,
                revision=revision, values=exact,
            ),
        ]  # fmt: skip


def _asked(pictures: Sequence[Picture]) -> list[tuple[Picture, str]]:
    texts = [picture.text or quoted_text(picture.prompt or "") for picture in pictures]
    asked = [(picture, text) for picture, text in zip(pictures, texts, strict=True) if text]
    if not asked:
        folder = pictures[0].file.parent
        raise PromptsError(f"text: no prompt of {folder} quotes one such as 'open': give --prompts JSONL with `text`")
    return asked
