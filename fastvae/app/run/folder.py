"""The folder of a training run: what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastvae.app.user_errors import RunError

PICTURES = ("curves", "reconstructions", "samples", "pseudo_inputs", "latent_space")
GAP = "prior_and_posterior"  # the picture that evaluation draws


@dataclass(frozen=True)
class RunFolder:
    """Names the files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings, as JSON."""
        return self.path / "config.json"

    @property
    def checkpoint(self) -> Path:
        """The last whole checkpoint; there once an epoch is finished."""
        return self.path / "checkpoint.pt"

    @property
    def results(self) -> Path:
        """What training gave, as JSON; there once training is finished."""
        return self.path / "results.json"

    @property
    def events(self) -> Path:
        """The folder with what TensorBoard shows, where it was asked for."""
        return self.path / "tensorboard"

    def event_files(self) -> list[Path]:
        """The files of TensorBoard that are there."""
        return sorted(self.events.glob("events.out.tfevents.*"))

    def evaluation(self, part: str = "") -> Path:
        """What evaluation gave, as JSON: of all test images, or of that `part` of the data."""
        return self.path / (f"evaluation-{part}.json" if part else "evaluation.json")

    def unfinished_evaluation(self, part: str, samples: int, precision: str) -> Path:
        """What an evaluation with these settings, that is under way or was stopped, has done, as JSON."""
        return self.evaluation(f"{part and f'{part}-'}unfinished-{samples}-{precision}")

    def other_evaluation(self, part: str, samples: int, precision: str | None) -> Path:
        """Where an evaluation with these settings is kept once one with others takes its place."""
        return self.evaluation(f"{part and f'{part}-'}{samples}-{precision or 'unknown'}")

    @property
    def reproduction(self) -> Path:
        """The record of a protocol's run, as JSON, beside the published figures."""
        return self.path / "reproduction.json"

    def picture(self, name: str) -> Path:
        """The PNG of one of PICTURES, or of GAP."""
        return self.path / f"{name}.png"

    def pictures(self) -> list[Path]:
        """The pictures that are there."""
        return [path for path in map(self.picture, (*PICTURES, GAP)) if path.exists()]

    def evaluations(self) -> list[Path]:
        """The evaluations that are there, of all test images and of parts."""
        return sorted(self.path.glob("evaluation*.json"))

    def holds_run(self) -> bool:
        """Whether an epoch of a run was finished here."""
        return self.checkpoint.exists()

    def refuse_run(self) -> None:
        """Raise RunError if there is a run here, which a new one would replace."""
        if self.holds_run():
            raise RunError(
                f"{self.path}: holds a run already; say --resume to go on with it or --overwrite to replace it."
            )

    def of_the_model(self) -> list[Path]:
        """The files that are there and tell of the checkpoint's model: outdated once it is trained further."""
        records = [path for path in (self.results, self.reproduction) if path.exists()]
        return [*records, *self.evaluations(), *self.pictures()]

    def files(self) -> list[Path]:
        """The files of a run that are there."""
        return [*(path for path in (self.config, self.checkpoint) if path.exists()), *self.of_the_model()]

    def clear(self) -> None:
        """Delete the files of a run, and no others."""
        for file in (*self.files(), *self.event_files()):
            file.unlink()
