"""How long prompts are in tokens of a teacher, and which of them it cuts."""

from collections.abc import Sequence
from dataclasses import dataclass

from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.text_encoder import load_tokenizer, token_ids_of

_LONGEST_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class PromptLengths:
    """Tokens of prompts, end token included: their mean, the longest with its text, how many are cut to text_length."""

    mean: float
    longest: int
    longest_text: str
    cut: int
    text_length: int

    def cut_text(self) -> str:
        """One line that says what is cut."""
        shown = self.longest_text[:_LONGEST_SHOWN] + ("..." if len(self.longest_text) > _LONGEST_SHOWN else "")
        were = "prompt is" if self.cut == 1 else "prompts are"
        return (
            f"{self.cut} {were} longer than {self.text_length} tokens and cut to that, the longest has {self.longest} "
            f"tokens: {shown!r}"
        )


def prompt_lengths(texts: Sequence[str], teacher: TeacherFolder, *, text_length: int | None = None) -> PromptLengths:
    """Lengths of at least one text by the teacher's T5 tokenizer. text_length: None for the teacher's own."""
    most = text_length or teacher.text_length
    lengths = [len(ids) for ids in token_ids_of(load_tokenizer(teacher.part("tokenizer_2")), texts)]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return PromptLengths(
        mean=sum(lengths) / len(lengths),
        longest=lengths[longest],
        longest_text=texts[longest],
        cut=sum(length > most for length in lengths),
        text_length=most,
    )
