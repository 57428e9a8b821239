"""The trajectory of one output as a picture: which token settled at which iteration."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.text import Text

from cllm_core.errors import ConfigError
from cllm_core.evaluation.trajectory import TokenState, Trajectory, settled_at, token_states
from cllm_core.text.codec import TextCodec

_STYLES = {
    TokenState.ACCEPTED: "bold black on green",
    TokenState.RIGHT: "black on cyan",
    TokenState.WRONG: "red",
}
_COLOURS = {
    TokenState.SETTLED: "#d9ead3",
    TokenState.ACCEPTED: "#38761d",
    TokenState.RIGHT: "#45b6c9",
    TokenState.WRONG: "#f4b6ad",
    TokenState.OUTSIDE: "#ffffff",
}
_GROUP_STYLES = ("black on green", "black on yellow")
_MAX_LABELS = 100  # tokens along the picture that can still be read
_INCHES_PER_TOKEN = 0.16
_MAX_INCHES = 30.0


@dataclass(frozen=True, slots=True)
class TrajectoryPicture:
    """A trajectory with what is needed to draw it.

    Attributes:
        title: model, block length and example.
        trajectory: what is drawn.
        codec: of the model.
    """

    title: str
    trajectory: Trajectory
    codec: TextCodec

    def as_text(self) -> Group:
        """For the terminal: a line per iteration with its window, then the output in groups accepted together."""
        num_tokens, num_passes = len(self.trajectory.output_ids), len(self.trajectory.iterations)
        heading = Text(f"{self.title}: {num_tokens} tokens in {num_passes} forward passes", style="bold")
        legend = Text.assemble(*((f" {state.value} ", style) for state, style in _STYLES.items()))
        rows = [self._row(index, states) for index, states in enumerate(token_states(self.trajectory))]
        return Group(heading, legend, *rows, Text(), self._output())

    def save_png(self, path: Path) -> None:
        """Draw iterations downwards and output tokens along.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        try:
            from matplotlib.colors import ListedColormap  # noqa: PLC0415
            from matplotlib.figure import Figure  # noqa: PLC0415
            from matplotlib.patches import Patch  # noqa: PLC0415
            from matplotlib.ticker import MaxNLocator  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError("the picture needs matplotlib: pip install 'cllm-server[train]'") from error
        order = list(_COLOURS)
        grid = [[order.index(state) for state in states] for states in token_states(self.trajectory)]
        width = min(_MAX_INCHES, 2 + _INCHES_PER_TOKEN * len(grid[0]))
        figure = Figure(figsize=(max(6.0, width), max(3.0, min(_MAX_INCHES, 1.5 + _INCHES_PER_TOKEN * len(grid)))))
        axes = figure.subplots()
        colours = ListedColormap(list(_COLOURS.values()))
        axes.imshow(grid, cmap=colours, vmin=-0.5, vmax=len(order) - 0.5, aspect="auto", interpolation="nearest")
        axes.set(title=self.title, xlabel="output token", ylabel="iteration")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if len(grid[0]) <= _MAX_LABELS:
            axes.set_xticks(range(len(grid[0])), self._labels(), rotation=90, fontsize=6, family="monospace")
        patches = [Patch(facecolor=colour, edgecolor="grey", label=state.value) for state, colour in _COLOURS.items()]
        axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a token in a script that the font lacks is drawn as a box
            figure.savefig(path, dpi=120, bbox_inches="tight")

    def _row(self, index: int, states: list[TokenState]) -> Text:
        """The window of one iteration: accepted tokens, then the rest of its draft."""
        iteration = self.trajectory.iterations[index]
        line = Text(f"{index:4d} {'+' + str(iteration.num_accepted):>4} ")
        for position in range(iteration.first_position, len(states)):
            state = states[position]
            if state is TokenState.OUTSIDE:
                break
            is_wrong = state is TokenState.WRONG
            token = iteration.draft_ids[position - iteration.first_position] if is_wrong else self._final(position)
            line.append(self._label(token), style=_STYLES[state])
        return line

    def _output(self) -> Text:
        text = Text()
        for position, iteration in enumerate(settled_at(self.trajectory)):
            text.append(self._label(self._final(position)), style=_GROUP_STYLES[iteration % 2])
        return text

    def _final(self, position: int) -> int:
        return self.trajectory.output_ids[position]

    def _labels(self) -> list[str]:
        # $ would start a formula
        return [self._label(token).replace("$", r"\$") for token in self.trajectory.output_ids]

    def _label(self, token_id: int) -> str:
        return self.codec.token_text(token_id).replace("\n", "⏎").replace("\t", "⇥")
