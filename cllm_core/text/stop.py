"""Stop strings in a text that arrives in pieces.

The text ends before the stop string whose last character comes first; where several end on the same character, before
the longest of them. That is what generating character by character and looking after each one gives: the decision at
a character depends on nothing behind it, hence neither on how text was cut into tokens and steps nor on what the model
would have written next.
"""


class StopMatcher:
    """Passes text through until a stop string, never a character that may turn out to belong to one.

    Scans each character once per stop string (Knuth-Morris-Pratt), so the cost does not grow with the text or with the
    length of the stop strings.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        """Look for these strings, none of them empty (SamplingParams refuses those)."""
        self._scanners = tuple(_Scanner(text) for text in stop)
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, None while there is none."""
        return self._matched

    @property
    def finished(self) -> bool:
        """Whether a stop string ended the text; nothing is let through after it."""
        return self._matched is not None

    @property
    def held(self) -> str:
        """What `push` took and holds back, since a stop string may begin with it."""
        return self._held

    def push(self, text: str) -> str:
        """Return the text that can be given away: all but the longest end that a stop string may begin with."""
        if not self._scanners:
            return text
        if self.finished:
            return ""
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            if (stop := self._complete_at(char)) is not None:
                self._held, self._matched = "", stop
                return pending[: end - len(stop)]
        num_safe = len(pending) - max(scanner.num_matched for scanner in self._scanners)
        self._held = pending[num_safe:]
        return pending[:num_safe]

    def flush(self) -> str:
        """Return what was held back; call it where the text ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _complete_at(self, char: str) -> str | None:
        complete = [scanner.stop for scanner in self._scanners if scanner.advance(char)]
        return max(complete, key=len, default=None)


class _Scanner:
    """One stop string and how much of its beginning the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._borders = _borders(stop)

    def advance(self, char: str) -> bool:
        """Take the next character; whether the stop string is complete with it (then the scan is over)."""
        while self.num_matched and self.stop[self.num_matched] != char:
            self.num_matched = self._borders[self.num_matched - 1]
        self.num_matched += self.stop[self.num_matched] == char
        return self.num_matched == len(self.stop)


def _borders(text: str) -> list[int]:
    """For each prefix of the text, the length of its longest proper end that is also its beginning."""
    borders = [0]
    for char in text[1:]:
        length = borders[-1]
        while length and text[length] != char:
            length = borders[length - 1]
        borders.append(length + (text[length] == char))
    return borders
